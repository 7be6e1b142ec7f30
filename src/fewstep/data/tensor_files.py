"""safetensors files that are written and read in pieces, so that no process needs a whole tensor, let alone all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fewstep.models.sharding import Part, Stored

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8,
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


class StoredFiles(Stored):
    """The tensors in some safetensors files, whole ones and rows that several processes wrote.

    Args:
        files: all files of them.

    Raises:
        OSError, SafetensorError: one of them cannot be read.
        ValueError: rows are missing.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._shapes: dict[str, torch.Size] = {}
        self._pieces: dict[str, list[tuple[int, Any]]] = {}  # (first row, open file), in the order of rows
        self._names: dict[str, str] = {}  # as asked for -> in the files
        for path in files:
            file = safe_open(path, framework="pt")
            places = json.loads((file.metadata() or {}).get(_ROWS, "{}"))
            for name in file.keys():  # noqa: SIM118
                first, shape = places.get(name, (0, file.get_slice(name).get_shape()))
                self._shapes[name] = torch.Size(shape)
                self._pieces.setdefault(name, []).append((first, file))
        self._names = {name: name for name in self._shapes}
        for name, found in self._pieces.items():
            found.sort(key=lambda piece: piece[0])
            self._check(name)

    def _check(self, name: str) -> None:
        shape, row = self._shapes[name], 0
        for first, file in self._pieces[name] if shape else ():
            if first != row:
                raise ValueError(f"rows of {name} are missing")
            row += file.get_slice(name).get_shape()[0]
        if shape and row != shape[0]:
            raise ValueError(f"rows of {name} are missing")

    def under(self, prefix: str) -> StoredFiles:
        """The tensors under ``prefix/``, without it."""
        found = StoredFiles(())
        found._shapes, found._pieces = self._shapes, self._pieces
        found._names = {
            name.removeprefix(f"{prefix}/"): own for name, own in self._names.items() if name.startswith(f"{prefix}/")
        }
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        own = self._names[name]
        if len(self._pieces[own]) == 1:
            whole: Tensor = self._pieces[own][0][1].get_tensor(own)
            return whole
        return self.rows(name, 0, self._shapes[own][0])

    def shape(self, name: str) -> torch.Size:
        return self._shapes[self._names[name]]

    def rows(self, name: str, first: int, last: int) -> Tensor:
        own, found = self._names[name], []
        for begin, file in self._pieces[own]:
            piece = file.get_slice(own)
            low, high = max(first - begin, 0), min(last - begin, piece.get_shape()[0])
            if low < high:
                found.append(piece[low:high])
        if not found:
            return torch.empty(0, *self._shapes[own][1:], dtype=_TYPES[piece.get_dtype()])
        return found[0] if len(found) == 1 else torch.cat(found)
