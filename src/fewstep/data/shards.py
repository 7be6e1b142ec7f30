"""webdataset shards: tar files whose members of one name are one sample.

    000.tar    cat.jpg  cat.txt  dog.png  dog.json     a caption is in .txt or .caption, or in .json by its key

Nothing is unpacked and no member but pictures and captions is ever decoded: whatever a tar's links, its absolute names
or its pickles say, nobody listens. A shard is indexed once; pictures are then read where they lie.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath

from fewstep.data.pictures import KINDS, MOST_TEXT, Picture, Skipped, caption_in, caption_of, inside

_TEXTS = ("txt", "caption", "text", "json")
_END = 1024  # zeros at the end of a whole tar file


def shards_of(path: Path) -> list[Path]:
    """The tar files that ``path`` is or holds."""
    return [path] if path.is_file() else sorted(path.rglob("*.tar"))


def shard_pictures(path: Path, caption_column: str | None = None) -> Iterator[Picture | Skipped]:
    """The samples of a tar file, or of all in a folder and below it in the order of their names.

    Args:
        caption_column: key of the caption in .json members; by default text, caption or prompt.

    Raises:
        ValueError: one sentence when there is no tar file.
    """
    shards = shards_of(path) if path.exists() else []
    if not shards:
        raise ValueError(f"data.path: there are no shards (.tar) in '{path}'.")
    return _all(path if path.is_dir() else path.parent, shards, caption_column)


def _all(folder: Path, shards: list[Path], column: str | None) -> Iterator[Picture | Skipped]:
    for shard in shards:
        name = str(shard.relative_to(folder))
        try:
            inside(folder, name)
        except ValueError as error:
            yield Skipped(name, str(error))
            continue
        yield from _samples(name, shard, column)


def _samples(name: str, shard: Path, column: str | None) -> Iterator[Picture | Skipped]:
    """The samples of one shard; of one that is cut short those that are whole."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    wrong: list[Skipped] = []
    size, stamp = shard.stat().st_size, shard.stat().st_mtime_ns
    with open(shard, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.isdir():
                        continue
                    why = _refused(member, size)
                    if why:
                        wrong.append(Skipped(f"{name}: {member.name}", why))
                        continue
                    key, _, suffix = member.name.rpartition("/")[2].partition(".")
                    place = samples.setdefault(f"{member.name.rpartition('/')[0]}/{key}".lstrip("/"), {})
                    place[suffix.lower()] = member
        except (tarfile.TarError, ValueError, OverflowError, EOFError):
            wrong.append(Skipped(name, "it is cut short or no tar file: what follows is lost"))
        else:
            file.seek(max(0, size - _END))
            if any(file.read()):
                wrong.append(Skipped(name, "it is cut short: it lacks the mark of its end"))
        for key, members in samples.items():
            yield _sample(f"{name}: {key}", shard, members, str(stamp), column)
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
) -> Picture | Skipped:
    picture = next((member for suffix, member in members.items() if f".{suffix}".endswith(KINDS)), None)
    try:
        if picture is None:
            raise ValueError(f"it has no picture, but {', '.join(sorted(members)) or 'nothing'}")
        text = next((suffix for suffix in _TEXTS if suffix in members), None)
        if text is None:
            raise ValueError("it has no caption")
        said = _read(shard, members[text].offset_data, min(members[text].size, MOST_TEXT + 1))
        caption = caption_of(said) if text != "json" else caption_in(said, column)
    except ValueError as error:
        return Skipped(name, str(error))
    read = partial(_read, shard, picture.offset_data, picture.size)
    return Picture(name, caption, f"{stamp} {picture.offset_data} {picture.size}", read)


def _read(shard: Path, start: int, size: int) -> bytes:
    with open(shard, "rb") as file:
        file.seek(start)
        return file.read(size)
