"""Captioned images, wherever they lie: what every kind of data set gives, and how bytes become pixels.

The files come from strangers. An image is opened as one of a few formats, its size is read before its pixels are, and
what cannot be used is passed over and listed with the reason: one broken file does not end a run of days.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.data.entries import Skipped, Unusable, attempt, unread
from fewstep.data.rgb import SIDEWAYS, check_size, fitted, orientation, rgb

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_LINK = "it is a link to a folder, and those are not followed: give that folder as data.path, or move it here"
_MAX_ENLARGEMENT = 8  # times a side may be enlarged; smaller images carry too little detail


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


# ---------------------------------------------------------------- looking for files


def walk(folder: Path) -> tuple[list[Path], list[Skipped]]:
    """(all files below a folder in the order of their names, the folders in it that cannot be read or are links)."""
    files: list[Path] = []
    closed: list[Skipped] = []

    def note(error: OSError) -> None:
        closed.append(unread(os.path.relpath(error.filename, folder), error))

    for place, folders, names in os.walk(folder, onerror=note):
        files += [Path(place, name) for name in names]
        links = (Path(place, name) for name in sorted(folders))
        closed += [Skipped(str(link.relative_to(folder)), _LINK) for link in links if link.is_symlink()]
    return sorted(files), closed


def files_of(path: Path, suffix: str) -> tuple[list[Path], list[Skipped]]:
    """``path`` if it is a file; all files of that suffix in a folder and below it, and as `walk` has it."""
    if path.is_file():
        return [path], []
    files, closed = walk(path) if path.is_dir() else ([], [])
    return [file for file in files if file.suffix.lower() == suffix], closed


def from_files(
    path: Path, suffix: str, kind: str, read: Callable[[Path, str], Iterator[CaptionedImage | Skipped]]
) -> Iterator[CaptionedImage | Skipped]:
    """The entries of all files of one kind that ``path`` is or holds; files outside the folder are passed over.

    Args:
        read: returns the entries of a file, given its folder and its name in it.

    Raises:
        ValueError: one sentence when there is no such file.
    """
    (files, closed), folder = files_of(path, suffix), path if path.is_dir() else path.parent
    if not files:
        raise ValueError(f"data.path: there are no {kind} ({suffix}) in '{path}'{_hint(path, suffix)}.")

    def entries() -> Iterator[CaptionedImage | Skipped]:
        for name in (str(file.relative_to(folder)) for file in files):
            lies_inside = attempt(name, inside, folder, name)
            if isinstance(lies_inside, Skipped):
                yield lies_inside
            else:
                yield from read(folder, name)
        yield from closed

    return entries()


def _hint(path: Path, suffix: str) -> str:
    """Why there may be no such file."""
    if any(sign in path.name for sign in "*?{[") and not path.exists():
        return ": patterns are not expanded, so give one file or their folder"
    compressed = path.is_dir() and any(f"{suffix}." in file.name.lower() for file in walk(path)[0])
    return f": decompress its files of {suffix}.gz and the like" if compressed else ""


def inside(folder: Path, name: str) -> Path:
    """The file ``name`` of ``folder``, whatever links and dots there are in it.

    Raises:
        Unusable: it lies elsewhere, or is no file.
    """
    path = folder / name
    try:
        there = path.resolve().is_relative_to(folder.resolve())
    except ValueError:
        raise Unusable("no file can have this name") from None
    except (OSError, RuntimeError):  # a link to itself
        there = False
    if not there:
        raise Unusable("it lies outside the folder")
    if not path.is_file():  # a pipe would be waited for
        raise Unusable(f"it is not there{' as a file, but as a folder, pipe or device' if path.exists() else ''}")
    return path


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Within this block Pillow does not warn about sizes, which are limited here. For the main thread."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.|fewstep\.data\.(images|rgb)")
        yield


def pixels(captioned: CaptionedImage, size_for: Callable[[int, int], tuple[int, int]]) -> Tensor:
    """As `decode`, without Pillow's warnings."""
    with quiet_pillow():
        return decode(captioned, size_for)


def decode(captioned: CaptionedImage, size_for: Callable[[int, int], tuple[int, int]]) -> Tensor:
    """[3, height, width] in uint8: upright, cut around its middle and resized to ``size_for(height, width)``.

    Colours as `fewstep.data.rgb` has them.

    Raises:
        Unusable: why it cannot be used.
    """
    try:
        data = captioned.read()
    except OSError:
        raise Unusable("it cannot be read") from None
    try:
        return _decoded(data, size_for)
    except Unusable:
        raise
    except Image.DecompressionBombError:
        raise Unusable("its pixels are too many") from None
    except Exception:  # a decoder on damaged bytes may raise anything
        raise Unusable("it is damaged, or no image") from None


def _decoded(data: bytes, size_for: Callable[[int, int], tuple[int, int]]) -> Tensor:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as file:
        check_size(file)
        if file.format == "TIFF":
            file.load()  # which turns it upright
        turned = orientation(file) in SIDEWAYS
        sides = (file.width, file.height) if turned else (file.height, file.width)
        wanted = size_for(*sides)
        if min(sides) * _MAX_ENLARGEMENT < min(wanted):
            raise Unusable(f"its {file.width} x {file.height} pixels are too few")
        if file.format == "JPEG":  # decoded at a fraction of its size where that is enough
            file.draft(None, (2 * max(wanted), 2 * max(wanted)))
        image = fitted(rgb(file), *wanted, reducing_gap=3.0)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
