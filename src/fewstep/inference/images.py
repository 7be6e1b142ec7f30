"""Images and masks of the user, as tensors of a model's size."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Sequence
from typing import Any, BinaryIO, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import max_pool2d

from fewstep.data.entries import Unusable
from fewstep.data.rgb import check_size, eight_bits, fitted, from_array, rgb

AnyImage: TypeAlias = "Image.Image | str | os.PathLike[str] | bytes | BinaryIO | npt.NDArray[Any] | Tensor"
"""A PIL image; a file by its name, opened, or its bytes; an array or tensor [H, W], [H, W, C] or [C, H, W] in uint8,
uint16, bool, or floats from 0 to 1. Of arrays [H, W, C] is tried first, of tensors [C, H, W]."""
AnyImages: TypeAlias = "AnyImage | Sequence[AnyImage]"


def as_list(given: AnyImages) -> list[AnyImage]:
    """One image, or several, as a list; arrays and tensors of four dimensions are several."""
    given = _as_array(given)
    if isinstance(given, np.ndarray | Tensor):
        return list(given) if given.ndim == 4 else [given]
    if isinstance(given, Image.Image | str | os.PathLike | bytes | bytearray | memoryview) or hasattr(given, "read"):
        return [cast("AnyImage", given)]
    try:
        return list(cast("Sequence[AnyImage]", given))
    except TypeError:
        raise ValueError(_refusal(given, "it is no file, image, array or tensor")) from None


def opened(given: AnyImages) -> list[Image.Image]:
    """One image, or several, as upright RGB: each is read once, so that pipes and generators serve too.

    Raises:
        ValueError: as `as_images`.
    """
    return [_read(image, rgb) for image in as_list(given)]


def as_images(given: AnyImages, size: tuple[int, int]) -> Tensor:
    """Pixels [B, 3, H, W] from -1 to 1, each image upright, cropped to its middle and resized to ``size`` (H, W).

    Raises:
        ValueError: a file is no image, an array has another shape or other values.
    """
    rows = [np.asarray(fitted(image, *size), dtype=np.float32) for image in opened(given)]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2) / 127.5 - 1


def as_masks(given: AnyImages, images: AnyImages, size: tuple[int, int]) -> Tensor:
    """Masks [B, 1, H, W] of 0 and 1, from images whose bright half is 1, cropped and resized as ``images`` are.

    The brightness counts, not the alpha.

    Raises:
        ValueError: as `as_images`; a mask has another size than its image, or has no white.
    """
    masks, masked = [_read(mask, _grey) for mask in as_list(given)], opened(images)
    if not masks:
        raise ValueError("There is no mask: give one, or one for each image.")
    for i, mask in enumerate(masks):
        own = masked[min(i, len(masked) - 1)].size
        if mask.size != own:
            raise ValueError(
                f"The mask is {_words(mask.size)} pixels and its image {_words(own)}: give both the same size."
            )
        if mask.getextrema()[1] < 128:  # type: ignore[operator]
            raise ValueError("The mask is empty: make the part that is to be generated white.")
    rows = [np.asarray(ImageOps.fit(m, size[::-1], Image.Resampling.NEAREST), dtype=np.float32) for m in masks]
    return (torch.from_numpy(np.stack(rows))[:, None] >= 128).float()


def cells(masks: Tensor, down: int) -> Tensor:
    """Masks of latents [B, 1, h, w]: a cell is generated anew as soon as the mask touches one of its pixels."""
    return max_pool2d(masks, down)


# ---------------------------------------------------------------- reading


def _grey(image: Image.Image) -> Image.Image:
    return eight_bits(image).convert("L")


def _read(given: AnyImage, convert: Any) -> Image.Image:
    """``convert`` of the image.

    Raises:
        ValueError: one sentence that names the image.
    """
    given = _as_array(given)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow about sizes, which are limited here
            if isinstance(given, Image.Image):
                return convert(given)
            if isinstance(given, np.ndarray | Tensor):
                return convert(_from_values(given))
            with Image.open(_file(given)) as file:
                check_size(file)
                return convert(file)
    except (FileNotFoundError, NotADirectoryError):
        hint = ": web addresses are not fetched, so save it to a file first" if "://" in str(given) else ""
        raise ValueError("There is no image " + str(given) + f"{hint}.") from None
    except Unusable as error:
        raise ValueError(_refusal(given, str(error))) from None
    except Image.DecompressionBombError:
        raise ValueError(_refusal(given, "its pixels are too many")) from None
    except Exception as error:  # a decoder on damaged bytes may raise anything
        closed = getattr(error, "strerror", None)
        raise ValueError(_refusal(given, closed or "it is damaged, or no image")) from None


def _as_array(given: Any) -> Any:
    """Arrays of other libraries as numpy's; anything else as it is."""
    other = hasattr(given, "__array__") and not isinstance(given, np.ndarray | Tensor | Image.Image)
    return np.asarray(given) if other else given


def _from_values(given: npt.NDArray[Any] | Tensor) -> Image.Image:
    if isinstance(given, np.ndarray):
        return from_array(given)
    values = given.detach().cpu()
    return from_array((values.float() if values.is_floating_point() else values).numpy(), channels_first=True)


def _file(given: Any) -> Any:
    """What Pillow opens: the name of a regular file, or bytes.

    Raises:
        Unusable: it is a folder, or a pipe, socket or device, which would be waited for.
    """
    if isinstance(given, bytes | bytearray | memoryview):
        return io.BytesIO(given)
    if hasattr(given, "read"):
        return given
    path = os.path.expanduser(given)
    kind = os.stat(path).st_mode
    if not stat.S_ISREG(kind):
        raise Unusable("it is a folder" if stat.S_ISDIR(kind) else "it is a pipe, socket or device, and no file")
    return path


def _refusal(given: Any, why: str) -> str:
    if isinstance(given, np.ndarray | Tensor):
        name = f"The {'tensor' if isinstance(given, Tensor) else 'array'} {list(given.shape)}"
    else:
        name = f"{given!s:.200}" if isinstance(given, str | os.PathLike) else f"The given {type(given).__name__}"
    return f"{name} cannot be read as an image: {why}."


def _words(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
