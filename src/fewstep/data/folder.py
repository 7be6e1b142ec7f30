"""A folder of pictures with captions, as people keep them.

    pictures/cat.jpg   cat.txt                     the caption beside its picture
    pictures/metadata.jsonl                        or {"file_name": "cat.jpg", "text": "a cat"}, one line a picture

Pictures are turned upright, cut to their middle square and resized to the teacher's size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

_KINDS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Picture:
    """A file and what it shows."""

    path: Path
    caption: str


def find_pictures(folder: Path, limit: int | None = None) -> list[Picture]:
    """The captioned pictures of ``folder`` and below it in the order of their names, at most ``limit``.

    Raises:
        ValueError: one sentence when there is no such folder, no picture in it, or one without its caption.
    """
    if not folder.is_dir():
        raise ValueError(f"data.path: there is no folder '{folder}'.")
    metadata = folder / _METADATA
    pictures = _listed(metadata) if metadata.is_file() else _beside(folder)
    if not pictures:
        raise ValueError(f"data.path: the folder {folder} holds no pictures ({', '.join(sorted(_KINDS))}).")
    return pictures[:limit]


def _beside(folder: Path) -> list[Picture]:
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _KINDS and path.is_file():
            text = path.with_suffix(".txt")
            if not text.is_file():
                raise ValueError(f"data.path: {path} has no caption: write it to {text.name}, or to {_METADATA}.")
            found.append(Picture(path, text.read_text(encoding="utf-8").strip()))
    return found


def _listed(metadata: Path) -> list[Picture]:
    found = []
    for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            path, caption = metadata.parent / entry["file_name"], str(entry["text"])
        except (ValueError, KeyError, TypeError):
            wanted = '{"file_name": "cat.jpg", "text": "a cat"}'
            raise ValueError(f"data.path: line {number} of {metadata} is not like {wanted}.") from None
        if not path.is_file():
            raise ValueError(f"data.path: line {number} of {metadata} names {path.name}, which is not there.")
        found.append(Picture(path, caption))
    return sorted(found, key=lambda picture: picture.path)


def fingerprint_of(pictures: Sequence[Picture]) -> str:
    """A short name of these pictures: their names, sizes, times of change and captions; no file is read."""
    digest = hashlib.blake2b(digest_size=8)
    for picture in pictures:
        stat = picture.path.stat()
        digest.update(repr((picture.path.name, stat.st_size, stat.st_mtime_ns, picture.caption)).encode())
    return digest.hexdigest()


def read_pictures(pictures: Sequence[Picture], size: int) -> Tensor:
    """Pixels [B, 3, size, size] in [-1, 1].

    Raises:
        ValueError: one sentence for a file that is no picture.
    """
    return torch.stack([_read(picture.path, size) for picture in pictures])


def _read(path: Path, size: int) -> Tensor:
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
            image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        raise ValueError(f"data.path: {path} cannot be read as a picture: remove it, or save it again.") from None
    return torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
