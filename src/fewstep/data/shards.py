"""webdataset shards: tar files whose members of one name are one sample.

    000.tar    cat.jpg  cat.txt  dog.png  dog.json     a caption is in .txt or .caption, or in .json by its key

Nothing is unpacked, and no members but images and captions are decoded: links, absolute names and pickles in a tar have
no effect. A shard is indexed once; images are then read where they lie.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath

from fewstep.data.images import (
    IMAGE_SUFFIXES,
    MAX_TEXT,
    CaptionedImage,
    Skipped,
    Unusable,
    attempt,
    caption_in,
    caption_of,
    from_files,
)

SHARD_SUFFIX = ".tar"
_TEXTS = ("txt", "caption", "text", "json")
_END = 1024  # zeros at the end of a whole tar file


def shard_images(path: Path, caption_column: str | None = None) -> Iterator[CaptionedImage | Skipped]:
    """The samples of a tar file, or of all in a folder and below it in the order of their names.

    Args:
        caption_column: key of the caption in .json members; by default text, caption or prompt.

    Raises:
        ValueError: one sentence when there is no tar file.
    """
    return from_files(path, SHARD_SUFFIX, "shards", partial(_samples, column=caption_column))


def _samples(folder: Path, name: str, column: str | None) -> Iterator[CaptionedImage | Skipped]:
    """The samples of one shard; only the whole ones of a shard that is cut short."""
    shard = folder / name
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    wrong: list[Skipped] = []
    size, stamp = shard.stat().st_size, shard.stat().st_mtime_ns
    with open(shard, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.isdir():
                        continue
                    refused = _refused(member, size)
                    if refused:
                        wrong.append(Skipped(f"{name}: {member.name}", refused))
                        continue
                    key, _, suffix = member.name.rpartition("/")[2].partition(".")
                    place = samples.setdefault(f"{member.name.rpartition('/')[0]}/{key}".lstrip("/"), {})
                    place[suffix.lower()] = member
        except (tarfile.TarError, ValueError, OverflowError, EOFError):
            wrong.append(Skipped(name, "it is cut short or no tar file: what follows is lost"))
        else:
            file.seek(max(0, size - _END))
            if any(file.read()):
                wrong.append(Skipped(name, "it is cut short: its end-of-archive block is missing"))
        for key, members in samples.items():
            yield attempt(f"{name}: {key}", _sample, f"{name}: {key}", shard, members, str(stamp), column)
    yield from wrong


def _refused(member: tarfile.TarInfo, size: int) -> str:
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        return "it is a link or a device"
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        return "its name lies outside the folder"
    return "it is cut short" if member.offset_data + member.size > size else ""


def _sample(
    name: str, shard: Path, members: Mapping[str, tarfile.TarInfo], stamp: str, column: str | None
) -> CaptionedImage:
    image = next((member for suffix, member in members.items() if f".{suffix}".endswith(IMAGE_SUFFIXES)), None)
    if image is None:
        raise Unusable(f"it has no image, but {', '.join(sorted(members)) or 'nothing'}")
    kind = next((suffix for suffix in _TEXTS if suffix in members), None)
    if kind is None:
        raise Unusable("it has no caption")
    text = _read(shard, members[kind].offset_data, min(members[kind].size, MAX_TEXT + 1))
    caption = caption_in(text, column) if kind == "json" else caption_of(text)
    read = partial(_read, shard, image.offset_data, image.size)
    return CaptionedImage(name, caption, f"{stamp} {image.offset_data} {image.size}", read)


def _read(shard: Path, start: int, size: int) -> bytes:
    with open(shard, "rb") as file:
        file.seek(start)
        return file.read(size)
