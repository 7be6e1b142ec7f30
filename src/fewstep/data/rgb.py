"""Any image as upright RGB of 8 bits, cut to a size: one conversion for training and for sampling from images.

The orientation in EXIF is applied; what is transparent becomes white; 16 bits become 8 by v / 257 (of a file in RGB,
Pillow reads the high byte alone) and floats from 0 to 1 by 255 v, rounded; of an animation the first frame counts.
Colour profiles are not applied: values are taken as sRGB, and CMYK is converted without a profile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fewstep.data.entries import Unusable

MAX_PIXELS = 2**27  # 11,585 squared: 400 MB while it is read
SIDEWAYS = (5, 6, 7, 8)
"""Orientations in EXIF whose height is the width of the stored pixels."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_SCALES = {"L;2": 85, "L;4": 17}
_SLACK = 1e-3  # by which rounding and resampling may take floats beyond 0 and 1: a quarter of a level of 8 bits


def check_size(image: Image.Image) -> None:
    """Refuse an image with too many pixels, before they are decoded."""
    if image.width * image.height > MAX_PIXELS:
        raise Unusable(f"its {image.width} x {image.height} pixels are too many")


def orientation(image: Image.Image) -> int:
    """The orientation in EXIF, 1 (upright) where it says none or is damaged."""
    _scale_key(image)  # before this loads a PNG
    try:
        found = image.getexif().get(0x0112)
    except Exception:  # Pillow raises errors of many kinds on damaged EXIF; the pixels may be whole
        return 1
    return found if found in _TURNS else 1


def eight_bits(image: Image.Image) -> Image.Image:
    """The image upright, in a mode of 8 bits.

    Raises:
        Unusable: it has no pixels, or values that 16 bits or floats from 0 to 1 do not have.
    """
    if not image.width or not image.height:
        raise Unusable("it has no pixels")
    _scale_key(image)
    image.load()  # turns a TIFF upright; other formats leave that to their reader
    turn = _TURNS.get(orientation(image))
    upright = image if turn is None else image.transpose(turn)
    if turn is not None:  # or whoever gets it would turn it again
        upright.info = {key: value for key, value in image.info.items() if key == "transparency"}
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        eight = _without_key(_of_16_bits(np.asarray(upright)), upright)
        return Image.fromarray(255 - eight if _white_is_zero(image) else eight)
    return Image.fromarray(_of_floats(np.asarray(upright))) if image.mode == "F" else upright


def _scale_key(image: Image.Image) -> None:
    """Make the transparent grey of a PNG of 2 or 4 bits one of 8, as Pillow makes the pixels; once, as it is loaded."""
    tile = getattr(image, "tile", None) if image.format == "PNG" else None
    raw = tile[0].args if tile else ""
    if raw in _SCALES and isinstance(image.info.get("transparency"), int):
        image.load()
        image.info["transparency"] *= _SCALES[raw]


def _white_is_zero(image: Image.Image) -> bool:
    """Whether a TIFF stores white as 0, which Pillow undoes for 8 bits, but not for 16."""
    return bool(getattr(image, "tag_v2", {}).get(262) == 0)


def rgb(image: Image.Image) -> Image.Image:
    """The image as upright RGB, what is transparent white.

    Raises:
        Unusable: as `eight_bits`.
    """
    image = _with_plain_alpha(eight_bits(image))
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("RGB")


def _with_plain_alpha(image: Image.Image) -> Image.Image:
    """The image with its transparency as `Image.convert` reads it."""
    if image.mode in _PREMULTIPLIED:
        return image.convert(_PREMULTIPLIED[image.mode])
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # of 16 bits, of which Pillow keeps the high byte alone
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    return image


def fitted(image: Image.Image, height: int, width: int, reducing_gap: float | None = None) -> Image.Image:
    """The largest part of the wanted shape around the middle, resized.

    Args:
        reducing_gap: Pillow's shortcut for large images, for reading many.
    """
    shown = _middle(image.height, image.width, height, width)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=shown, reducing_gap=reducing_gap)


def _middle(height: int, width: int, to_height: int, to_width: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest part of the wanted shape around the middle."""
    scale = min(height / to_height, width / to_width)
    left, top = (width - scale * to_width) / 2, (height - scale * to_height) / 2
    return left, top, width - left, height - top


# ---------------------------------------------------------------- values


def from_array(values: npt.NDArray[Any], channels_first: bool = False) -> Image.Image:
    """An array [H, W], [H, W, C] or [C, H, W] of 1 to 4 channels (grey, grey and alpha, RGB, RGBA) as an image.

    Args:
        values: uint8, uint16, bool, or floats from 0 to 1.
        channels_first: how a shape is read that could be both.

    Raises:
        Unusable: another shape, another type, values out of range or not finite.
    """
    values = np.asarray(values)  # masked arrays and matrices are arrays with rules of their own
    if values.ndim == 2:
        values = values[:, :, None]
    last, first = (values.ndim == 3 and values.shape[side] in _MODES for side in (-1, 0))
    if not last and not first:
        raise Unusable("its shape is none of [H, W], [H, W, C] and [C, H, W] with 1 to 4 channels")
    if first and (channels_first or not last):
        values = np.moveaxis(values, 0, -1)
    if not values.size:
        raise Unusable("it has no pixels")
    eight = _as_eight(values)
    return Image.fromarray(np.ascontiguousarray(eight[:, :, 0] if eight.shape[2] == 1 else eight))


def _as_eight(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if kind == "f":
        return _of_floats(values)
    if kind != "u" or size > 2:
        raise Unusable(f"its values are {values.dtype}, and uint8, uint16, or floats from 0 to 1 are wanted")
    return values.astype(np.uint8) if size == 1 else _of_16_bits(values)


def _of_16_bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        raise Unusable(f"its values run from {low} to {high}, which is more than 16 bits")
    return (values.astype(np.float64) / 257).round().astype(np.uint8)


def _of_floats(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if not np.isfinite(values).all():
        raise Unusable("some of its values are not finite")
    low, high = values.min(), values.max()
    if low < -_SLACK or high > 1 + _SLACK:
        raise Unusable(f"its values run from {low:.4g} to {high:.4g}, and floats from 0 to 1 are wanted")
    return (values.astype(np.float64).clip(0, 1) * 255).round().astype(np.uint8)


def _without_key(eight: npt.NDArray[np.uint8], image: Image.Image) -> npt.NDArray[np.uint8]:
    """White where 16 bits of grey have the value that PNG says is transparent."""
    key = image.info.get("transparency")
    if isinstance(key, int):
        eight[np.asarray(image) == key] = 255
    return eight
