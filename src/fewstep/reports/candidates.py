"""What reports, benchmarks and the demo compare: a teacher and its students, at several numbers of steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.evaluation.compare import Candidate
from fewstep.models.families import Teacher
from fewstep.recipe.schema import Recipe
from fewstep.runs.first_teacher import held_as
from fewstep.sampling import make_sampler
from fewstep.students.card import load_card, sampler_of
from fewstep.students.lineage import teacher_of
from fewstep.students.student import load_student


def teacher_candidates(
    teacher: Teacher, steps: Sequence[int], guidance_scale: float, model: str = "teacher", sampler: str = "ddim"
) -> list[Candidate]:
    """The teacher at each number of steps, by a sampler of that name."""
    return [
        Candidate(model, teacher.denoiser, make_sampler(sampler, num_inference_steps=n), guidance_scale) for n in steps
    ]


def student_candidates(
    folder: Path, steps: Sequence[int] = (), model: str = "student", recipe: Recipe | None = None
) -> list[Candidate]:
    """The student in ``folder`` at each number of steps, by its own sampler; at its own number by default.

    Args:
        recipe: of its run, which says how its teacher is held; in float32 on the CPU by default.
    """
    card = load_card(folder)
    held = {} if recipe is None else held_as(recipe)
    student = load_student(teacher_of(folder, card, **held), folder, card)  # its card names the teacher's LoRAs
    own = [card.num_inference_steps]  # the only number of a student that has times of its own
    samplers = [sampler_of(card, num_inference_steps=n) for n in (own if card.timesteps else steps or own)]
    return [Candidate(model, student, sampler, card.guidance_scale, card.guidance_embed) for sampler in samplers]
