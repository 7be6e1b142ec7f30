"""Images and captions, encoded once by the teacher's own VAE and text encoders, and kept on disk.

Files hold some hundred images each and exist whole or not at all: an interrupted encoding continues where it stopped,
and files of other images, captions, sizes or another teacher are encoded again. ``skipped.txt`` beside them lists what
was passed over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.data.buckets import Size, bucket_sizes, nearest
from fewstep.data.entries import Skipped, attempt
from fewstep.data.files import replace_tensors, replace_text, text_hash
from fewstep.data.images import Collection, pixels
from fewstep.data.sources import Buckets, LatentSource, Prompts
from fewstep.models.cond import Cond
from fewstep.models.families import Teacher, vae_batch_size

_PER_FILE = 512
_LARGEST = 2**31  # bytes that may stay on an accelerator; the host sends a batch in about a millisecond
SKIPPED = "skipped.txt"

Advance = Callable[[int], None]
"""Called with the number of images done."""


def image_latents(
    path: Path,
    teacher: Teacher,
    found: Collection,
    device: str = "cpu",
    advance: Advance | None = None,
    buckets: bool = False,
) -> LatentSource | Buckets:
    """Images of any data set as latents with prompt embeddings, from ``path`` if it holds exactly these.

    Latents are kept as their posterior's mean and standard deviation, in float16, and sampled anew at every visit.
    All are encoded again when any image or caption has changed.

    Args:
        buckets: crop each image to the bucket nearest to its shape; otherwise all to squares.

    Raises:
        ValueError: one sentence when no image can be used.
    """
    side = teacher.image_size
    sizes = bucket_sizes(side, teacher.multiple) if buckets else ((side, side),)

    def read(rows: range) -> Iterator[Row | Skipped]:
        for image in found.images[rows.start : rows.stop]:
            read_pixels = attempt(image.name, pixels, image, lambda height, width: nearest(height, width, sizes))
            yield read_pixels if isinstance(read_pixels, Skipped) else (read_pixels, image.caption)

    # the key says "pictures" since the first version: another word would have every data set encoded again
    name = f"pictures {found.fingerprint()}{' in buckets' if buckets else ''}"
    source = Encoding(path, teacher, name, len(found.images), read, found.skipped).load(device, advance)
    assert not isinstance(source, Prompts)
    return source


def prompt_latents(
    path: Path,
    teacher: Teacher,
    prompts: Sequence[str],
    device: str = "cpu",
    advance: Advance | None = None,
    skipped: tuple[Skipped, ...] = (),
) -> Prompts:
    """Prompts without images, encoded and kept likewise, for methods that need no images."""
    digest = text_hash("\n".join(prompts))

    def read(rows: range) -> Iterator[Row]:
        return ((None, prompts[i]) for i in rows)

    found = Encoding(path, teacher, f"prompts {digest}", len(prompts), read, skipped).load(device, advance)
    assert isinstance(found, Prompts)
    return found


def home(device: str, size: int) -> str:
    """The device that holds ``size`` bytes of encoded data: ``device`` itself, or the host for large data sets.

    T5's embeddings take megabytes a caption: 4,000 images for FLUX are 21 GB.
    """
    return device if size <= _LARGEST else "cpu"


def fingerprint(source: LatentSource | Buckets | Prompts) -> str:
    """A short hash of the data's exact values."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in source.content():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- encoding

Row = tuple[Tensor | None, str]
"""Pixels [3, height, width] in uint8, or none, and the caption."""
_Parts = dict[Size, dict[str, Tensor]]
"""Encoded rows by the size of their images: "mean", "std", and the condition's `Cond.flat`."""


