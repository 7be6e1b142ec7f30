"""Heads that know the prompt: StyleGAN-T's (Sauer et al. 2023, arXiv 2301.09515, sec. 3.2), as ADD and LADD use them.

    h = lrelu(norm(conv_1(features)))
    h = (h + lrelu(norm(conv_k(h)))) / sqrt(2)
    logit at a position = conv_64(h) . linear(condition) / sqrt(64)

Every convolution is spectrally normalised: its largest singular value is about 1. None has a bias: norms undo it, and
the last one's would be the same for both sides, without a slope within the hinge's margins.

=====  ===================================  ===============================  ==========================================
head   of                                   conv_k                           norm
=====  ===================================  ===============================  ==========================================
token  [B, C, tokens], maps read in rows    9 tokens, the row closed         `LocalBatchNorm`: groups of eight images
map    [B, C, h, w]                         3x3, zeros around                group norm, every image by itself
=====  ===================================  ===============================  ==========================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion.schedule import working
from fewstep.methods.base import Loss
from fewstep.methods.parts.discriminators import AdversarialLoss, Judge, logged_discriminator_loss, r1
from fewstep.methods.parts.heads import Heads, groups_of, width_inside
from fewstep.models.cond import Cond
from fewstep.models.helpers import Helpers
from fewstep.models.roles import Roles

CONDITION_WIDTH, GROUP, ITERATIONS = 64, 8, 8


class SpectralConv(nn.Module):
    """A convolution divided by the largest singular value of its kernel, seen as a matrix [out, in x positions].

    The value is found by power iteration from one fixed vector, anew in every call: `torch.nn.utils` keeps the vector
    of the call before, so that a loss depended on how often it was asked for, and a resumed run on what was forgotten.
    Eight iterations find at least 0.9 of it in random kernels; no gradient flows through the vectors.

    Args:
        channels, width: in and out. kernel: odd. dims: 1 (circular) or 2 (zeros around).
    """

    start: Tensor

    def __init__(self, channels: int, width: int, kernel: int = 1, dims: int = 1) -> None:
        super().__init__()
        self.weight = (nn.Conv1d if dims == 1 else nn.Conv2d)(channels, width, kernel).weight
        self.dims, self.padding = dims, kernel // 2
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("start", torch.randn(width, generator=generator, device="cpu"), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.largest()
        if self.dims == 1:
            return F.conv1d(circular(x, self.padding) if self.padding else x, weight)
        return F.conv2d(x, weight, padding=self.padding)

    def largest(self) -> Tensor:
        """The kernel's largest singular value, a scalar with a graph to the kernel."""
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            u = self.start.to(matrix)
            for _ in range(ITERATIONS):
                v = F.normalize(matrix.T @ u, dim=0)
                u = F.normalize(matrix @ v, dim=0)
        return u @ matrix @ v


