"""DMD where it must end without guidance: at its teacher's own solver."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fewstep.data.random import Rng, stream_key
from fewstep.methods.dmd import DMD, Shared
from fewstep.models.roles import Roles
from fewstep.sampling import DDIMSampler, sample
from fewstep.verification.bench import Bench
from fewstep.verification.distribution import sliced_w2
from fewstep.verification.report import Row
from fewstep.verification.sizes import rms

PAIRED_STEPS = 600


def fixed_rows(bench: Bench, method: DMD) -> list[Row]:
    """A student that predicts the pairs' images, with the teacher as fake score, has no loss and no gradient.

    There are no rows with guidance, which moves the fixed point away from the teacher's solver.
    """
    if bench.guidance_scale != 1.0:
        return []
    batch, draws = bench.draw(method, 64)
    assert batch.pairs is not None
    x0 = batch.pairs.x0.clone().requires_grad_()
    roles: Any = SimpleNamespace(teacher=bench.teacher, fake=bench.teacher)
    batch = dataclasses.replace(batch, cond=batch.pairs.cond)
    loss = method.student(roles, batch, draws, Shared(x0, x0)).total
    (slope,) = torch.autograd.grad(loss, x0)
    return [
        Row("loss of a student that is the pairs' solver, the teacher its fake score", 0.0, loss.item(), 0.0),
        Row("its gradient", 0.0, float(slope.abs().max()), 0.0),
    ]


def trained_rows(bench: Bench, method: DMD, roles: Roles) -> list[Row]:
    """A trained student's one step from new noise, and from the noise of the pairs.

    The limit of the distance to the data is a fifth of the teacher's own at two steps. Guided samples follow no
    mixture, so that they are compared with the pairs only.
    """
    _, cond = bench.starts
    noise = torch.randn(
        len(bench.pairs.mean), bench.mixture.dim, generator=torch.Generator().manual_seed(stream_key(bench.seed, "new"))
    )
    student = DDIMSampler(timesteps=(method.timestep,))
    made = bench.pairs.pairs(Rng(bench.seed, 0, len(noise), dtype=torch.float64))
    met = sample(roles.student, student, made.noise.float(), made.cond).x0
    off, size = rms(met - made.x0), rms(made.x0 - made.x0.mean(dim=0))
    rows = [Row("one step from the pairs' noise: rms distance to the pairs", 0.0, off, 0.3 * size)]
    if bench.guidance_scale != 1.0:
        return rows
    samples = sample(roles.student, student, noise, cond).x0
    data, other = (bench.data(name) for name in ("data", "other data"))
    two = sample(bench.teacher.uncounted(), DDIMSampler(num_inference_steps=2), noise, cond).x0
    limit = sliced_w2(two, data) / 5
    row = Row("one step: sliced W2 to the data", 0.0, sliced_w2(samples, data), limit, sliced_w2(data, other))
    return [row, *_mode_rows(bench, samples), *rows]


def _mode_rows(bench: Bench, samples: Tensor) -> list[Row]:
    """The largest relative error of a mode's share of the samples: the regression on pairs must keep every mode.

    The floor is three standard errors of the rarest mode's share.
    """
    weights = bench.mixture.weights
    shares = torch.bincount(bench.mixture.assign(samples.double()), minlength=len(weights)) / len(samples)
    worst, floor = float((shares / weights - 1).abs().max()), 3 / (float(weights.min()) * len(samples)) ** 0.5
    return [Row("worst mode: its share of the samples, off by", 0.0, worst, 0.25, floor)]