@dataclass
class Encoding:
    """A data set that is encoded file by file.

    Args:
        path: the files' common name, to which each adds its number.
        name: identifies the rows. size: how many there are.
        read: yields the rows of a range.
        skipped: what was passed over before.
    """

    path: Path
    teacher: Teacher
    name: str
    size: int
    read: Callable[[range], Iterator[Row | Skipped]]
    skipped: tuple[Skipped, ...] = ()

    def load(self, device: str, advance: Advance | None) -> LatentSource | Buckets | Prompts:
        """All rows, from the files that exist and from those that are encoded now."""
        pieces, passed = [], [str(entry) for entry in self.skipped]
        for number, first in enumerate(range(0, self.size, _PER_FILE)):
            rows = range(first, min(first + _PER_FILE, self.size))
            parts, without = self._kept(number, rows) or self._make(number, rows, advance or (lambda done: None))
            pieces.append(parts)
            passed += without
        self._list(passed)
        if not any(pieces):
            raise ValueError(f"data.path: none of the {self.size} images could be used, the first: {passed[0]}.")
        return _source(_joined(pieces), device, self.teacher.latent_shape)

    def _about(self, rows: range) -> dict[str, str]:
        return {
            "source": self.name,
            "rows": f"{rows.start} to {rows.stop} of {self.size}",
            "teacher": self.teacher.origin,
            "image_size": str(self.teacher.image_size),
        }

    def _file(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}-{number:05d}.safetensors")

    def _kept(self, number: int, rows: range) -> tuple[_Parts, list[str]] | None:
        """The file's rows and what was skipped in it, or None when it is missing, damaged, or holds other rows."""
        try:
            with safe_open(self._file(number), framework="pt") as file:
                about = file.metadata() or {}
                without = json.loads(about.pop("skipped", "[]"))
                if about != self._about(rows):
                    return None
                parts: _Parts = {}
                for key in file.keys():  # noqa: SIM118
                    sides, _, name = key.partition("/")
                    height, width = map(int, sides.split("x"))
                    parts.setdefault((height, width), {})[name] = file.get_tensor(key)
                return parts, without
        except (OSError, SafetensorError, ValueError):
            return None

    def _make(self, number: int, rows: range, advance: Advance) -> tuple[_Parts, list[str]]:
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
        parts = _joined(done)
        flat = {f"{h}x{w}/{name}": t for (h, w), tensors in parts.items() for name, t in tensors.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_tensors(self._file(number), flat, {**self._about(rows), "skipped": json.dumps(without)})
        advance(rows.stop)
        return parts, without

    def _size(self, image: Tensor | None) -> Size:
        side = self.teacher.image_size
        return (side, side) if image is None else (int(image.shape[1]), int(image.shape[2]))

    def _encoded(self, group: Sequence[Row], size: Size) -> dict[str, Tensor]:
        images = [image for image, _ in group if image is not None]
        tensors: dict[str, Tensor] = {}
        if images:
            mean, std = self.teacher.encode_images(torch.stack(images).float() / 127.5 - 1)
            tensors = {"mean": mean.half(), "std": std.half()}
        cond = self.teacher.encode_prompts([caption for _, caption in group], size=size).to(torch.float16)
        tensors |= cond.flat()
        return {name: t.cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}

    def _list(self, passed: Sequence[str]) -> None:
        """Write ``skipped.txt``; names of files need not be text."""
        lines = (" ".join(line.split()).encode("utf-8", "backslashreplace").decode() for line in passed)
        listed, text = self.path.with_name(SKIPPED), "".join(f"{line}\n" for line in lines)
        if not passed:
            listed.unlink(missing_ok=True)
        elif not listed.is_file() or listed.read_text(encoding="utf-8") != text:  # other processes find it written
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(listed, text)


def _joined(pieces: Sequence[_Parts]) -> _Parts:
    """The rows of all pieces, size by size."""
    groups: dict[Size, list[dict[str, Tensor]]] = {}
    for piece in pieces:
        for size, tensors in piece.items():
            groups.setdefault(size, []).append(tensors)
    return {size: Cond.cat_flat(group) for size, group in sorted(groups.items())}


def _source(parts: _Parts, device: str, latent_shape: tuple[int, ...]) -> LatentSource | Buckets | Prompts:
    place = home(device, sum(t.nbytes for tensors in parts.values() for t in tensors.values()))
    sources = []
    for tensors in parts.values():
        there = {name: t.to(place) for name, t in tensors.items()}
        cond = Cond.from_flat(there)
        if "mean" not in there:
            return Prompts(cond, latent_shape)
        sources.append(LatentSource(there["mean"], there["std"], cond))
    return sources[0] if len(sources) == 1 else Buckets(sources)
