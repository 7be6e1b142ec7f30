"""Memory of the machine: how much is free, in words, and which errors mean that there was too little."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_ASKED = re.compile(r"allocate:?\s+([\d.]+)\s*(\w+)", re.IGNORECASE)
# PyTorch's CPU allocator and MPS raise plain RuntimeErrors.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def in_words(size: float) -> str:
    """Bytes as people read them: 5.0 MB, 136 MB, 3.44 GB (decimal units)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            value = size / factor
            return f"{value:.{2 if unit == 'GB' and value < 100 else 1 if value < 100 else 0}f} {unit}"
    return f"{size:.0f} bytes"


def memory(device: str) -> tuple[int, int] | None:
    """(free, total) bytes of a device; on the CPU within a container's limit. None where they are unknown."""
    kind = torch.device(device).type
    if kind == "cuda" and torch.cuda.is_available():
        return torch.cuda.mem_get_info(device)
    if kind != "cpu":
        return None
    import psutil

    machine = psutil.virtual_memory()
    free, total = machine.available, machine.total
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None and limit < total:
        free, total = min(free, max(limit - used, 0)), limit
    return free, total


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such limit, or "max"
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device's memory, or the machine's, was too small."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def asked_for(error: BaseException) -> int | None:
    """The bytes that could not be allocated, if the error states them."""
    found = _ASKED.search(str(error))
    if found is None or found[2].lower() not in _UNITS:
        return None
    return int(float(found[1]) * _UNITS[found[2].lower()])
