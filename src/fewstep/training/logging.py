"""The log of training: running means, a JSONL file, and the speed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.files import replace_text
from fewstep.diffusion.schedule import working


class Meter:
    """Running means of scalars, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add a detached scalar or vector [n]; the mean is over the steps in which it was added."""
        value = value.detach()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """All means by one transfer from the device (a vector's as ``name/0``, ``name/1``, ...), then start anew."""
        if not self._sums:
            return {}
        names = [(key, name) for key, value in self._sums.items() for name in _names(key, value)]
        values = torch.cat([working(v).reshape(-1) for v in self._sums.values()]).tolist()
        means = {name: value / self._counts[key] for (key, name), value in zip(names, values, strict=True)}
        self.__init__()  # type: ignore[misc]
        return means


def _names(key: str, value: Tensor) -> list[str]:
    return [key] if value.ndim == 0 else [f"{key}/{i}" for i in range(len(value))]


class JsonLines:
    """Append-only log. On resume, lines after the checkpoint's step are dropped, so it holds each step once."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        found = list(read_log(path)) if resume_step else []
        self.found_step = max((line["step"] for line in found), default=0)  # the last one before the resume
        kept = [line for line in found if line["step"] <= resume_step]
        replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, record: dict[str, Any]) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OSError(
                f"The log {self.path} could not be written ({error.strerror}): make room, then go on with --resume."
            ) from None

    def close(self) -> None:
        """Nothing is held open between lines."""


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log, none if there is no file; lines that are cut off or no records are left out."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                continue  # the line being written when the process died
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


class Speed:
    """Steps per second since the last reading."""

    def __init__(self, step: int) -> None:
        self._step, self._time = step, time.perf_counter()

    def read(self, step: int) -> float:
        now = time.perf_counter()
        rate = (step - self._step) / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return rate
