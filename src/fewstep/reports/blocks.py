"""The parts of a page that reports and benchmarks share: verdict, images, figures, charts, differences of settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from fewstep.evaluation.figures import Figure
from fewstep.evaluation.grids import ON_PAGES, image_grid
from fewstep.evaluation.result import KEPT_IMAGES, Comparison, Result, in_steps
from fewstep.evaluation.tables import Table
from fewstep.reports.page import Page, Series
from fewstep.reports.results import IN_SHORT, meaning, other_table, quality_table, summary, verdict

OPEN = 3
"""The images of so many prompts stand open on the page; those of the others unfold."""


def put_results(page: Page, comparison: Comparison) -> None:
    """All that was measured: first what the students reach, then how they look, then the figures."""
    against = comparison.about.partition(", against ")[2] or "the reference images"
    floor = f"; as many real images have {comparison.floors['FD']:.3g}" if "FD" in comparison.floors else ""
    page.verdict(f"FD to {against}{floor}", verdict(comparison))
    _put_images(page, comparison)
    page.heading("Figures")
    note = f"{comparison.count} images of each; in brackets 95 % intervals, resampled over images"
    if any(result.seed is not None for result in comparison.results):
        page.text("Of several seeds the mean ± their standard deviation.", note=True)
        for name in IN_SHORT:
            if name in comparison.names:
                page.table(summary(comparison, name), _always(meaning(name)))
    page.text(f"{note}. ↓ small values are good, ↑ large ones.", note=True)
    page.table(quality_table(comparison), meaning, explained=True)
    _put_charts(page, comparison)
    more = Page("More figures")
    more.table(other_table(comparison), meaning, explained=True)
    page.folded(more)


def _always(figure: Figure) -> Callable[[str], Figure]:
    """What every column says of a table of one figure by steps."""
    return lambda column: figure


def put_differences(page: Page, settings: Mapping[str, Mapping[str, object]]) -> None:
    """The settings in which models differ; nothing for a single one."""
    if len(settings) < 2:
        return
    page.heading("Differences of settings")
    found = differences(settings)
    if not found.rows:
        page.text("Their recipes are the same.")
        return
    page.text("The keys in which recipes differ, defaults filled in; “–” where there is no such key.", note=True)
    page.table(found)


def differences(settings: Mapping[str, Mapping[str, object]]) -> Table:
    """The keys of which models have not all the same value: a row for each, a column for each model."""
    found = dict.fromkeys(key for flat in settings.values() for key in flat)
    sections = list(dict.fromkeys(key.rpartition(".")[0] for key in found))
    keys = sorted(found, key=lambda key: sections.index(key.rpartition(".")[0]))
    cells = {key: [_as_text(flat[key]) if key in flat else "–" for flat in settings.values()] for key in keys}
    return Table(["setting", *settings], [[key, *row] for key, row in cells.items() if len(set(row)) > 1])


def _as_text(value: object) -> str:
    """A value of a recipe as it is written there."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_as_text, value)) or "none"
    return "empty" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# ---------------------------------------------------------------- images


def _put_images(page: Page, comparison: Comparison) -> None:
    """For each prompt a row of images for each model, and a column for each number of steps."""
    page.heading("Images")
    page.text("All images of a prompt start from the same noise.", note=True)
    steps, rows = _by_steps(comparison)
    more = Page("More prompts")
    for i, caption in enumerate(comparison.captions[:KEPT_IMAGES]):
        found: dict[str, list[Result | None]] = {comparison.full.label: [comparison.full], **rows}
        cells = {name: [r if r is None else (r.label, r.images[i]) for r in row] for name, row in found.items()}
        (page if i < OPEN else more).images(caption, [in_steps(n) for n in steps], cells)
    page.folded(more)


def _by_steps(comparison: Comparison) -> tuple[list[int], dict[str, list[Result | None]]]:
    """Numbers of steps, and for each model its results at them, of several seeds those of the first."""
    others = comparison.results[1:]
    students = [r.steps for r in comparison.students]  # the teacher may be there at full steps by other samplers
    steps = sorted({*students, *(r.steps for r in others if r.steps < comparison.full.steps)})
    found: dict[str, dict[int, Result]] = {}
    for r in others:
        found.setdefault(r.model, {}).setdefault(r.steps, r)
    return steps, {name: [row.get(n) for n in steps] for name, row in found.items() if row.keys() & set(steps)}


def by_steps_grid(comparison: Comparison, prompts: int = 3) -> Image.Image:
    """A few prompts, each at its numbers of steps from left to right: the teacher at full steps, then every model.

    Where a model does not take so many steps its place is white.
    """
    full, (steps, found) = comparison.full.images[:prompts], _by_steps(comparison)
    white = torch.ones_like(full)
    rows: list[Tensor] = [full.repeat_interleave(len(steps), dim=0)]
    for row in found.values():
        shown = [white if r is None else r.images[:prompts] for r in row]
        rows.append(torch.stack(shown, dim=1).flatten(0, 1))
    above = [f"{in_steps(n)}: {caption}" for caption in comparison.captions[:prompts] for n in steps]
    return image_grid(rows, [comparison.full.label, *found], above, largest=ON_PAGES)


# ---------------------------------------------------------------- charts


def _put_charts(page: Page, comparison: Comparison) -> None:
    """Figures against steps and against network evaluations: a line for each model, one for the teacher's best."""
    full, *others = comparison.results
    for name in IN_SHORT:
        known = [r for r in others if name in r.figures]
        if not known:
            continue
        page.chart(_lines(known, name, [r.steps for r in known], full), "steps", name, name != "accuracy")
        calls = [r.figures["evaluations"] for r in known]
        page.chart(_lines(known, name, calls, full), "network evaluations per image", name, name != "accuracy")


def _lines(results: Sequence[Result], name: str, at: Sequence[float], full: Result) -> Series:
    lines: dict[str, list[tuple[float, float]]] = {r.name: [] for r in results}
    for r, x in zip(results, at, strict=True):
        lines[r.name].append((x, r.figures[name]))
    best = [(x, full.figures[name]) for x in (min(at), max(at)) if name in full.figures]
    return {**lines, full.label: best}
