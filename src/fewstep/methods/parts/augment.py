"""DiffAugment: the same random changes of the discriminator's real and generated images (Zhao et al. 2020).

All random numbers are given, seven for each image, so that a step can be replayed. Gradients pass through.

===========  ======  =========================================================================================
policy       drawn   change of an image with pixels from -1 to 1
===========  ======  =========================================================================================
color        0, 1, 2 brightness: + (u - 0.5); saturation: 0 to 2 times the distance to the pixel's grey; contrast:
                     0.5 to 1.5 times the distance to the image's mean
translation  3, 4    moved by up to an eighth of its height and width, zeros (grey) coming in
cutout       5, 6    a rectangle of half its height and width becomes zero
===========  ======  =========================================================================================
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fewstep.data.random import Rng
from fewstep.diffusion.schedule import expand

Policy: TypeAlias = Literal["color", "translation", "cutout"]
POLICIES: tuple[Policy, ...] = ("color", "translation", "cutout")
NUMBERS = 7


def draw_augmentation(rng: Rng, name: str) -> Tensor:
    """[B, 7] uniforms in [0, 1), float64 on the host."""
    return torch.stack([rng.sample.uniform(f"{name}/{i}") for i in range(NUMBERS)], dim=1)


def augmented(images: Tensor, numbers: Tensor, policies: tuple[Policy, ...] = POLICIES) -> Tensor:
    """The images [B, C, H, W] as ``numbers`` [B, 7] (host) say; data that are no images are left alone."""
    if images.ndim != 4:
        return images
    u, x = numbers.numpy(), images
    if "color" in policies:
        x = x + expand(u[:, 0] - 0.5, x)
        grey = x.mean(dim=1, keepdim=True)
        x = (x - grey) * expand(2 * u[:, 1], x) + grey
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        x = (x - mean) * expand(u[:, 2] + 0.5, x) + mean
    if "translation" in policies:
        x = _moved(_moved(x, u[:, 3], 2), u[:, 4], 3)
    if "cutout" in policies:
        rows, columns = (_cut(x.shape[dim], u[:, 3 + dim]) for dim in (2, 3))
        x = torch.where(_on(rows[:, None, :, None] & columns[:, None, None, :], x), 0.0, x)
    return x


def _moved(x: Tensor, u: npt.NDArray[np.float64], dim: int) -> Tensor:
    """Along ``dim`` by a whole number of pixels from -side/8 to side/8, all of them alike."""
    side = x.shape[dim]
    reach = int(side / 8 + 0.5)
    shift = np.floor(u * (2 * reach + 1)).astype(np.int64) - reach
    source = np.arange(side)[None] + shift[:, None]
    inside = (source >= 0) & (source < side)
    shape = (len(x), 1, side, 1) if dim == 2 else (len(x), 1, 1, side)
    index = torch.from_numpy(source.clip(0, side - 1)).reshape(shape).to(x.device, non_blocking=True)
    return x.gather(dim, index.expand_as(x)) * _on(inside.reshape(shape), x)


def _cut(side: int, u: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """[B, side]: which places lie in a window of half the side, whose middle may lie anywhere."""
    size = int(side / 2 + 0.5)
    first = np.floor(u * (side + 1 - size % 2)).astype(np.int64) - size // 2
    place = np.arange(side)[None]
    return np.asarray((place >= first[:, None]) & (place < first[:, None] + size))


def _on(mask: npt.NDArray[np.bool_], like: Tensor) -> Tensor:
    return torch.from_numpy(mask).to(like.device, non_blocking=True)
