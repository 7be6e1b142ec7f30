"""The linear code that scenes-64's latents follow: principal components of smoothly windowed patches.

A generator's uncertain latents are means over several images. In a code that is linear in the pixels such a mean is
the code of a blurred image, and the decoder sharpens it; in the code that an autoencoder finds by itself it is the
code of nothing, and decodes to a coarse grain.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STRIDE = 8
"""Pixels from one latent to the next; a patch is twice as wide, and its neighbours overlap it by half."""

_SIDE = 2 * STRIDE


class LinearCode(NamedTuple):
    """A convolution from images to latents.

    Attributes:
        kernel: [C, 3, 16, 16]; bias: [C].
    """

    kernel: Tensor
    bias: Tensor

    def encode(self, images: Tensor) -> Tensor:
        """Latents [B, C, h, w] of images [B, 3, 8h, 8w] in [-1, 1]."""
        padded = F.pad(images, (STRIDE // 2,) * 4, mode="reflect")
        return F.conv2d(padded, self.kernel, self.bias, stride=STRIDE)


def fit_linear_code(images: Tensor, channels: int) -> LinearCode:
    """Principal components of all patches of ``images`` [N, 3, H, W] in [-1, 1].

    A component of variance e is scaled to one in proportion to e^(1/2): colours still count more than details, as a
    coarse-to-fine generator wants it, but by less than in the pixels. Over all channels the variance is 1.
    """
    window = torch.sin(math.pi * (torch.arange(_SIDE) + 0.5) / _SIDE)
    taper = (window[:, None] * window).to(torch.float64).flatten().repeat(3)
    size = len(taper)
    total, squares, count = torch.zeros(size).double(), torch.zeros(size, size).double(), 0
    for batch in images.split(256):
        padded = F.pad(batch, (STRIDE // 2,) * 4, mode="reflect")
        patches = F.unfold(padded, _SIDE, stride=STRIDE).transpose(1, 2).reshape(-1, size) * taper
        total += patches.sum(dim=0)
        squares += patches.T @ patches
        count += len(patches)
    mean = total / count
    variances, vectors = torch.linalg.eigh(squares / count - mean[:, None] * mean)
    variances, vectors = variances.flip(0)[:channels], vectors.flip(1)[:, :channels]
    vectors = vectors * (vectors.sum(dim=0) + 1e-9).sign()  # an eigenvector's sign is arbitrary: fix it
    scale = variances.pow(-0.25)
    scale = scale * (channels / (variances * scale.square()).sum()).sqrt()
    rows = (vectors * scale).T
    kernel = (rows * taper).reshape(channels, 3, _SIDE, _SIDE)
    return LinearCode(kernel.float(), -(rows @ mean).float())
