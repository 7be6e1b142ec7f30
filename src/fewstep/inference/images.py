"""Images and masks of the user, as tensors of a model's size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import max_pool2d

AnyImage: TypeAlias = "Image.Image | str | Path"
AnyImages: TypeAlias = "AnyImage | Sequence[AnyImage]"


def as_list(given: AnyImages) -> list[AnyImage]:
    """One image, or several, as a list."""
    return [given] if isinstance(given, Image.Image | str | Path) else list(given)


def as_images(given: AnyImages, size: tuple[int, int]) -> Tensor:
    """Pixels [B, 3, H, W] from -1 to 1, each image upright, cropped to its middle and resized to ``size`` (H, W).

    Raises:
        ValueError: a file is no image.
    """
    fitted = [np.asarray(_fit(image, size), dtype=np.float32) for image in as_list(given)]
    return torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2) / 127.5 - 1


def as_masks(given: AnyImages, images: AnyImages, size: tuple[int, int]) -> Tensor:
    """Masks [B, 1, H, W] of 0 and 1, from images whose bright half is 1, cropped and resized as ``images`` are.

    Raises:
        ValueError: a file is no image, a mask has another size than its image, or has no white.
    """
    masks, masked = as_list(given), as_list(images)
    opened = [_open(mask).convert("L") for mask in masks]
    for i, mask in enumerate(opened):
        own = _open(masked[min(i, len(masked) - 1)]).size
        if mask.size != own:
            raise ValueError(
                f"The mask is {_words(mask.size)} pixels and its image {_words(own)}: give both the same size."
            )
        if mask.getextrema()[1] < 128:  # type: ignore[operator]
            raise ValueError("The mask is empty: make the part that is to be generated white.")
    rows = [np.asarray(ImageOps.fit(m, size[::-1], Image.Resampling.NEAREST), dtype=np.float32) for m in opened]
    return (torch.from_numpy(np.stack(rows))[:, None] >= 128).float()


def cells(masks: Tensor, down: int) -> Tensor:
    """Masks of latents [B, 1, h, w]: a cell is generated anew as soon as the mask touches one of its pixels."""
    return max_pool2d(masks, down)


def _fit(given: AnyImage, size: tuple[int, int]) -> Image.Image:
    image = _open(given).convert("RGB")
    height, width = size
    return image if image.size == (width, height) else ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def _open(image: AnyImage) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    try:
        with Image.open(image) as file:
            return ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise ValueError(f"There is no image {image}.") from None
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        raise ValueError(f"{image} cannot be read as an image.") from None


def _words(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
