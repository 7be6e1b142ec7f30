"""Images and captions, encoded once by the teacher's own VAE and text encoders, and kept on disk.

Files hold some hundred images each and exist whole or not at all: an interrupted encoding continues where it stopped,
and files of other images, captions, sizes or another teacher are encoded again. Several processes share the files, and
threads decode images while the autoencoder works. ``skipped.txt`` beside them lists what was passed over.

Captions may stay text, which is encoded while a run trains (``live``, `fewstep.data.captions`).
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.data.buckets import Size, bucket_sizes, nearest
from fewstep.data.captions import as_bytes, encoder, null_of
from fewstep.data.entries import Skipped, attempt, one_line
from fewstep.data.files import replace_tensors, replace_text, text_hash
from fewstep.data.images import CaptionedImage, Collection, decode, quiet_pillow
from fewstep.data.rows import HELD, Stored, checksum, cut_padding, joined
from fewstep.data.sources import Buckets, LatentSource, Prompts
from fewstep.models.cond import Cond
from fewstep.models.families import Teacher, vae_batch_size
from fewstep.models.families.family import CLIP_TOKENS

_PER_FILE = 512  # rows of a file, at most
_FILE = 300_000_000  # bytes of a file, about
_THREADS = 8  # that decode images, at most
SKIPPED = "skipped.txt"

T = TypeVar("T")
R = TypeVar("R")
Advance = Callable[[int], None]
"""Called with the number of images done."""


@dataclass(frozen=True)
class Share:
    """This process's part of the encoding.

    Attributes:
        rank, count: its number, and how many processes encode together.
        wait: returns when all of them have called it.
    """

    rank: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None


def image_latents(
    path: Path,
    teacher: Teacher,
    found: Collection,
    advance: Advance | None = None,
    buckets: bool = False,
    share: Share = Share(),
    live: bool = False,
) -> LatentSource | Buckets:
    """Images of any data set as latents with prompt embeddings, from ``path`` if it holds exactly these.

    Latents are kept as their posterior's mean and standard deviation, in float16, and sampled anew at every visit.
    All are encoded again when any image or caption has changed.

    Args:
        buckets: crop each image to the bucket nearest to its shape; otherwise all to squares.
        share: of this process, where several encode together.
        live: keep the captions as text, which is encoded when its batch is asked for.

    Raises:
        ValueError: one sentence when no image can be used.
    """
    side = teacher.image_size
    sizes = bucket_sizes(side, teacher.multiple) if buckets else ((side, side),)

    def row(image: CaptionedImage) -> Row | Skipped:
        pixels = attempt(image.name, decode, image, lambda height, width: nearest(height, width, sizes))
        return pixels if isinstance(pixels, Skipped) else (pixels, image.caption)

    def read(rows: range) -> Iterator[Row | Skipped]:
        with quiet_pillow():
            yield from in_order(row, found.images[rows.start : rows.stop], loader_threads(share.count))

    # the key says "pictures" since the first version: another word would have every data set encoded again
    name = f"pictures {found.fingerprint()}{' in buckets' if buckets else ''}"
    source = Encoding(path, teacher, name, len(found.images), read, found.skipped, live).load(advance, share)
    assert not isinstance(source, Prompts)
    return source


def prompt_latents(
    path: Path,
    teacher: Teacher,
    prompts: Sequence[str],
    advance: Advance | None = None,
    skipped: tuple[Skipped, ...] = (),
    share: Share = Share(),
    live: bool = False,
) -> Prompts:
    """Prompts without images, encoded and kept likewise, for methods that need no images."""
    digest = text_hash("\n".join(prompts))

    def read(rows: range) -> Iterator[Row]:
        return ((None, prompts[i]) for i in rows)

    found = Encoding(path, teacher, f"prompts {digest}", len(prompts), read, skipped, live).load(advance, share)
    assert isinstance(found, Prompts)
    return found


def loader_threads(processes: int) -> int:
    """How many threads each of so many processes should decode images with."""
    return min(_THREADS, max(1, (os.cpu_count() or 1) // processes))


def in_order(make: Callable[[T], R], items: Sequence[T], threads: int) -> Iterator[R]:
    """``make`` of every item in their order, made by threads that are a few items ahead."""
    with ThreadPoolExecutor(threads, "fewstep-decode") as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


# ---------------------------------------------------------------- encoding

Row = tuple[Tensor | None, str]
"""Pixels [3, height, width] in uint8, or none, and the caption."""
_Parts = dict[Size, dict[str, Tensor]]
"""Encoded rows by the size of their images: "mean", "std", and the condition's `Cond.flat`."""


