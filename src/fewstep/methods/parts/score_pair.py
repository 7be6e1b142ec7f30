"""Two scores: the teacher's, of data, and a fake one's, trained on the student's predictions (Yin et al. 2024, DMD).

Their difference at the student's noised predictions is the gradient, along the predictions x, of the divergence from
the student's distribution to the teacher's:

    x_t = alpha x + sigma eps            one noise for both scores
    g = w (mu_fake(x_t) - mu_real(x_t))     mu: clean data, as each score denoises x_t; the real one may be guided

=====  =====================================  ===================================================================
``w``  weight                                 what it descends
=====  =====================================  ===================================================================
l1     1 / mean over x of |x - mu_real|       no divergence; q = p is its fixed point. What DMD and DMD2 train with:
                                              the code's, which drops a factor alpha of the paper's eq. 8
kl     (alpha / sigma)^2                      KL(q_t || p_t), exactly, where the fake score is exact
=====  =====================================  ===================================================================

The fake score denoises the student's predictions, with the error of what its network predicts: of eps, v or flow as it
is, of x0 times SNR + 1 / sigma_data^2 (Karras et al. 2022; sigma_data is 0.5 on EDM schedules and 1 elsewhere).

Both can start from the student's jump x_s in place of its clean predictions x (TDM: Luo et al. 2025, arXiv 2503.06674):

    x_t = (alpha_t / alpha_s) x_s + b n,   b^2 = sigma_t^2 - (alpha_t sigma_s / alpha_s)^2,   t above s

The scores then compare what the student's trajectory passes through with the teacher's marginals there, and x moves
along their gap; under "kl" the exact gradient is this times one number for every pair of times. The fake score learns

=====  =============================================================================================================
x0     x, as TDM's released code: no score of x_t, because x is not independent of the noise left in x_s
score  the exact score of x_t, whose noise is n alone (Phased DMD: Fan et al. 2025): eps* = (sigma_t / b) n, and
       x0* = x_s / alpha_s - (alpha_t sigma_s^2 / (alpha_s^2 b)) n; the error times b^2 / sigma_t^2, finite next to s
=====  =============================================================================================================

Three places where this is not the public code, none of which changes a number beyond rounding: two networks of one
kind are compared by their outputs, because x_t, up to 14 times larger after conversion, then cancels before it costs
digits (there: everything in float64); the loss is written so that no digit of g is lost next to x; and NaN is not
turned to 0, because the trainer skips such a step and logs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from fewstep.data.random import Rng
from fewstep.diffusion.prediction import Prediction, mix
from fewstep.diffusion.schedule import Array, Schedule, expand, working
from fewstep.diffusion.well_posed import first_time
from fewstep.methods.guidance import Guidance
from fewstep.methods.parts.distances import distance
from fewstep.methods.parts.statistics import by_time, fake_score_statistics
from fewstep.models.cond import Cond
from fewstep.models.roles import Roles
from fewstep.sampling.samplers import renoise

Weighting: TypeAlias = Literal["l1", "kl"]
FakeTarget: TypeAlias = Literal["x0", "score"]
MATCHED = (0.02, 0.98)
"""Shares of all noise levels between which DMD compares scores (20 ... 980 of 1,000): none is singular there."""


@dataclass(frozen=True)
class Jump:
    """The student's jump x_s [B, ...] to native time s, one host number below the times at which scores see it."""

    x_s: Tensor
    s: float


@dataclass
class Matching:
    """Both scores at the student's predictions.

    Attributes:
        gradient: g [B, ...], without a graph.
        stats: ``fake_error``, ``teacher_fake_error`` (the teacher without guidance), ``score_gap``, the root mean
            square of mu_fake - mu_real, and ``score_scale``, the mean of |x - mu_real|: below 0.001 g explodes.
    """

    gradient: Tensor
    stats: dict[str, Tensor]


