"""Shards that are read from beginning to end where they lie: tar files by path or URL, and data sets of the hub.

What opens a URL is fsspec's, what reads a data set of the hub is that of `datasets`. Nothing is written to disk.
"""

from __future__ import annotations

import itertools
import re
import sys
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from lzma import LZMAError
from pathlib import Path
from typing import Any, Protocol

from fewstep.data.entries import Skipped, Unusable, attempt
from fewstep.data.files import at_home
from fewstep.data.find import Place
from fewstep.data.images import CaptionedImage, files_of
from fewstep.data.listing import once
from fewstep.data.shards import SHARD_SUFFIX, image_among, refused, sample_of, text_among
from fewstep.data.tables import TABLE_SUFFIX, columns_of, library, row_of
from fewstep.data.text import MAX_TEXT, caption_in, caption_of
from fewstep.models.hub import short_error

Entry = CaptionedImage | Skipped
_MOST_SHARDS = 1_000_000
_MOST_BYTES = 2**28  # of an image's file
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, LZMAError)
_BRACES = re.compile(r"\{([^{}]*)\}")


class Shards(Protocol):
    """Parts of a data set.

    Attributes:
        names: theirs.
    """

    names: Sequence[str]

    def read(self, number: int) -> Iterator[Entry]:
        """The entries of a shard in their order, with the bytes of their images.

        Raises:
            OSError: it is not there, or the network failed.
        """


def open_shards(place: Place) -> Shards:
    """The shards at a place; no image is read yet.

    Raises:
        ValueError: one sentence: there are none, or what reads them is not installed.
    """
    return once(("shards", place), lambda: _opened(place))


def _opened(place: Place) -> Shards:
    if place.source == "webdataset":
        return TarShards(_found(place.path, SHARD_SUFFIX, "shards"), place.image_column, place.caption_column)
    files = _found(place.path, TABLE_SUFFIX, "tables") if place.source == "parquet" else ()
    return TableShards(place, files)


class TarShards:
    """webdataset shards, plain or compressed by gzip, bzip2 or xz.

    The members of a sample follow each other. Images and captions are read as `fewstep.data.shards` does.

    Args:
        urls: of the files. image, column: as `shard_images` has them.
    """

    def __init__(self, urls: Sequence[str], image: str | None, column: str | None) -> None:
        self.names, self._image, self._column = urls, image, column

    def read(self, number: int) -> Iterator[Entry]:
        import fsspec

        url = self.names[number]
        name = url.rpartition("/")[2]
        with fsspec.open(url, "rb") as file:
            try:
                with tarfile.open(fileobj=file, mode="r|*") as tar:
                    for sample, members in _samples(tar):
                        where = f"{name}: {sample}"
                        yield attempt(where, self._entry, where, members)
            except _DAMAGED:
                yield Skipped(name, "it is cut short, damaged, or no tar file: what follows is lost")

    def _entry(self, name: str, members: dict[str, bytes] | str) -> CaptionedImage:
        if isinstance(members, str):
            raise Unusable(members)
        image, kind = image_among(members, self._image), text_among(members, self._column)
        text = members[kind]
        caption = caption_in(text, self._column) if kind.endswith("json") else caption_of(text)
        return CaptionedImage(name, caption, "", partial(_identity, members[image]))


def _identity(data: bytes) -> bytes:
    return data


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes] | str]]:
    """(name, members by their suffix, or why they cannot be used) of the samples, as they come."""
    files = (member for member in tar if not member.isdir() and sample_of(member.name)[0])
    for sample, members in itertools.groupby(files, lambda member: sample_of(member.name)[0]):
        read: dict[str, bytes] = {}
        wrong = ""
        for member in members:
            suffix = sample_of(member.name)[1]
            wrong = wrong or refused(member, sys.maxsize) or (f"it holds {suffix} twice" if suffix in read else "")
            most = MAX_TEXT if suffix.rpartition(".")[2] in ("txt", "caption", "text", "json") else _MOST_BYTES
            content = None if wrong else tar.extractfile(member)
            read[suffix] = b"" if content is None else content.read(most + 1)
            if len(read[suffix]) > _MOST_BYTES:
                wrong, read[suffix] = f"its {suffix} is larger than {_MOST_BYTES >> 20} MB", b""
        yield sample, wrong or read


