"""Heads: a discriminator's logits from features, position by position.

They are small, keep float32 at least, and norm every sample by itself: the logits of an image do not depend on
the others in its batch, nor on which of them are real.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualHead(nn.Module):
    """PCM's head: 1x1 convolution, group norm, leaky ReLU; the same again with a shortcut; 1x1 to one logit a position.

    Group norm keeps real and fake batches, and samples, apart. Wide features are brought to `width_inside` first.

    Args:
        channels: C of the features [B, C, ...].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = width_inside(channels)
        self.inlet, self.middle = _block(channels, width), _block(width, width)
        self.outlet = nn.Conv1d(width, 1, 1, bias=False)  # within the hinge's margins a bias has no slope

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, ...] -> [B, positions]."""
        h = self.inlet(features.reshape(*features.shape[:2], -1))
        h = h + self.middle(h)
        return cast(Tensor, self.outlet(h).squeeze(1))


_LEAST, _WIDEST, _NARROW = 32, 1280, 512


def width_inside(channels: int) -> int:
    """Channels inside a head on features of ``channels``: as many, but at least 32, and 512 where these exceed 1280.

    The published heads read UNets, of at most 1280 channels. On FLUX's 3,072 their 4x4 convolutions would hold 755
    million weights, four times those of the student's LoRA.
    """
    return max(channels, _LEAST) if channels <= _WIDEST else _NARROW


def _block(channels: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Conv1d(channels, width, 1), nn.GroupNorm(groups_of(width), width), nn.LeakyReLU(0.2))


class ConvHead(nn.Module):
    """A stack of 4x4 convolutions down to one logit (DMD2, sec. 4.3 and its code; SDXL-Lightning, sec. 3.3).

    Each halves the map, until it is 4x4; the last takes all of that; group norm and SiLU follow each. What a map still
    has of more than 4x4 gives more logits, one for each 4x4. Where a map does not divide it is padded with zeros.
    A 1x1 convolution brings wide features to `width_inside` first.

    Args:
        channels: C of the features [B, C, h, w], or [B, C].
        halvings: how many convolutions of stride 2: 1 for SD1.5's middle at 512 pixels, 3 for SDXL's at 1024.
    """

    def __init__(self, channels: int, halvings: int = 0) -> None:
        super().__init__()
        width = min(channels, width_inside(channels))
        self.narrow = nn.Identity() if width == channels else nn.Conv2d(channels, width, 1)
        self.halve = nn.Sequential(*(_strided(width, 2) for _ in range(halvings)))
        self.last = _strided(width, 4)
        self.outlet = nn.Conv2d(width, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, ...] -> [B, positions]."""
        h = features[..., None, None] if features.ndim == 2 else features
        side = 4 * 2 ** len(self.halve)
        h = F.pad(h, (0, -h.shape[-1] % side, 0, -h.shape[-2] % side))
        return cast(Tensor, self.outlet(self.last(self.halve(self.narrow(h)))).flatten(1))


def _strided(channels: int, stride: int) -> nn.Module:
    conv = nn.Conv2d(channels, channels, 4, stride=stride, padding=1 if stride == 2 else 0)
    return nn.Sequential(conv, nn.GroupNorm(groups_of(channels), channels), nn.SiLU())


def groups_of(width: int) -> int:
    """32 from 128 channels on; fewer where a group would have less than four, but never more than divide evenly."""
    return max((g for g in range(1, 33) if width % g == 0 and width // g >= 4), default=1)


class Heads(nn.Module):
    """One head for every tap.

    Args:
        channels: tap -> channels of its features.
        head: from the channels of a tap to its head.
    """

    def __init__(self, channels: Mapping[str, int], head: Callable[[int], nn.Module] = ResidualHead) -> None:
        super().__init__()
        self.taps = tuple(channels)
        self.heads = nn.ModuleDict({tap: head(c) for tap, c in channels.items()})

    def forward(self, features: Sequence[Tensor], *condition: Tensor | None) -> list[Tensor]:
        """Logits [B, positions] of every head, from features in the order of ``taps``, and the condition, if any."""
        pairs = zip(self.heads.values(), features, strict=True)
        return [head(feature.to(next(head.parameters()).dtype), *condition) for head, feature in pairs]