class ScorePair:
    """The real and the fake score of a method: ``roles.teacher`` and ``roles.fake``.

    Args:
        schedule: of both.
        guidance_scale: of the real one (1 is off); the fake one is never guided.
        weighting: "l1" or "kl".

    Raises:
        ValueError: an unknown weighting, or a scale that is negative or not finite.
    """

    def __init__(self, schedule: Schedule, guidance_scale: float = 1.0, weighting: Weighting = "l1") -> None:
        if weighting not in get_args(Weighting):
            raise ValueError(f"Unknown weighting '{weighting}': use {', '.join(get_args(Weighting))}.")
        self.schedule, self.guidance_scale, self.weighting = schedule, Guidance.of(guidance_scale).low, weighting
        self.levels = torch.from_numpy(noise_levels(schedule))
        self.usable = self._count(first_time(schedule))

    def draw_time(
        self,
        rng: Rng,
        name: str,
        low: float = 0.0,
        high: float = 1.0,
        above: float | None = None,
        upto: float | None = None,
    ) -> Tensor:
        """Native times [B] on the host, uniform over the shares ``low`` ... ``high`` of the levels, both included.

        DMD compares scores at those of `MATCHED`, and up to `first_time`, above which a gap between scores is their
        errors; other terms see all levels.

        Args:
            above, upto: only levels above the one native time, and up to the other; at least one level is left.
                Without ``above`` that one is no noisier than ``upto``, also below the share ``low``.
        """
        count = len(self.levels)
        first, last = int(low * count), min(int(high * count), count - 1)
        if high < 1 and (above is None or self._count(above) < self.usable):
            last = max(first, min(last, self.usable - 1))
        if above is not None:
            first = min(max(first, self._count(above)), count - 1)
        if upto is not None:
            last = min(last, self._count(upto) - 1)
            first, last = (max(min(first, last), 0), max(last, 0)) if above is None else (first, max(first, last))
        return self.levels[rng.sample.integers(name, first, last + 1)]

    def _count(self, t: float) -> int:
        """How many levels are at ``t`` or below."""
        return int(torch.searchsorted(self.levels, torch.tensor(t, dtype=self.levels.dtype), right=True))

    @torch.no_grad()
    def matching(
        self, roles: Roles, x: Tensor, noise: Tensor, t: Tensor, cond: Cond | None, jump: Jump | None = None
    ) -> Matching:
        """g at predictions x [B, ...], or their jump, noised to t [B] (host): one call of each score."""
        x = working(x)
        x_t = self._noised(x, noise, t, jump)
        real, plain = roles.teacher.with_and_without_guidance(x_t, t, cond, self.guidance_scale)
        fake = roles.fake(x_t, t, cond)
        gap, away = difference(fake, real), (x - real.x0).flatten(1).abs().mean(1)
        if self.weighting == "kl":
            alpha, sigma = self.schedule.alpha_sigma(t)
            gradient = expand(np.asarray((alpha / sigma) ** 2), gap) * gap
        else:
            gradient = over_distance(gap, x, real.x0)
        stats = fake_score_statistics(fake.x0, plain.x0, x)
        stats |= {"score_gap": gap.square().mean().sqrt(), "score_scale": away.mean()}
        rows = {"score_gap": gap.flatten(1).square().mean(1).sqrt(), "score_scale": away}
        return Matching(gradient, stats | by_time(rows, t, self.levels, "matching"))

    def denoising_loss(
        self,
        roles: Roles,
        x: Tensor,
        noise: Tensor,
        t: Tensor,
        cond: Cond | None,
        jump: Jump | None = None,
        target: FakeTarget = "x0",
    ) -> Tensor:
        """The fake score's loss at predictions x [B, ...], or their jump, noised to t [B] (host).

        No gradient reaches the student.

        Args:
            target: what it learns of a jump, "x0" or "score".
        """
        x = working(x.detach())
        x_t = self._noised(x, noise, t, jump)
        pred = roles.fake(x_t, t, cond)
        alpha, sigma = self.schedule.alpha_sigma(t)
        weight = self._weight_of_x0(alpha, sigma) if pred.prediction_type == "sample" else None
        if jump is not None and target == "score":
            x, noise, fresh = self._exact(jump, noise, alpha, sigma)
            weight = fresh if weight is None else fresh * weight
        elif jump is not None:
            noise = (x_t - expand(alpha, x) * x) / expand(sigma, x)
        p, q = mix(pred.prediction_type, alpha, sigma)
        wanted = expand(p, x) * x + expand(q, x) * noise
        return distance(pred.output, wanted, "l2", weight=weight)

    def _noised(self, x: Tensor, noise: Tensor, t: Tensor, jump: Jump | None) -> Tensor:
        if jump is None:
            return self.schedule.add_noise(x, noise, t)
        return renoise(self.schedule, working(jump.x_s.detach()), jump.s, t, noise)

    def _exact(self, jump: Jump, noise: Tensor, alpha: Array, sigma: Array) -> tuple[Tensor, Tensor, Array]:
        """(x0*, eps*) whose means at x_t are those of its exact score, and the weight (b / sigma)^2."""
        low, x_s = self.schedule.alpha_sigma(jump.s), working(jump.x_s.detach())
        ratio = low[1] / low[0]
        fresh = np.asarray(np.sqrt(sigma**2 - (alpha * ratio) ** 2))
        x0 = expand(np.asarray(1 / low[0]), x_s) * x_s - expand(np.asarray(alpha * ratio**2 / fresh), x_s) * noise
        return x0, expand(np.asarray(sigma / fresh), noise) * noise, np.asarray((fresh / sigma) ** 2)

    def _weight_of_x0(self, alpha: Array, sigma: Array) -> Array:
        sigma_data = 0.5 if self.schedule.family == "edm" else 1.0
        return np.asarray((alpha / sigma) ** 2 + 1 / sigma_data**2)