class TableShards:
    """The files of a data set of the hub, or parquet files at any URL, through `datasets`.

    Raises:
        ValueError: one sentence: `datasets` is not installed, or there is no such data set, split or column.
    """

    def __init__(self, place: Place, files: Sequence[str]) -> None:
        datasets = library()
        try:
            if files:
                data = datasets.load_dataset("parquet", data_files={"train": [*files]}, split="train", streaming=True)
            else:
                data = datasets.load_dataset(place.path, split=place.split, streaming=True)
            data = data if data.features else data._resolve_features()
        except Exception as error:  # several libraries read these files, each with errors of its own
            raise ValueError(
                f"data.path: the data set '{place.path}' cannot be loaded: {short_error(error)}."
            ) from None
        schema = data.features.arrow_schema
        self._image, self._captions = columns_of(schema, place.image_column, place.caption_column, place.path)
        if isinstance(data.features[self._image], datasets.Image):
            data = data.cast_column(self._image, datasets.Image(decode=False))
        self._data, count = data, int(data.num_shards)
        self.names = files if len(files) == count else [f"{place.path} {i} of {count}" for i in range(1, count + 1)]

    def read(self, number: int) -> Iterator[Entry]:
        name = self.names[number].rpartition("/")[2]
        for row, found in enumerate(self._data.shard(num_shards=len(self.names), index=number)):
            yield row_of(f"{name}: row {row}", found, self._captions, "", partial(_image_in, found[self._image]))


def _image_in(cell: Any) -> bytes:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise Unusable("it has no image")
    return data


# ---------------------------------------------------------------- names of shards


def _found(path: str, suffix: str, kind: str) -> Sequence[str]:
    """The files that a path, folder, URL or pattern names.

    Raises:
        ValueError: one sentence when there are none, or a package is missing.
    """
    if "://" not in path:
        local = Path(at_home(path))
        if local.is_dir():
            files, _ = files_of(local, suffix)
            if not files:
                raise ValueError(f"data.path: there are no {kind} ({suffix}) in '{path}'.")
            return [str(file) for file in files]
        path = str(local)
    names = expanded(path)
    try:
        return _there(names)
    except ImportError:
        raise ValueError(f"data.path: reading {path} needs a package: pip install 'fewstep[data]'.") from None
    except _Absent as error:
        raise ValueError(f"data.path: there is no shard '{error}'.") from None
    except Exception as error:  # each kind of storage has errors of its own
        raise ValueError(f"data.path: {path} cannot be read ({short_error(error)}).") from None


class _Absent(Exception):
    """A shard that is not there."""


def _there(names: Sequence[str]) -> list[str]:
    """The names, patterns among them spelled out. All local files are looked for, of remote ones the first and last.

    Raises:
        _Absent: with the name of the one that is not there.
    """
    import fsspec

    found: list[str] = []
    for name in names:
        if "*" in name:
            system, path = fsspec.core.url_to_fs(name)
            matching = [system.unstrip_protocol(each) for each in sorted(system.glob(path))]
            if not matching:
                raise _Absent(name)
            found += matching
        else:
            found.append(name)
    for name in found if "://" not in found[0] else (found[0], found[-1]):
        system, path = fsspec.core.url_to_fs(name)
        if not system.exists(path):
            raise _Absent(name)
    return found


def expanded(pattern: str) -> list[str]:
    """``{000..012}`` and ``{a,b}`` spelled out, as shells do.

    Raises:
        ValueError: they are too many, or none.
    """
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    first, last = (int(span[1]), int(span[2])) if span else (0, 0)
    if span and not 0 <= last - first < _MOST_SHARDS:
        raise ValueError(f"data.path: {found[0]} is no range of 1 to {_MOST_SHARDS:,} shards.")
    choices = [f"{i:0{len(span[1])}d}" for i in range(first, last + 1)] if span else found[1].split(",")
    before, after = pattern[: found.start()], expanded(pattern[found.end() :])
    if len(choices) * len(after) > _MOST_SHARDS:
        raise ValueError(f"data.path: {pattern} names more than {_MOST_SHARDS:,} shards.")
    return [before + choice + rest for choice in choices for rest in after]
