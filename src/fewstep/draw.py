"""`fewstep sample`: any model of ours by its name or folder, drawn with the sampler it wants."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.evaluation.grids import image_grid
from fewstep.export.chain import student_folder, teacher_of
from fewstep.export.student import Card, load_card, load_student, sampler_of
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import Teacher, load_teacher
from fewstep.sampling import sample

TEACHER = Card(method="", sampler="ddim", num_inference_steps=50, weights="full", teacher="")


@dataclass
class Model:
    """Something to draw with: a teacher, or a student on its teacher.

    Attributes:
        card: how to sample from it.
        guidance_scale: classifier-free guidance unless the user says otherwise.
    """

    teacher: Teacher
    denoiser: Denoiser
    card: Card
    guidance_scale: float


def load_model(name: str) -> Model:
    """A run directory, a student's folder, or a teacher.

    Raises:
        ValueError: one sentence when it is none of these.
    """
    folder = student_folder(Path(name))
    if folder is not None:
        card = load_card(folder)
        teacher = teacher_of(folder, card)
        return Model(teacher, load_student(teacher, folder, card), card, card.guidance_scale)
    if (Path(name) / "recipe.yaml").is_file():
        raise ValueError(f"The run {name} has no student yet: finish it with fewstep distill ... --resume.")
    teacher = load_teacher(name)
    return Model(teacher, teacher.denoiser, TEACHER, 3.0)


def draw(
    model: Model,
    prompts: Sequence[str],
    sampler: str | None,
    options: Mapping[str, Any],
    guidance_scale: float | None,
    seed: int,
    out: Path,
) -> str:
    """Write one row of pictures to ``out``; returns in words how they were made."""
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out must be a .png, .jpg or .webp file, not '{out}'.")
    chosen = sampler_of(model.card, sampler, **options)
    scale = guidance_scale if guidance_scale is not None else model.guidance_scale
    if not 0 <= scale < math.inf:
        raise ValueError(f"--guidance-scale must be at least 0 and finite (1 is off), not {scale:g}.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed must be a whole number from 0 to 2^63 - 1, not {seed}.")
    cond = model.teacher.encode_prompts(list(prompts))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), *model.teacher.latent_shape, generator=generator)
    told = model.card.guidance_embed
    run = sample(model.denoiser, chosen, noise, cond, scale, guidance_embed=told, generator=generator)
    pictures = model.teacher.decode(run.x0)
    words = f"{chosen.name}, timesteps {', '.join(f'{t:g}' for t in run.timesteps[:8].tolist())}"
    words += ", ..." if len(run.timesteps) > 8 else ""
    out.parent.mkdir(parents=True, exist_ok=True)
    image_grid([pictures], [f"seed {seed}"], list(prompts), scale=3).save(out)
    return f"{words}; guidance {scale:g}; seed {seed}"
