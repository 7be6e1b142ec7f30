"""What reports, benchmarks and the demo compare: a teacher and its students, at several numbers of steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.evaluation.compare import Candidate
from fewstep.models.families import Teacher
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
    folder: Path, steps: Sequence[int] = (), model: str = "student", device: str = "cpu"
) -> list[Candidate]:
    """The student in ``folder`` at each number of steps, by its own sampler; at its own number by default."""
    card = load_card(folder)
    student = load_student(teacher_of(folder, card, device), folder, card)
    samplers = [sampler_of(card, num_inference_steps=n) for n in steps or [card.num_inference_steps]]
    return [Candidate(model, student, sampler, card.guidance_scale, card.guidance_embed) for sampler in samplers]