def critic_rate(schedule: Schedule) -> float:
    """`Player.rate` of a fake score: 4 where the schedule is ill-posed at its start, and the fake score would lag."""
    return 4.0 if first_time(schedule) < schedule.start else 1.0


def matching_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient at predictions x [B, ...] is ``gradient`` over the number of elements.

    DMD's 1/2 mean (x - sg(x - g))^2, and its value: x - sg(x) is exactly 0, where x - (x - g) rounds g to digits of x.
    """
    x = working(x)
    return 0.5 * (x - x.detach() + gradient).square().mean()


def over_distance(gap: Tensor, x: Tensor, real: Tensor) -> Tensor:
    """``gap`` over the mean distance of x and real, [B, ...] all: the normaliser of "l1"."""
    away = (x - real).flatten(1).abs().mean(1)
    scale = away.clamp_min(torch.finfo(away.dtype).eps)  # 0 / 0 where the teacher agrees to the last bit
    return gap / scale.reshape(-1, *[1] * (gap.ndim - 1))


def difference(a: Prediction, b: Prediction) -> Tensor:
    """a.x0 - b.x0 of two predictions at the same state and time; of one kind, by their outputs."""
    if a.prediction_type != b.prediction_type:
        return a.x0 - b.x0
    return Prediction(torch.zeros_like(a.x), a.output - b.output, a.t, a.schedule, a.prediction_type).x0


def noise_levels(schedule: Schedule) -> Array:
    """The levels at which scores are compared, increasing: the table (VP), 1,000 Karras points, shifted k/T (flow)."""
    if schedule.family == "vp":
        return np.arange(schedule.num_train_timesteps, dtype=np.float64)
    if schedule.family == "edm":
        return np.ascontiguousarray(schedule.karras(1000)[::-1])
    steps = schedule.num_train_timesteps
    return schedule.shifted(np.arange(1, steps + 1) / steps)
