"""A test for any few-step method: its samples are closer to the data than its teacher's at as many steps."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.data.random import stream_key
from fewstep.methods.base import Method
from fewstep.models.denoiser import Denoiser
from fewstep.models.roles import Roles
from fewstep.sampling import DDIMSampler, Sampler, make_sampler, sample
from fewstep.verification.bench import Bench
from fewstep.verification.report import Row

DIRECTIONS = 64


def distribution_rows(bench: Bench, method: Method, roles: Roles) -> list[Row]:
    """Sliced W2 distance of 1- and 4-step samples to fresh data.

    The floor is the distance of two draws of data, the limit the teacher's own distance at as many DDIM steps. Guided
    samples follow no mixture: there are no rows then.
    """
    if bench.guidance_scale != 1.0:
        return []
    rows = []
    data, other = bench.data("data"), bench.data("other data")
    floor = sliced_w2(data, other)
    for n in (1, 4):
        teacher = sliced_w2(_samples(bench, bench.teacher, DDIMSampler(num_inference_steps=n)), data)
        student = sliced_w2(_samples(bench, roles.student, make_sampler(method.sampler, num_inference_steps=n)), data)
        name = f"{n} step{'s' if n > 1 else ''}: sliced W2 to the data; limit: the teacher's"
        rows.append(Row(name, 0.0, student, teacher, floor))
    return rows


def sliced_w2(a: Tensor, b: Tensor) -> float:
    """Root mean squared 1-D Wasserstein-2 distance over fixed random directions, of two sets [N, D] of equal size."""
    if a.shape != b.shape:
        raise ValueError(f"Sliced W2 compares sets of one shape, not {list(a.shape)} and {list(b.shape)}.")
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(a.shape[1], DIRECTIONS, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    along_a, along_b = ((x.double() @ directions).sort(dim=0).values for x in (a, b))
    return float((along_a - along_b).square().mean().sqrt())


def _samples(bench: Bench, denoiser: Denoiser, sampler: Sampler) -> Tensor:
    x, cond = bench.starts
    generator = torch.Generator().manual_seed(stream_key(bench.seed, "sampling"))
    noise = torch.randn(x.shape, generator=generator)
    return sample(denoiser, sampler, noise, cond, generator=generator).x0
