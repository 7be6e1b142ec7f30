"""ADD and LADD against closed forms: the best discriminator, what it tells a student, what advice alone comes to."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.data.random import Rng
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule, expand
from fewstep.methods.base import Progress
from fewstep.methods.ladd import LADD
from fewstep.methods.parts.discriminators import discriminator_loss, generator_loss, r1
from fewstep.methods.turbo import Turbo
from fewstep.models.denoiser import Denoiser
from fewstep.verification.bench import Bench
from fewstep.verification.report import Row

_REAL, _FAKE = (1.0, 0.6), (-0.2, 0.9)  # mean and standard deviation of clean data and answers
_ALPHA, _SIGMA = 0.8, 0.6
_TABLE = Schedule.from_betas([_SIGMA**2, 0.5])  # whose index 0 has that alpha and sigma
_MEAN, _VARIANCE = 0.3, 0.6
_POINTS, _DRAWN = 4096, 20_000


def turbo_fixed_rows(bench: Bench, method: Turbo) -> list[Row]:
    """What holds without training a student."""
    return [*game_rows(), *penalty_rows(), *advice_rows(type(method)), *_score_rows(bench, method)]


def ladd_fixed_rows(bench: Bench, method: LADD) -> list[Row]:
    """What holds without training a student."""
    return [*game_rows(), *_judged_rows(bench, method)]


# ---------------------------------------------------------------- the game


def game_rows() -> list[Row]:
    """On noised data and answers, 1-D Gaussians: what the best discriminators say, lose and teach.

    A logistic one is trained on (1, x, x^2), on which it is convex and log p/q is linear. Taught by log p/q itself, a
    student moves by s_q - s_p, DMD's direction, times a factor of r = p/q that depends on the generator's loss.
    """
    real, fake = (_quantiles(_ALPHA * mean, _noised_std(std)) for mean, std in (_REAL, _FAKE))
    logit, loss = _fitted(real, fake)
    axis = torch.linspace(-1.5, 2.0, 41, dtype=torch.float64)
    apart = (logit(axis) - _log_ratio(axis)).square().mean().sqrt()
    variation, divergence = _divergences()
    sign = discriminator_loss([_log_ratio(real).sign()[:, None]], [_log_ratio(fake).sign()[:, None]], "hinge")
    rows = [
        Row("best logistic discriminator: rms distance of its logit to log p/q", 0.0, float(apart), 5e-3),
        Row("its loss, 2 log 2 - 2 JS", 2 * math.log(2) - 2 * divergence, loss, 1e-4),
        Row("hinge loss of sign(p - q), 2 (1 - TV)", 2 * (1 - variation), float(sign), 1e-3),
    ]
    x = axis.clone().requires_grad_()
    says, direction = _log_ratio(x), _score_difference(axis)
    ratio = says.detach().exp()
    kept = {
        "-logit": (generator_loss([says[:, None]], "hinge"), torch.ones_like(ratio)),
        "softplus(-logit)": (generator_loss([says[:, None]], "logistic"), 1 / (1 + ratio)),
        "log(1 - sigmoid(logit))": (-discriminator_loss([1e9 + 0 * says], [says], "logistic"), ratio / (1 + ratio)),
    }
    for name, (loss_of_x, factor) in kept.items():
        (slope,) = torch.autograd.grad(loss_of_x * len(axis), x, retain_graph=True)
        away = float((slope - factor * direction).abs().max())
        rows.append(Row(f"slope of {name}, to s_q - s_p times its factor: largest distance", 0.0, away, 1e-10))
    return rows


def _fitted(real: Tensor, fake: Tensor) -> tuple[Any, float]:
    """(logit, loss) of the logistic discriminator of least loss on quadratic features."""
    weights = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def logit(x: Tensor) -> Tensor:
        return torch.stack([torch.ones_like(x), x, x * x], dim=1) @ weights

    optimizer = torch.optim.LBFGS([weights], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = discriminator_loss([logit(real)[:, None]], [logit(fake)[:, None]], "logistic")
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return (lambda x: logit(x).detach()), float(closure().detach())


def _noised_std(std: float) -> float:
    return math.hypot(_ALPHA * std, _SIGMA)


def _log_density(x: Tensor, mean: float, std: float) -> Tensor:
    return -0.5 * ((x - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)


def _log_ratio(x: Tensor) -> Tensor:
    real, fake = (_log_density(x, _ALPHA * mean, _noised_std(std)) for mean, std in (_REAL, _FAKE))
    return real - fake


def _score_difference(x: Tensor) -> Tensor:
    """s_q - s_p by exact denoisers: (alpha / sigma^2) (mu_fake - mu_real)."""
    denoised = [_teacher(mean, std**2)(x[:, None], 0).x0[:, 0] for mean, std in (_FAKE, _REAL)]
    return _ALPHA / _SIGMA**2 * (denoised[0] - denoised[1])


def _divergences() -> tuple[float, float]:
    """Total variation and Jensen-Shannon divergence of the noised pair, by quadrature."""
    axis = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    p, q = (_log_density(axis, _ALPHA * mean, _noised_std(std)).exp() for mean, std in (_REAL, _FAKE))
    middle = (0.5 * (p + q)).log()
    js = 0.5 * (p * (p.log() - middle) + q * (q.log() - middle))
    return tuple(float(torch.trapezoid(f, axis)) for f in (0.5 * (p - q).abs(), js))  # type: ignore[return-value]


def penalty_rows() -> list[Row]:
    """R1 of a linear head is |w|^2 at any features, and nothing of it passes through them to a picture."""
    head = nn.Linear(5, 1, bias=False).double()
    pictures = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    penalty = r1(lambda features: [head(f) for f in features], [pictures.sin()])
    (reached,) = torch.autograd.grad(penalty, pictures, allow_unused=True)
    passed = 0.0 if reached is None else float(reached.abs().max())
    wanted = float(head.weight.detach().square().sum())
    return [
        Row("R1 at the input of a linear head, |w|^2", wanted, float(penalty.detach()), 1e-12),
        Row("its slope at the picture behind the features", 0.0, passed, 0.0),
    ]


# ---------------------------------------------------------------- advice alone, and both


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
    z = _quantiles(0.0, 1.0, 512)
    return (z / z.square().mean().sqrt())[:, None]


def _quantiles(mean: float, std: float, n: int = _DRAWN) -> Tensor:
    return mean + std * torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)


# ---------------------------------------------------------------- the methods' own terms on the bench


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


def _judged_rows(bench: Bench, method: LADD) -> list[Row]:
    """Where both sides are judged, and that every answer feels every head's logits."""
    rng = Rng(bench.seed, method.settings.warmup_steps, _POINTS, dtype=torch.float64)
    batch = bench.source.batch(rng)
    draws = method.draw(batch, rng, Progress(method.settings.warmup_steps, 10**9))
    level = np.log(method.schedule.noise_to_signal(method.judged_at(draws.ratio)))
    roles = bench.roles(method, torch.float64)
    shared = method.prepare(roles, batch, draws, {"student", "discriminator"})
    says = roles.heads["discriminator"](shared.fake, shared.condition)
    felt = [torch.autograd.grad(F.softplus(s).sum(), shared.x0_student, retain_graph=True)[0] for s in says]
    share = float(torch.stack([(slope != 0).any(dim=1) for slope in felt]).double().mean())
    return [
        Row("median of log(sigma/alpha) where both sides are judged", method.settings.ratio_mean,
            float(np.median(level)), 0.08),
        Row("share of answers that feel every logit", 1.0, share, 1e-3),
    ]  # fmt: skip
