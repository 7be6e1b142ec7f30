"""`fewstep demo`: what few steps cost, a 4-step student of the shipped model against it, and a comparison of both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fewstep.data.files import replace_text
from fewstep.evaluation.compare import compare, comparison_grid
from fewstep.evaluation.grids import ON_PAGES, image_grid
from fewstep.evaluation.result import Comparison, in_steps
from fewstep.models.families import Teacher, load_teacher
from fewstep.recipe.load import load_recipe
from fewstep.recipe.schema import Recipe
from fewstep.reports.candidates import student_candidates, teacher_candidates
from fewstep.reports.results import in_percent
from fewstep.runs.distill import distill
from fewstep.runs.folder import RunFolder
from fewstep.runs.foresee import foresee
from fewstep.runs.plan import cost_of_step
from fewstep.runs.validation import sample_teacher
from fewstep.scenes64.prompts import unseen_prompts
from fewstep.training import launch
from fewstep.training.progress import doing, duration, progress_bar

RECIPE = "scenes-64-pdd"
BEFORE = "before.png"
"""The teacher's images in many and in few steps, which exist before any training."""


@dataclass
class Demo:
    """Results of the demo: its run directory, the image grid, and the comparison of teacher and student."""

    folder: Path
    grid: Path
    comparison: Comparison

    def gap_closed(self, figure: str) -> str:
        """The share of the teacher's loss at few steps that the student avoids, in words."""
        found = self.comparison.gap_closed(self.comparison.results[-1], figure)
        if found is None:
            return f"{figure}: the teacher loses nothing measurable at few steps"
        return f"{figure}: the student closes {in_percent(found)} of the teacher's gap"


def demo(
    folder: Path,
    recipe: Recipe | None = None,
    count: int = 512,
    show_progress: bool = False,
    tell: Callable[[str], object] = lambda line: None,
) -> Demo:
    """Show the teacher's images, distil in ``folder`` or continue there, then compare on ``count`` unseen prompts.

    Args:
        tell: takes a line about each part before it begins: what it does, and how long it will last.
    """
    if launch.place().count > 1:
        raise ValueError("fewstep demo is for one process: under torchrun or srun use fewstep distill.")
    recipe = recipe or load_recipe(RECIPE)
    with doing("loading the teacher"):
        teacher = load_teacher(recipe.teacher.path, device=recipe.training.device)
    _before(folder, recipe, teacher, count, tell)
    student = student_candidates(distill(recipe, folder, resume=True, show_progress=show_progress), recipe=recipe)
    steps = [recipe.sample.teacher_steps, student[0].steps]
    candidates = [*teacher_candidates(teacher, steps, recipe.sample.guidance_scale), *student]
    with progress_bar(len(candidates), 0, "comparing", show_progress) as advance:
        comparison = compare(teacher, candidates, unseen_prompts(teacher, count), recipe.seed, advance)
    grid = folder / "demo.png"
    comparison_grid(comparison).save(grid)
    replace_text(folder / "demo.json", comparison.as_json())
    return Demo(folder, grid, comparison)


def _before(folder: Path, recipe: Recipe, teacher: Teacher, count: int, tell: Callable[[str], object]) -> None:
    """Write the teacher's images in many and in few steps, and tell what follows; once for each folder.

    What the run would refuse is refused first: a folder that holds an image is no longer free for another run.
    """
    files, shown = RunFolder(folder), recipe.sample
    foresee(recipe)
    files.check(recipe, resume=True)
    with files.locked():
        files.claim(recipe.as_yaml())
        if (folder / BEFORE).is_file():
            return
        steps = (shown.teacher_steps, shown.num_inference_steps)
        with doing(f"generating the teacher's images in {steps[0]} and in {steps[1]} steps"):
            cond, began = teacher.encode_prompts(shown.prompts), time.monotonic()
            rows = [sample_teacher(teacher, recipe, cond, n) for n in steps]
            spent = time.monotonic() - began
            labels = [f"teacher, {in_steps(n)}" for n in steps]
            grid = image_grid([teacher.decode(row) for row in rows], labels, shown.prompts, largest=2 * ON_PAGES)
            grid.save(folder / BEFORE)
    tell(f"The teacher in {steps[0]} and in {steps[1]} steps, which the student will need: {folder / BEFORE}.")
    calls = 2 if shown.guidance_scale > 1 else 1
    a_pass = spent / (len(shown.prompts) * sum(steps) * calls)
    training = a_pass * cost_of_step(recipe) * recipe.training.steps
    comparing = a_pass * count * (sum(steps) * calls + steps[1])
    tell(
        f"Next: {recipe.captions():,} images are encoded; {recipe.training.steps:,} steps of training last about "
        f"{duration(training)}, the comparison on {count} unseen prompts about {duration(comparing)}."
    )
