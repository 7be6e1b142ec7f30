"""What a comparison says, alike for `fewstep report`, `benchmark` and `evaluate`: verdict, tables, rows of CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch

from fewstep.evaluation.figures import FIGURES, MAIN, Figure, figure
from fewstep.evaluation.result import Comparison, Estimate, Result, in_steps, lower_by, teacher_at
from fewstep.evaluation.tables import Table, figure_table, in_lines, meanings
from fewstep.training.machine import in_words

DISTANCES = ("FD", "detail FD")
IN_SHORT = ("FD", "detail FD", "accuracy")
"""The figures of the summary, and of the charts."""
_COST: dict[str, tuple[str, Callable[[Any], str], Figure]] = {
    "forward_equivalents": ("cost", "{:,.0f}".format, Figure(
        "forward passes of one image in training, a backward pass as two, with pairs and stages", "lower")),
    "minutes": ("minutes", "{:.0f}".format, Figure("minutes of training", "lower")),
    "memory": ("memory", in_words, Figure(
        "estimate of the peak of a training step, for the stage that needs most", "lower")),
}  # fmt: skip
"""The facts of a result that tables show: their column, how they are written, what they say."""
_CLOSED = Figure("share of the teacher's loss at as many steps that the student avoids, in this distance", "higher")
MANY = 4
"""Of more students at one number of steps the verdict has the best, and names those not distinguishable from it."""


def meaning(column: str) -> Figure:
    """What a column of these tables says, and which direction is good."""
    if column.endswith(" closed"):
        return _CLOSED
    return next((says for name, _, says in _COST.values() if name == column), None) or figure(column)


# ---------------------------------------------------------------- in sentences


def verdict(comparison: Comparison) -> list[str]:
    """For each number of steps what students reach and cost, the one of lowest FD first; seeds in the mean."""
    found, sentences = comparison.over_seeds(), []
    for steps in sorted({r.steps for r in found.students}):
        first, *others = sorted((r for r in found.students if r.steps == steps), key=lambda r: r.figures["FD"])
        best = f"{_reached(found, first)}; {_speed(found, first)}"
        if len(others) < MANY:
            sentences += [f"{best}.", *(_beside(found, r, first) for r in others)]
            continue
        alike = ", ".join(r.name for r in others if _is_open(lower_by("FD", first, r)))
        other = f"not distinguishable from {alike}" if alike else "distinguishable from all others"
        sentences.append(f"{best}; the lowest FD of {len(others) + 1} students at as many steps, {other}.")
    return sentences


def _beside(found: Comparison, other: Result, first: Result) -> str:
    """The sentence of a student beside the one of lowest FD; its speed where it is another one."""
    same = other.figures["evaluations"] == first.figures["evaluations"]
    return "; ".join([_reached(found, other), _behind(other, first), *([] if same else [_speed(found, other)])]) + "."


def _reached(found: Comparison, ours: Result) -> str:
    """A student's FD, and the share of the teacher's gap that it closes."""
    at_steps, closed = f"the teacher at {in_steps(ours.steps)}", found.gap_closed(ours, "FD")
    few = teacher_at(ours.steps, found.results)
    if few is None:
        gap = ""
    elif closed is None:  # what cannot be closed can still be widened
        value, (low, high) = lower_by("FD", few, ours)
        worse = f", worse than {at_steps}: higher by {value:.3g} [{low:.3g}, {high:.3g}]"
        gap = worse if low > 0 else f" ({at_steps} has no measurable gap to close)"
    elif _is_open(closed):
        gap = f", not distinguishable from {at_steps}: {in_percent(closed)} of its gap closed"
    elif closed[0] < 0:
        gap = f", worse than {at_steps}: {in_percent(closed)} of its gap closed"
    else:
        gap = f", closes {in_percent(closed)} of the teacher's {ours.steps}-step gap"
    return f"{ours.label}: FD {ours.in_words('FD')}{gap}"


def _speed(found: Comparison, ours: Result) -> str:
    """How many times fewer network evaluations an image takes than the teacher's at its full number of steps."""
    mine, full = ours.figures["evaluations"], found.full.figures["evaluations"]
    faster = f"{full / mine:.3g} × faster" if full > mine else "not faster"
    return f"{faster} ({mine:g} network evaluation{'s' if mine != 1 else ''} per image; {found.full.label}: {full:g})"


def _behind(other: Result, first: Result) -> str:
    """By how much a student's FD is above the lowest one, or that they cannot be distinguished."""
    value, (low, high) = difference = lower_by("FD", first, other)
    found = f"FD higher by {value:.3g} [{low:.3g}, {high:.3g}]"
    return (
        f"not distinguishable from {first.name} ({found})" if _is_open(difference) else f"behind {first.name}: {found}"
    )


def _is_open(estimate: Estimate) -> bool:
    """Whether the interval holds 0."""
    return estimate[1][0] <= 0 <= estimate[1][1]


def in_percent(closed: Estimate | None) -> str:
    """The closed share of a gap with its interval; "no gap" where there is none."""
    if closed is None:
        return "no gap"
    share, (low, high) = closed
    return f"{100 * share:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def verdict_text(comparison: Comparison) -> str:
    """The verdict in lines for a terminal."""
    return "\n".join(line for sentence in verdict(comparison) for line in in_lines(f"- {sentence}", hang=2))


