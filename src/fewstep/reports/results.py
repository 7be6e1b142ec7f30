"""What many models gave on the same prompts and noise, in one table: Markdown, CSV, JSON and a page to look at."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.data.files import replace_tensors, replace_text
from fewstep.evaluation.compare import FIGURES, Result, cell, gap_closed_by, lower_by
from fewstep.evaluation.grids import image_grid
from fewstep.reports.page import Page
from fewstep.scenes64.prompts import unseen_captions
from fewstep.training.machine import in_words

SHOWN = ("FD", "KID", "detail FD", "recall", "accuracy", "spread")
"""The figures of the table, of `compare.FIGURES`."""
DISTANCES = ("FD", "detail FD")
IN_SHORT = ("FD", "detail FD", "accuracy")
"""What a cell of the summary holds."""
PICTURES = 8


@dataclass
class Entry:
    """One model at one number of steps.

    Attributes:
        model: what draws: a run's name without its seed, or "teacher, SAMPLER".
        seed: of its training; None for the teacher.
        steps: of its sampler.
        figures, intervals: as `Result`'s; resampled: as `Measured.resampled`, the same draws for every entry.
        pictures: uint8 [n, 3, H, W], of the first prompts.
        facts: of the training: forward_equivalents, minutes, memory (bytes), steps, recipe, set, versions.
    """

    model: str
    seed: int | None
    steps: int
    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    resampled: dict[str, Tensor]
    pictures: Tensor
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, outcome: Result, model: str, seed: int | None, steps: int, facts: dict[str, Any]) -> Entry:
        """What `compare` found for one way."""
        seen = (outcome.images[:PICTURES].clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
        figures = {name: value for name, value in outcome.figures.items() if name != "to first"}
        return cls(model, seed, steps, figures, dict(outcome.intervals), outcome.resampled, seen, facts)

    @property
    def label(self) -> str:
        """Of a row: model and seed."""
        return self.model if self.seed is None else f"{self.model}, seed {self.seed}"

    def plain(self) -> dict[str, Any]:
        """Without tensors, for JSON."""
        kept = asdict(self)
        return {key: value for key, value in kept.items() if key not in ("resampled", "pictures")}

    def save(self, path: Path) -> None:
        """All of it in one safetensors file."""
        tensors = {f"resampled/{name}": values for name, values in self.resampled.items()}
        replace_tensors(path, tensors | {"pictures": self.pictures}, {"entry": json.dumps(self.plain())})

    @classmethod
    def load(cls, path: Path) -> Entry:
        """What `save` wrote.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                kept = json.loads(file.metadata()["entry"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                kept["intervals"] = {name: tuple(ends) for name, ends in kept["intervals"].items()}
                pictures = tensors.pop("pictures")
                return cls(
                    **kept, pictures=pictures, resampled={n.removeprefix("resampled/"): t for n, t in tensors.items()}
                )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            raise ValueError(f"{path} is damaged: remove it, and what it held is measured again.") from None


@dataclass
class Standings:
    """All entries, and the teacher's own that others are held against.

    Attributes:
        entries: in the order of the table.
        full: the teacher at full length.
        count: prompts. floors: FD and detail FD of as many real scenes.
    """

    entries: list[Entry]
    full: Entry
    count: int
    floors: dict[str, float]

    def closed(self, entry: Entry, figure: str) -> tuple[float, tuple[float, float]] | None:
        """Part of the teacher's loss at as many steps that ``entry`` does not have, with its 95 % interval.

        None where the teacher has no loss to speak of at so many steps, or was not measured there.
        """
        few = self.few(entry)
        return None if few is None else gap_closed_by(figure, few, self.full, entry)

    def few(self, entry: Entry) -> Entry | None:
        """The teacher at as many steps as ``entry``, by the full one's sampler."""
        return next((e for e in self.entries if e.model == self.full.model and e.steps == entry.steps), None)

    def better_by(self, entry: Entry, other: Entry, figure: str) -> tuple[float, tuple[float, float]]:
        """By how much ``entry`` is lower than ``other`` on the same prompts and noise, with its 95 % interval."""
        return lower_by(figure, entry, other)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The table for programs: a row for each entry."""
        for entry in [self.full, *self.entries]:
            row: dict[str, Any] = {"model": entry.model, "seed": entry.seed, "steps": entry.steps}
            row["forward_equivalents"] = entry.facts.get("forward_equivalents")
            row["minutes"], row["memory"] = entry.facts.get("minutes"), entry.facts.get("memory")
            for name in SHOWN:
                row[name] = entry.figures.get(name)
                if name in entry.intervals:
                    row[f"{name} low"], row[f"{name} high"] = entry.intervals[name]
            for name in DISTANCES:
                closed = None if entry is self.full else self.closed(entry, name)
                row[f"{name} closed"] = None if closed is None else closed[0]
            yield row

    # ------------------------------------------------------------ in words and pictures

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows, as text."""
        head = ["model", "steps", "cost", "minutes", "memory", *SHOWN, *(f"{name} closed" for name in DISTANCES)]
        body = []
        for entry in [self.full, *self.entries]:
            cost, minutes, memory = (entry.facts.get(name) for name in ("forward_equivalents", "minutes", "memory"))
            cells = [entry.label, str(entry.steps)]
            cells += ["" if cost is None else f"{cost:,.0f}", "" if minutes is None else f"{minutes:.0f}"]
            cells.append("" if memory is None else in_words(memory))
            cells += [cell(entry, name) if name in entry.figures else "" for name in SHOWN]
            cells += ["" if entry is self.full else in_percent(self.closed(entry, name)) for name in DISTANCES]
            body.append(cells)
        return head, body

    def summary(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows, as text: a row for each model, a column for each number of steps."""
        entries = [self.full, *self.entries]
        steps = sorted({e.steps for e in entries})
        head = ["model", *(f"{n} step{'s' if n > 1 else ''}" for n in steps), "seeds"]
        body = []
        for model in dict.fromkeys(e.model for e in entries):
            mine = [e for e in entries if e.model == model]
            seeds = sorted({e.seed for e in mine if e.seed is not None})
            cells = [over_seeds([e.figures for e in mine if e.steps == n]) for n in steps]
            body.append([model, *cells, ", ".join(map(str, seeds))])
        return head, body

    def markdown(self) -> str:
        """The summary, and the table with a line for each figure that says what it is."""
        lines = [*_markdown(*self.summary()), "", f"{_SUMMARY}.", "", *_markdown(*self.table()), ""]
        floors = ", ".join(f"{name} {value:.3g}" for name, value in self.floors.items())
        lines.append(f"{self.count} unseen prompts, 95 % intervals in brackets; as many real scenes: {floors}.")
        lines += [f"- {name}: {FIGURES[name]}" for name in SHOWN]
        lines.append("- cost: forward passes of a picture in training, or their equivalent; pairs and stages included")
        lines.append("- memory: at the peak of a training step, estimated; of stages the one that needs most")
        lines.append("- closed: part of the teacher's loss at as many steps that the student does not have")
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """`rows` as comma-separated values."""
        rows = list(self.rows())
        file = io.StringIO()
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue()

    def grid(self) -> Image.Image:
        """A row for each entry from the same prompts and noise; of a model's seeds the first."""
        shown = [e for e in [self.full, *self.entries] if e.seed in (None, self._first_seed(e))]
        labels = [f"{e.model}, {e.steps}" for e in shown]
        return image_grid([e.pictures.float() / 255 for e in shown], labels, unseen_captions(PICTURES))

    def page(self) -> Page:
        """The table, quality against steps and against cost, the grid."""
        page = Page("Benchmark")
        page.text(f"{self.count} unseen prompts, the same noise for all; in brackets 95 % intervals.", note=True)
        page.table(*self.summary())
        page.text(f"{_SUMMARY}.", note=True)
        page.table(*self.table())
        for name in IN_SHORT:
            page.chart(self._by(name, lambda e: float(e.steps)), "steps", name, logarithmic=name != "accuracy")
            evaluations = self._by(name, lambda e: e.figures["evaluations"])
            page.chart(evaluations, "network evaluations per picture", name, logarithmic=name != "accuracy")
        page.picture(self.grid(), "Every row starts from the same noise and the same prompts.")
        for name in SHOWN:
            page.text(f"{name}: {FIGURES[name]}.", note=True)
        return page

    def write(self, folder: Path) -> None:
        """table.md, table.csv, table.json, grid.png and report.html in ``folder``."""
        replace_text(folder / "table.md", self.markdown())
        replace_text(folder / "table.csv", self.csv())
        kept = {"prompts": self.count, "real": self.floors, "full": self.full.plain()}
        replace_text(
            folder / "table.json", json.dumps({**kept, "entries": [e.plain() for e in self.entries]}, indent=1) + "\n"
        )
        self.grid().save(folder / "grid.png")
        replace_text(folder / "report.html", self.page().html())

    def _first_seed(self, entry: Entry) -> int | None:
        return min((e.seed for e in self.entries if e.model == entry.model and e.seed is not None), default=None)

    def _by(self, figure: str, across: Any) -> dict[str, list[tuple[float, float]]]:
        series: dict[str, list[tuple[float, float]]] = {}
        for entry in self.entries:
            series.setdefault(entry.label, []).append((across(entry), entry.figures[figure]))
        return {name: sorted(points) for name, points in series.items()}


_SUMMARY = f"In each cell {', '.join(IN_SHORT)}: of several seeds the mean and the standard deviation"


def over_seeds(found: Sequence[dict[str, float]]) -> str:
    """A cell of the summary from the figures of each seed: three digits of the mean, its spread to as many places."""
    cells = []
    for name in IN_SHORT:
        unit, scale = (" %", 100.0) if name == "accuracy" else ("", 1.0)
        values = scale * torch.tensor([figures[name] for figures in found if name in figures], dtype=torch.float64)
        if len(values) == 0:
            continue
        mean = float(values.mean())
        places = 0 if unit or mean == 0 else max(0, 2 - math.floor(math.log10(abs(mean))))
        spread = f" ± {float(values.std()):.{places}f}" if len(values) > 1 else ""
        cells.append(f"{mean:.{places}f}{spread}{unit}")
    return ", ".join(cells)


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def in_percent(closed: tuple[float, tuple[float, float]] | None) -> str:
    """A closed part with its interval; nothing where there is no gap."""
    if closed is None:
        return "no gap"
    share, (low, high) = closed
    return f"{100 * share:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def in_order(entries: Iterable[Entry], models: Sequence[str]) -> list[Entry]:
    """The teacher first, then ``models`` in their order, each by seed and steps."""
    place = {model: i for i, model in enumerate(models)}
    return sorted(entries, key=lambda e: (place.get(e.model, -1), e.model, -1 if e.seed is None else e.seed, e.steps))
