"""A folder of images with captions, as people keep them.

    images/cat.jpg   cat.txt                     the caption beside its image; also cat.caption or cat.jpg.txt
    images/metadata.jsonl                        or {"file_name": "cat.jpg", "text": "a cat"}, one line an image
    images/metadata.csv                          or a table with the same columns

Nothing outside the folder is read, whatever its links and its list say.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewstep.data.entries import Skipped, Unusable, attempt, usable
from fewstep.data.images import IMAGE_SUFFIXES, CaptionedImage, inside, walk
from fewstep.data.text import MAX_TEXT, UTF_16, caption_among, caption_keys, caption_of, decoded, lines

METADATA = ("metadata.jsonl", "metadata.csv")
_TEXTS = (".txt", ".caption")
csv.field_size_limit(max(csv.field_size_limit(), MAX_TEXT + 1))  # its own limit ends the whole list
_NOT_READ = (
    ".gif", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".tga", ".ico", ".ppm", ".pgm", ".exr", ".hdr",
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".mp4", ".mov", ".webm",
)  # fmt: skip
"""Images that are listed, so that nobody misses them unknowingly; other files are no concern of the data set."""
_FORMAT = f"it is none of {', '.join(IMAGE_SUFFIXES)}: convert it"


def folder_images(folder: Path, caption_column: str | None = None) -> Iterator[CaptionedImage | Skipped]:
    """The captioned images of ``folder`` and below it, in the order of their names.

    Args:
        caption_column: key of the caption in the list; by default text, caption or prompt.

    Raises:
        ValueError: one sentence when there is no such folder.
    """
    if not folder.is_dir():
        hint = ", but a file: unpack it, or set data.source to its kind" if folder.is_file() else ""
        raise ValueError(f"data.path: there is no folder '{folder}'{hint}.")
    listed = next((name for name in METADATA if (folder / name).is_file()), None)
    if listed is None and caption_column is not None:
        raise ValueError(
            f"data.caption_column: '{folder}' has no {' or '.join(METADATA)}, in which '{caption_column}' would be."
        )
    return _beside(folder) if listed is None else _listed(folder, listed, caption_keys(caption_column))


def uncaptioned_images(folder: Path) -> tuple[CaptionedImage, ...]:
    """All images of ``folder`` and below it, in the order of their names; captions are not read.

    Raises:
        ValueError: one sentence when there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder '{folder}' of images to compare with.")
    names = (str(path.relative_to(folder)) for path in walk(folder)[0] if path.suffix.lower() in IMAGE_SUFFIXES)
    found = (attempt(name, lambda name: _image(name, inside(folder, name), ""), name) for name in names)
    return usable(found, str(folder), "images", hint=f" ({', '.join(IMAGE_SUFFIXES)})", key="evaluate.reference")[0]


# ---------------------------------------------------------------- captions beside their images


def _beside(folder: Path) -> Iterator[CaptionedImage | Skipped]:
    files, closed = walk(folder)
    texts = {(path.parent, path.stem, path.suffix.lower()): path for path in files if path.suffix.lower() in _TEXTS}
    for path in files:
        name, suffix = str(path.relative_to(folder)), path.suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            keys = [(path.parent, stem, kind) for kind in _TEXTS for stem in (path.stem, path.name)]
            text = next((texts[key] for key in keys if key in texts), None)
            yield attempt(name, _with_text_file, folder, name, text)
        elif suffix in _NOT_READ:
            yield Skipped(name, _FORMAT)
    yield from closed


def _with_text_file(folder: Path, name: str, text: Path | None) -> CaptionedImage:
    image = inside(folder, name)
    if text is None:
        near = next((list_ for list_ in METADATA if (image.parent / list_).is_file()), None)
        where = f"or to {METADATA[0]}" if near is None else f"or give the folder of its {near} as data.path"
        raise Unusable(f"it has no caption: write it to {image.stem}.txt, {where}")
    with open(inside(folder, str(text.relative_to(folder))), "rb") as file:
        return _image(name, image, caption_of(file.read(MAX_TEXT + 1)))


# ---------------------------------------------------------------- captions in a list


def _listed(folder: Path, file: str, keys: tuple[str, ...]) -> Iterator[CaptionedImage | Skipped]:
    data = attempt(file, lambda: inside(folder, file).read_bytes())
    if isinstance(data, Skipped):
        yield data
        return
    rows = _csv_rows(file, data, keys) if file.endswith(".csv") else _json_rows(file, data)
    found = [row if isinstance(row, Skipped) else _entry(folder, where, row, keys) for where, row in rows]
    yield from sorted(found, key=lambda entry: entry.name)
    if not found:
        yield Skipped(file, "it names no image")


def _json_rows(file: str, data: bytes) -> Iterator[tuple[str, Any]]:
    """(where it stands, the value or why there is none) of every line."""
    for number, line in lines(data):
        where = f"line {number} of {file}"
        text = attempt(where, decoded, line)
        try:
            yield where, text if isinstance(text, Skipped) else json.loads(text)
        except (ValueError, RecursionError):
            yield where, None


def _csv_rows(file: str, data: bytes, keys: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Likewise of every row; a cell may be quoted and hold line ends."""
    if data.startswith(UTF_16):
        yield file, Skipped(file, "it is not text in UTF-8")
        return
    text = data.decode("utf-8-sig", "surrogateescape")  # a row in another encoding does not end the others
    rows, number = csv.DictReader(io.StringIO(text, newline="")), 0
    try:
        there = rows.fieldnames or []
        if "file_name" not in there or not set(keys) & set(there):
            wanted = f"file_name and {' or '.join(keys)}"
            yield file, Skipped(file, f"its columns must be {wanted}, separated by commas, not {', '.join(there)}")
            return
        for number, row in enumerate(rows, start=1):
            where = f"row {number} of {file}"
            more = None in row  # such as an unquoted comma in a caption, which would lose its end
            yield where, Skipped(where, "it has more cells than columns: quote text with commas") if more else row
    except csv.Error as error:
        yield file, Skipped(file, f"it is damaged after row {number} ({error}): what follows is lost")


def _entry(folder: Path, where: str, entry: Any, keys: tuple[str, ...]) -> CaptionedImage | Skipped:
    name = entry.get("file_name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not any(key in entry for key in keys):
        return Skipped(where, f'it is not like {{"file_name": "cat.jpg", "{keys[0]}": "a cat"}}')
    return attempt(f"{name} ({where})", _with_text, folder, name, entry, keys)


def _with_text(folder: Path, name: str, entry: dict[str, Any], keys: tuple[str, ...]) -> CaptionedImage:
    if "\\" in name and not (folder / name).exists():  # a list that was written on Windows
        name = name.replace("\\", "/")
    path = inside(folder, name)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise Unusable(_FORMAT)
    return _image(name, path, caption_among(entry, keys))


def _image(name: str, path: Path, caption: str) -> CaptionedImage:
    stat = path.stat()
    return CaptionedImage(name, caption, f"{stat.st_size} {stat.st_mtime_ns}", path.read_bytes)
