"""GANs against closed forms: the best discriminator, what it teaches a student, the gradient penalty R1."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.parts.discriminators import discriminator_loss, generator_loss, r1
from fewstep.models.denoiser import Denoiser
from fewstep.verification.report import Row

_REAL, _FAKE = (1.0, 0.6), (-0.2, 0.9)  # mean and standard deviation of clean data and of the student's samples
_ALPHA, _SIGMA = 0.8, 0.6
_TABLE = Schedule.from_betas([_SIGMA**2, 0.5])  # whose index 0 has that alpha and sigma
_DRAWN = 20_000


def rows() -> list[Row]:
    """All of them."""
    return [*gan_rows(), *penalty_rows()]


def gan_rows() -> list[Row]:
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


def _teacher(mean: float, variance: float) -> Denoiser:
    return Denoiser(GaussianMixture([1.0], [mean], [math.sqrt(variance)]).network(_TABLE, "sample"), _TABLE, "sample")


def _quantiles(mean: float, std: float, n: int = _DRAWN) -> Tensor:
    return mean + std * torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
