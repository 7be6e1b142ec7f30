"""Lightning against closed form: halvings that lose nothing, and what ideal discriminators ask of a student.

The closed forms are those of one Gaussian, whose flow and whose DDIM steps are affine.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fewstep.data.batch import Batch
from fewstep.data.random import stream_key
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule, expand
from fewstep.methods.lightning import Draws, Lightning, Shared
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.verification.report import Row

MEAN, VARIANCE = 1.0, 0.6
STEPS = 64  # of the first teacher, on the cosine schedule from pure noise on
SLOPE = 0.7593262378804  # of its composed steps; sqrt(VARIANCE) = 0.7746 is the flow's
_DRAWN, _ROUNDS, _PHI = 1024, 400, 0.8


def rows() -> list[Row]:
    """All of them."""
    return [*halving_rows(), *location_rows(), *terminal_rows(), *gan_rows()]


# ---------------------------------------------------------------- progressive distillation (mse)


def halving_rows() -> list[Row]:
    """Students that are affine at each of their times lose nothing, from 64 steps down to one."""
    angles = np.arange(1, STEPS + 1) / STEPS * np.pi / 2
    table = np.cos(angles) ** 2
    table[-1] = 0
    schedule = Schedule("vp", alphas_cumprod=table)
    teacher = Denoiser(_gaussian().network(schedule, "sample"), schedule, "sample")
    worst, steps = 0.0, STEPS
    while steps > 1:
        stage = Lightning(
            schedule, loss="mse", num_teacher_steps=steps, num_inference_steps=steps // 2, num_start_times=steps // 2
        )
        student = _best_affine(stage, teacher)
        worst = max(worst, _step(stage, teacher, student, 0)[0].item())
        teacher, steps = student, steps // 2
    ends = teacher(torch.tensor([[0.0], [1.0]], dtype=torch.float64), schedule.start).at(schedule.clean)
    slope = float(ends[1] - ends[0])
    return [
        Row("largest loss of an affine student, over 64 -> 32 -> ... -> 1 steps", 0.0, worst, 1e-24),
        Row("slope of the one-step student", SLOPE, slope, 1e-12),
        Row("the same, to the product of 64 DDIM steps", _product(), slope, 1e-12),
    ]


def _best_affine(stage: Lightning, teacher: Denoiser) -> Denoiser:
    """The student whose x0 is the one that a single DDIM step takes to where the teacher lands (Salimans and Ho)."""
    start = torch.arange(stage.starts).repeat_interleave(2)
    noise = torch.tensor([[-1.0], [1.0]], dtype=torch.float64).repeat(stage.starts, 1)
    batch, draws = Batch(torch.zeros_like(noise)), Draws(start, noise, None, None)
    shared = stage.prepare(_roles(teacher, teacher), batch, draws, set())
    x0 = _lands_there(stage.schedule, shared)
    slope = (x0[1::2] - x0[::2]) / (shared.x_t[1::2] - shared.x_t[::2])
    offset = x0[::2] - slope * shared.x_t[::2]
    place = {int(t): i for i, t in enumerate(shared.t[::2].tolist())}

    def network(x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        rows = [place[int(time)] for time in t.tolist()]
        return slope[rows] * x + offset[rows]

    return Denoiser(network, stage.schedule, "sample")


def _lands_there(schedule: Schedule, shared: Shared) -> Tensor:
    """x0~ = (x_u - (sigma_u / sigma_t) x_t) / (alpha_u - (sigma_u / sigma_t) alpha_t)."""
    (alpha_t, sigma_t), (alpha_u, sigma_u) = schedule.alpha_sigma(shared.t), schedule.alpha_sigma(shared.u)
    ratio = sigma_u / sigma_t
    x0 = shared.x_u - expand(ratio, shared.x_u) * shared.x_t
    return x0 / expand(np.asarray(alpha_u - ratio * alpha_t), x0)


def _product() -> float:
    """Slope of 64 DDIM steps of N(m, S)'s posterior mean on alpha = cos, sigma = sin, in plain arithmetic."""
    slope = 1.0
    for k in range(STEPS, 0, -1):
        alpha, sigma = math.cos(k * math.pi / 2 / STEPS), math.sin(k * math.pi / 2 / STEPS)
        below = math.cos((k - 1) * math.pi / 2 / STEPS), math.sin((k - 1) * math.pi / 2 / STEPS)
        gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
        slope *= below[0] * gain + below[1] / sigma * (1 - alpha * gain)
    return slope


