"""DMD with guidance on a line, without pairs: its bias has a closed form, to which its own loss leads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.batch import Batch, Pairs
from fewstep.diffusion.schedule import Array, Schedule, expand
from fewstep.methods.dmd import DMD, Draws, Shared
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.verification.report import Row

SCALE, GIVEN, WITHOUT = 2.0, (1.0, 0.3), (0.0, 1.3)  # guidance; (mean, variance) with and without the condition


def rows(schedule: Schedule) -> list[Row]:
    """The mean and variance that guidance leads to."""
    times = times_of(schedule)
    mean, variance = guided_fixed_point(schedule, times, SCALE, GIVEN, WITHOUT)
    found = fixed_point(schedule, times)
    name = f"on a line, guided at {SCALE:g}, without pairs: fixed point's"
    return [Row(f"{name} mean", mean, found[0], 1e-8), Row(f"{name} variance", variance, found[1], 1e-8)]


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


def times_of(schedule: Schedule) -> Array:
    """60 of them, at even angles atan(sigma / alpha)."""
    return np.asarray(schedule.time_at(np.tan(np.linspace(0.05, 1.5, 60))))


def fixed_point(schedule: Schedule, times: Array) -> tuple[float, float]:
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
