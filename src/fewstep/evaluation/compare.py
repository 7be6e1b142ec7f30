"""Comparison of models on the prompts of one set: the same noise, the same captions, the same figures for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from fewstep.evaluation.grids import ON_PAGES, image_grid
from fewstep.evaluation.measured import Features, resamplings
from fewstep.evaluation.metrics import Moments, centred_interval, frechet_distance, spreads
from fewstep.evaluation.prompt_set import PromptSet
from fewstep.evaluation.result import Comparison, Result
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import Teacher
from fewstep.sampling import Sampler, sample


@dataclass
class Candidate:
    """A model to compare, with its sampler and its guidance; ``model`` is its name in tables."""

    model: str
    denoiser: Denoiser
    sampler: Sampler
    guidance_scale: float = 1.0
    guidance_embed: float | None = None

    @property
    def steps(self) -> int:
        return len(self.sampler.times(self.denoiser.schedule)) - 1


def compare(
    teacher: Teacher,
    candidates: Iterable[Candidate],
    prompts: PromptSet,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
    per_prompt: int = 0,
    floors: bool = True,
) -> Comparison:
    """Generate and measure one image of every prompt with every candidate, all from the same noise.

    Args:
        teacher: encodes the prompts and decodes the latents.
        seed: of the noise.
        advance: called with the number of candidates done.
        per_prompt: number of further images of each of the first 16 prompts, for their spread; 0 leaves it out.
        floors: whether to measure real images too, where the prompt set has some.

    Raises:
        ValueError: the prompt set has neither a reference nor real images to make one.
    """
    count = len(prompts.captions)
    cond, noise = eval_inputs(teacher, prompts, seed)
    real, lowest = prompts.reference_from(count), {}
    if floors and prompts.real is not None:
        others = prompts.statistics(2 * count)
        lowest["FD"] = frechet_distance(Moments.of(others.features), Moments.of(real.features))
        lowest["detail FD"] = frechet_distance(others.detail, real.detail)
    results: list[Result] = []
    first: tuple[Tensor, Tensor] | None = None
    for i, candidate in enumerate(candidates):
        before, started = candidate.denoiser.cost.evaluations, time.perf_counter()
        latents = sample_candidate(candidate, noise, cond, seed)
        seconds = time.perf_counter() - started
        images = teacher.decode(latents).cpu()
        evaluations = (candidate.denoiser.cost.evaluations - before) / count
        figures = {"evaluations": evaluations, "ms": 1000 * seconds / count}
        measured = prompts.measure(images)
        if prompts.teacher is None:
            first = first or (images, measured.features)
            measured.compare_with("first", images, *first)
        figures |= measured.figures(real)
        if first is not None:
            figures["to first"] = float((images - first[0]).square().mean().sqrt())  # float32, as in earlier tables
        resampled = measured.resampled(real)
        if per_prompt:
            values = _spreads(teacher, candidate, cond[: min(16, count)], per_prompt, seed, prompts.features)
            figures["spread"] = float(values.mean())
            resampled["spread"] = resamplings(len(values)) @ values / len(values)
        intervals = {name: centred_interval(values, figures[name]) for name, values in resampled.items()}
        facts = {"guidance_scale": candidate.guidance_scale}
        results.append(Result(candidate.model, candidate.steps, images, figures, intervals, resampled, facts=facts))
        if advance is not None:
            advance(i + 1)
    return Comparison(results, prompts.captions, seed, lowest, prompts.about)


def comparison_grid(comparison: Comparison, columns: int = 8) -> Image.Image:
    """A row for each candidate: its images of the first ``columns`` prompts, with their captions."""
    results = comparison.results
    rows, labels = [r.images[:columns] for r in results], [r.label for r in results]
    return image_grid(rows, labels, comparison.captions[:columns], largest=ON_PAGES)


def _spreads(
    teacher: Teacher, candidate: Candidate, cond: Cond, per_prompt: int, seed: int, features: Features
) -> Tensor:
    """Diversity within each prompt, ``per_prompt`` images of each, every one from its own noise; float64 [prompts]."""
    rows = torch.arange(len(cond)).repeat_interleave(per_prompt)
    generator = torch.Generator().manual_seed(seed + 10**6)
    noise = torch.randn(len(rows), *teacher.latent_shape, generator=generator).to(cond["prompt_embeds"].device)
    images = teacher.decode(sample_candidate(candidate, noise, cond[rows], seed)).cpu()
    return spreads(features(images), per_prompt)


def eval_inputs(teacher: Teacher, prompts: PromptSet, seed: int) -> tuple[Cond, Tensor]:
    """The captions as a condition, and the noise from which every candidate starts: the set's own, or of ``seed``."""
    cond, noise, shape = teacher.encode_prompts(prompts.captions), prompts.noise, teacher.latent_shape
    if noise is None:
        noise = torch.randn(len(prompts.captions), *shape, generator=torch.Generator().manual_seed(seed))
    return cond, noise.to(cond["prompt_embeds"].device)


def rows_at_once(shape: Sequence[int]) -> int:
    """How many latents of ``shape``, (..., height, width), are sampled together: 64 small ones, 4 of 128 x 128."""
    return max(4, min(64, 2**16 // (shape[-2] * shape[-1])))


def sample_candidate(candidate: Candidate, noise: Tensor, cond: Cond, seed: int, batch: int | None = None) -> Tensor:
    """Latents of all images; every batch has its own random stream, so that an image depends on no later one."""
    parts, batch = [], batch or rows_at_once(noise.shape)
    for first in range(0, len(noise), batch):
        rows = slice(first, first + batch)
        run = sample(
            candidate.denoiser,
            candidate.sampler,
            noise[rows],
            cond[rows],
            candidate.guidance_scale,
            guidance_embed=candidate.guidance_embed,
            generator=torch.Generator().manual_seed(seed + 1 + first),
        )
        parts.append(run.x0)
    return torch.cat(parts)