def location_rows() -> list[Row]:
    """|x - x_r|^2 is (alpha_u - sigma_u alpha_t / sigma_t)^2 |x0 - x0~|^2, time by time."""
    schedule = Schedule.scaled_linear()
    stage = Lightning(schedule, loss="mse", num_teacher_steps=8, num_inference_steps=4)
    teacher = Denoiser(_gaussian().network(schedule, "sample"), schedule, "sample")
    student = Denoiser(lambda x, t, cond=None: 0.3 * x - 0.2, schedule, "sample")
    worst = 0.0
    for start in range(4):
        loss, shared = _step(stage, teacher, student, start + 1, start)
        (alpha_t, sigma_t), (alpha_u, sigma_u) = schedule.alpha_sigma(shared.t), schedule.alpha_sigma(shared.u)
        factor = float(((alpha_u - sigma_u * alpha_t / sigma_t) ** 2)[0])
        wanted = factor * float((shared.x0 - _lands_there(schedule, shared)).square().mean())
        worst = max(worst, abs(loss.item() / wanted - 1))
    return [Row("location-space loss over its factor times x0's, minus 1: largest", 0.0, worst, 1e-12)]


def terminal_rows() -> list[Row]:
    """Noise in the place of x_T moves the mean of what the teacher draws: by how much the flow says."""
    schedule = Schedule.scaled_linear()
    teacher = Denoiser(_gaussian().network(schedule, "sample"), schedule, "sample")
    alpha, sigma = (float(c) for c in schedule.alpha_sigma(schedule.start))
    bias = -math.sqrt(VARIANCE / (alpha**2 * VARIANCE + sigma**2)) * alpha * MEAN
    means = {}
    for terminal in ("noise", "table"):
        stage = Lightning(schedule, loss="mse", num_teacher_steps=1000, num_inference_steps=1, num_start_times=1,
                          terminal=terminal)  # fmt: skip
        middle = torch.zeros(1, 1, dtype=torch.float64)  # affine steps take means to means
        draws = Draws(torch.zeros(1, dtype=torch.int64), middle, None, None)
        means[terminal] = float(stage.prepare(_roles(teacher, teacher), Batch(middle + MEAN), draws, set()).x_u)
    return [
        Row("terminal noise: bias of the mean", bias, means["noise"] - MEAN, 5e-4),
        Row("terminal table: bias of the mean", 0.0, means["table"] - MEAN, 1e-12),
    ]


# ---------------------------------------------------------------- ideal discriminators


class Ideal:
    """A discriminator that knows student and teacher, x0 = a x_t and phi x_t, and says log real / fake of what it sees.

    With the start beside it: (alpha / sigma^2) (real - fake) . (x - alpha (real + fake) / 2) of both landings there;
    without: log N(x; 0, alpha^2 phi^2 + sigma^2) - log N(x; 0, alpha^2 a^2 + sigma^2).
    """

    taps = ("state",)

    def __init__(self, alpha: float, sigma: float, a: float) -> None:
        self.alpha, self.sigma, self.a = alpha, sigma, a

    def __call__(self, features: list[Tensor]) -> list[Tensor]:
        (seen,) = features
        if seen.shape[1] == 1:
            wide, own = (self.alpha**2 * slope**2 + self.sigma**2 for slope in (_PHI, self.a))
            return [(seen.square() * (1 / own - 1 / wide) + math.log(own / wide)) / 2]
        x, start = seen.chunk(2, dim=1)
        real, fake = _PHI * start, self.a * start
        return [self.alpha / self.sigma**2 * (real - fake) * (x - self.alpha * (real + fake) / 2)]


def gan_rows() -> list[Row]:
    """From the mirrored map F = -phi x, which draws what the teacher draws: one game mends it, the other lets it be."""
    flipped, kept = descend("conditional", -_PHI), descend("unconditional", -1.5 * _PHI)
    return [
        Row("ideal conditional game: its pull over sigmoid(-logit) times the MSE's, minus 1", 0.0, pull_ratio(), 1e-12),
        Row("conditional, from the mirrored map: where it ends, over the teacher's", 1.0, flipped / _PHI, 0.02),
        Row("unconditional: pull on the mirrored map", 0.0, _pull("unconditional", -_PHI, 0), 1e-15),
        Row("unconditional, from 1.5 times that: where it ends, over the teacher's", -1.0, kept / _PHI, 0.02),
    ]


