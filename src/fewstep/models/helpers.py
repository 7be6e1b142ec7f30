"""Frozen networks that losses use beside those they train: decoder, image encoder, rewards, pooled prompt.

Gradients pass through them to the student's prediction; their own weights get none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fewstep.models.cond import Cond
from fewstep.models.denoiser import check_taps


class Encoder(Protocol):
    """A frozen image encoder; images are [B, 3, H, W] from -1 to 1, as `Helpers.decode` makes them."""

    @property
    def tap_channels(self) -> Mapping[str, int]:
        """Names of the inner activations that `features` gives, and their channels."""

    @property
    def summary_width(self) -> int:
        """Length of the vectors of `summary`."""

    def features(self, images: Tensor, taps: Iterable[str]) -> list[Tensor]:
        """Activations [B, C, ...] at the taps, in their order."""

    def summary(self, images: Tensor) -> Tensor:
        """One vector for each image, [B, `summary_width`]."""


class Reward(Protocol):
    """A frozen reward model (`fewstep.models.rewards`), with a gradient to the images."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards [B], one for each image; higher is better.

        Args:
            images: [B, 3, H, W] from -1 to 1 as `Helpers.decode` makes them, not clamped.
            prompts: B of them.
        """


def _identity(latents: Tensor) -> Tensor:
    return latents


@dataclass(frozen=True)
class Helpers:
    """The frozen helpers of a teacher. By default those of plain data: nothing to decode, no encoder, no prompt.

    Attributes:
        decode: latents [B, ...] at the scale of training -> images [B, 3, H, W] from -1 to 1, not clamped.
        encoder: image encoder of perceptual and adversarial losses; None where no loss needs one.
        pool: a condition -> one vector for each row, [B, `pooled_width`]; None where there is nothing to pool.
        pooled_width: its length; 0 without it.
        networks: the modules behind these.
        rewards: reward models, by the names that a method gives them.
    """

    decode: Callable[[Tensor], Tensor] = _identity
    encoder: Encoder | None = None
    pool: Callable[[Cond], Tensor] | None = None
    pooled_width: int = 0
    networks: tuple[nn.Module, ...] = ()
    rewards: Mapping[str, Reward] = field(default_factory=dict)

    @property
    def look(self) -> bool:
        """Whether losses are taken on decoded images, and so need the decoder."""
        return self.encoder is not None or bool(self.rewards)

    def pooled(self, cond: Cond | None) -> list[Tensor]:
        """The pooled condition as a list of one, or of none."""
        return [] if self.pool is None or cond is None else [self.pool(cond)]


class PointEncoder(nn.Module):
    """An encoder for data that are points [B, D]: their products, and waves of two lengths along 32 directions.

    Args:
        dim: D.
    """

    directions: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(dim, 32, generator=generator, dtype=torch.float64)
        self.dim, self.summary_width = dim, dim
        self.register_buffer("directions", directions / directions.norm(dim=0))

    @property
    def tap_channels(self) -> dict[str, int]:
        return {"products": self.dim + self.dim**2, "long": 64, "short": 64}

    def features(self, images: Tensor, taps: Iterable[str]) -> list[Tensor]:
        """[B, D + D^2] coordinates and their products, [B, 64] long and short waves."""
        x, found = images, []
        for tap in check_taps(taps, self.tap_channels):
            if tap == "products":
                found.append(torch.cat([x, (x[:, :, None] * x[:, None]).flatten(1)], dim=1))
            else:
                phase = (1.5 if tap == "long" else 6.0) * x @ self.directions.to(x.dtype)
                found.append(torch.cat([phase.sin(), phase.cos()], dim=1))
        return found

    def summary(self, images: Tensor) -> Tensor:
        return images


class PointReward:
    """A reward for data that are points [B, D]: the coordinate along the direction (1, ..., 1) / sqrt(D)."""

    def __call__(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        return images.flatten(1).sum(1) / images[0].numel() ** 0.5


def pooled_prompt(cond: Cond) -> Tensor:
    """A prompt as one vector [B, width]: its pooled_embeds, else the mean of its real tokens (prompt_mask or _length).

    Without any, the last token: CLIP's text encoders are causal, so it has seen all the others. Of several states a
    token, [B, tokens, states, width], it is the mean over those too.
    """
    if "pooled_embeds" in cond:
        return cast(Tensor, cond["pooled_embeds"])
    embeds = cond["prompt_embeds"]
    if embeds.ndim > 3:
        embeds = embeds.flatten(2, -2).mean(2)
    if "prompt_mask" in cond:
        real = cond["prompt_mask"]
    elif "prompt_length" in cond:
        length = cond["prompt_length"].to(embeds.device, non_blocking=True)
        real = torch.arange(embeds.shape[1], device=embeds.device) < length[:, None]
    else:
        return cast(Tensor, embeds[:, -1])
    words = real[..., None].to(embeds.dtype)
    return cast(Tensor, (embeds * words).sum(1) / words.sum(1))


def one_hot_labels(num_classes: int) -> dict[str, Any]:
    """`Helpers`' ``pool`` and ``pooled_width`` for conditions that hold a ``label``, -1 for none."""
    if not num_classes:
        return {}

    def pool(cond: Cond) -> Tensor:
        return (cond["label"][:, None] == torch.arange(num_classes, device=cond["label"].device)).float()

    return {"pool": pool, "pooled_width": num_classes}
