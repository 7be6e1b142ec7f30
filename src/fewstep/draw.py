"""`fewstep sample`: any model of ours by its name or folder, drawn with the sampler it wants."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.checkpoints.explain import licence_notice, warnings
from fewstep.checkpoints.load import family_of, load_checkpoint
from fewstep.checkpoints.registry import Checkpoint
from fewstep.checkpoints.sampling import sampler_of as published_sampler
from fewstep.checkpoints.sampling import start_of
from fewstep.evaluation.grids import image_grid
from fewstep.export.chain import is_pipeline, student_folder, teacher_of
from fewstep.export.student import CARD_FILE, Card, load_card, load_student, sampler_of
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import Teacher, load_teacher
from fewstep.sampling import Sampler, sample

TEACHER = Card(method="", sampler="ddim", num_inference_steps=50, weights="full", teacher="")


@dataclass
class Model:
    """Something to draw with: a teacher, or a student on its teacher.

    Attributes:
        card: how to sample from it.
        guidance_scale: classifier-free guidance unless the user says otherwise.
        published: the entry of the registry, where it is one; it then says how to sample, not the card.
        base: what that stands on.
    """

    teacher: Teacher
    denoiser: Denoiser
    card: Card
    guidance_scale: float
    published: Checkpoint | None = None
    base: str = ""

    def sampler(self, name: str | None, options: Mapping[str, Any]) -> Sampler:
        """What this model wants, as far as the user has no wishes."""
        if self.published is None or name is not None:
            return sampler_of(self.card, name, **options)
        return published_sampler(self.published, dict(self.teacher.pipeline.scheduler.config), **options)

    def said(self, steps: int, guidance_scale: float | None) -> list[str]:
        """What the user should know before sampling from a published file: its licence, and what is unusual."""
        if self.published is None:
            return []
        family = family_of(self.teacher.pipeline)
        return [*warnings(self.published, self.base, family, steps, guidance_scale), licence_notice(self.published)]


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
    if is_pipeline(Path(name)) and (Path(name) / CARD_FILE).is_file():  # a student that was exported whole
        card = load_card(Path(name))
        return Model(teacher, teacher.denoiser, card, card.guidance_scale)
    return Model(teacher, teacher.denoiser, TEACHER, 3.0)


def load_published(entry: Checkpoint, base: str | None = None, file: Path | None = None) -> Model:
    """An entry of the registry on its base model, as `fewstep.checkpoints.load.load_checkpoint` has it."""
    teacher = load_checkpoint(entry, base, file)
    scale = 1.0 if entry.guidance == "embedded" else entry.guidance_scale or 1.0
    told = entry.guidance_scale if entry.guidance == "embedded" else None
    card = Card(entry.method, "", entry.default_steps, "full", base or entry.base, guidance_embed=told)
    return Model(teacher, teacher.denoiser, card, scale, entry, base or entry.base or entry.repo)


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
    chosen = model.sampler(sampler, options)
    scale, told = _guidance(model, guidance_scale)
    if not 0 <= scale < math.inf:
        raise ValueError(f"--guidance-scale must be at least 0 and finite (1 is off), not {scale:g}.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed must be a whole number from 0 to 2^63 - 1, not {seed}.")
    cond = model.teacher.encode_prompts(list(prompts))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), *model.teacher.latent_shape, generator=generator)
    start = "unit" if model.published is None or sampler is not None else start_of(model.published)
    run = sample(model.denoiser, chosen, noise, cond, scale, None, start, guidance_embed=told, generator=generator)
    pictures = model.teacher.decode(run.x0)
    words = f"{chosen.name}, timesteps {', '.join(f'{t:g}' for t in run.timesteps[:8].tolist())}"
    words += ", ..." if len(run.timesteps) > 8 else ""
    out.parent.mkdir(parents=True, exist_ok=True)
    image_grid([pictures], [f"seed {seed}"], list(prompts), scale=3).save(out)
    words += f"; guidance {scale:g}" + ("" if told is None else f", told {told:g}")
    return f"{words}; seed {seed}"


def _guidance(model: Model, wish: float | None) -> tuple[float, float | None]:
    """(classifier-free guidance, the scale that the network is told)."""
    if model.published is None:
        return model.guidance_scale if wish is None else wish, model.card.guidance_embed
    if model.published.guidance == "embedded":
        return 1.0, model.card.guidance_embed if wish is None else wish
    return model.guidance_scale if wish is None else wish or 1.0, None  # cards of published files write 0 for off
