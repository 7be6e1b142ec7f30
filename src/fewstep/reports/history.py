"""The history of a run as its folder records it: the log as columns, the settings of its recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fewstep.training.logging import read_log
from fewstep.training.run_files import RunFiles

ENOUGH = 6  # lines of a statistic that a check needs
FAR = 1e40  # larger numbers, which float32 cannot hold, are cut to this, so that squares and ratios stay finite


@dataclass(frozen=True)
class Series:
    """One column of the log: values [n] at steps [n], both float64, from the lines that hold a number there."""

    name: str
    steps: npt.NDArray[np.float64]
    values: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def enough(self) -> bool:
        """Whether there are enough lines to judge by."""
        return len(self) >= ENOUGH

    @property
    def head(self) -> Series:
        """The first third."""
        return self.part(slice(0, math.ceil(len(self) / 3)))

    @property
    def tail(self) -> Series:
        """The last third."""
        return self.part(slice(len(self) - math.ceil(len(self) / 3), None))

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    @property
    def span(self) -> tuple[int, int]:
        """The first and the last step."""
        return int(self.steps[0]), int(self.steps[-1])

    def part(self, rows: slice | npt.NDArray[np.bool_]) -> Series:
        return Series(self.name, self.steps[rows], self.values[rows])

    def over(self, other: Series) -> Series:
        """The ratio to another column at the same steps."""
        return Series("ratio", self.steps, self.values / np.maximum(other.values, 1e-30))

    def since(self, holds: npt.NDArray[np.bool_]) -> tuple[int, int]:
        """(first, last) step of the final stretch of lines where ``holds`` [n] is true; of all lines if it is empty."""
        broken = np.flatnonzero(~holds)
        first = 0 if not len(broken) or broken[-1] + 1 == len(holds) else int(broken[-1]) + 1
        return self.part(slice(first, None)).span


@dataclass
class History:
    """A run as its folder records it.

    Attributes:
        records: lines of the log ordered by step, the last line of each step.
        recipe: recipe.yaml as plain data, {} where it cannot be read.
        samples: lines of samples/statistics.jsonl.
        missing: sentences about what the folder lacks.
    """

    records: list[dict[str, Any]]
    recipe: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last logged step."""
        return int(self.records[-1]["step"]) if self.records else 0

    def names(self, ending: str) -> list[str]:
        """Columns of all players with this ending: `loss` finds "student/loss" and "critic/loss"."""
        found = dict.fromkeys(name for line in self.records for name in line)
        return [name for name in found if name.rpartition("/")[2] == ending and "/" in name]

    def series(self, name: str) -> Series:
        """A column's finite numbers."""
        return columns(self.records, name)[0]

    def first(self, ending: str) -> Series | None:
        """The column with this ending, the student's before others; None where it has too few lines to judge by."""
        names = sorted(self.names(ending), key=lambda name: not name.startswith("student/"))
        found = [series for series in map(self.series, names) if series.enough]
        return found[0] if found else None

    def pair(self, first: str, second: str) -> tuple[Series, Series] | None:
        """Two columns of one player at the steps that have both; None where there are too few of them."""
        for name in self.names(first):
            player = name.rpartition("/")[0]
            found = columns(self.records, name, f"{player}/{second}")
            if found[0].enough:
                return found[0], found[1]
        return None

    def setting(self, *path: str) -> Any:
        """A value of the recipe, None where it is unknown."""
        place: Any = self.recipe
        for key in path:
            place = place.get(key) if isinstance(place, dict) else None
        return place


def columns(records: Sequence[dict[str, Any]], *names: str) -> list[Series]:
    """Columns, at the steps at which all of them hold finite numbers."""
    rows = [
        (float(line["step"]), *(max(-FAR, min(FAR, float(line[name]))) for name in names))
        for line in records
        if all(is_number(line.get(name)) and math.isfinite(line[name]) for name in names)
    ]
    table = np.array(rows, dtype=np.float64).reshape(len(rows), 1 + len(names))
    return [Series(name, table[:, 0], table[:, 1 + i]) for i, name in enumerate(names)]


def is_number(value: object) -> bool:
    """Whether a log's value is a number; true, false and integers beyond all floats are not."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**53)


def read_history(run: Path) -> History:
    """Read the folder ``run``; lines that are cut off or foreign are skipped.

    Raises:
        ValueError: there is no such folder, or it holds neither a log nor a recipe.
    """
    if not run.is_dir():
        raise ValueError(f"There is no run directory {run}.")
    files = RunFiles(run)
    log, recipe = files.log, files.recipe
    if not log.is_file() and not recipe.is_file():
        raise ValueError(f"{run} is no run directory: it has neither log.jsonl nor recipe.yaml.")
    missing = []
    by_step = {line["step"]: line for line in read_log(log) if is_number(line["step"]) and line["step"] >= 0}
    if not by_step:
        missing.append("log.jsonl is empty: no step was logged yet.")
    settings = _read_recipe(recipe)
    if not settings:
        missing.append("recipe.yaml is missing or cannot be read: checks that need settings were left out.")
    samples = list(read_log(files.sample_statistics))
    return History([by_step[step] for step in sorted(by_step)], settings, samples, missing)


def _read_recipe(path: Path) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