def pull_ratio() -> float:
    """Largest relative difference of the student's gradient to -sigmoid(-logit) (alpha^2 / sigma^2) (real - fake)."""
    a = 0.3
    game, roles = _game("conditional", a)
    batch, draws = _drawn(game, 0)
    shared = game.prepare(roles, batch, draws, {"student"})
    (found,) = torch.autograd.grad(game.student(roles, batch, draws, shared).total, shared.x_student)
    ideal = roles.heads["heads"]
    assert shared.judged is not None
    (logit,) = ideal([torch.cat([shared.judged.seen.detach(), shared.x_t], dim=1)])
    of_mse = -(ideal.alpha**2) / ideal.sigma**2 * (_PHI - a) * shared.x_t / len(shared.x_t)
    return float((found / (functional.sigmoid(-logit) * of_mse) - 1).abs().max())


def descend(loss: str, a: float) -> float:
    """Where gradient descent takes the student's slope, the discriminator ideal at every step."""
    for step in range(_ROUNDS):
        a -= 0.2 * _pull(loss, a, step)
    return a


def _pull(loss: str, a: float, step: int) -> float:
    game, roles = _game(loss, a)
    batch, draws = _drawn(game, step)
    total = game.student(roles, batch, draws, game.prepare(roles, batch, draws, {"student"})).total
    (slope,) = torch.autograd.grad(total, roles.slope)
    return float(slope)


def _game(loss: str, a: float) -> tuple[Lightning, Any]:
    schedule = Schedule.scaled_linear()
    game = Lightning(schedule, loss=loss, num_teacher_steps=1, num_inference_steps=1, num_start_times=1,
                     renoise_times=(0.5,), renoise_weights=(1.0,))  # fmt: skip
    slope = torch.tensor(a, dtype=torch.float64, requires_grad=True)
    teacher = Denoiser(lambda x, t, cond=None: _PHI * x, schedule, "sample")
    roles = _roles(teacher, Denoiser(lambda x, t, cond=None: slope * x, schedule, "sample"))
    roles.slope, roles.discriminator = slope, Denoiser(_Sees(), schedule, "sample")
    assert game.gan is not None
    alpha, sigma = (float(c) for c in schedule.alpha_sigma(game.gan.levels[0]))
    roles.heads = {"heads": Ideal(alpha, sigma, a)}
    return game, roles


class _Sees:
    """A backbone whose feature is the state itself."""

    dtype = None

    def __call__(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        return x

    def features(self, x: Tensor, t: Tensor, cond: Cond | None, taps: Any) -> list[Tensor]:
        return [x]


def _drawn(game: Lightning, step: int) -> tuple[Batch, Draws]:
    generator = torch.Generator().manual_seed(stream_key("lightning", step) % 2**63)
    noise, level_noise = (torch.randn(_DRAWN, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    level = torch.zeros(_DRAWN, dtype=torch.float64) if game.gan else None
    start = torch.arange(_DRAWN) % game.starts
    return Batch(torch.zeros_like(noise)), Draws(start, noise, level, level_noise if game.gan else None)


def _step(
    stage: Lightning, teacher: Denoiser, student: Denoiser, seed: int, start: int | None = None
) -> tuple[Tensor, Shared]:
    """The student's loss on made-up data, from one of its times or from all of them."""
    batch, draws = _drawn(stage, seed)
    if start is not None:
        draws.start = torch.full_like(draws.start, start)
    shared = stage.prepare(_roles(teacher, student), batch, draws, {"student"})
    return stage.student(_roles(teacher, student), batch, draws, shared).total.detach(), shared


def _roles(teacher: Denoiser, student: Denoiser) -> Any:
    return SimpleNamespace(teacher=teacher, student=student)


def _gaussian() -> GaussianMixture:
    return GaussianMixture([1.0], [MEAN], [math.sqrt(VARIANCE)])
