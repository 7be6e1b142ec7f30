"""ADD against closed forms: what its distillation term alone comes to, and score distillation at every element."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.random import Rng
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule, expand
from fewstep.methods.base import Progress
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
    """What holds without training a student."""
    return [*advice_rows(type(method)), *_score_rows(bench, method)]


def advice_rows(cls: type[Turbo]) -> list[Row]:
    """A Gaussian teacher N(m, S): its advice pulls answers to m at the rate 2 c (1 - k alpha), k = alpha S / V.

    Nothing pushes back, so alone it leaves one answer. Beside the reverse KL of an ideal game it leaves the variance
    1 / (1/S + 2 lambda c (1 - k alpha)); 0.465 for S = 0.6, alpha = 0.8, sigma = 0.6, lambda c = 0.5.
    """
    method = cls(_TABLE, num_levels=1, guidance_scale=1.0, adversarial_weight=0.0)
    pull = 1 - _ALPHA**2 * _VARIANCE / (_ALPHA**2 * _VARIANCE + _SIGMA**2)
    rate = 2 * _ALPHA * pull  # c(t) = alpha_t
    x = (_MEAN + 1.3 * _normals() - 0.4).requires_grad_()
    (slope,) = torch.autograd.grad(_advice(method, x) * len(x), x)
    away = float((slope - rate * (x.detach() - _MEAN)).abs().max())
    answers, step, steps = x.detach(), 0.2, 60
    for _ in range(steps):
        moving = answers.clone().requires_grad_()
        (slope,) = torch.autograd.grad(_advice(method, moving) * len(x), moving)
        answers = answers - step * slope
    left = float(answers.std(correction=0) / x.detach().std(correction=0))
    return [
        Row("advice of a Gaussian teacher, to 2 c (1 - k alpha) (x - m): largest distance", 0.0, away, 1e-10),
        Row("advice alone: spread left after sixty steps of descent", (1 - step * rate) ** steps, left, 1e-9),
        Row("advice alone: mean of the answers, the teacher's mode", _MEAN, float(answers.mean()), 1e-3),
        Row("advice beside an ideal game: variance of the answers", _settled(pull), _descended(method), 1e-6),
    ]


def _settled(pull: float) -> float:
    return 1 / (1 / _VARIANCE + 2 * 0.5 * pull)


def _descended(method: Turbo) -> float:
    """Variance of answers b + a z whose (a, b) descend -log p/q and the teacher's advice together."""
    place = torch.tensor([1.5, -1.0], dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        x = place[1] + place[0] * _normals()
        spread, mean = (float(v) for v in place.detach())
        logit = _log_density(x, _MEAN, math.sqrt(_VARIANCE)) - _log_density(x, mean, abs(spread))
        loss = generator_loss([logit], "hinge") + 0.5 / _ALPHA * _advice(method, x)
        (slope,) = torch.autograd.grad(loss, place)
        place = (place.detach() - 0.15 * slope).requires_grad_()
    return float(place[0].detach()) ** 2


def _log_density(x: Tensor, mean: float, std: float) -> Tensor:
    return -0.5 * ((x - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)


def _advice(method: Turbo, x: Tensor) -> Tensor:
    """The method's own distillation term for answers x [B, 1] at the level of alpha and sigma, its noise averaged out.

    It is linear in the noise up to a square that nothing flows into, so a noise and its opposite make its mean.
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
    """With the weighting sds, in latents, advice is score distillation: w(t) (eps_teacher - eps') at every element."""
    settings = dataclasses.replace(method.settings, weighting="sds", space="latents")
    sds = type(method)(method.schedule, settings)
    rng = Rng(bench.seed, 0, _POINTS, dtype=torch.float64)
    batch = bench.source.batch(rng)
    draws = sds.draw(batch, rng, Progress(0, 1))
    answer = batch.x0.clone().requires_grad_()
    roles: Any = SimpleNamespace(teacher=bench.teacher)
    shared: Any = SimpleNamespace(x0_student=answer, seen=answer)
    (slope,) = torch.autograd.grad(sds.distillation(roles, batch.cond, draws, shared) * answer.numel(), answer)
    t = sds.levels[draws.teacher_level]
    x_t = sds.schedule.add_noise(batch.x0, draws.teacher_noise, t)
    gap = bench.teacher(x_t, t, batch.cond, guidance_scale=bench.guidance_scale).epsilon - draws.teacher_noise
    alpha, sigma = sds.schedule.alpha_sigma(t)
    share = sigma**2 / (alpha**2 + sigma**2 if sds.schedule.family == "edm" else 1.0)
    away = float((slope - expand(np.asarray(share), gap) * gap).abs().max())
    return [Row("sds in latents, to w(t) (eps_teacher - eps'): largest distance", 0.0, away, 1e-8)]
