"""Continuous-time consistency: sCM (Lu and Song 2024, arXiv 2410.11081) by distillation, with a difference for its JVP.

In angles a = atan(sigma / alpha) and states y = x / sqrt(alpha^2 + sigma^2) every schedule is the circle
y = cos a x0 + sin a eps. F = dy/da = cos a eps - sin a x0 follows from a prediction of any kind, and the consistency
function f = cos a y - sin a F is the predicted x0, which is y at a = 0. Each step, with F_T the guided teacher's,

    dF  = (F(x_t, t) - F(x_u, u)) / sin h          x_u: the teacher's jump from the angle a down to a - h
    g   = -cos a sqrt(1 - r^2 sin^2 a) (F - F_T) - r cos a sin a (y + dF)        r: the warm-up, from 0 to 1
    loss = | F - stop_gradient(F + g / (|g| + c)) |^2                            |g|: a root mean square

dF is the paper's JVP along the teacher's path for h -> 0: at the exact consistency function g falls with h.
It would need an attention that has JVPs, and a network without checkpointing. The price of the difference is precision:
two predictions a small angle apart cancel, of which bf16 leaves nothing. So this method trains in float32 alone.

It is CM (`methods/cm.py`) with an infinitesimal solver step and a normalised tangent. Left out: the adaptive weight,
which is a learned network, and the training without a teacher.

``matching_weight`` adds the distribution matching of rCM (Zheng et al. 2025, arXiv 2510.08431): after 1 to N of its own
calls, at times drawn anew, the student's prediction moves along the difference of two scores (`parts.matching`).
Consistency spreads its samples over all that the teacher has, matching sharpens them. Unguided, both have one optimum;
guided, consistency follows the guided trajectory and matching the guided scores, and the weight chooses between them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedule import Array, Schedule, Time, expand
from fewstep.methods import Batch, Loss, Method, Player, Progress, Rng, RoleSpec
from fewstep.methods.guidance import Guidance
from fewstep.methods.parts.distances import bounded_gain
from fewstep.methods.parts.matching import DistributionMatching, MatchingDraws, MatchingSettings
from fewstep.methods.parts.rollout import Rollout, RolloutDraws, RolloutSettings
from fewstep.methods.parts.score_pair import critic_rate
from fewstep.methods.parts.statistics import student_statistics
from fewstep.methods.settings import Count, GuidanceScale, Share, Weight, checked
from fewstep.models.roles import Roles


@dataclass
class Draws(MatchingDraws):
    """Random numbers of one step, with those of the matching.

    Attributes:
        t, u: [B] float64 on the host, native times, u the cleaner by one small angle, or t itself where a table has no
            time in between.
        noise: [B, ...] unit normal.
        guidance_scale: [B] float64, the teacher's scale w (1 = off).
        warmup: r, from 0 to 1.
        times, exit: the student's own calls before it is matched, as in `RolloutDraws`, and
        rollout_noise: [B, exit + 1, ...] unit normals of them; None without matching.
    """

    t: Tensor
    u: Tensor
    noise: Tensor
    guidance_scale: Tensor
    warmup: float
    times: tuple[float, ...] = ()
    exit: int = 0
    rollout_noise: Tensor | None = None


@dataclass
class Along:
    """x_t; F_T of the teacher there; F of the student where the teacher's jump ends, all [B, ...] without a graph."""

    x_t: Tensor
    of_teacher: Tensor
    below: Tensor
    teacher_x0: Tensor


@dataclass
class Shared:
    """What the difference is of, where the student is due; its matched prediction [B, ...], which then has a graph."""

    along: Along | None
    x0_student: Tensor | None = None


