"""The detector's network: it finds the things in an image of scenes-64, and the attributes of each.

An image becomes a grid of cells of 4x4 pixels. Each cell predicts whether a thing's centre is near, where exactly, and
the attributes of that thing, in the manner of CenterNet (Zhou et al. 2019).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CELLS = 16
"""Cells along a side of the grid."""

_GEOMETRY = 3


class DetectorNetwork(nn.Module):
    """Residual blocks at 32x32, 16x16 and 8x8, and once more at 16x16, where the predictions are made.

    Args:
        heads: attributes and how many values each can take.
        channels: at 32x32, 16x16 and 8x8.
    """

    def __init__(self, heads: Mapping[str, int], channels: tuple[int, int, int] = (32, 64, 96)) -> None:
        super().__init__()
        self.heads = dict(heads)
        fine, middle, coarse = channels
        self.stem = nn.Conv2d(3, fine, 4, stride=2, padding=1)
        self.fine = nn.Sequential(ResidualBlock(fine), ResidualBlock(fine))
        self.down_middle = nn.Conv2d(fine, middle, 3, stride=2, padding=1)
        self.middle = ResidualBlock(middle)
        self.down_coarse = nn.Conv2d(middle, coarse, 3, stride=2, padding=1)
        self.coarse = ResidualBlock(coarse)
        self.up = nn.Conv2d(coarse, middle, 1)
        self.last = ResidualBlock(middle)
        self.norm = nn.GroupNorm(8, middle)
        self.answers = nn.Conv2d(middle, 1 + _GEOMETRY + sum(heads.values()), 1)
        assert self.answers.bias is not None
        with torch.no_grad():
            self.answers.bias[0] = -3.0  # most cells are empty

    def grid(self, images: Tensor) -> Tensor:
        """Features [N, C, 16, 16] behind the predictions, of images [N, 3, 64, 64] in [0, 1]."""
        fine = self.fine(self.stem(images.contiguous(memory_format=torch.channels_last) * 4 - 2))
        middle = self.middle(self.down_middle(fine))
        coarse = self.coarse(self.down_coarse(middle))
        up = F.interpolate(self.up(coarse), scale_factor=2.0, mode="nearest")
        grid: Tensor = F.silu(self.norm(self.last(middle + up)))
        return grid

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Predictions of every cell.

        Returns:
            ``near``: logits [N, 16, 16] of a centre being near; ``geometry``: [N, 16, 16, 3], the centre's x and y from
            the cell's middle, in cells, and the logarithm of the radius in sides; per attribute logits
            [N, 16, 16, values].
        """
        parts = self.answers(self.grid(images)).permute(0, 2, 3, 1).split([1, _GEOMETRY, *self.heads.values()], dim=-1)
        return {"near": parts[0].squeeze(-1), "geometry": parts[1], **dict(zip(self.heads, parts[2:], strict=True))}

    def features(self, images: Tensor) -> Tensor:
        """Means of `grid` over its cells, [N, C]: the content of an image, roughly regardless of places."""
        return self.grid(images).mean(dim=(2, 3))


class ResidualBlock(nn.Module):
    """Residual block that starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))
        return x + update
