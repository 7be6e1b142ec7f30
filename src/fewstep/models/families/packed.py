"""Latents as the sequence of a transformer: squares of 2x2 latents to a token, or a token for each latent."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from fewstep.models.families.latents import Latents
from fewstep.models.families.network import TransformerNetwork


def pack(x: Tensor, square: int = 2) -> Tensor:
    """Latents [B, C, s h, s w] -> tokens [B, h w, s s C], a square of side s = ``square`` each, channel by channel."""
    return nn.functional.pixel_unshuffle(x, square).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int, square: int = 2) -> Tensor:
    """Tokens [B, h w, s s C] -> latents [B, C, s h, s w]: the inverse of `pack`."""
    return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), square)


def places(height: int, width: int, like: Tensor) -> Tensor:
    """Positions (0, row, column) of the tokens, [h w, 3]."""
    rows = torch.arange(height, device=like.device, dtype=like.dtype).repeat_interleave(width)
    columns = torch.arange(width, device=like.device, dtype=like.dtype).repeat(height)
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=1)


class PackedNetwork(TransformerNetwork):
    """A transformer whose pipeline packs latents into tokens, squares of side `patch_size` each."""

    patch_size = 2

    def lay_out(self, noise: Tensor) -> Tensor:
        """Noise that diffusers' schedulers draw in the shape of tokens, reshaped to [B, C, h, w] -> latents."""
        height, width = (side // self.patch_size for side in noise.shape[-2:])
        return unpack(noise.reshape(len(noise), height * width, -1), height, width, self.patch_size)


class Packed(Latents):
    """`Latents` of a pipeline that packs them into tokens, for families to inherit from before `Family`.

    Attributes:
        square: side in latents of the square that is one token.
    """

    square: ClassVar[int] = 2

    @property
    def latent_channels(self) -> int:
        return int(self.base.config.in_channels) // self.square**2

    @property
    def patch(self) -> int:
        return self.square

    def output_latents(self, latents: Tensor) -> Tensor:
        return pack(latents, self.square)
