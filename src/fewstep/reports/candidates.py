"""What reports, benchmarks and the demo compare: a teacher and its students, at several numbers of steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.evaluation.compare import Candidate
from fewstep.models.families import Teacher, load_teacher
from fewstep.models.hub import DTYPES
from fewstep.recipe.schema import Recipe
from fewstep.sampling import make_sampler
from fewstep.students.card import load_card, sampler_of
from fewstep.students.lineage import model_behind, teacher_of
from fewstep.students.student import load_student


def teacher_candidates(
    teacher: Teacher, steps: Sequence[int], guidance_scale: float, model: str = "teacher", sampler: str = "ddim"
) -> list[Candidate]:
    """The teacher at each number of steps, by a sampler of that name."""
    return [
        Candidate(model, teacher.denoiser, make_sampler(sampler, num_inference_steps=n), guidance_scale) for n in steps
    ]


def first_teacher_of(recipe: Recipe) -> Teacher:
    """The model at the beginning of a run's lineage, past all students in between, as the run was trained on it."""
    return load_teacher(model_behind(recipe.teacher.path), **_held_as(recipe), size=recipe.teacher.size,
                        guidance_embed=recipe.teacher.guidance_embed, loras=recipe.teacher.loras)  # fmt: skip


def _held_as(recipe: Recipe) -> dict[str, Any]:
    """Device, number format, quantisation and tiling of a run's teacher: what its students are measured in, too."""
    teacher = recipe.teacher
    return {
        "device": recipe.training.device, "dtype": DTYPES[teacher.dtype], "config": teacher.config,
        "quantization": teacher.quantize, "vae_tiling": teacher.vae_tiling,
    }  # fmt: skip


def student_candidates(
    folder: Path, steps: Sequence[int] = (), model: str = "student", recipe: Recipe | None = None
) -> list[Candidate]:
    """The student in ``folder`` at each number of steps, by its own sampler; at its own number by default.

    Args:
        recipe: of its run, which says how its teacher is held; in float32 on the CPU by default.
    """
    card = load_card(folder)
    held_as = {} if recipe is None else _held_as(recipe)
    student = load_student(teacher_of(folder, card, **held_as), folder, card)  # its card names the teacher's LoRAs
    samplers = [sampler_of(card, num_inference_steps=n) for n in steps or [card.num_inference_steps]]
    return [Candidate(model, student, sampler, card.guidance_scale, card.guidance_embed) for sampler in samplers]
