"""The results of many models on the same prompts and noise, in one table: Markdown, CSV, JSON and an HTML page."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fewstep.data.files import replace_text
from fewstep.evaluation.figures import FIGURES
from fewstep.evaluation.grids import ON_PAGES, image_grid
from fewstep.evaluation.result import KEPT_IMAGES, Estimate, Result, gap_closed_in, in_steps
from fewstep.reports.page import Page
from fewstep.scenes64.prompts import unseen_captions
from fewstep.training.machine import in_words

SHOWN = ("FD", "KID", "detail FD", "recall", "accuracy", "unlike teacher", "spread")
"""The figures of the table, among those of `figures.FIGURES`."""
DISTANCES = ("FD", "detail FD")
IN_SHORT = ("FD", "detail FD", "accuracy")
"""The figures in a cell of the summary, and of the charts."""
_COST: dict[str, Callable[[Any], str]] = {
    "forward_equivalents": "{:,.0f}".format,
    "minutes": "{:.0f}".format,
    "memory": in_words,
}
"""The facts of a result that the table shows, and how they are written."""
_SUMMARY = "Of several seeds the mean and the standard deviation"

Table = tuple[list[str], list[list[str]]]
"""Head and rows, as text."""


@dataclass
class ResultsTable:
    """Results of the same prompts and noise.

    Attributes:
        results: in the order of the table; the first is the teacher at its full number of steps, against which the
            others are measured.
        count: number of prompts. floors: FD and detail FD of as many real images.
    """

    results: list[Result]
    count: int
    floors: dict[str, float]

    @property
    def full(self) -> Result:
        """The teacher at its full number of steps."""
        return self.results[0]

    @property
    def shown(self) -> list[str]:
        """Those of `SHOWN` that these models have."""
        return [name for name in SHOWN if any(name in result.figures for result in self.results)]

    @property
    def about(self) -> str:
        """The prompts and the reference in words."""
        return str(self.full.facts.get("about", "unseen prompts"))

    def gap_closed(self, result: Result, figure: str) -> Estimate | None:
        """`gap_closed_in` this table."""
        return gap_closed_in(self.results, figure, result)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The table for programs: a row for each result."""
        for r in self.results:
            row: dict[str, Any] = {"model": r.model, "seed": r.seed, "steps": r.steps}
            row |= {name: r.facts.get(name) for name in _COST}
            for name in self.shown:
                row[name] = r.figures.get(name)
                if name in r.intervals:
                    row[f"{name} low"], row[f"{name} high"] = r.intervals[name]
            for name in DISTANCES:
                closed = None if r is self.full else self.gap_closed(r, name)
                row[f"{name} closed"] = None if closed is None else closed[0]
            yield row

    def table(self) -> Table:
        """A row for each result."""
        head = ["model", "steps", "cost", "minutes", "memory", *self.shown, *(f"{name} closed" for name in DISTANCES)]
        return head, [self._cells(result) for result in self.results]

    def _cells(self, r: Result) -> list[str]:
        cost = ["" if r.facts.get(name) is None else write(r.facts[name]) for name, write in _COST.items()]
        figures = [r.in_words(name) if name in r.figures else "" for name in self.shown]
        closed = ["" if r is self.full else in_percent(self.gap_closed(r, name)) for name in DISTANCES]
        return [r.name, str(r.steps), *cost, *figures, *closed]

    def summary(self) -> Table:
        """A row for each model, a column for each number of steps."""
        steps = sorted({r.steps for r in self.results})
        body = []
        for model in dict.fromkeys(r.model for r in self.results):
            mine = [r for r in self.results if r.model == model]
            seeds = sorted({r.seed for r in mine if r.seed is not None})
            cells = [over_seeds([r.figures for r in mine if r.steps == n]) for n in steps]
            body.append([model, *cells, ", ".join(map(str, seeds))])
        return ["model", *map(in_steps, steps), "seeds"], body

    # ------------------------------------------------------------ in words and images

    def markdown(self) -> str:
        """The summary and the table, with a line that explains each figure."""
        lines = [*_markdown(*self.summary()), "", f"{_SUMMARY}.", "", *_markdown(*self.table()), ""]
        floors = ", ".join(f"{name} {value:.3g}" for name, value in self.floors.items())
        floors = f"; as many real images: {floors}" if floors else ""
        lines.append(f"{self.count} {self.about}; 95 % intervals in brackets{floors}.")
        lines += [f"- {name}: {FIGURES[name]}" for name in self.shown]
        lines.append("- cost: forward passes of one image in training, a backward pass as two, with pairs and stages")
        lines.append("- memory: estimate of the peak of a training step, for the stage that needs most")
        lines.append("- closed: share of the teacher's loss at as many steps that the student avoids")
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
        """A row for each result, all from the same prompts and noise; of a model's seeds the first."""
        first = {r.model: r.seed for r in reversed(self.results)}
        shown = [r for r in self.results if r.seed == first[r.model]]
        labels = [f"{r.model}, {r.steps}" for r in shown]
        captions = self.full.facts.get("captions") or unseen_captions(KEPT_IMAGES)  # older files are of scenes-64
        return image_grid([r.images for r in shown], labels, captions, largest=ON_PAGES)

    def page(self) -> Page:
        """Summary, table, quality against steps and against compute cost, images."""
        page = Page("Benchmark")
        page.text(f"{self.count} {self.about}, the same noise for all; in brackets 95 % intervals.", note=True)
        page.table(*self.summary())
        page.text(f"{_SUMMARY}.", note=True)
        page.table(*self.table())
        quality_charts(page, self.results[1:])
        page.image(self.grid(), "Every row starts from the same noise and the same prompts.")
        for name in self.shown:
            page.text(f"{name}: {FIGURES[name]}.", note=True)
        return page

    def write(self, folder: Path) -> None:
        """table.md, table.csv, table.json, grid.png and report.html in ``folder``."""
        full, *entries = (result.as_plain() for result in self.results)
        plain = {"prompts": self.count, "real": self.floors, "full": full, "entries": entries}
        replace_text(folder / "table.md", self.markdown())
        replace_text(folder / "table.csv", self.csv())
        replace_text(folder / "table.json", json.dumps(plain, indent=1) + "\n")
        self.grid().save(folder / "grid.png")
        replace_text(folder / "report.html", self.page().html())


