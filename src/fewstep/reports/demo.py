"""`fewstep demo`: distil the shipped model into a 4-step LoRA, and show what came out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.data.files import replace_text
from fewstep.evaluation.compare import Candidate, Comparison, as_json, compare, comparison_grid
from fewstep.models.families import Teacher, load_teacher
from fewstep.recipe.load import load_recipe
from fewstep.recipe.schema import Recipe
from fewstep.runs.distill import distill
from fewstep.sampling import DDIMSampler
from fewstep.scenes64.prompts import unseen_prompts
from fewstep.students.card import load_card, sampler_of
from fewstep.students.lineage import teacher_of
from fewstep.students.student import load_student
from fewstep.training.logging import progress_bar

RECIPE = "scenes-64-tcd"


@dataclass
class Demo:
    """What the demo made: its run, the picture, the figures."""

    folder: Path
    picture: Path
    comparison: Comparison

    def closed(self, figure: str) -> str:
        """How much of the teacher's loss at few steps the student avoids, in words."""
        found = self.comparison.gap_closed(figure, few=1, many=0, student=2)
        if found is None:
            return f"{figure}: the teacher loses nothing measurable at few steps"
        share, (low, high) = found
        return (
            f"{figure}: the student closes {100 * share:.0f} % [{100 * low:.0f}, {100 * high:.0f}] of the teacher's gap"
        )


def against_teacher(
    recipe: Recipe, student_folder: Path, steps: Sequence[int] = (), few: Sequence[int] = ()
) -> tuple[Teacher, list[Candidate]]:
    """The teacher and the ways to `compare`: it at its full and at ``few`` steps, then the student at ``steps``.

    Both are the student's own number by default.
    """
    teacher, card = load_teacher(recipe.teacher.path), load_card(student_folder)
    student = load_student(teacher_of(student_folder, card), student_folder, card)
    steps, scale = steps or [card.num_inference_steps], recipe.sample.guidance_scale
    ways = [
        Candidate(f"teacher, {n} steps", teacher.denoiser, DDIMSampler(num_inference_steps=n), scale)
        for n in (recipe.sample.teacher_steps, *(few or steps))
    ]
    for n in steps:
        sampler = sampler_of(card, num_inference_steps=n)
        ways.append(Candidate(f"student, {n} steps", student, sampler, card.guidance_scale, card.guidance_embed))
    return teacher, ways


def demo(folder: Path, recipe: Recipe | None = None, count: int = 256, show_progress: bool = False) -> Demo:
    """Distil (or go on distilling) in ``folder``, then compare teacher and student on ``count`` unseen prompts."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("fewstep demo is for one process: under torchrun use fewstep distill.")
    recipe = recipe or load_recipe(RECIPE)
    student_folder = distill(recipe, folder, resume=True, show_progress=show_progress)
    teacher, ways = against_teacher(recipe, student_folder)
    with progress_bar(len(ways), 0, "comparing", show_progress) as advance:
        comparison = compare(teacher, ways, unseen_prompts(teacher, count), recipe.seed, advance)
    shown = folder / "demo.png"
    comparison_grid(comparison).save(shown)
    replace_text(folder / "demo.json", as_json(comparison))
    return Demo(folder, shown, comparison)