@dataclass(frozen=True)
class _File:
    """A file that is there: which sizes of images it holds, what was skipped in it, and the hash of its values."""

    path: Path
    sizes: frozenset[Size]
    skipped: tuple[str, ...]
    checksum: str


@dataclass
class Encoding:
    """A data set that is encoded file by file.

    Args:
        path: the files' common name, to which each adds its number.
        name: identifies the rows. size: how many there are.
        read: yields the rows of a range.
        skipped: what was passed over before.
        live: captions stay text.
    """

    path: Path
    teacher: Teacher
    name: str
    size: int
    read: Callable[[range], Iterator[Row | Skipped]]
    skipped: tuple[Skipped, ...] = ()
    live: bool = False
    _nulls: dict[Size, dict[str, Tensor]] = field(default_factory=dict)

    def load(self, advance: Advance | None = None, share: Share = Share()) -> LatentSource | Buckets | Prompts:
        """All rows: encode this process's share of those that no file holds yet, and wait for the others."""
        per_file = self._rows_per_file(share.count)
        pieces = [range(first, min(first + per_file, self.size)) for first in range(0, self.size, per_file)]
        kept = {number: self._kept(number, rows) for number, rows in enumerate(pieces)}
        share.wait()  # every process must have looked before one of them writes
        missing = [number for number, file in kept.items() if file is None]
        for number in missing[share.rank :: share.count]:
            self._make(number, pieces[number], advance or (lambda done: None))
        share.wait()
        kept |= {number: self._kept(number, pieces[number]) for number in missing}
        files = [file for file in kept.values() if file is not None]
        if len(files) < len(pieces):
            raise ValueError(f"{self.path.parent}: files of encoded data vanished or were damaged as soon as written.")
        passed = [str(entry) for entry in self.skipped] + [entry for file in files for entry in file.skipped]
        if share.rank == 0:
            self._list(passed)
        if not any(file.sizes for file in files):
            raise ValueError(f"data.path: none of the {self.size} images could be used, the first: {passed[0]}.")
        return self._source(files)

    def _rows_per_file(self, processes: int) -> int:
        """As many as in the files that are there; else as many as make a file of sensible size for every process."""
        for path in sorted(self.path.parent.glob(f"{self.path.name}-[0-9]*.safetensors")):
            about, number = _metadata(path), path.stem.rpartition("-")[2]
            first, _, end = about.get("rows", "").partition(" of ")[0].partition(" to ")
            if about.get("source") == self.name and all(map(str.isdecimal, (number, first, end))):
                return int(first) // int(number) if int(number) else int(end)
        latents = 4 * math.prod(self.teacher.latent_shape)  # mean and standard deviation in float16
        texts = sum(2 * math.prod(shape) for shape in self.teacher.family.shapes(CLIP_TOKENS).values())
        most = max(1, min(_PER_FILE, _FILE // (latents + (0 if self.live else texts))))
        if processes == 1:
            return most
        files = -(-self.size // most)
        return -(-self.size // (-(-files // processes) * processes))

    def _about(self, rows: range) -> dict[str, str]:
        return {
            "source": self.name,
            "rows": f"{rows.start} to {rows.stop} of {self.size}",
            "teacher": self.teacher.origin,
            "image_size": str(self.teacher.image_size),
            **({"text": "live"} if self.live else {}),
        }

    def _file(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}-{number:05d}.safetensors")

    def _kept(self, number: int, rows: range) -> _File | None:
        """What the file holds, or None when it is missing, damaged, or holds other rows. No row is read."""
        path = self._file(number)
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                without = json.loads(about.pop("skipped", "[]"))
                found = about.pop("checksum", None)
                if about != self._about(rows):
                    return None
                keys = list(file.keys())
                # files of versions up to 0.1 have no checksum
                found = found or checksum({key: file.get_tensor(key) for key in keys})
            sizes = {tuple(map(int, key.partition("/")[0].split("x"))) for key in keys}
            return _File(path, frozenset((height, width) for height, width in sizes), tuple(without), found)
        except (OSError, SafetensorError, ValueError):
            return None

    def _make(self, number: int, rows: range, advance: Advance) -> None:
        """Encode these rows in batches of one size, and write their file."""
        batch_size = vae_batch_size(self.teacher.image_size)
        without: list[str] = []
        waiting: dict[Size, list[Row]] = {}
        done: list[_Parts] = []
        for row, entry in zip(rows, self.read(rows), strict=True):
            if isinstance(entry, Skipped):
                without.append(str(entry))
                continue
            size = self._size(entry[0])
            waiting.setdefault(size, []).append(entry)
            if len(waiting[size]) == batch_size:
                done.append({size: self._encoded(waiting.pop(size), size)})
                advance(row + 1)
        done += [{size: self._encoded(group, size)} for size, group in waiting.items()]
        parts = {size: cut_padding(part) for size, part in _joined(done).items()}
        flat = {f"{h}x{w}/{name}": t for (h, w), part in parts.items() for name, t in part.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        about = {**self._about(rows), "skipped": json.dumps(without), "checksum": checksum(flat)}
        replace_tensors(self._file(number), flat, about)
        advance(rows.stop)

    def _size(self, image: Tensor | None) -> Size:
        side = self.teacher.image_size
        return (side, side) if image is None else (int(image.shape[1]), int(image.shape[2]))

    def _encoded(self, group: Sequence[Row], size: Size) -> dict[str, Tensor]:
        images = [image for image, _ in group if image is not None]
        tensors: dict[str, Tensor] = {}
        if images:
            mean, std = self.teacher.encode_images(torch.stack(images).float() / 127.5 - 1)
            tensors = {"mean": mean.half(), "std": std.half()}
        captions = [caption for _, caption in group]
        if self.live:
            self.teacher.remark_on_length(captions)
            if size not in self._nulls:
                self._nulls[size] = null_of(self.teacher, size)
            tensors |= as_bytes(captions) | self._nulls[size]
        else:
            cond = self.teacher.encode_prompts(captions, size=size)
            tensors |= cond.to(self.teacher.family.text_dtype).flat()
        return {name: t.cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}

    def _list(self, passed: Sequence[str]) -> None:
        """Write ``skipped.txt``."""
        listed, text = self.path.with_name(SKIPPED), "".join(f"{one_line(entry)}\n" for entry in passed)
        if not passed:
            listed.unlink(missing_ok=True)
        elif not listed.is_file() or listed.read_text(encoding="utf-8") != text:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(listed, text)

    def _source(self, files: Sequence[_File]) -> LatentSource | Buckets | Prompts:
        """The rows of all files, size by size: in memory if they are few."""
        whole = joined(file.checksum for file in files)
        sizes = sorted(frozenset().union(*(file.sizes for file in files)))
        stored = [
            Stored([file.path for file in files if (height, width) in file.sizes], f"{height}x{width}/", whole)
            for height, width in sizes
        ]
        small = sum(rows.nbytes for rows in stored) <= HELD
        found = [rows.held() if small else rows for rows in stored]
        encoders = [encoder(self.teacher, size) if self.live else None for size in sizes]
        if "mean" not in found[0]:
            return Prompts(found[0], self.teacher.latent_shape, encoders[0])
        sources = [LatentSource.of(rows, encode) for rows, encode in zip(found, encoders, strict=True)]
        return sources[0] if len(sources) == 1 else Buckets(sources)


def _metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; nothing of a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def _joined(pieces: Sequence[_Parts]) -> _Parts:
    """The rows of all pieces, size by size."""
    groups: dict[Size, list[dict[str, Tensor]]] = {}
    for piece in pieces:
        for size, tensors in piece.items():
            groups.setdefault(size, []).append(tensors)
    return {size: Cond.cat_flat(group) for size, group in sorted(groups.items())}