def quality_charts(page: Page, results: Sequence[Result], full: Result | None = None) -> None:
    """Charts of `IN_SHORT` against steps and against network evaluations: a line for each model, one for ``full``."""
    steps = [float(r.steps) for r in results]
    for name in IN_SHORT:
        known = [r for r in results if name in r.figures]
        if not known:
            continue
        by_steps: dict[str, list[tuple[float, float]]] = {r.name: [] for r in known}
        by_cost: dict[str, list[tuple[float, float]]] = {r.name: [] for r in known}
        for r in known:
            by_steps[r.name].append((float(r.steps), r.figures[name]))
            by_cost[r.name].append((r.figures["evaluations"], r.figures[name]))
        if full is not None:
            by_steps[full.label] = [(n, full.figures[name]) for n in (min(steps), max(steps))]
        page.chart(by_steps, "steps", name, logarithmic=name != "accuracy")
        page.chart(by_cost, "network evaluations per image", name, logarithmic=name != "accuracy")


def over_seeds(found: Sequence[dict[str, float]]) -> str:
    """A cell of the summary from the figures of each seed: the mean to three digits, with its standard deviation."""
    cells = []
    for name in IN_SHORT:
        unit, scale = (" %", 100.0) if name == "accuracy" else ("", 1.0)
        values = scale * torch.tensor([figures[name] for figures in found if name in figures], dtype=torch.float64)
        if len(values) == 0:
            continue
        mean = float(values.mean())
        places = 0 if unit or mean == 0 else max(0, 2 - math.floor(math.log10(abs(mean))))
        spread = f" ± {float(values.std()):.{places}f}" if len(values) > 1 else ""
        cells.append(f"{name} {mean:.{places}f}{spread}{unit}")
    return ", ".join(cells)


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def in_percent(closed: Estimate | None) -> str:
    """The closed share of a gap with its interval; "no gap" where there is none."""
    if closed is None:
        return "no gap"
    share, (low, high) = closed
    return f"{100 * share:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def in_order(results: Iterable[Result], models: Sequence[str]) -> list[Result]:
    """The teacher first, then ``models`` in their order, each by seed and steps."""
    place = {model: i for i, model in enumerate(models)}
    return sorted(results, key=lambda r: (place.get(r.model, -1), r.model, -1 if r.seed is None else r.seed, r.steps))