def in_short(comparison: Comparison) -> str:
    """The verdict, and a table of each of `IN_SHORT` by steps, for a terminal."""
    about = (
        f"Over {comparison.count} {comparison.about}; 95 % intervals in brackets, of several seeds mean ± deviation."
    )
    names = [name for name in IN_SHORT if name in comparison.names]
    parts = [verdict_text(comparison), *(summary(comparison, name).as_text() for name in names)]
    return "\n\n".join([*parts, "\n".join([*in_lines(about), *meanings(names)])])


# ---------------------------------------------------------------- in tables


def shown(comparison: Comparison) -> list[str]:
    """The main figures that these models have."""
    return [name for name in MAIN if name in comparison.names]


def quality_table(comparison: Comparison) -> Table:
    """The main figures and the costs of training, a row for each result and one for real images."""
    plain, results = figure_table(comparison, shown(comparison)), comparison.results
    columns = {"": [row[0] for row in plain.rows]}
    for i, name in enumerate(plain.head[1:], 1):
        columns[name] = [row[i] for row in plain.rows]
        if name in DISTANCES:
            columns[f"{name} closed"] = [_closed(comparison, result, name) for result in results]
    for fact, (name, write, _) in _COST.items():
        columns[name] = ["" if r.facts.get(fact) is None else write(r.facts[fact]) for r in results]
    lines = zip_longest(*columns.values(), fillvalue="")  # real images have figures alone
    return Table(list(columns), [list(line) for line in lines]).without_empty()


def _closed(comparison: Comparison, result: Result, name: str) -> str:
    """The closed share of the gap; empty for the teacher, and where it was not measured at as many steps."""
    if all(result is not r for r in comparison.students) or teacher_at(result.steps, comparison.results) is None:
        return ""
    return in_percent(comparison.gap_closed(result, name))


def other_table(comparison: Comparison) -> Table:
    """All figures that `quality_table` leaves out."""
    rest = [name for name in (*FIGURES, *comparison.names) if name not in MAIN]
    return figure_table(comparison, dict.fromkeys(rest))


def summary(comparison: Comparison, name: str) -> Table:
    """One figure: a row for each model, a column for each number of steps, of several seeds mean and deviation."""
    results = [r for r in comparison.results if name in r.figures]
    steps, body = sorted({r.steps for r in results}), []
    for model in dict.fromkeys(r.model for r in results):
        mine = [r for r in results if r.model == model]
        seeds = sorted({r.seed for r in mine if r.seed is not None})
        cells = [over_seeds(name, [r for r in mine if r.steps == n]) for n in steps]
        of_seeds = f", seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}" if seeds else ""
        body.append([model + of_seeds, *cells])
    return Table([name, *map(in_steps, steps)], body)


def over_seeds(name: str, results: Sequence[Result]) -> str:
    """A cell of the summary: of one result the figure with its interval; of several the mean ± standard deviation."""
    if len(results) < 2:
        return "".join(r.in_words(name) for r in results)
    values = torch.tensor([r.figures[name] for r in results], dtype=torch.float64)
    mean = float(values.mean())
    places = 0 if mean == 0 else max(0, 2 - math.floor(math.log10(abs(mean))))
    return f"{mean:.{places}f} ± {float(values.std()):.{places}f}"


def in_order(results: Iterable[Result], models: Sequence[str]) -> list[Result]:
    """The teacher first, then ``models`` in their order, each by seed and steps."""
    place = {model: i for i, model in enumerate(models)}
    return sorted(results, key=lambda r: (place.get(r.model, -1), r.model, -1 if r.seed is None else r.seed, r.steps))


# ---------------------------------------------------------------- for programs


def rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """The table for programs: a row for each result."""
    for r in comparison.results:
        row: dict[str, Any] = {"model": r.model, "seed": r.seed, "steps": r.steps}
        row |= {fact: r.facts.get(fact) for fact in _COST}
        for name in shown(comparison):
            row[name] = r.figures.get(name)
            if name in r.intervals:
                row[f"{name} low"], row[f"{name} high"] = r.intervals[name]
        for name in DISTANCES:
            closed = None if r is comparison.full else comparison.gap_closed(r, name)
            row[f"{name} closed"] = None if closed is None else closed[0]
        yield row


def as_csv(comparison: Comparison) -> str:
    """`rows` as comma-separated values."""
    found, file = list(rows(comparison)), io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in found for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return file.getvalue()


def as_markdown(comparison: Comparison) -> str:
    """The verdict, the summary and the table, with a line that explains each figure."""
    quality, parts = quality_table(comparison), ["\n".join(f"- {sentence}" for sentence in verdict(comparison))]
    parts += [summary(comparison, name).as_markdown() for name in IN_SHORT if name in comparison.names]
    parts += ["Of several seeds the mean ± their standard deviation.", quality.as_markdown()]
    parts.append(f"{comparison.count} {comparison.about}; 95 % intervals in brackets.")
    parts.append("\n".join(f"- {name}: {meaning(name)}" for name in quality.head[1:]))
    return "\n\n".join(part for part in parts if part) + "\n"
