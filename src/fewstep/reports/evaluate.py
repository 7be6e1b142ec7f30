"""`fewstep evaluate`: students at every combination of steps, guidance, eta and LoRA scale, to choose what to ship."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fewstep.data.files import replace_text
from fewstep.diffusion.schedule import Schedule
from fewstep.evaluation.compare import Candidate, compare, comparison_grid
from fewstep.evaluation.figures import best_first
from fewstep.evaluation.result import Comparison, in_steps
from fewstep.models.hub import Remark
from fewstep.reports.candidates import student_candidates, teacher_candidates
from fewstep.reports.finished import FinishedRun, check_out, finished_runs, measured_alike, model_of, steps_of
from fewstep.runs.first_teacher import first_teacher_of
from fewstep.students.card import sampler_of
from fewstep.training.progress import doing, progress_bar


@dataclass(frozen=True)
class Sweep:
    """Values to combine; an empty tuple stands for the student's own.

    Attributes:
        steps: of the sampler. guidance: classifier-free guidance, 0 or 1 for off. eta: fresh noise of the sampler, 0
            to 1. lora_scale: strength of a LoRA student.
    """

    steps: tuple[int, ...] = ()
    guidance: tuple[float, ...] = ()
    eta: tuple[float, ...] = ()
    lora_scale: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, least, most in (("steps", 1, 10**6), ("guidance", 0, 1e6), ("eta", 0, 1), ("lora_scale", -100, 100)):
            for value in getattr(self, name):
                if not least <= value <= most:
                    raise ValueError(f"{name}: {value:g} is not from {least:g} to {most:g}.")

    def __len__(self) -> int:
        return math.prod(len(values) or 1 for values in (self.steps, self.guidance, self.eta, self.lora_scale))

    def of(self, run: FinishedRun, label: str, schedule: Schedule) -> Iterator[Candidate]:
        """The student of ``run`` at every combination that its sampler can take; a remark names the others."""
        (own,), card = student_candidates(run.files.student, (), label, run.own), run.card
        lora = _LoraScale(own.denoiser)
        if self.steps and set(self.steps) != {card.num_inference_steps} == set(steps_of(run, schedule)):
            trained = in_steps(card.num_inference_steps)
            warnings.warn(Remark(f"{label} was trained for {trained} alone: others are no fair trial."), stacklevel=2)
        for scale in self.lora_scale or (1.0,):
            lora.set(scale)
            for steps, eta, guidance in product(self.steps or (None,), self.eta or (None,), self.guidance or (None,)):
                changes: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
                changes |= {} if eta is None else {"eta": eta}
                named = [label, *(f"{name} {value:g}" for name, value in (
                    ("LoRA", scale if self.lora_scale else None), ("guidance", guidance), ("eta", eta),
                ) if value is not None)]  # fmt: skip
                try:
                    sampler = sampler_of(card, **changes)
                    sampler.times(schedule)
                except ValueError as error:
                    warnings.warn(Remark(f"{', '.join(named)}, {steps} steps is left out: {error}"), stacklevel=2)
                    continue
                wanted = own.guidance_scale if guidance is None else guidance or 1.0
                yield replace(own, model=", ".join(named), sampler=sampler, guidance_scale=wanted)


def evaluate(
    folders: Sequence[Path],
    sweep: Sweep,
    out: Path,
    count: int = 0,
    features: str = "",
    prompts: Path | None = None,
    show_progress: bool = False,
    device: str | None = None,
) -> Comparison:
    """Measure the students of finished runs of one teacher; write ``out`` (JSON) and beside it their images (PNG).

    The teacher at its full number of steps, and at those of the sweep, stands first.

    Args:
        count: number of prompts; 0: as the first run's recipe.
        features, prompts, device: as `fewstep.reports.report.report`.

    Raises:
        ValueError: a run is not finished, or has another teacher, or no LoRA for the scales of ``sweep``.
    """
    check_out(out, ".png")
    runs, _ = finished_runs(folders, device)
    if sweep.lora_scale and any(run.card.weights == "full" for run in runs):
        raise ValueError("--lora-scale goes with a LoRA student, and one of these has full weights: leave it out.")
    first = runs[0].recipe
    with doing("loading the teacher"):
        teacher = first_teacher_of(first)
    measured_on = measured_alike(runs, teacher, features, prompts, count or None, show_progress)
    steps = sweep.steps or tuple(sorted({run.card.num_inference_steps for run in runs}))
    shown = teacher_candidates(teacher, (first.sample.teacher_steps, *steps), first.sample.guidance_scale)

    def candidates() -> Iterator[Candidate]:  # one student in memory at a time
        yield from shown
        for run in runs:
            yield from sweep.of(run, model_of(run, runs), teacher.denoiser.schedule)

    with progress_bar(len(shown) + len(runs) * len(sweep), 0, "measuring", show_progress) as advance:
        comparison = compare(teacher, candidates(), measured_on, first.seed, advance, per_prompt=4)
    out.parent.mkdir(parents=True, exist_ok=True)
    comparison_grid(comparison).save(out.with_suffix(".png"))
    replace_text(out, comparison.as_json())
    return comparison


def best(comparison: Comparison, figure: str) -> str:
    """Which student to ship by one figure, in a sentence."""
    full, *others = comparison.results
    measured = [result for result in others if result.model != full.model]
    students = [result for result in measured if figure in result.figures]
    if not students:
        return f"No student has the figure {figure}." if measured else "No student could be measured at these values."
    found = min(students, key=lambda result: best_first(figure, result.figures[figure]))
    return f"Best by {figure}: {found.label} ({found.in_words(figure)})."


class _LoraScale:
    """The LoRA of a loaded student at other strengths than its own."""

    def __init__(self, denoiser: Any) -> None:
        named = denoiser.network.network.named_parameters()
        self.own = [(weight, weight.detach().clone()) for name, weight in named if ".lora_B" in name]

    @torch.no_grad()
    def set(self, scale: float) -> None:
        for weight, own in self.own:
            weight.copy_(own * scale)
