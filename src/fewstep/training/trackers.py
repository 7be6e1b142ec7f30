"""Trackers, which get every line of the log too: TensorBoard and trackio, imported only when a recipe names them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio"}


class Tracker(Protocol):
    """Takes the records that `fewstep.training.logging.JsonLines` takes."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError, one sentence, for a tracker that is not installed."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ValueError(
                f"training.trackers asks for {name}, which is not installed: pip install {PACKAGES[name]}, "
                "or take it out of the list."
            )


def open_trackers(names: Sequence[str], run_dir: Path, done: int, written: int) -> list[Tracker]:
    """Trackers of a run that goes on after step ``done`` and whose log had lines up to step ``written``.

    Raises:
        ValueError: as `check_trackers` does.
    """
    check_trackers(names)
    kinds: dict[str, Any] = {"tensorboard": TensorBoard, "trackio": Trackio}
    return [kinds[name](run_dir, done, written) for name in names]


class TensorBoard:
    """Event files in ``<run>/tensorboard``; after a resume TensorBoard hides what was written beyond that step."""

    def __init__(self, run_dir: Path, done: int, written: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(run_dir / "tensorboard", purge_step=done + 1 if written > done else None)  # type: ignore[no-untyped-call]

    def write(self, record: dict[str, Any]) -> None:
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """The run's name in the project "fewstep" of the local trackio; nothing of the machine is logged.

    trackio cannot delete lines: after a resume, steps that it already has are left out (they are the same to the bit).
    """

    def __init__(self, run_dir: Path, done: int, written: int) -> None:
        import trackio

        self._written = written
        self._run: Any = trackio.init(
            project="fewstep",
            name=run_dir.resolve().name,
            resume="allow" if written else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, record: dict[str, Any]) -> None:
        if record["step"] > self._written:
            self._run.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)}
