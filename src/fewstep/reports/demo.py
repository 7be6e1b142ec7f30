"""`fewstep demo`: distil the shipped model into a 4-step LoRA, and compare it with its teacher."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fewstep.data.files import replace_text
from fewstep.evaluation.compare import Comparison, as_json, compare, comparison_grid
from fewstep.evaluation.result import gap_closed_in
from fewstep.models.families import load_teacher
from fewstep.recipe.load import load_recipe
from fewstep.recipe.schema import Recipe
from fewstep.reports.candidates import student_candidates, teacher_candidates
from fewstep.reports.results import in_percent
from fewstep.runs.distill import distill
from fewstep.scenes64.prompts import unseen_prompts
from fewstep.training.progress import progress_bar

RECIPE = "scenes-64-tcd"


@dataclass
class Demo:
    """Results of the demo: its run directory, the image grid, and the comparison of teacher and student."""

    folder: Path
    grid: Path
    comparison: Comparison

    def gap_closed(self, figure: str) -> str:
        """The share of the teacher's loss at few steps that the student avoids, in words."""
        results = self.comparison.results
        found = gap_closed_in(results, figure, results[-1])
        if found is None:
            return f"{figure}: the teacher loses nothing measurable at few steps"
        return f"{figure}: the student closes {in_percent(found)} of the teacher's gap"


def demo(folder: Path, recipe: Recipe | None = None, count: int = 256, show_progress: bool = False) -> Demo:
    """Distil in ``folder``, or continue there, then compare teacher and student on ``count`` unseen prompts."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("fewstep demo is for one process: under torchrun use fewstep distill.")
    recipe = recipe or load_recipe(RECIPE)
    student = student_candidates(distill(recipe, folder, resume=True, show_progress=show_progress))
    teacher = load_teacher(recipe.teacher.path)
    steps = [recipe.sample.teacher_steps, student[0].steps]
    candidates = [*teacher_candidates(teacher, steps, recipe.sample.guidance_scale), *student]
    with progress_bar(len(candidates), 0, "comparing", show_progress) as advance:
        comparison = compare(teacher, candidates, unseen_prompts(teacher, count), recipe.seed, advance)
    grid = folder / "demo.png"
    comparison_grid(comparison).save(grid)
    replace_text(folder / "demo.json", as_json(comparison))
    return Demo(folder, grid, comparison)
