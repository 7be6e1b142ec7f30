"""DMD where it must end: at its teacher's own solver without guidance, at the closed form of its bias with guidance."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.batch import Batch, Pairs
from fewstep.data.random import Rng, stream_key
from fewstep.diffusion.schedule import Array, Schedule, expand
from fewstep.methods.base import Progress
from fewstep.methods.dmd import DMD, Draws, Shared
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.roles import Roles
from fewstep.sampling import DDIMSampler, sample
from fewstep.verification.bench import Bench
from fewstep.verification.distribution import sliced_w2
from fewstep.verification.report import Row

PAIRED_STEPS = 600
SCALE, GIVEN, WITHOUT = 2.0, (1.0, 0.3), (0.0, 1.3)  # guidance; (mean, variance) with and without the condition


def fixed_rows(bench: Bench, method: DMD) -> list[Row]:
    """Rows without training: no gradient at the pairs' solver; the mean and variance that guidance leads to."""
    rows = _solver_rows(bench, method) if bench.guidance_scale == 1.0 else []
    times = _times(bench.schedule)
    mean, variance = guided_fixed_point(bench.schedule, times, SCALE, GIVEN, WITHOUT)
    found = _rest(bench.schedule, times)
    name = f"on a line, guided at {SCALE:g}, without pairs: fixed point's"
    return [
        *rows,
        Row(f"{name} mean", mean, found[0], 1e-8),
        Row(f"{name} variance", variance, found[1], 1e-8),
    ]


def guided_fixed_point(
    schedule: Schedule, times: Array, scale: float, given: tuple[float, float], without: tuple[float, float]
) -> tuple[float, float]:
    """(mean, variance) of the Gaussian to which distribution matching by the KL weight converges on a line.

    Scores of Gaussians are linear, a guided one too: with precisions p = alpha^2 / (alpha^2 variance + sigma^2), with
    and without the condition, the mean is that of both, weighted by w p and (1 - w) p', and the variance v solves
    sum w p + (1 - w) p' = sum alpha^2 / (alpha^2 v + sigma^2), sums over ``times``. Equal variances: plain
    extrapolation of the mean. Otherwise guidance also takes variance away, in a correct implementation.
    """
    alpha, sigma = schedule.alpha_sigma(times)

    def precision(variance: float) -> float:
        return float((alpha**2 / (alpha**2 * variance + sigma**2)).sum())

    with_, less = scale * precision(given[1]), (1 - scale) * precision(without[1])
    low, high = 0.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if precision(middle) > with_ + less else (low, middle)
    return (with_ * given[0] + less * without[0]) / (with_ + less), low


def _times(schedule: Schedule) -> Array:
    """60 of them, at even angles atan(sigma / alpha)."""
    return np.asarray(schedule.time_at(np.tan(np.linspace(0.05, 1.5, 60))))


def _rest(schedule: Schedule, times: Array) -> tuple[float, float]:
    """(mean, variance) of the affine student that the method's own loss leaves alone, the fake score being exact.

    The gradient is linear in the noises, so that means over -1 and 1 are expectations; in the mean it is linear too.
    """
    method = DMD(schedule, guidance_scale=SCALE, weighting="kl", regression_weight=0.0)
    (first, _), (second, _) = _pull(method, times, 0.0, 1.0), _pull(method, times, 1.0, 1.0)
    mean = first / (first - second)
    low, high = 0.01, 3.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _pull(method, times, mean, middle)[1] < 0 else (low, middle)
    return mean, low**2


def _pull(method: DMD, times: Array, mean: float, std: float) -> tuple[float, float]:
    """The gradient of the student's loss along mean and std of x = mean + std z."""
    schedule, signs = method.schedule, torch.tensor([-1.0, 1.0], dtype=torch.float64)
    z, noise = (x.flatten().repeat(len(times))[:, None] for x in torch.meshgrid(signs, signs, indexing="ij"))
    t = torch.from_numpy(np.repeat(times, 4))
    at, size = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (mean, std))
    label = Cond({"label": torch.zeros(len(z))}, null={"label": torch.full((1,), -1.0)})

    def teacher(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        known = cond["label"][:, None] >= 0
        return torch.where(known, _posterior(schedule, x, t, *GIVEN), _posterior(schedule, x, t, *WITHOUT))

    def fake(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return _posterior(schedule, x, t, mean, std**2)

    roles: Any = SimpleNamespace(teacher=Denoiser(teacher, schedule, "sample"), fake=Denoiser(fake, schedule, "sample"))
    x = at + size * z
    batch = Batch(x.detach(), label, Pairs(z, x.detach(), label))
    loss = method.student(roles, batch, Draws(z, t, noise, t, noise), Shared(x, x)).total
    by_mean, by_std = torch.autograd.grad(loss, (at, size))
    return float(by_mean), float(by_std)


def _posterior(schedule: Schedule, x: Tensor, t: Tensor, mean: float, variance: float) -> Tensor:
    alpha, sigma = schedule.alpha_sigma(t)
    gain = alpha * variance / (alpha**2 * variance + sigma**2)
    return mean + expand(np.asarray(gain), x) * (x - expand(np.asarray(alpha * mean), x))


def _solver_rows(bench: Bench, method: DMD) -> list[Row]:
    """A student that predicts the pairs' images, with the teacher as fake score, has no loss and no gradient."""
    rng = Rng(bench.seed, 0, 64, dtype=torch.float64)
    batch = bench.source_of(method).batch(rng)
    assert batch.pairs is not None
    x0 = batch.pairs.x0.clone().requires_grad_()
    roles: Any = SimpleNamespace(teacher=bench.teacher, fake=bench.teacher)
    batch = dataclasses.replace(batch, cond=batch.pairs.cond)
    draws = method.draw(batch, rng, Progress(0, 1))
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
    off = float((met - made.x0).square().sum(dim=1).mean().sqrt())
    rows = [Row("one step from the pairs' noise: rms distance to the pairs", 0.0, off, 0.3 * _size(made.x0))]
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


def _size(x: Tensor) -> float:
    return float((x - x.mean(dim=0)).square().sum(dim=1).mean().sqrt())
