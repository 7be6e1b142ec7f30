"""Rows of encoded data: few are held in memory, many stay in their files and are read one micro-batch ahead.

Rows are read by position into ordinary (on CUDA pinned) memory, not mapped: mapped pages count as the process's own
memory until the system takes them back, and a file that shrinks while it is mapped ends the process.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

HELD = 2**26
"""Bytes of data that are held in memory; more stay in their files."""
NULL = "null."
"""How names of tensors [1, ...] begin that serve all rows: the null condition (`Cond.flat`)."""
TOKENS, MASK = "cond.prompt_embeds", "cond.prompt_mask"
"""Text tokens [N, tokens, ...], and which of them are not padding [N, tokens]."""
LENGTH = "cond.prompt_length"
"""How many text tokens each row has [N], for networks that need these numbers: texts of no common length."""
CUT, LENGTHS = "cut.prompt_embeds", "cut.lengths"
"""In files: the tokens of all rows one after the other, without padding, and how many each row has."""
CAPTION = "caption"
"""Captions that are kept as text, in UTF-8 [N, bytes]; NUL fills the shorter ones."""
TEXT, TEXT_LENGTHS = "cut.caption", "cut.caption_lengths"
"""In files: the bytes of all captions one after the other, and how many each has."""
_CUTS = {CUT: (LENGTHS, TOKENS), TEXT: (TEXT_LENGTHS, CAPTION)}
"""What files hold one after the other: under which name the lengths are, and that of the rows."""
Picked = npt.NDArray[np.int64]
Tensors = dict[str, Tensor]
T = TypeVar("T")

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Rows(Protocol):
    """N rows of named tensors.

    Attributes:
        null: tensors [1, ...] that serve all rows, by their names.
        checksum: a short hash of all values.
    """

    null: Tensors

    @property
    def checksum(self) -> str: ...

    def __len__(self) -> int: ...

    def shape(self, name: str) -> torch.Size:
        """Shape of the tensor ``name`` of one row."""

    def take(self, picked: Picked, pin: bool = False) -> Tensors:
        """These rows of every tensor but `null`, [len(picked), ...] each.

        Args:
            pin: into pinned memory, from which copies to an accelerator do not wait.
        """


def cut_padding(tensors: Mapping[str, Tensor]) -> Tensors:
    """Rows without the tokens that their mask leaves out, as a file holds them; `Stored` puts zeros in their place.

    Only where the network is given the mask or the lengths, so that their values change nothing: PixArt. The text
    tokens of FLUX and SD3 attend to the padding of T5, whose values depend on the prompt, and so do those of CLIP: they
    stay whole.

    Args:
        tensors: of some rows, as `Cond.flat` names them.
    """
    mask, tokens, lengths = tensors.get(MASK), tensors.get(TOKENS), tensors.get(LENGTH)
    if tokens is None or (mask is None and lengths is None):
        return dict(tensors)
    lengths = mask.long().sum(1) if lengths is None else lengths.to(tokens.device)  # type: ignore[union-attr]
    kept = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    if mask is not None and not torch.equal(kept, mask.bool()):  # the tokens left out are not the last ones
        return dict(tensors)
    others = {name: t for name, t in tensors.items() if name not in (MASK, TOKENS)}
    return others | {CUT: tokens[kept], LENGTHS: lengths.int()}


class Held:
    """Rows in the memory of any device.

    Args:
        tensors: [N, ...] each; those whose names begin with "null." may have one row for all.
    """

    def __init__(self, tensors: Mapping[str, Tensor], checksum: str = "") -> None:
        shared = {name for name, t in tensors.items() if name.startswith(NULL) and len(t) == 1}
        self.null = {name: tensors[name] for name in shared}
        self.tensors = {name: t for name, t in tensors.items() if name not in shared}
        self._checksum = checksum
        sizes = {len(t) for t in self.tensors.values()}
        if len(sizes) > 1:
            raise ValueError(f"Rows need tensors of one length, not {sorted(sizes)}.")

    @property
    def checksum(self) -> str:
        return self._checksum or checksum({**self.tensors, **self.null})

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(t.nbytes for t in self.tensors.values())

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> torch.Size:
        return self.tensors[name].shape[1:]

    def take(self, picked: Picked, pin: bool = False) -> Tensors:
        rows = torch.from_numpy(picked)
        found = {name: t.index_select(0, rows.to(t.device)) for name, t in self.tensors.items()}
        return {name: t.pin_memory() if pin and t.device.type == "cpu" else t for name, t in found.items()}


class Stored:
    """Rows that stay in safetensors files, one file after the other.

    Args:
        files: of the same tensors. prefix: how the names of those begin that are read; it is left out.
        checksum: of all of them.

    Raises:
        ValueError: a file is damaged.
    """

    def __init__(self, files: Sequence[Path], prefix: str = "", checksum: str = "") -> None:
        self._files = [(path, blocks(path, prefix)) for path in files]
        self._checksum = checksum
        first = self._files[0][1]
        self.null = {name: _whole(files[0], block) for name, block in first.items() if name.startswith(NULL)}
        names = [name for name in first if name not in (*self.null, CUT, LENGTHS, TEXT, TEXT_LENGTHS)]
        self._shapes = {name: (first[name].shape[1:], first[name].dtype) for name in names}
        of_rows = (next(b for name, b in found.items() if name not in (*self.null, *_CUTS)) for _, found in self._files)
        counts = [block.shape[0] for block in of_rows]
        # of each file, what has rows of several lengths, with the place of every row, and of the end
        self._cuts: list[dict[str, Picked]] = []
        for path, found in self._files:
            cuts = {kind: _whole(path, found[name]).long() for kind, (name, _) in _CUTS.items() if name in found}
            self._cuts.append({kind: np.append(0, lengths.cumsum(0).numpy()) for kind, lengths in cuts.items()})
            for name in (TOKENS, MASK) if CUT in cuts else ():
                like = self.null.get(name.replace("cond.", NULL))
                if like is not None:
                    self._shapes[name] = (like.shape[1:], like.dtype)
            if TEXT in cuts:
                longest = max(int(cuts[TEXT].max()), *self._shapes.get(CAPTION, ((1,),))[0])
                self._shapes[CAPTION] = (torch.Size([longest]), torch.uint8)
        self._ends = np.cumsum(counts)
        self._of_any_length = LENGTH in first  # elsewhere all texts, and the null, have one padded length
        if self._of_any_length:
            self._shapes |= self._padded_to(max(int(np.diff(cuts[CUT]).max()) for cuts in self._cuts))

    @property
    def checksum(self) -> str:
        return self._checksum

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, with their padding."""
        return len(self) * sum(shape.numel() * dtype.itemsize for shape, dtype in self._shapes.values())

    def held(self) -> Held:
        """The same rows in memory."""
        return Held({**self.take(np.arange(len(self))), **self.null}, self._checksum)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> torch.Size:
        return self._shapes[name][0]

    def take(self, picked: Picked, pin: bool = False) -> Tensors:
        """As `Rows.take`.

        Raises:
            OSError: a file cannot be read, or was cut short since it was opened.
        """
        numbers = np.searchsorted(self._ends, picked, side="right")
        shapes = self._shapes | (self._padded_to(self._longest(picked, numbers)) if self._of_any_length else {})
        found = {
            name: torch.empty(len(picked), *shape, dtype=dtype, pin_memory=pin)
            for name, (shape, dtype) in shapes.items()
        }
        into = {name: _bytes_of(t) for name, t in found.items()}
        for number in np.unique(numbers):
            path, its = self._files[number]
            before = self._ends[number - 1] if number else 0
            with open(path, "rb", buffering=0) as file:
                for place in np.flatnonzero(numbers == number):
                    row = int(picked[place] - before)
                    for name in into.keys() & its.keys():
                        _fill(file, its[name].start + row * its[name].row_bytes, into[name][place])
                    for kind, ends in self._cuts[number].items():
                        name, wide = _CUTS[kind][1], its[kind].row_bytes
                        first, end = map(int, ends[row : row + 2])
                        _fill(file, its[kind].start + first * wide, into[name][place, : (end - first) * wide])
                        found[name][place, end - first :] = 0
                        if kind == CUT and MASK in found:
                            found[MASK][place] = torch.arange(found[MASK].shape[1]) < end - first
        return found

    def _padded_to(self, tokens: int) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shapes and dtypes of the texts' tensors with so many tokens."""
        texts = {name: self._shapes[name] for name in (TOKENS, MASK) if name in self._shapes}
        return {name: (torch.Size((tokens, *shape[1:])), dtype) for name, (shape, dtype) in texts.items()}

    def _longest(self, picked: Picked, numbers: Picked) -> int:
        """Tokens of the longest text among the rows ``picked``, which are in the files ``numbers``."""
        rows = picked - np.concatenate([[0], self._ends])[numbers]
        cuts = ((self._cuts[int(number)][CUT], int(row)) for number, row in zip(numbers, rows, strict=True))
        return max((int(ends[row + 1] - ends[row]) for ends, row in cuts), default=0)


