"""safetensors files that are written and read in pieces, so that no process needs a whole tensor, let alone all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.models.sharding import Part, Stored

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_ROWS = "rows"  # in a file's metadata: {name: [first row, shape of the whole]}


def write_pieces(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    pieces: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, one piece after the other, and flush it to disk.

    Args:
        tensors: (dtype, shape) of each tensor.
        pieces: its rows in their order, in any number of tensors on any device; each is forgotten when it is written.

    Raises:
        OSError: it cannot be written.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that numbers begin where a computer reads them at once
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, _) in tensors.items():
            for piece in pieces(name):
                host = piece.detach().to("cpu", dtype).contiguous().flatten()
                file.write(host.view(torch.uint8).numpy().data)
        if file.tell() != 8 + len(text) + end:
            raise OSError(f"{path} has {file.tell():,} bytes and not {8 + len(text) + end:,}")
        file.flush()
        os.fsync(file.fileno())


def write_parts(path: Path, parts: Mapping[str, Part]) -> None:
    """Write one process's rows of tensors; `StoredFiles` puts the rows of all files together."""
    places = {name: [part.first, list(part.shape)] for name, part in parts.items()}
    about = {name: (part.rows.dtype, part.rows.shape) for name, part in parts.items()}
    write_pieces(path, about, lambda name: [parts[name].rows], {_ROWS: json.dumps(places)})


@dataclass(frozen=True)
class _Piece:
    """Rows ``first`` ... ``last`` - 1 of a tensor, which begin at a byte of a file; scalars are one row."""

    first: int
    last: int
    path: Path
    begin: int


def _end(header: Mapping[str, Any]) -> int:
    """How many bytes the tensors of a header take."""
    return max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)


class StoredFiles(Stored):
    """The tensors in some safetensors files, whole ones and rows that several processes wrote.

    Files are read by bytes and not mapped: pages of a map would count as memory, and are slow on network file systems.

    Args:
        files: all files of them.

    Raises:
        OSError: one of them cannot be read.
        ValueError: one of them is damaged, or rows are missing.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._about: dict[str, tuple[str, torch.Size]] = {}  # the type as the file names it
        self._pieces: dict[str, list[_Piece]] = {}  # in the order of rows
        for path in files:
            self._look(path)
        self._names = {name: name for name in self._about}  # as asked for -> in the files
        for name, found in self._pieces.items():
            found.sort(key=lambda piece: piece.first)
            shape, ends = self._about[name][1], [0, *(piece.last for piece in found)]
            if [piece.first for piece in found] != ends[:-1] or ends[-1] != (shape[0] if shape else 1):
                raise ValueError(f"rows of {name} are missing")

    def _look(self, path: Path) -> None:
        """Note where the tensors of a file are."""
        try:
            with open(path, "rb") as file:
                size, length = int.from_bytes(file.read(8), "little"), path.stat().st_size
                header = json.loads(file.read(size)) if size < length else None
            if not isinstance(header, dict) or 8 + size + _end(header) != length:
                raise ValueError("its header and its length disagree")
            places = json.loads(header.pop("__metadata__", {}).get(_ROWS, "{}"))
            for name, entry in header.items():
                self._note(name, entry, places.get(name, (0, entry["shape"])), path, 8 + size)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):  # of a header in which bytes have changed
            raise ValueError(f"{path} is no safetensors file, or only a part of one") from None

    def _note(self, name: str, entry: Mapping[str, Any], place: tuple[int, Sequence[int]], path: Path, at: int) -> None:
        """Note where a tensor is, or rows of it, in a file whose tensors begin at byte ``at``."""
        (first, shape), dtype, (begin, end) = place, entry["dtype"], entry["data_offsets"]
        known = _TYPES.get(dtype)
        if known is not None and end - begin != torch.Size(entry["shape"]).numel() * known.itemsize:
            raise ValueError("a tensor and its place disagree")
        self._about[name] = dtype, torch.Size(shape)
        piece = _Piece(first, first + (entry["shape"][0] if shape else 1), path, at + begin)
        self._pieces.setdefault(name, []).append(piece)

    def under(self, prefix: str) -> StoredFiles:
        """The tensors under ``prefix/``, without it."""
        found = StoredFiles(())
        found._about, found._pieces = self._about, self._pieces
        found._names = {
            name.removeprefix(f"{prefix}/"): own for name, own in self._names.items() if name.startswith(f"{prefix}/")
        }
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shape(name)
        return self.rows(name, 0, shape[0] if shape else 1)

    def shape(self, name: str) -> torch.Size:
        return self._about[self._names[name]][1]

    def readable(self, name: str) -> bool:
        """Whether `rows` can read this tensor; a file may hold others, of types for which PyTorch has other names."""
        return self._about[self._names[name]][0] in _TYPES

    def rows(self, name: str, first: int, last: int) -> Tensor:
        own = self._names[name]
        kind, shape = self._about[own]
        if kind not in _TYPES:
            raise ValueError(f"{name} has numbers of type {kind}, which fewstep does not read by rows")
        dtype = _TYPES[kind]
        found = torch.empty((last - first, *shape[1:]) if shape else (), dtype=dtype)
        there = memoryview(found.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
        each = shape[1:].numel() * dtype.itemsize
        for piece in self._pieces[own]:
            low, high = max(first, piece.first), min(last, piece.last)
            if low < high and each:
                with open(piece.path, "rb") as file:
                    file.seek(piece.begin + (low - piece.first) * each)
                    if file.readinto(there[(low - first) * each : (high - first) * each]) != (high - low) * each:
                        raise OSError(f"{piece.path} ends too early")
        return found
