"""The result of one model at one number of steps, and the comparison of two or three of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.data.files import replace_tensors
from fewstep.evaluation.measured import gap_closed
from fewstep.evaluation.metrics import centred_interval

KEPT_IMAGES = 8
"""`Result.save` keeps the images of so many prompts; figures and intervals do not need the others any more."""

Estimate = tuple[float, tuple[float, float]]
"""A value, and the ends of its 95 % interval."""


@dataclass
class Result:
    """Images and figures of one model at one number of steps.

    Attributes:
        model: its name in tables, e.g. "student" or "teacher, ddim".
        steps: of its sampler.
        images: [N, 3, H, W] in [0, 1].
        figures: name -> value, in the order of `figures.FIGURES`; intervals: 95 %, of those that have one.
        resampled: [RESAMPLINGS] values of a figure, over resamplings that all results of the same prompts share, so
            that differences and ratios of two results can be taken resampling by resampling.
        seed: of its training; None for a teacher, and where seeds are not compared.
        facts: what else is known of the model, as plain data: its guidance scale, its recipe, what it cost.
    """

    model: str
    steps: int
    images: Tensor
    figures: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    resampled: dict[str, Tensor] = field(default_factory=dict)
    seed: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The model, with the seed of its training if there is one."""
        return self.model if self.seed is None else f"{self.model}, seed {self.seed}"

    @property
    def label(self) -> str:
        """Name and number of steps: "student, 4 steps"."""
        return f"{self.name}, {in_steps(self.steps)}"

    def in_words(self, figure: str, digits: int = 3) -> str:
        """A figure with its interval, if it has one: "3.21 [3.05, 3.4]"."""
        value = f"{self.figures[figure]:.{digits}g}"
        if figure not in self.intervals:
            return value
        low, high = self.intervals[figure]
        return f"{value} [{low:.3g}, {high:.3g}]"

    def as_plain(self) -> dict[str, Any]:
        """Everything but the tensors, for JSON."""
        return {key: value for key, value in vars(self).items() if key not in ("images", "resampled")}

    def save(self, path: Path) -> None:
        """Write a safetensors file, with the first `KEPT_IMAGES` images in eight bits."""
        images = (self.images[:KEPT_IMAGES].clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
        tensors = {f"resampled/{name}": values for name, values in self.resampled.items()}
        replace_tensors(path, tensors | {"pictures": images}, {"entry": json.dumps(self.as_plain())})

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                plain = json.loads(file.metadata()["entry"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            plain["intervals"] = {name: tuple(ends) for name, ends in plain["intervals"].items()}
            images = tensors.pop("pictures").float() / 255
            resampled = {name.removeprefix("resampled/"): values for name, values in tensors.items()}
            return cls(**plain, images=images, resampled=resampled)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            raise ValueError(f"{path} is damaged: remove it, and what it held is measured again.") from None


@dataclass
class Comparison:
    """Results of several models on the same prompts and noise, and the context in which to read them.

    Attributes:
        results: in the order of the candidates; of reports and benchmarks the first is the teacher at its full number
            of steps.
        captions: of their images, or of the first ones that are kept; seed: of the noise.
        floors: FD and detail FD of as many other real images to the reference: nothing can do better.
        about: the prompts and the reference in words.
        count: images of each model; as many as captions by default.
    """

    results: list[Result]
    captions: Sequence[str]
    seed: int
    floors: dict[str, float]
    about: str = "unseen prompts"
    count: int = 0

    def __post_init__(self) -> None:
        self.count = self.count or len(self.captions)

    @property
    def full(self) -> Result:
        """The teacher at its full number of steps."""
        return self.results[0]

    @property
    def students(self) -> list[Result]:
        """The results of every other model than the teacher, which may be there by several samplers."""
        teacher = self.full.model.partition(",")[0]
        return [r for r in self.results if "method" in r.facts or r.model.partition(",")[0] != teacher]

    @property
    def names(self) -> list[str]:
        """The figures that any of the models has."""
        return list(dict.fromkeys(name for result in self.results for name in result.figures))

    def gap_closed(self, result: Result, figure: str) -> Estimate | None:
        """`gap_closed_in` these results."""
        return gap_closed_in(self.results, figure, result)

    def over_seeds(self) -> Comparison:
        """The same with one result for all seeds of a model at a number of steps."""
        groups: dict[object, list[Result]] = {}
        for i, r in enumerate(self.results):  # without seeds, the same model at the same steps is another result
            groups.setdefault(i if r.seed is None else (r.model, r.steps), []).append(r)
        return replace(self, results=[mean_over_seeds(group) for group in groups.values()])

    def as_json(self) -> str:
        """The figures for programs."""
        ways = {r.label: {**r.figures, "intervals": r.intervals} for r in self.results}
        figures = {"pictures": self.count, "seed": self.seed, "real": self.floors, "ways": ways}
        return json.dumps(figures, indent=1) + "\n"


def mean_over_seeds(results: Sequence[Result]) -> Result:
    """One result for several seeds of a model: means of those figures that all have, intervals over the same images."""
    first = results[0]
    if len(results) == 1:
        return replace(first, seed=None)
    figures = {
        name: sum(r.figures[name] for r in results) / len(results)
        for name in first.figures
        if all(name in r.figures for r in results)
    }
    resampled = {
        name: torch.stack([r.resampled[name] for r in results]).mean(0) for name in first.resampled if name in figures
    }
    intervals = {name: centred_interval(values, figures[name]) for name, values in resampled.items()}
    model = f"{first.model}, mean of {len(results)} seeds"
    return Result(model, first.steps, first.images, figures, intervals, resampled, facts=first.facts)


def in_steps(steps: int) -> str:
    """A number of steps in words: "1 step", "4 steps"."""
    return "1 step" if steps == 1 else f"{steps} steps"


def lower_by(figure: str, ours: Result, theirs: Result) -> Estimate:
    """By how much ``ours`` is lower than ``theirs``, on the same prompts and noise, with its 95 % interval."""
    value = theirs.figures[figure] - ours.figures[figure]
    return value, centred_interval(theirs.resampled[figure] - ours.resampled[figure], value)


def teacher_at(steps: int, results: list[Result]) -> Result | None:
    """The teacher at so many steps; ``results`` begin with the same teacher at its full number of steps."""
    same = (r for r in results[1:] if r.model == results[0].model and r.steps == steps)
    return next(same, None)


def gap_closed_in(results: list[Result], figure: str, student: Result) -> Estimate | None:
    """Share of the teacher's gap between the student's and all steps that the student closes, with its 95 % interval.

    None where the teacher was not measured at the student's number of steps, or where it has no measurable gap: the
    gap's own interval holds 0.

    Args:
        results: the teacher at its full number of steps first, ``student`` among the others.
    """
    few, full = teacher_at(student.steps, results), results[0]
    if few is None or float((few.resampled[figure] - full.resampled[figure]).quantile(0.025)) <= 0:
        return None
    picked = (few, full, student)
    value = float(gap_closed(*(torch.tensor(each.figures[figure], dtype=torch.float64) for each in picked)))
    return value, centred_interval(gap_closed(*(each.resampled[figure] for each in picked)), value)
