"""DMD2 on a line, where all is known: its gradient, its guided fixed points, its two time scales, its own inputs.

Teacher, student and fake score are Gaussian, the student affine. What is averaged is linear in its noises, or the
square of that: means over noises of +-1 are expectations, and nothing here is random.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule, expand
from fewstep.methods.parts.rollout import Policy, Rollout, RolloutDraws
from fewstep.methods.parts.score_pair import ScorePair, Weighting, matching_loss
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.verification.report import Row

MEAN, VARIANCE = 0.4, 0.6  # of the data
_DESCENT = 150  # steps
BIAS = 0.5  # of a first step that is off
GUIDED = {1.0: (1.000, 0.300), 2.0: (1.216, 0.136), 4.0: (1.364, 0.049), 8.0: (1.452, 0.013)}  # scale: mean, variance
ANGLES = np.linspace(0.05, np.pi / 2 - 0.05, 60)


def matching_rows(schedule: Schedule) -> list[Row]:
    """All of it, on a teacher's schedule."""
    return [
        *_gradient_rows(schedule),
        *_fixed_point_rows(schedule),
        *_guided_rows(),
        *_two_time_scales_rows(schedule),
        *_input_rows(schedule),
    ]


# ---------------------------------------------------------------- gradient and fixed points


def _gradient_rows(schedule: Schedule) -> list[Row]:
    """With the kl weight, E[g] and E[g z] are the derivatives of KL(q_t || p_t) by mean and standard deviation."""
    scores, mean, std = ScorePair(schedule, weighting="kl"), -0.7, 0.5
    worst = 0.0
    for t in _levels(scores):
        found = gradient(scores, normal(schedule, MEAN, VARIANCE**0.5), None, mean, std, [t])
        leaves = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (mean, std)]
        alpha, sigma = (float(c) for c in schedule.alpha_sigma(t))
        p, q = alpha**2 * VARIANCE + sigma**2, alpha**2 * leaves[1] ** 2 + sigma**2
        divergence = (q / p + (alpha * (leaves[0] - MEAN)) ** 2 / p - (q / p).log()) / 2
        slopes = torch.autograd.grad(divergence, leaves)
        worst = max(worst, *(abs(f / float(s) - 1) for f, s in zip(found, slopes, strict=True)))
    return [Row("gradient (kl), to that of the KL divergence: largest relative distance", 0.0, worst, 1e-8)]


def _fixed_point_rows(schedule: Schedule) -> list[Row]:
    """Where gradient descent on mean and standard deviation ends: at the data's, whatever the weight."""
    rows = []
    weightings: tuple[Weighting, ...] = ("l1", "kl")
    for weighting in weightings:
        scores = ScorePair(schedule, weighting=weighting)
        teacher, times = normal(schedule, MEAN, VARIANCE**0.5), _levels(scores)
        mean, std = -0.7, 0.5
        for _ in range(_DESCENT):
            by_mean, by_std = gradient(scores, teacher, None, mean, std, times)
            mean, std = mean - 0.3 * by_mean, std - 0.3 * by_std
        rows.append(Row(f"fixed point ({weighting}): mean", MEAN, mean, 1e-4))
        rows.append(Row(f"fixed point ({weighting}): variance", VARIANCE, std**2, 1e-4))
    return rows


def _guided_rows() -> list[Row]:
    """A guided teacher is no diffusion of anything: what is matched to it is sharper, and beyond the class's mean.

    N(1, 0.3) against N(0, 1.3) without condition, over 60 even angles of a VP schedule.
    """
    schedule = Schedule("vp", alphas_cumprod=np.cos(ANGLES) ** 2)
    mixture = GaussianMixture([0.0, 1.0], [1.0, 0.0], [0.3**0.5, 1.3**0.5], class_weights=[[1.0, 0.0]])
    teacher, times = (
        Denoiser(mixture.network(schedule, "sample"), schedule, "sample"),
        [float(i) for i in range(len(ANGLES))],
    )
    cond = Cond({"label": torch.zeros(4 * len(ANGLES), dtype=torch.int64)}, null={"label": torch.tensor([-1])})
    rows = []
    for scale, (mean, variance) in GUIDED.items():
        scores = ScorePair(schedule, scale, "kl")
        found = root(lambda b, a: gradient(scores, teacher, cond, b, a, times), 1.2, 0.3)  # noqa: B023
        rows.append(Row(f"guidance {scale:g}: mean of the fixed point", mean, found[0], 5e-4))
        rows.append(Row(f"guidance {scale:g}: variance of the fixed point", variance, found[1] ** 2, 5e-4))
    return rows


def gradient(
    scores: ScorePair, teacher: Denoiser, cond: Cond | None, mean: float, std: float, times: list[float]
) -> tuple[float, float]:
    """(E[g], E[g z]) of a student mean + std z whose fake score is exact, averaged over times."""
    z, noise, t = _nodes(2, times)
    roles: Any = SimpleNamespace(teacher=teacher, fake=normal(scores.schedule, mean, std))
    g = scores.matching(roles, mean + std * z, noise, t, cond).gradient
    return float(g.mean()), float((g * z).mean())