def _whole(path: Path, block: Block) -> Tensor:
    """A tensor of a file."""
    t = torch.empty(1, *block.shape, dtype=block.dtype)
    with open(path, "rb", buffering=0) as file:
        _fill(file, block.start, _bytes_of(t)[0])
    return t[0]


def _bytes_of(t: Tensor) -> npt.NDArray[np.uint8]:
    """The memory of a contiguous tensor [N, ...] as bytes, row by row."""
    flat: npt.NDArray[np.uint8] = t.view(len(t), -1).view(torch.uint8).numpy()
    return flat


def _fill(file: object, start: int, into: npt.NDArray[np.uint8]) -> None:
    """Read the bytes from ``start`` on."""
    file.seek(start)  # type: ignore[attr-defined]
    view, done = memoryview(into.data), 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"{file.name} was cut short while it was in use.")  # type: ignore[attr-defined]
        done += count


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class Block:
    """Where a tensor lies in a file: ``start`` in bytes from its beginning."""

    start: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.shape[1:].numel() * self.dtype.itemsize


def blocks(path: Path, prefix: str = "") -> dict[str, Block]:
    """The tensors of a safetensors file whose names begin with ``prefix``, which is left out.

    Raises:
        ValueError: it is damaged.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name.removeprefix(prefix): Block(
            8 + size + entry["data_offsets"][0], torch.Size(entry["shape"]), _DTYPES[entry["dtype"]]
        )
        for name, entry in header.items()
        if name.startswith(prefix)
    }


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """A short hash of named tensors: names, types, shapes and values."""
    digest = hashlib.blake2b(digest_size=8)
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def joined(checksums: Iterable[str]) -> str:
    """One hash of several, in their order."""
    return hashlib.blake2b("\n".join(checksums).encode(), digest_size=8).hexdigest()


# ---------------------------------------------------------------- one micro-batch ahead


def in_thread(work: Callable[[], T], name: str, daemon: bool = False) -> Future[T]:
    """What ``work`` returns or raises, begun in a thread that lives for it alone, so that there is none to be ended."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # it belongs to whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=daemon).start()
    return future


class Ahead:
    """Rows that are read in a thread while the main thread trains.

    What was read is kept by its rows: where others are asked for, they are read then. So a wrong forecast costs time
    and never changes a batch.

    Args:
        read: returns the rows ``picked`` of all tensors, ``pin`` as in `Rows.take`.
    """

    def __init__(self, read: Callable[[Picked, bool], Tensors]) -> None:
        self._read = read
        self._coming: dict[bytes, Future[Tensors]] = {}

    def prefetch(self, picked: Picked, pin: bool) -> None:
        """Begin to read these rows, and forget others that were read and not fetched."""
        self._coming = {picked.tobytes(): in_thread(lambda: self._read(picked, pin), "fewstep-rows")}

    def fetch(self, picked: Picked, pin: bool) -> Tensors:
        """These rows, read before or now.

        Raises:
            Exception: what reading raised, as itself.
        """
        future = self._coming.pop(picked.tobytes(), None)
        return self._read(picked, pin) if future is None else future.result()
