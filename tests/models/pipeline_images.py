"""One image of a tiny pipeline made twice: by diffusers' own call, and by our teacher, sampler and guidance."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fewstep.models.families import as_teacher
from fewstep.sampling import EulerSampler, sample
from tests.models.pipelines import PROMPTS, SIZE, build


@dataclass(frozen=True)
class Case:
    """How a pipeline of `tests.models.pipelines.build` is called, and the same in our words.

    Attributes:
        name: of the pipeline. scale: our guidance scale (1 is off).
        call: further arguments of the pipeline's call, guidance in its own convention among them.
        prompts: as many images as there are prompts. negative: of all, empty for none. steps: of both.
        ready: puts other parts into a copy of the pipeline: a scheduler that steps as Euler does.
        sigmas: whether the levels n/n, ..., 1/n are passed, for pipelines that do not pass them by themselves.
        images: what to take of the pipeline's result, [B, 3, H, W] in [0, 1].
    """

    name: str
    scale: float = 1.0
    call: Mapping[str, Any] = field(default_factory=dict)
    prompts: Sequence[str] = tuple(PROMPTS)
    negative: str = ""
    steps: int = 4
    ready: Callable[[Any], None] | None = None
    sigmas: bool = False
    images: Callable[[Any], torch.Tensor] = lambda found: found.images


@dataclass(frozen=True)
class Gaps:
    """Largest differences: of pixels in [0, 1], and of the levels at which the networks are called."""

    pixels: float
    grid: float
    images: torch.Tensor


def pipeline_of(case: Case) -> Any:
    """The pipeline, whose parts are shared with all tests."""
    pipeline = copy.copy(build(case.name))
    if case.ready is not None:
        case.ready(pipeline)
    return pipeline


@torch.no_grad()
def compare(case: Case, seed: int = 0) -> Gaps:
    """Both ways from the same seed."""
    pipeline = pipeline_of(case)
    teacher = as_teacher(pipeline, size=SIZE)
    noise = torch.randn(len(case.prompts), *teacher.latent_shape, generator=torch.Generator().manual_seed(seed))
    sampler = EulerSampler(num_inference_steps=case.steps)
    cond = teacher.encode_prompts(list(case.prompts), guided=case.scale != 1)
    if case.negative:
        cond = cond.with_negative(teacher.encode_prompts([case.negative] * len(cond), negative=True))
    mine = teacher.decode(sample(teacher.denoiser, sampler, noise, cond, case.scale).x0)
    call = {"num_inference_steps": case.steps, "height": SIZE, "width": SIZE, "output_type": "pt", **case.call}
    if case.negative:
        call["negative_prompt"] = [case.negative] * len(cond)
    if case.sigmas:
        call |= {"sigmas": [k / case.steps for k in range(case.steps, 0, -1)]}
    theirs = case.images(pipeline(prompt=list(case.prompts), generator=torch.Generator().manual_seed(seed), **call))
    levels = np.asarray(pipeline.scheduler.sigmas, dtype=np.float64)
    grid = np.abs(levels - sampler.times(teacher.denoiser.schedule)).max()
    assert mine.shape == theirs.shape and mine.std() > 0.02  # an image of one colour would equal anything
    return Gaps(float((mine - theirs.to(mine)).abs().max()), float(grid), mine)
