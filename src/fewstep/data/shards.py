"""webdataset shards: tar files whose members of one name are one sample.

    000.tar    cat.jpg  cat.txt  dog.png  dog.json     a caption is in .txt or .caption, or in .json by its key
               fox.jpg  fox.mask.png  fox.txt          of several images the one with the plain suffix counts

Nothing is unpacked, and no members but images and captions are decoded: links, absolute names and pickles in a tar have
no effect. A shard is indexed once; images are then read where they lie.
"""

from __future__ import annotations

import tarfile
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath

from fewstep.data.entries import Skipped, Unusable, attempt
from fewstep.data.images import IMAGE_SUFFIXES, CaptionedImage, from_files
from fewstep.data.text import MAX_TEXT, caption_in, caption_of

SHARD_SUFFIX = ".tar"
_TEXTS = ("txt", "caption", "text", "json")
_END = 1024  # zeros at the end of a whole tar file
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")  # gzip, bzip2, xz, zstd, zip


def shard_images(
    path: Path, image_column: str | None = None, caption_column: str | None = None
) -> Iterator[CaptionedImage | Skipped]:
    """The samples of a tar file, or of all in a folder and below it in the order of their names.

    Args:
        image_column: suffix of the image, such as "image.png", where samples have several.
        caption_column: key of the caption in .json members; by default text, caption or prompt.

    Raises:
        ValueError: one sentence when there is no tar file.
    """
    return from_files(path, SHARD_SUFFIX, "shards", partial(_samples, image=image_column, column=caption_column))


def _samples(folder: Path, name: str, image: str | None, column: str | None) -> Iterator[CaptionedImage | Skipped]:
    """The samples of one shard; only the whole ones of a shard that is cut short."""
    shard = folder / name
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    wrong: list[Skipped] = []
    twice: dict[str, str] = {}
    size, stamp = shard.stat().st_size, shard.stat().st_mtime_ns
    with open(shard, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.isdir():
                        continue
                    why = refused(member, size)
                    if why:
                        wrong.append(Skipped(f"{name}: {member.name}", why))
                        continue
                    sample, suffix = sample_of(member.name)
                    if not sample:
                        continue
                    if suffix in samples.setdefault(sample, {}):
                        twice[sample] = suffix
                    samples[sample][suffix] = member
        except (tarfile.TarError, ValueError, OverflowError, EOFError):
            wrong.append(Skipped(name, _no_tar(shard)))
        else:
            file.seek(max(0, size - _END))
            if any(file.read()):
                wrong.append(Skipped(name, "it is cut short: its end-of-archive block is missing"))
        for key, members in samples.items():
            if key in twice:
                yield Skipped(f"{name}: {key}", f"it holds {twice[key]} twice, of two samples perhaps")
            else:
                yield attempt(f"{name}: {key}", _sample, f"{name}: {key}", shard, members, str(stamp), image, column)
    yield from wrong


def sample_of(name: str) -> tuple[str, str]:
    """(sample, suffix) of a member; no sample for a hidden file, such as those that macOS adds to every other."""
    folder, _, file = name.rpartition("/")
    key, _, suffix = file.partition(".")
    return f"{folder}/{key}".lstrip("/") if key else "", suffix.lower()


def refused(member: tarfile.TarInfo, size: int) -> str:
    """Why a member of a tar file of ``size`` bytes is not read; empty where it is."""
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        return "it is a link or a device"
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        return "its name lies outside the folder"
    return "it is cut short" if member.offset_data + member.size > size else ""


def _no_tar(shard: Path) -> str:
    if _read(shard, 0, 8).startswith(_COMPRESSED):
        return "it is compressed, and images are read where they lie: decompress it to a plain tar file"
    return "it is cut short or no tar file: what follows is lost"


def _sample(
    name: str, shard: Path, members: Mapping[str, tarfile.TarInfo], stamp: str, image: str | None, column: str | None
) -> CaptionedImage:
    pixels = members[image_among(members, image)]
    kind = text_among(members, column)
    text = _read(shard, members[kind].offset_data, min(members[kind].size, MAX_TEXT + 1))
    caption = caption_in(text, column) if kind.endswith("json") else caption_of(text)
    read = partial(_read, shard, pixels.offset_data, pixels.size)
    return CaptionedImage(name, caption, f"{stamp} {pixels.offset_data} {pixels.size}", read)


def image_among(members: Collection[str], wanted: str | None) -> str:
    """The suffix of the image: ``wanted``, the plain one, or the only one."""
    if wanted is not None:
        suffix = wanted.lower().removeprefix(".")
        if suffix not in members:
            raise Unusable(f"it has no {suffix}, but {', '.join(sorted(members))}")
        return suffix
    found = [suffix for suffix in members if f".{suffix}".endswith(IMAGE_SUFFIXES)]
    if not found:
        raise Unusable(f"it has no image, but {', '.join(sorted(members)) or 'nothing'}")
    plain = [suffix for suffix in found if "." not in suffix] or found
    if len(plain) > 1:
        raise Unusable(f"it has several images ({', '.join(sorted(plain))}): name one in data.image_column")
    return plain[0]


def text_among(members: Collection[str], key: str | None) -> str:
    """The suffix of the caption: the plain one, or the only one; .json before others where a ``key`` is asked for."""
    kinds = _TEXTS if key is None else ("json", *_TEXTS)
    plain = [suffix for suffix in kinds if suffix in members]
    longer = [suffix for suffix in members if suffix.rpartition(".")[2] in kinds]
    if not longer:
        raise Unusable("it has no caption")
    if not plain and len(longer) > 1:
        raise Unusable(f"it has several captions ({', '.join(sorted(longer))}) and none with a plain suffix")
    return (plain or longer)[0]


def _read(shard: Path, start: int, size: int) -> bytes:
    with open(shard, "rb") as file:
        file.seek(start)
        return file.read(size)