# ---------------------------------------------------------------- two time scales


@dataclass
class Game:
    """Student and fake score with one number each, their means, learning from each other by plain gradient steps.

    With the student's error e and the fake score's h, both from the data's mean: e' = e - g h, and after n steps of the
    critic h' = (1 - q) e' + q h, q = (1 - r)^n. It swings if g > (1 - sqrt q) / (1 + sqrt q), with a factor sqrt q a
    step, and diverges if g > 2 (1 + q) / (1 - q).

    Attributes:
        g: of the student. rate: r, of one step of the critic. updates: n.
    """

    schedule: Schedule
    g: float
    rate: float
    updates: int

    def play(self, rounds: int) -> list[float]:
        """e after every step of the student, the first error, 1, included."""
        scores = ScorePair(self.schedule, weighting="kl")
        z, noise, t = _nodes(2, _levels(scores))
        student, fake = (torch.full((), MEAN + 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
        roles: Any = SimpleNamespace(teacher=normal(self.schedule, MEAN, VARIANCE**0.5), fake=self._score(fake))
        of_student, of_fake = self._slopes(scores)
        errors = [1.0]
        for _ in range(rounds):
            x = student + VARIANCE**0.5 * z
            loss = matching_loss(x, scores.matching(roles, x, noise, t, None).gradient)
            self._descend(loss, student, self.g / of_student)
            for _ in range(self.updates):
                answers = student.detach() + VARIANCE**0.5 * z
                self._descend(scores.denoising_loss(roles, answers, noise, t, None), fake, self.rate / of_fake)
            errors.append(float(student.detach()) - MEAN)
        return errors

    @property
    def q(self) -> float:
        return float((1 - self.rate) ** self.updates)

    @property
    def roots(self) -> tuple[float, float]:
        """What is to be expected of a round."""
        return _roots(1 + self.q - self.g * (1 - self.q), self.q)

    def _score(self, mean: Tensor) -> Denoiser:
        def network(x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
            alpha, sigma = (expand(c, x) for c in self.schedule.alpha_sigma(t))
            return mean + alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * (x - alpha * mean)

        return Denoiser(network, self.schedule, "sample")

    def _slopes(self, scores: ScorePair) -> tuple[float, float]:
        """What one unit of error makes of the gradient by the student's mean, and by the fake score's."""
        alpha, sigma = self.schedule.alpha_sigma(np.array(_levels(scores)))
        marginal, size = alpha**2 * VARIANCE + sigma**2, 0.5 if self.schedule.family == "edm" else 1.0
        weight = (alpha / sigma) ** 2 + 1 / size**2
        return float((alpha**2 / marginal).mean()), float((2 * weight * (sigma**2 / marginal) ** 2).mean())

    @staticmethod
    def _descend(loss: Tensor, parameter: Tensor, rate: float) -> None:
        (slope,) = torch.autograd.grad(loss, parameter)
        with torch.no_grad():
            parameter -= rate * slope


def _two_time_scales_rows(schedule: Schedule) -> list[Row]:
    """Played games against the eigenvalues of one round: damping, period, and both thresholds from either side."""
    rows = []
    for updates in (1, 5):
        game = Game(schedule, 0.5, 0.15, updates)
        modulus, angle = game.roots
        errors = game.play(4)
        name = f"{updates} critic step{'s' if updates > 1 else ''} a round"
        rows.append(Row(f"{name}: factor of the swing", modulus, _roots(*_recurrence(errors))[0], 1e-6))
        rows.append(
            Row(f"{name}: period in rounds", 2 * math.pi / angle, 2 * math.pi / _roots(*_recurrence(errors))[1], 1e-6)
        )
        swings = (1 - math.sqrt(game.q)) / (1 + math.sqrt(game.q))
        calm = Game(schedule, 0.95 * swings, 0.15, updates).play(60)
        rows.append(Row(f"{name}, below the threshold of swinging: changes of sign", 0.0, _changes(calm), 0.0))
        astir = Game(schedule, 2 * swings, 0.15, updates)
        expected = 60 * astir.roots[1] / math.pi
        rows.append(Row(f"{name}, above it: changes of sign", expected, _changes(astir.play(60)), 1.0))
        for share in (0.98, 1.02):
            edge = Game(schedule, share * 2 * (1 + game.q) / (1 - game.q), 0.15, updates)
            side, factor = "below" if share < 1 else "above", _roots(*_recurrence(edge.play(4)))[0]
            rows.append(Row(f"{name}, just {side} divergence: factor", edge.roots[0], factor, 1e-6))
    return rows


def _recurrence(errors: list[float]) -> tuple[float, float]:
    """(trace, determinant) of the rounds, from four errors in a row."""
    a, b, c, d = errors[:4]
    determinant = (c * c - b * d) / (b * b - a * c)
    return (c + determinant * a) / b, determinant


def _roots(trace: float, determinant: float) -> tuple[float, float]:
    """(largest modulus, its angle) of a round's eigenvalues."""
    inside = trace**2 / 4 - determinant
    if inside < 0:
        return math.sqrt(determinant), math.acos(trace / 2 / math.sqrt(determinant))
    return abs(trace) / 2 + math.sqrt(inside), 0.0 if trace > 0 else math.pi


def _changes(errors: list[float]) -> float:
    signs = np.sign(errors)
    return float((signs[1:] != signs[:-1]).sum())


# ---------------------------------------------------------------- the student's own inputs


def _input_rows(schedule: Schedule) -> list[Row]:
    """Two steps, the first one off by a bias, the second one matched: on the student's own way, or on data.

    Only the first of the two sees the bias, and takes it away. On data the second learns the map of a perfect way,
    whose slope sqrt(S / (alpha^2 S + sigma^2)) lets alpha times as much of the bias through.
    """
    alpha, sigma = (float(c) for c in schedule.alpha_sigma(schedule.timesteps(2)[1]))
    kept = VARIANCE**0.5 / math.sqrt(alpha**2 * VARIANCE + sigma**2) * alpha * BIAS
    return [
        Row("bias of the first step left by the second: simulated inputs", 0.0, _left(schedule, "simulated"), 1e-7),
        Row("bias of the first step left by the second: data-noised inputs", kept, _left(schedule, "noised"), 1e-7),
    ]


def _left(schedule: Schedule, policy: Policy) -> float:
    """The error of the mean of two-step samples once the second step is matched on such inputs."""
    times, scores = schedule.timesteps(2).to(torch.float64), ScorePair(schedule, weighting="kl")
    first = VARIANCE**0.5 / (schedule.sigma_max if schedule.family == "edm" else 1.0)
    z = _nodes(3, [0.0])[:3]

    def student(slope: float, shift: float) -> Denoiser:
        def network(x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
            return first * x + MEAN + BIAS if float(t[0]) == float(times[0]) else slope * x + shift

        return Denoiser(network, schedule, "sample")

    def answers(policy: Policy, slope: float, shift: float) -> tuple[Tensor, Tensor]:
        view = student(slope, shift)
        data, inputs = MEAN + VARIANCE**0.5 * z[1], Rollout(schedule, times, policy)
        noise = torch.stack(z[:2] if policy == "simulated" else z[:1], dim=1)
        x_t = inputs.state(view, data, RolloutDraws(times=tuple(times.tolist()), exit=1, noise=noise), None)
        return x_t, view(x_t, times[1]).x0

    def gradient(slope: float, shift: float) -> tuple[float, float]:
        x_t, x = answers(policy, slope, shift)
        law = normal(schedule, float(x.mean()), float(x.std(correction=0)))
        roles: Any = SimpleNamespace(teacher=normal(schedule, MEAN, VARIANCE**0.5), fake=law)
        found = [
            scores.matching(roles, x, z[2], torch.full((len(x),), t, dtype=torch.float64), None).gradient
            for t in _levels(scores)
        ]
        g = torch.stack(found).mean(0)
        return float((g * x_t).mean()), float(g.mean())

    slope, shift = root(gradient, 0.5, 0.2)
    return float(answers("simulated", slope, shift)[1].mean()) - MEAN


# ---------------------------------------------------------------- tools


def normal(schedule: Schedule, mean: float, std: float) -> Denoiser:
    """The exact denoiser of N(mean, std^2), whatever the condition."""
    exact = GaussianMixture([1.0], [mean], [abs(std)]).network(schedule, "sample")
    return Denoiser(lambda x, t, cond: exact(x, t), schedule, "sample")


def _levels(scores: ScorePair) -> list[float]:
    """Seven times from 0.02 to 0.98 of the table."""
    places = np.linspace(0.02, 0.98, 7) * (len(scores.levels) - 1)
    return [float(scores.levels[int(place)]) for place in places]


def _nodes(count: int, times: list[float]) -> tuple[Tensor, ...]:
    """All ways to give ``count`` noises the values +-1, [2^count times, 1] each, at every time; then the times."""
    grids = np.meshgrid(*[[-1.0, 1.0]] * count, times, indexing="ij")
    columns = [torch.from_numpy(grid.ravel().copy()) for grid in grids]
    return (*(column[:, None] for column in columns[:-1]), columns[-1])


def root(function: Callable[[float, float], tuple[float, float]], a: float, b: float) -> tuple[float, float]:
    """Where both values vanish, by Newton's method from (a, b)."""
    x = np.array([a, b])
    for _ in range(30):
        value = np.array(function(*x))
        step = 1e-6
        columns = [(np.array(function(*(x + e))) - function(*(x - e))) / (2 * step) for e in step * np.eye(2)]
        move = np.linalg.solve(np.array(columns).T, value)
        x = x - move
        if np.abs(move).max() < 1e-12:
            break
    return float(x[0]), float(x[1])
