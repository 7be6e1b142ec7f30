"""The encoder: a small network whose features serve in losses, for scenes-64 what DINOv2 or CLIP is elsewhere.

Turbo's discriminator looks at its taps, perceptual distances compare them. It was trained to tell what is drawn, on
other scenes than the reader and in another shape, and is never used to measure: a model could learn to please it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.models.reader import ResidualBlock

ASSET = Path(__file__).parent.parent / "assets" / "encoder.safetensors"

_GEOMETRY = 3


def load_encoder(path: Path = ASSET, device: str = "cpu") -> EncoderNetwork:
    """The encoder that ships with fewstep, or another one of its shape; frozen.

    Raises:
        ValueError: one sentence when the file is missing, damaged or of another shape.
    """
    try:
        with safe_open(path, framework="pt") as file:
            network = EncoderNetwork(json.loads(file.metadata()["heads"]))
            network.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path} does not hold an encoder's weights: train one by "
            "'python -m fewstep.training.reader --network encoder --export FILE'."
        ) from None
    return network.eval().requires_grad_(False).to(device)


class EncoderNetwork(nn.Module):
    """Residual blocks at 32x32, 16x16, 8x8 and 4x4, each twice as coarse as the one before.

    Args:
        heads: attributes and how many values each can take, for training.
        channels: at each of the four sizes.
    """

    def __init__(self, heads: Mapping[str, int], channels: tuple[int, ...] = (24, 48, 72, 72)) -> None:
        super().__init__()
        self.heads, self.channels = dict(heads), channels
        widths = (3, *channels)
        self.downs = nn.ModuleList(
            nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in zip(widths, channels, strict=False)
        )
        self.blocks = nn.ModuleList(ResidualBlock(c) for c in channels)
        self.norm = nn.GroupNorm(8, channels[2] + channels[3])
        self.answers = nn.Conv2d(channels[2] + channels[3], 1 + _GEOMETRY + sum(heads.values()), 1)

    def taps(self, images: Tensor) -> list[Tensor]:
        """Features at the four sizes, [N, C, 32, 32] ... [N, C, 4, 4], of images [N, 3, 64, 64] in [0, 1]."""
        x, found = images * 4 - 2, []
        for down, block in zip(self.downs, self.blocks, strict=True):
            x = block(down(x))
            found.append(x)
        return found

    def embed(self, images: Tensor) -> Tensor:
        """One vector for each picture, [N, C]: the coarsest features' mean and largest values."""
        last = self.taps(images)[-1]
        return torch.cat([last.mean(dim=(2, 3)), last.amax(dim=(2, 3))], dim=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """What it was trained to tell: as `fewstep.models.reader.ReaderNetwork`, for cells of 8x8 pixels."""
        middle, coarse = self.taps(images)[-2:]
        grid = torch.cat([middle, F.interpolate(coarse, scale_factor=2.0, mode="nearest")], dim=1)
        told = self.answers(F.silu(self.norm(grid))).permute(0, 2, 3, 1)
        parts = told.split([1, _GEOMETRY, *self.heads.values()], dim=-1)
        return {"near": parts[0].squeeze(-1), "geometry": parts[1], **dict(zip(self.heads, parts[2:], strict=True))}
