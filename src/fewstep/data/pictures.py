"""Captioned pictures, wherever they lie: what every kind of data set gives, and how bytes become pixels.

Files come from strangers. A picture is opened as one of a few formats, its size is read before its pixels are, and what
cannot be used is passed over and listed with the reason: one broken file does not end a run of days.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_MOST_PIXELS = 2**27  # 11,585 squared: 400 MB while it is read
_LEAST_PART = 8  # a side under an eighth of the wanted one shows nothing when it is blown up
MOST_TEXT = 2**20  # bytes of a caption, or of what holds it
CAPTION_KEYS = ("text", "caption", "prompt")


@dataclass(frozen=True)
class Picture:
    """A picture and what it shows.

    Attributes:
        name: how people find it: a path in the folder, a member of a shard, a row of a table.
        caption: its text.
        stamp: changes when the picture does.
        read: gives its encoded bytes.
    """

    name: str
    caption: str
    stamp: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Skipped:
    """Something that was passed over, and why."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


@dataclass(frozen=True)
class Collection:
    """The pictures of a data set in their order, and what was passed over while they were looked for."""

    pictures: tuple[Picture, ...]
    skipped: tuple[Skipped, ...] = ()

    def fingerprint(self) -> str:
        """A short name of these pictures: their names, stamps and captions; no pixel is read."""
        digest = hashlib.blake2b(digest_size=8)
        for picture in self.pictures:
            digest.update(repr((picture.name, picture.stamp, picture.caption)).encode())
        return digest.hexdigest()


def collect(found: Iterable[Picture | Skipped], where: str, limit: int | None = None) -> Collection:
    """The first ``limit`` pictures of what a data set holds; what lies behind them is not looked at.

    Raises:
        ValueError: one sentence when there is none.
    """
    pictures: list[Picture] = []
    skipped: list[Skipped] = []
    for entry in found:
        if limit is not None and len(pictures) == limit:
            break
        if isinstance(entry, Picture):
            pictures.append(entry)
        else:
            skipped.append(entry)
    if not pictures:
        reason = f", the first because {skipped[0]}" if skipped else f" ({', '.join(KINDS)})"
        raise ValueError(f"data.path: {where} holds no pictures that could be used{reason}.")
    return Collection(tuple(pictures), tuple(skipped))


def caption_of(text: str | bytes) -> str:
    """A caption without surrounding space.

    Raises:
        ValueError: it is empty, too long to be a caption, or no text.
    """
    if len(text) > MOST_TEXT:
        raise ValueError("its caption is longer than a megabyte")
    try:
        said = (text.decode("utf-8") if isinstance(text, bytes) else text).strip().replace("\0", "")
    except UnicodeDecodeError:
        raise ValueError("its caption is not text in UTF-8") from None
    if not said:
        raise ValueError("it has no caption")
    return said


def caption_in(said: bytes | str, column: str | None = None) -> str:
    """The caption in a JSON object.

    Raises:
        ValueError: there is none.
    """
    try:
        entry = json.loads(said)
    except (ValueError, RecursionError):
        raise ValueError("its JSON is damaged") from None
    keys = CAPTION_KEYS if column is None else (column,)
    key = next((key for key in keys if isinstance(entry, dict) and isinstance(entry.get(key), str)), None)
    if key is None:
        raise ValueError(f"its JSON has no text by the name of {' or '.join(keys)}")
    return caption_of(entry[key])


def read_text(path: Path) -> bytes:
    """The bytes of a small file, cut where `caption_of` refuses them."""
    with open(path, "rb") as file:
        return file.read(MOST_TEXT + 1)


def inside(folder: Path, name: str) -> Path:
    """The file ``name`` of ``folder``, whatever links and dots there are in it.

    Raises:
        ValueError: it lies elsewhere, or is no file.
    """
    path = folder / name
    try:
        there = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link to itself
        there = False
    if not there:
        raise ValueError("it lies outside the folder")
    if not path.is_file():
        raise ValueError("it is not there")
    return path


def pixels(picture: Picture, size_for: Callable[[int, int], tuple[int, int]]) -> Tensor:
    """[3, height, width] in uint8: upright, cut around its middle and resized to ``size_for(height, width)``.

    What is transparent is white; 16 bits become 8.

    Raises:
        ValueError: why it cannot be used.
    """
    try:
        data = picture.read()
    except OSError:
        raise ValueError("it cannot be read") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow about sizes, which are limited here
            return _decoded(data, size_for)
    except _Unusable:
        raise
    except Image.DecompressionBombError:
        raise ValueError("its pixels are too many") from None
    except Exception:  # a decoder on damaged bytes may raise anything
        raise ValueError("it is damaged, or no picture") from None


class _Unusable(ValueError):
    """A picture that could be decoded and should not be."""


def _decoded(data: bytes, size_for: Callable[[int, int], tuple[int, int]]) -> Tensor:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as file:
        if file.width * file.height > _MOST_PIXELS:
            raise _Unusable(f"its {file.width} x {file.height} pixels are too many")
        turned = file.getexif().get(0x0112) in (5, 6, 7, 8)
        sides = (file.width, file.height) if turned else (file.height, file.width)
        wanted = size_for(*sides)
        if min(sides) * _LEAST_PART < min(wanted):
            raise _Unusable(f"its {file.width} x {file.height} pixels are too few")
        if file.format == "JPEG":  # decoded at a fraction of its size where that is enough
            file.draft(None, (2 * max(wanted), 2 * max(wanted)))
        image = _rgb(ImageOps.exif_transpose(file))
    shown = _middle(image.height, image.width, *wanted)
    image = image.resize((wanted[1], wanted[0]), Image.Resampling.LANCZOS, box=shown, reducing_gap=3.0)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _middle(height: int, width: int, to_height: int, to_width: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest part of the wanted shape around the middle."""
    scale = min(height / to_height, width / to_width)
    left, top = (width - scale * to_width) / 2, (height - scale * to_height) / 2
    return left, top, width - left, height - top


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        eight = np.asarray(image, dtype=np.float64).clip(0, 65535) / 257
        return Image.fromarray(eight.round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("RGB")
