"""Captioned images, wherever they lie: what every kind of data set gives, and how bytes become pixels.

The files come from strangers. An image is opened as one of a few formats, its size is read before its pixels are, and
what cannot be used is passed over and listed with the reason: one broken file does not end a run of days.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_MAX_PIXELS = 2**27  # 11,585 squared: 400 MB while it is read
_MAX_ENLARGEMENT = 8  # times a side may be enlarged; smaller images carry too little detail
MAX_TEXT = 2**20  # bytes of a caption, or of the file that holds it
CAPTION_KEYS = ("text", "caption", "prompt")

T = TypeVar("T")


class Unusable(ValueError):
    """Why one entry of a data set cannot be used; the others can."""


@dataclass(frozen=True)
class CaptionedImage:
    """An image and its caption.

    Attributes:
        name: how people find it: a path in the folder, a member of a shard, a row of a table.
        caption: its text.
        stamp: changes when the image does.
        read: returns its encoded bytes.
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
    """The images of a data set in their order, and what was passed over while they were looked for."""

    images: tuple[CaptionedImage, ...]
    skipped: tuple[Skipped, ...] = ()

    def fingerprint(self) -> str:
        """A short hash of the images' names, stamps and captions; no pixel is read."""
        digest = hashlib.blake2b(digest_size=8)
        for image in self.images:
            digest.update(repr((image.name, image.stamp, image.caption)).encode())
        return digest.hexdigest()


# ---------------------------------------------------------------- looking for entries


def attempt(name: str, make: Callable[..., T], *args: object) -> T | Skipped:
    """``make(*args)``, or the reason why the entry ``name`` cannot be used."""
    try:
        return make(*args)
    except (Unusable, OSError) as error:
        return Skipped(name, str(error))


def usable(
    found: Iterable[T | Skipped], where: str, kind: str, limit: int | None = None, hint: str = ""
) -> tuple[tuple[T, ...], tuple[Skipped, ...]]:
    """The first ``limit`` usable entries of a data set, and what was passed over before them.

    Args:
        where: the data set. kind: "images" or "prompts". hint: added to the error where nothing was found at all.

    Raises:
        ValueError: one sentence when there is none.
    """
    kept: list[T] = []
    skipped: list[Skipped] = []
    for entry in found:
        if limit is not None and len(kept) == limit:
            break
        if isinstance(entry, Skipped):
            skipped.append(entry)
        else:
            kept.append(entry)
    if not kept:
        reason = f", the first because {skipped[0]}" if skipped else hint
        raise ValueError(f"data.path: {where} holds no {kind} that could be used{reason}.")
    return tuple(kept), tuple(skipped)


def files_of(path: Path, suffix: str) -> list[Path]:
    """``path`` if it is a file; all files of that suffix in a folder and below it, in the order of their names."""
    return [path] if path.is_file() else sorted(path.rglob(f"*{suffix}"))


def from_files(
    path: Path, suffix: str, kind: str, read: Callable[[Path, str], Iterator[CaptionedImage | Skipped]]
) -> Iterator[CaptionedImage | Skipped]:
    """The entries of all files of one kind that ``path`` is or holds; files outside the folder are passed over.

    Args:
        read: returns the entries of a file, given its folder and its name in it.

    Raises:
        ValueError: one sentence when there is no such file.
    """
    files, folder = files_of(path, suffix), path if path.is_dir() else path.parent
    if not files:
        raise ValueError(f"data.path: there are no {kind} ({suffix}) in '{path}'.")

    def entries() -> Iterator[CaptionedImage | Skipped]:
        for name in (str(file.relative_to(folder)) for file in files):
            lies_inside = attempt(name, inside, folder, name)
            if isinstance(lies_inside, Skipped):
                yield lies_inside
            else:
                yield from read(folder, name)

    return entries()


def caption_of(text: str | bytes) -> str:
    """A caption without surrounding space.

    Raises:
        Unusable: it is empty, too long to be a caption, or no text.
    """
    if len(text) > MAX_TEXT:
        raise Unusable("its caption is longer than a megabyte")
    try:
        caption = (text.decode("utf-8") if isinstance(text, bytes) else text).strip().replace("\0", "")
    except UnicodeDecodeError:
        raise Unusable("its caption is not text in UTF-8") from None
    if not caption:
        raise Unusable("it has no caption")
    return caption


def caption_in(text: bytes | str, column: str | None = None) -> str:
    """The caption in a JSON object.

    Raises:
        Unusable: there is none.
    """
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        raise Unusable("its JSON is damaged") from None
    keys = CAPTION_KEYS if column is None else (column,)
    key = next((key for key in keys if isinstance(entry, dict) and isinstance(entry.get(key), str)), None)
    if key is None:
        raise Unusable(f"its JSON has no text by the name of {' or '.join(keys)}")
    return caption_of(entry[key])


def read_text(path: Path) -> bytes:
    """The bytes of a small file, cut where `caption_of` refuses them."""
    with open(path, "rb") as file:
        return file.read(MAX_TEXT + 1)


def inside(folder: Path, name: str) -> Path:
    """The file ``name`` of ``folder``, whatever links and dots there are in it.

    Raises:
        Unusable: it lies elsewhere, or is no file.
    """
    path = folder / name
    try:
        there = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a link to itself, a name that no file can have
        there = False
    if not there:
        raise Unusable("it lies outside the folder")
    if not path.is_file():
        raise Unusable("it is not there")
    return path


def pixels(captioned: CaptionedImage, size_for: Callable[[int, int], tuple[int, int]]) -> Tensor:
    """[3, height, width] in uint8: upright, cut around its middle and resized to ``size_for(height, width)``.

    What is transparent is white; 16 bits become 8.

    Raises:
        Unusable: why it cannot be used.
    """
    try:
        data = captioned.read()
    except OSError:
        raise Unusable("it cannot be read") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow about sizes, which are limited here
            return _decoded(data, size_for)
    except Unusable:
        raise
    except Image.DecompressionBombError:
        raise Unusable("its pixels are too many") from None
    except Exception:  # a decoder on damaged bytes may raise anything
        raise Unusable("it is damaged, or no image") from None


def _decoded(data: bytes, size_for: Callable[[int, int], tuple[int, int]]) -> Tensor:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as file:
        if file.width * file.height > _MAX_PIXELS:
            raise Unusable(f"its {file.width} x {file.height} pixels are too many")
        turned = file.getexif().get(0x0112) in (5, 6, 7, 8)
        sides = (file.width, file.height) if turned else (file.height, file.width)
        wanted = size_for(*sides)
        if min(sides) * _MAX_ENLARGEMENT < min(wanted):
            raise Unusable(f"its {file.width} x {file.height} pixels are too few")
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
