"""Image encoders: the small one of scenes-64, and DINOv2, CLIP and similar models through transformers.

A network that serves in a loss must not measure the result: the student could learn to please it. On scenes-64 the
encoder serves in losses (turbo's discriminator, perceptual distances) and the detector measures; they share neither
training scenes nor architecture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.models.denoiser import check_taps
from fewstep.models.detector import ResidualBlock
from fewstep.models.pretrained import from_pretrained, loading, pixel_statistics, pooled, read_network

ASSET = Path(__file__).parent.parent / "assets" / "encoder.safetensors"

_GEOMETRY = 3


def open_encoder(name: str, device: str = "cpu") -> SmallEncoder | PretrainedEncoder:
    """The image encoder of a loss: ``scenes-64`` is the shipped one, others as `load_pretrained_encoder`.

    On the device "meta" it has shapes alone.

    Raises:
        ValueError: one sentence when it is not there, or is no vision model.
    """
    return SmallEncoder(load_encoder(device=device)) if name == "scenes-64" else load_pretrained_encoder(name, device)


def load_encoder(path: Path = ASSET, device: str = "cpu") -> EncoderNetwork:
    """The encoder that ships with fewstep, or another one of its shape; frozen.

    Raises:
        ValueError: one sentence when the file is missing, damaged or of another shape.
    """
    refusal = (
        f"{path} does not hold an encoder's weights: train one by "
        "'fewstep teacher detector --network encoder --export FILE'."
    )
    network = read_network(path, lambda metadata: EncoderNetwork(json.loads(metadata["heads"])), refusal)
    return network.eval().requires_grad_(False).to(device)


class EncoderNetwork(nn.Module):
    """The encoder of scenes-64, trained to find the shapes in an image and their attributes.

    Residual blocks at 32x32, 16x16, 8x8 and 4x4, each twice as coarse as the one before.

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
        """One vector for each image, [N, 2 C]: the coarsest features' mean and largest values."""
        last = self.taps(images)[-1]
        return torch.cat([last.mean(dim=(2, 3)), last.amax(dim=(2, 3))], dim=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Its own predictions: as `fewstep.models.detector.DetectorNetwork`, for cells of 8x8 pixels."""
        middle, coarse = self.taps(images)[-2:]
        grid = torch.cat([middle, F.interpolate(coarse, scale_factor=2.0, mode="nearest")], dim=1)
        predicted = self.answers(F.silu(self.norm(grid))).permute(0, 2, 3, 1)
        parts = predicted.split([1, _GEOMETRY, *self.heads.values()], dim=-1)
        return {"near": parts[0].squeeze(-1), "geometry": parts[1], **dict(zip(self.heads, parts[2:], strict=True))}


class SmallEncoder:
    """The shipped encoder as losses see it (`fewstep.models.helpers.Encoder`)."""

    def __init__(self, network: EncoderNetwork) -> None:
        self.network = network

    @property
    def tap_channels(self) -> dict[str, int]:
        """Its features at 1/2, 1/4, 1/8 and 1/16 of the images' side."""
        return {f"level{i}": c for i, c in enumerate(self.network.channels)}

    @property
    def summary_width(self) -> int:
        return 2 * self.network.channels[-1]

    def features(self, images: Tensor, taps: Iterable[str]) -> list[Tensor]:
        """[B, C, h, w] of images from -1 to 1."""
        found = dict(zip(self.tap_channels, self.network.taps(self._seen(images)), strict=True))
        return [found[tap] for tap in check_taps(taps, found)]

    def summary(self, images: Tensor) -> Tensor:
        """[B, `summary_width`] of images from -1 to 1."""
        return self.network.embed(self._seen(images))

    def instances(self, images: Tensor) -> dict[str, Tensor]:
        """Predictions of the shapes in images from -1 to 1, cell by cell (`EncoderNetwork.forward`)."""
        return cast("dict[str, Tensor]", self.network(self._seen(images)))

    def _seen(self, images: Tensor) -> Tensor:
        return (images / 2 + 0.5).to(next(self.network.parameters()).dtype)


class PretrainedEncoder:
    """A vision model of transformers: called, it gives a metric's features; in losses, features at taps and a summary.

    Its taps are the patch embedding and the blocks after each quarter of its depth: 2, 5, 8 and 11 of twelve, as in
    StyleGAN-T (Sauer et al. 2023, arXiv 2301.09515). They give tokens [B, C, patches], each plus the class token.

    Args:
        model: with ``get_image_features`` (CLIP's kind) or ``pooler_output`` (DINOv2's kind).
        size: side of the images that it sees; mean, std: [3], of its pixels.
    """

    def __init__(self, model: Any, size: int, mean: Tensor, std: Tensor) -> None:
        self.model, self.size = model.eval().requires_grad_(False), size
        self.mean, self.std = mean[:, None, None], std[:, None, None]
        self._config = getattr(model.config, "vision_config", model.config)

    @property
    def network(self) -> nn.Module:
        return cast(nn.Module, self.model)

    @property
    def tap_channels(self) -> dict[str, int]:
        depth, width = self._config.num_hidden_layers, self._config.hidden_size
        blocks = sorted({max(round(depth * k / 4) - 1, 0) for k in (1, 2, 3, 4)})
        return {"patches": width, **{f"block{i}": width for i in blocks}}

    @property
    def summary_width(self) -> int:
        clip = hasattr(self.model, "get_image_features")
        return int(self.model.config.projection_dim if clip else self._config.hidden_size)

    def features(self, images: Tensor, taps: Iterable[str]) -> list[Tensor]:
        """[B, C, patches] of images from -1 to 1, which are resized to the model's own size."""
        vision = getattr(self.model, "vision_model", self.model)
        hidden = vision(pixel_values=self._seen(images), output_hidden_states=True).hidden_states
        others = 1 + int(getattr(self._config, "num_register_tokens", 0))
        found = []
        for tap in check_taps(taps, self.tap_channels):
            tokens = hidden[0 if tap == "patches" else int(tap.removeprefix("block")) + 1]
            found.append((tokens[:, others:] + tokens[:, :1]).transpose(1, 2))
        return found

    def summary(self, images: Tensor) -> Tensor:
        """[B, `summary_width`], one vector for the whole image: DINOv2's class token, CLIP's image features."""
        return self._pooled(self._seen(images))

    def _seen(self, images: Tensor) -> Tensor:
        kind = {"mode": "area"} if images.shape[-1] > self.size else {"mode": "bicubic", "antialias": True}
        return self._normalised(F.interpolate(images / 2 + 0.5, (self.size, self.size), **kind))  # type: ignore[arg-type]

    def _normalised(self, images: Tensor) -> Tensor:
        return ((images - self.mean.to(images)) / self.std.to(images)).to(self.model.dtype)

    def _pooled(self, pixels: Tensor) -> Tensor:
        return pooled(getattr(self.model, "get_image_features", self.model)(pixel_values=pixels))

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """float32 [N, D] on the host for images [N, 3, H, W] in [0, 1], resized by antialiased bicubic."""
        found = []
        for part in images.split(batch_size):
            resized = F.interpolate(part.to(self.model.device), (self.size, self.size), mode="bicubic", antialias=True)
            found.append(self._pooled(self._normalised(resized)).float().cpu())
        return torch.cat(found)


def load_pretrained_encoder(name: str, device: str = "cpu") -> PretrainedEncoder:
    """DINOv2, CLIP or the like from a folder or a hub name; safetensors only, no remote code.

    Raises:
        ValueError: one sentence when it is not there, or is no vision model.
    """
    from transformers import AutoConfig, AutoModel

    name = os.path.expanduser(name)
    with loading(f"The encoder '{name}'"):
        model = from_pretrained(AutoModel, AutoConfig, name, device)
        pixels = pixel_statistics(name, model.config.model_type)
    size = getattr(getattr(model.config, "vision_config", model.config), "image_size", None)
    if not isinstance(size, int):
        raise ValueError(f"The encoder '{name}' is no vision model: give DINOv2, CLIP or another one of their kind.")
    return PretrainedEncoder(model, size, *pixels)
