"""A folder of images with captions, as people keep them.

    images/cat.jpg   cat.txt                     the caption beside its image
    images/metadata.jsonl                        or {"file_name": "cat.jpg", "text": "a cat"}, one line an image

Nothing outside the folder is read, whatever its links and its list say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from fewstep.data.images import (
    IMAGE_SUFFIXES,
    CaptionedImage,
    Skipped,
    Unusable,
    attempt,
    caption_of,
    inside,
    read_text,
)

_METADATA = "metadata.jsonl"


def folder_images(folder: Path) -> Iterator[CaptionedImage | Skipped]:
    """The captioned images of ``folder`` and below it, in the order of their names.

    Raises:
        ValueError: one sentence when there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"data.path: there is no folder '{folder}'.")
    return _listed(folder) if (folder / _METADATA).is_file() else _beside(folder)


def _beside(folder: Path) -> Iterator[CaptionedImage | Skipped]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir():
            yield attempt(str(path.relative_to(folder)), _with_text_file, folder, path)


def _with_text_file(folder: Path, path: Path) -> CaptionedImage:
    name, text = str(path.relative_to(folder)), path.with_suffix(".txt")
    image = inside(folder, name)
    if not text.exists():
        raise Unusable(f"it has no caption: write it to {text.name}, or to {_METADATA}")
    return _image(name, image, caption_of(read_text(inside(folder, str(text.relative_to(folder))))))


def _listed(folder: Path) -> Iterator[CaptionedImage | Skipped]:
    try:
        lines = inside(folder, _METADATA).read_bytes().decode("utf-8").splitlines()
    except (ValueError, OSError) as error:
        yield Skipped(_METADATA, "it is not text in UTF-8" if isinstance(error, UnicodeError) else str(error))
        return
    found = [_entry(folder, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    yield from sorted(found, key=lambda entry: entry.name)


def _entry(folder: Path, number: int, line: str) -> CaptionedImage | Skipped:
    try:
        entry = json.loads(line)
        name, text = str(entry["file_name"]), entry["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        wanted = '{"file_name": "cat.jpg", "text": "a cat"}'
        return Skipped(f"line {number} of {_METADATA}", f"it is not like {wanted}")
    return attempt(
        f"{name} (line {number} of {_METADATA})", _with_text, folder, name, "" if text is None else str(text)
    )


def _with_text(folder: Path, name: str, text: str) -> CaptionedImage:
    path = inside(folder, name)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise Unusable(f"it is none of {', '.join(IMAGE_SUFFIXES)}")
    return _image(name, path, caption_of(text))


def _image(name: str, path: Path, caption: str) -> CaptionedImage:
    stat = path.stat()
    return CaptionedImage(name, caption, f"{stat.st_size} {stat.st_mtime_ns}", path.read_bytes)