def circular(x: Tensor, padding: int) -> Tensor:
    """[B, C, L] with its end before its start and its start behind its end, of rows shorter than ``padding`` too."""
    length = x.shape[-1]
    around = -(-padding // length)
    first = around * length - padding
    return torch.cat([x] * (2 * around + 1), dim=-1)[..., first : first + length + 2 * padding]


class LocalBatchNorm(nn.Module):
    """Batch norm over groups of images that follow one another, in training and always (StyleGAN-T, virtual batch 8).

    A group is the largest common divisor of 8 and the batch, so micro-batches of 8, 16, ... give what the whole batch
    gives; of odd batches the largest divisor up to 7. Real and fake images are normed in calls of their own.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, L] -> the same shape.

        Raises:
            ValueError: a group is one number a channel, which batch norm turns into 0.
        """
        n = len(x)
        group = max(g for g in (1, 3, 5, 7) if n % g == 0) if n % 2 else math.gcd(GROUP, n)
        if group * x.shape[-1] == 1:
            raise ValueError(
                "Local batch norm sees one image of one position at a time: give training.batch_size an even number."
            )
        grouped = x.reshape(-1, group, *x.shape[1:])
        variance, mean = torch.var_mean(grouped, dim=(1, 3), correction=0, keepdim=True)
        normed = ((grouped - mean) * (variance + 1e-5).rsqrt()).reshape(x.shape)
        return normed * self.weight[:, None] + self.bias[:, None]


class ProjectionHead(nn.Module):
    """One head of the table above.

    Args:
        channels: C of the features. condition_width: length of the condition; 0 for none: the logit is then conv_1(h).
        dims: 1 for the token head, 2 for the map head.
    """

    def __init__(self, channels: int, condition_width: int, dims: int = 1) -> None:
        super().__init__()
        width, self.dims = width_inside(channels), dims
        self.inlet = _block(channels, width, 1, dims)
        self.middle = _block(width, width, 9 if dims == 1 else 3, dims)
        self.condition = nn.Linear(condition_width, CONDITION_WIDTH) if condition_width else None
        self.outlet = SpectralConv(width, CONDITION_WIDTH if condition_width else 1, dims=dims)

    def forward(self, features: Tensor, condition: Tensor | None = None) -> Tensor:
        """[B, C, ...] and [B, condition_width] -> logits [B, positions]."""
        h = self.inlet(self._shaped(features))
        h = (h + self.middle(h)) / math.sqrt(2)
        logits = self.outlet(h).flatten(2)
        if self.condition is None or condition is None:
            return cast(Tensor, logits.squeeze(1))
        asked = self.condition(condition.to(logits.dtype))
        return torch.einsum("bcl,bc->bl", logits, asked) / math.sqrt(CONDITION_WIDTH)

    def _shaped(self, features: Tensor) -> Tensor:
        """[B, C] and maps as rows, [B, C, L]; or [B, C] and square rows of tokens as maps, [B, C, h, w]."""
        if self.dims == 1 or features.ndim == 2:
            rows = features.reshape(*features.shape[:2], -1)
            return rows if self.dims == 1 else rows[..., None]
        side = math.isqrt(features.shape[-1])
        return features.reshape(*features.shape[:2], side, -1) if features.ndim == 3 else features


def _block(channels: int, width: int, kernel: int, dims: int) -> nn.Module:
    norm = LocalBatchNorm(width) if dims == 1 else nn.GroupNorm(groups_of(width), width)
    return nn.Sequential(SpectralConv(channels, width, kernel, dims), norm, nn.LeakyReLU(0.2))


def projection_heads(channels: Mapping[str, int], condition_width: int, dims: int = 1) -> Heads:
    """One `ProjectionHead` for every tap, from the channels of its features."""
    return Heads(channels, partial(ProjectionHead, condition_width=condition_width, dims=dims))


def projection_condition(helpers: Helpers, cond: Cond | None, *others: Tensor) -> Tensor | None:
    """The condition of the heads: the pooled prompt and ``others``, side by side, [B, ...]; None for nothing.

    Each is brought to a root mean square of 1 (zeros stay zeros): encoders' scales differ a thousandfold.
    """
    parts = [working(part) for part in (*helpers.pooled(cond), *others)]
    if not parts:
        return None
    dtype = max((part.dtype for part in parts), key=lambda kind: kind.itemsize)
    sized = [part.to(dtype) / part.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-6) for part in parts]
    return torch.cat(sized, dim=1)


def taps_of(roles: Roles) -> tuple[str, ...]:
    """The layers whose features the discriminator reads."""
    return cast(Heads, roles.heads["discriminator"]).taps


def conditioned_heads(roles: Roles, condition: Tensor | None) -> Judge:
    """The discriminator's heads with the condition of a batch."""
    heads = roles.heads["discriminator"]
    return lambda features: heads(features, condition)


def projection_loss(
    heads: Judge, real: Sequence[Tensor], fake: Sequence[Tensor], kind: AdversarialLoss, r1_weight: float = 0.0
) -> Loss:
    """The loss of the player that trains the heads, with R1 at their inputs on real ones; none for the student."""
    gan = logged_discriminator_loss(heads(real), heads([feature.detach() for feature in fake]), kind)
    if not r1_weight:
        return gan
    penalty = r1(heads, real)
    parts = {kind: gan.total.detach(), "r1": penalty.detach()}
    return Loss(gan.total + r1_weight * penalty, parts, gan.stats)
