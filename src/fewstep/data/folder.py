"""A folder of pictures with captions, as people keep them.

    pictures/cat.jpg   cat.txt                     the caption beside its picture
    pictures/metadata.jsonl                        or {"file_name": "cat.jpg", "text": "a cat"}, one line a picture

Nothing outside the folder is read, whatever its links and its list say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from fewstep.data.pictures import KINDS, Picture, Skipped, caption_of, inside, read_text

_METADATA = "metadata.jsonl"


def folder_pictures(folder: Path) -> Iterator[Picture | Skipped]:
    """The captioned pictures of ``folder`` and below it, in the order of their names, or of the list.

    Raises:
        ValueError: one sentence when there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"data.path: there is no folder '{folder}'.")
    return _listed(folder) if (folder / _METADATA).is_file() else _beside(folder)


def _beside(folder: Path) -> Iterator[Picture | Skipped]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in KINDS or path.is_dir():
            continue
        name, text = str(path.relative_to(folder)), path.with_suffix(".txt")
        try:
            there = inside(folder, name)
            if not text.exists():
                raise ValueError(f"it has no caption: write it to {text.name}, or to {_METADATA}")
            caption = caption_of(read_text(inside(folder, str(text.relative_to(folder)))))
        except (ValueError, OSError) as error:
            yield Skipped(name, str(error))
            continue
        yield _picture(name, there, caption)


def _listed(folder: Path) -> Iterator[Picture | Skipped]:
    try:
        lines = inside(folder, _METADATA).read_bytes().decode("utf-8").splitlines()
    except (ValueError, OSError) as error:
        yield Skipped(_METADATA, "it is not text in UTF-8" if isinstance(error, UnicodeError) else str(error))
        return
    found = [_entry(folder, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    yield from sorted(found, key=lambda entry: entry.name)


def _entry(folder: Path, number: int, line: str) -> Picture | Skipped:
    try:
        entry = json.loads(line)
        name, text = str(entry["file_name"]), entry["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        wanted = '{"file_name": "cat.jpg", "text": "a cat"}'
        return Skipped(f"line {number} of {_METADATA}", f"it is not like {wanted}")
    try:
        path = inside(folder, name)
        if path.suffix.lower() not in KINDS:
            raise ValueError(f"it is none of {', '.join(KINDS)}")
        return _picture(name, path, caption_of("" if text is None else str(text)))
    except (ValueError, OSError) as error:
        return Skipped(f"{name} (line {number} of {_METADATA})", str(error))


def _picture(name: str, path: Path, caption: str) -> Picture:
    stat = path.stat()
    return Picture(name, caption, f"{stat.st_size} {stat.st_mtime_ns}", path.read_bytes)
