"""ADD against closed forms: the fixed points of its distillation loss, and score distillation at every element."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule, expand
from fewstep.methods.parts.discriminators import generator_loss
from fewstep.methods.turbo import Turbo
from fewstep.models.denoiser import Denoiser
from fewstep.verification.bench import Bench
from fewstep.verification.report import Row

_ALPHA, _SIGMA = 0.8, 0.6
_TABLE = Schedule.from_betas([_SIGMA**2, 0.5])  # whose index 0 has that alpha and sigma
_MEAN, _VARIANCE = 0.3, 0.6
_POINTS = 4096


def fixed_rows(bench: Bench, method: Turbo) -> list[Row]:
    """Rows that need no trained student."""
    return [*distillation_rows(type(method)), *_score_rows(bench, method)]


def distillation_rows(cls: type[Turbo]) -> list[Row]:
    """With a Gaussian teacher N(m, S) samples move to m at the rate 2 c (1 - k alpha), k = alpha S / V.

    Alone, the distillation loss contracts them to m. Beside the reverse KL of an ideal discriminator their variance
    converges to 1 / (1/S + 2 lambda c (1 - k alpha)); 0.465 for S = 0.6, alpha = 0.8, sigma = 0.6, lambda c = 0.5.
    """
    method = cls(_TABLE, num_levels=1, guidance_scale=1.0, adversarial_weight=0.0)
    factor = 1 - _ALPHA**2 * _VARIANCE / (_ALPHA**2 * _VARIANCE + _SIGMA**2)
    rate = 2 * _ALPHA * factor  # c(t) = alpha_t
    exact = 1 / (1 / _VARIANCE + 2 * 0.5 * factor)  # lambda c = 0.5
    x = (_MEAN + 1.3 * _normals() - 0.4).requires_grad_()
    (slope,) = torch.autograd.grad(_distillation_loss(method, x) * len(x), x)
    away = float((slope - rate * (x.detach() - _MEAN)).abs().max())
    samples, step, steps = x.detach(), 0.2, 60
    for _ in range(steps):
        moving = samples.clone().requires_grad_()
        (slope,) = torch.autograd.grad(_distillation_loss(method, moving) * len(x), moving)
        samples = samples - step * slope
    left = float(samples.std(correction=0) / x.detach().std(correction=0))
    return [
        Row("distillation gradient, to 2 c (1 - k alpha) (x - m): largest distance", 0.0, away, 1e-10),
        Row("distillation alone: spread left after sixty steps of descent", (1 - step * rate) ** steps, left, 1e-9),
        Row("distillation alone: mean of the samples, the teacher's mode", _MEAN, float(samples.mean()), 1e-3),
        Row("distillation beside an ideal discriminator: variance", exact, _variance_after_descent(method), 1e-6),
    ]


def _variance_after_descent(method: Turbo) -> float:
    """Variance of samples b + a z after gradient descent of (a, b) on -log p/q plus the distillation loss."""
    parameters = torch.tensor([1.5, -1.0], dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        x = parameters[1] + parameters[0] * _normals()
        spread, mean = (float(v) for v in parameters.detach())
        logit = _log_density(x, _MEAN, math.sqrt(_VARIANCE)) - _log_density(x, mean, abs(spread))
        loss = generator_loss([logit], "hinge") + 0.5 / _ALPHA * _distillation_loss(method, x)
        (slope,) = torch.autograd.grad(loss, parameters)
        parameters = (parameters.detach() - 0.15 * slope).requires_grad_()
    return float(parameters[0].detach()) ** 2


def _log_density(x: Tensor, mean: float, std: float) -> Tensor:
    return -0.5 * ((x - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)


def _distillation_loss(method: Turbo, x: Tensor) -> Tensor:
    """The method's distillation loss for samples x [B, 1] at the level of alpha and sigma, averaged over its noise.

    It is linear in the noise, up to a square that has no gradient, so the mean over a noise and its negative is exact.
    """
    roles: Any = SimpleNamespace(teacher=_teacher(_MEAN, _VARIANCE), decode=lambda latents: latents)
    noise = _normals().flip(0)
    terms = []
    for sign in (1, -1):
        draws: Any = SimpleNamespace(teacher_level=torch.zeros(len(x), dtype=torch.int64), teacher_noise=sign * noise)
        shared: Any = SimpleNamespace(x0_student=x, seen=x)
        terms.append(method.distillation(roles, None, draws, shared))
    return torch.stack(terms).mean()


def _teacher(mean: float, variance: float) -> Denoiser:
    return Denoiser(GaussianMixture([1.0], [mean], [math.sqrt(variance)]).network(_TABLE, "sample"), _TABLE, "sample")


def _normals() -> Tensor:
    """[n, 1] quantiles of the unit normal, of mean 0 and variance 1 exactly."""
    z = torch.special.ndtri((torch.arange(512, dtype=torch.float64) + 0.5) / 512)
    return (z / z.square().mean().sqrt())[:, None]


def _score_rows(bench: Bench, method: Turbo) -> list[Row]:
    """With weighting sds in latents the gradient is w(t) (eps_teacher - eps') at every element."""
    settings = dataclasses.replace(method.settings, weighting="sds", space="latents")
    sds = type(method)(method.schedule, settings)
    batch, draws = bench.draw(sds, _POINTS)
    x0 = batch.x0.clone().requires_grad_()
    roles: Any = SimpleNamespace(teacher=bench.teacher)
    shared: Any = SimpleNamespace(x0_student=x0, seen=x0)
    (slope,) = torch.autograd.grad(sds.distillation(roles, batch.cond, draws, shared) * x0.numel(), x0)
    t = sds.levels[draws.teacher_level]
    x_t = sds.schedule.add_noise(batch.x0, draws.teacher_noise, t)
    gap = bench.teacher(x_t, t, batch.cond, guidance_scale=bench.guidance_scale).epsilon - draws.teacher_noise
    alpha, sigma = sds.schedule.alpha_sigma(t)
    share = sigma**2 / (alpha**2 + sigma**2 if sds.schedule.family == "edm" else 1.0)
    away = float((slope - expand(np.asarray(share), gap) * gap).abs().max())
    return [Row("sds in latents, to w(t) (eps_teacher - eps'): largest distance", 0.0, away, 1e-8)]
