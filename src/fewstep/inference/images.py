"""Pictures and masks that people bring, as tensors of a model's size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import max_pool2d

Picture: TypeAlias = "Image.Image | str | Path"
Pictures: TypeAlias = "Picture | Sequence[Picture]"


def as_list(given: Pictures) -> list[Picture]:
    """One picture, or several, as a list."""
    return [given] if isinstance(given, Image.Image | str | Path) else list(given)


def as_images(given: Pictures, size: tuple[int, int]) -> Tensor:
    """Pixels [B, 3, H, W] from -1 to 1, each picture upright, cut in its middle and resized to ``size`` (H, W).

    Raises:
        ValueError: one sentence for a file that is no picture.
    """
    fitted = [np.asarray(_fit(picture, size, "RGB"), dtype=np.float32) for picture in as_list(given)]
    return torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2) / 127.5 - 1


def as_masks(given: Pictures, images: Pictures, size: tuple[int, int]) -> Tensor:
    """Masks [B, 1, H, W] of 0 and 1, from pictures whose bright half is 1, cut and resized as ``images`` are.

    Raises:
        ValueError: one sentence for a file that is no picture, a mask of another size than its picture's, and one that
            marks nothing.
    """
    masks, pictures = as_list(given), as_list(images)
    opened = [_open(mask).convert("L") for mask in masks]
    for i, mask in enumerate(opened):
        own = _open(pictures[min(i, len(pictures) - 1)]).size
        if mask.size != own:
            raise ValueError(f"The mask is {_words(mask.size)} pixels and its picture {_words(own)}: make them alike.")
        if mask.getextrema()[1] < 128:  # type: ignore[operator]
            raise ValueError("The mask marks nothing: what is to be drawn anew must be white in it.")
    rows = [np.asarray(ImageOps.fit(m, size[::-1], Image.Resampling.NEAREST), dtype=np.float32) for m in opened]
    return (torch.from_numpy(np.stack(rows))[:, None] >= 128).float()


def cells(masks: Tensor, down: int) -> Tensor:
    """Masks of latents [B, 1, h, w]: a cell is drawn anew as soon as the mask touches one of its pixels."""
    return max_pool2d(masks, down)


def _fit(picture: Picture, size: tuple[int, int], mode: str) -> Image.Image:
    image = _open(picture).convert(mode)
    height, width = size
    return image if image.size == (width, height) else ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def _open(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    try:
        with Image.open(picture) as file:
            return ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise ValueError(f"There is no picture {picture}.") from None
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        raise ValueError(f"{picture} cannot be read as a picture.") from None


def _words(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