class SCM(Method):
    """sCD: continuous-time consistency distillation."""

    name = "scm"
    summary = (
        "Continuous-time consistency: one jump to clean data, learnt from its derivative along the teacher's path."
    )
    sampler = "renoise"
    needs_precision: ClassVar[bool] = True
    reads_clean_data: ClassVar[bool] = True
    truth_settings: ClassVar[dict[str, Any]] = {"guidance_scale": 1.0}

    @checked
    class Settings:
        """Settings of SCM.

        Attributes:
            guidance_scale: of the teacher (1 = off), one number or [low, high], as in LCM.
            P_mean, P_std: of log tan a, where it is trained (the paper: -0.8 and 1.6; rCM's large models: 0.7 and 1.6).
            angle_step: h; smaller ones lose digits, larger ones are CM's solver steps.
            warmup: share of the steps over which r grows.
            normalize: c; 0 leaves the tangent as it is.
            matching_weight: of rCM's distribution matching in the loss; 0 leaves its scores out. Both losses are means
                over elements here: rCM's 1 to 100, of sums, is sqrt(D) / 100 at D elements, 0.3 for scenes-64.
            any_steps: N, the most calls of the student before it is matched.
            student_every: steps of the fake score to one of the student's, as in DMD2; without matching it has no use.
        """

        guidance_scale: GuidanceScale = 4.0
        P_mean: float = 0.7
        P_std: Annotated[float, Field(gt=0)] = 1.6
        angle_step: Share = 0.01
        warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
        normalize: Weight = 0.1
        matching_weight: Weight = 0.0
        any_steps: Count = 4
        student_every: Count = 5

        def __post_init__(self) -> None:
            if self.matching_weight and not Guidance.of(self.guidance_scale).fixed:
                raise ValueError("matching_weight compares scores at one guidance_scale: give one number, not a range.")

    settings: Settings

    def __init__(self, schedule: Schedule, settings: Settings | None = None, **overrides: Any) -> None:
        super().__init__(schedule, settings, **overrides)
        self.guidance = Guidance.of(self.settings.guidance_scale)
        self.lowest, self.highest = (angle(schedule, t) for t in (schedule.end, schedule.start))
        if self.settings.matching_weight:
            self.rollout = Rollout.of(schedule, RolloutSettings(any_steps=self.settings.any_steps))
            self.matching = DistributionMatching(schedule, MatchingSettings(guidance_scale=self.guidance.low))
            student = Player("student", every=self.settings.student_every)
            self.players = (student, Player("critic", owns=("fake",), rate=critic_rate(schedule)))

    def roles(self) -> tuple[RoleSpec, ...]:
        student = RoleSpec("student")
        return (student, RoleSpec("fake")) if self.settings.matching_weight else (student,)

    @classmethod
    def depends_on_length(cls, settings: Settings) -> bool:
        return settings.warmup > 0

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Draws:
        settings = self.settings
        level = torch.special.ndtri(rng.sample.uniform("time").clamp(1e-12, 1 - 1e-12))
        a = np.arctan(np.exp(settings.P_mean + settings.P_std * level.numpy()))
        a = np.clip(a, self.lowest + 2 * settings.angle_step, self.highest)  # the jump ends above clean data
        grown = progress.step / (settings.warmup * progress.total) if settings.warmup else 1.0
        draws = Draws(
            t=self.time_at(a),
            u=self.time_at(a - settings.angle_step),
            noise=rng.sample.normal("noise", batch.x0.shape[1:]),
            guidance_scale=self.guidance.draw(rng),
            warmup=min(1.0, grown),
        )
        if settings.matching_weight:
            self._draw_matching(draws, rng, batch.x0.shape[1:], progress.plays("student"))
        return draws

    def _draw_matching(self, draws: Draws, rng: Rng, shape: Sequence[int], due: bool) -> None:
        draws.times = self.rollout.draw_times(rng)
        draws.exit = self.rollout.draw_exit(rng, len(draws.times))
        draws.rollout_noise = rng.sample.normal("rollout_noise", (self.rollout.noises(draws.exit), *shape))
        self.matching.draw(draws, rng, shape, due, draws.times[draws.exit], self.schedule.clean)

    def prepare(self, roles: Roles, batch: Batch, draws: Draws, due: Collection[str]) -> Shared:
        along = self.along(roles, batch, draws) if "student" in due else None
        if draws.rollout_noise is None:
            return Shared(along)
        own = RolloutDraws(times=draws.times, exit=draws.exit, noise=draws.rollout_noise)
        x = self.rollout.state(roles.student, batch.x0, own, batch.cond)
        with nullcontext() if "student" in due else torch.no_grad():
            return Shared(along, roles.student(x, draws.times[draws.exit], batch.cond).x0)

    def along(self, roles: Roles, batch: Batch, draws: Draws) -> Along:
        """The teacher at x_t, and the student where it leads."""
        scale = self.guidance.scale(draws.guidance_scale)
        with torch.no_grad():
            x_t = self.schedule.add_noise(batch.x0, draws.noise, draws.t)
            teacher = roles.teacher(x_t, draws.t, batch.cond, guidance_scale=scale)
            below = roles.student(teacher.at(draws.u), draws.u, batch.cond)
            return Along(x_t, velocity(teacher), velocity(below), teacher.x0)

    def student(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        along, x = shared.along, shared.x0_student
        assert along is not None
        if x is None:
            return self.consistency(roles, batch, draws, along)
        matched = self.matching.student(roles, batch, x, draws, None)
        total = self.settings.matching_weight * matched.total
        return replace(matched, total=total, then=lambda: self.consistency(roles, batch, draws, along))

    def critic(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        assert shared.x0_student is not None
        return self.matching.fake(roles, shared.x0_student.detach(), draws, batch.cond, None)

    def consistency(self, roles: Roles, batch: Batch, draws: Draws, along: Along) -> Loss:
        """The loss of the continuous-time consistency function."""
        pred = roles.student(along.x_t, draws.t, batch.cond)
        moved, c = velocity(pred), self.settings.normalize
        with torch.no_grad():
            tangent = self.tangent(moved, draws, along)
            size = tangent.flatten(1).square().mean(1).sqrt()
            if c:
                tangent = tangent / (size + c).reshape(-1, *[1] * (tangent.ndim - 1))
            stats = student_statistics(pred.x0, batch.x0, along.teacher_x0) | {"tangent": size.mean()}
        each = (moved - moved.detach() - tangent).square().flatten(1).mean(1)
        a = angle(self.schedule, draws.t)
        weight = bounded_gain(pred.gain(-np.sin(a), np.cos(a)), "huber")  # g is normalised: its gain counts once
        loss = each.mean() if weight is None else (expand(weight, each) * each).mean()
        return Loss(loss, {"consistency": loss.detach()}, stats)

    def calls(self, draws: Draws) -> dict[str, float]:
        return self._calls(draws.exit)

    def calls_per_step(self) -> dict[str, float]:
        return self._calls(self.rollout.mean_exit if self.settings.matching_weight else 0)

    def _calls(self, exit: float) -> dict[str, float]:
        matched = self.settings.matching_weight > 0
        return {"student": 2, "teacher": 1} if not matched else {"student": 3 + exit, "teacher": 2, "fake": 2}

    def tangent(self, moved: Tensor, draws: Draws, along: Along) -> Tensor:
        """g [B, ...] for the student's F at (x_t, t), ``moved``."""
        a, r = angle(self.schedule, draws.t), draws.warmup
        cos, sin, h = np.cos(a), np.sin(a), a - angle(self.schedule, draws.u)
        y = expand(1 / np.hypot(*self.schedule.alpha_sigma(draws.t)), moved) * along.x_t
        rate = (moved - along.below) / expand(np.where(h > 0, np.sin(h), 1.0), moved)
        first = expand(cos * np.sqrt(1 - (r * sin) ** 2), moved) * (moved - along.of_teacher)
        return -first - expand(r * cos * sin, moved) * (y + rate)

    def time_at(self, a: Array) -> Tensor:
        """Native times of angles [B]."""
        found = np.clip(self.schedule.time_at(np.tan(a)), self.schedule.end, self.schedule.start)
        return torch.from_numpy(np.where(a >= self.highest, self.schedule.start, found))


def angle(schedule: Schedule, t: Time) -> Array:
    """atan(sigma / alpha) at native time ``t`` (number or [B])."""
    alpha, sigma = schedule.alpha_sigma(t)
    return np.asarray(np.arctan2(sigma, alpha))


def velocity(prediction: Prediction) -> Tensor:
    """F = dy/da = cos a eps - sin a x0 of a prediction, [B, ...]."""
    a = angle(prediction.schedule, prediction.t)
    return prediction.combine(-np.sin(a), np.cos(a))
