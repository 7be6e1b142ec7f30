"""Teacher against student on unseen prompts: one row of figures for each way of sampling, and their pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.data.scenes import Scenes
from fewstep.evaluation.metrics import detail_fd
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import Teacher
from fewstep.sampling import Sampler, sample

UNSEEN = 3
"""The set of scenes that nothing was trained on."""


@dataclass
class Way:
    """One way to make pictures: a model, its sampler, its guidance."""

    label: str
    denoiser: Denoiser
    sampler: Sampler
    guidance_scale: float = 1.0
    guidance_embed: float | None = None


@dataclass
class Outcome:
    """What a way gave.

    Attributes:
        label: its name. pictures: [N, 3, H, W] in [0, 1].
        evaluations: network evaluations per picture.
        milliseconds: of sampling per picture, decoding apart.
        detail: detail FD to as many real scenes, seen through the teacher's autoencoder.
        distance: root mean square difference to the first way's pictures, from the same noise.
    """

    label: str
    pictures: Tensor
    evaluations: float
    milliseconds: float
    detail: float
    distance: float


def compare(
    teacher: Teacher, ways: Sequence[Way], count: int, seed: int = 0, advance: Callable[[int], None] | None = None
) -> list[Outcome]:
    """Sample ``count`` unseen captions in every way from the same noise; the first way is the reference."""
    scenes = Scenes(UNSEEN, size=teacher.image_size)
    captions = scenes.render(range(count)).captions
    real = _real(teacher, scenes, count)
    cond = teacher.encode_prompts(captions)
    noise = torch.randn(count, *teacher.latent_shape, generator=torch.Generator().manual_seed(seed))
    outcomes: list[Outcome] = []
    for i, way in enumerate(ways):
        before, started = way.denoiser.cost.evaluations, time.perf_counter()
        latents = _sample(way, noise.to(next(iter(cond.tensors.values())).device), cond, seed)
        seconds = time.perf_counter() - started
        pictures = teacher.decode(latents).cpu()
        first = outcomes[0].pictures if outcomes else pictures
        outcomes.append(
            Outcome(
                way.label,
                pictures,
                (way.denoiser.cost.evaluations - before) / count,
                1000 * seconds / count,
                detail_fd(pictures, real),
                float((pictures - first).square().mean().sqrt()),
            )
        )
        if advance is not None:
            advance(i + 1)
    return outcomes


def _sample(way: Way, noise: Tensor, cond: Cond, seed: int, batch: int = 64) -> Tensor:
    """All pictures' latents; each batch has its own stream, so a picture does not depend on how many follow it."""
    parts = []
    for first in range(0, len(noise), batch):
        rows = slice(first, first + batch)
        generator = torch.Generator().manual_seed(seed + 1 + first)
        parts.append(
            sample(
                way.denoiser, way.sampler, noise[rows], cond[rows], way.guidance_scale,
                guidance_embed=way.guidance_embed, generator=generator,
            ).x0
        )  # fmt: skip
    return torch.cat(parts)


def _real(teacher: Teacher, scenes: Scenes, count: int) -> Tensor:
    """Other unseen scenes, encoded and decoded: what a perfect generator of latents would show."""
    images = torch.from_numpy(scenes.render(range(count, 2 * count)).images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.cat([teacher.decode(teacher.encode_images(part)[0]).cpu() for part in images.split(64)])
