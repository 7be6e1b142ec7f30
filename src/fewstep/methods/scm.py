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
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedule import Array, Schedule, Time, expand
from fewstep.methods import Batch, Loss, Method, Progress, Rng
from fewstep.methods.guidance import Guidance
from fewstep.methods.parts.distances import bounded_gain
from fewstep.methods.parts.statistics import student_statistics
from fewstep.methods.settings import GuidanceScale, Share, Weight, checked
from fewstep.models.roles import Roles


@dataclass
class Draws:
    """Random numbers of one step.

    Attributes:
        t, u: [B] float64 on the host, native times, u the cleaner by one small angle, or t itself where a table has no
            time in between.
        noise: [B, ...] unit normal.
        guidance_scale: [B] float64, the teacher's scale w (1 = off).
        warmup: r, from 0 to 1.
    """

    t: Tensor
    u: Tensor
    noise: Tensor
    guidance_scale: Tensor
    warmup: float


@dataclass
class Shared:
    """x_t; F_T of the teacher there; F of the student where the teacher's jump ends, all [B, ...] without a graph."""

    x_t: Tensor
    of_teacher: Tensor
    below: Tensor
    teacher_x0: Tensor


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
        """

        guidance_scale: GuidanceScale = 4.0
        P_mean: float = 0.7
        P_std: Annotated[float, Field(gt=0)] = 1.6
        angle_step: Share = 0.01
        warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
        normalize: Weight = 0.1

    settings: Settings

    def __init__(self, schedule: Schedule, settings: Settings | None = None, **overrides: Any) -> None:
        super().__init__(schedule, settings, **overrides)
        self.guidance = Guidance.of(self.settings.guidance_scale)
        self.lowest, self.highest = (angle(schedule, t) for t in (schedule.end, schedule.start))

    @classmethod
    def depends_on_length(cls, settings: Settings) -> bool:
        return settings.warmup > 0

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Draws:
        settings = self.settings
        level = torch.special.ndtri(rng.sample.uniform("time").clamp(1e-12, 1 - 1e-12))
        a = np.arctan(np.exp(settings.P_mean + settings.P_std * level.numpy()))
        a = np.clip(a, self.lowest + 2 * settings.angle_step, self.highest)  # the jump ends above clean data
        grown = progress.step / (settings.warmup * progress.total) if settings.warmup else 1.0
        return Draws(
            t=self.time_at(a),
            u=self.time_at(a - settings.angle_step),
            noise=rng.sample.normal("noise", batch.x0.shape[1:]),
            guidance_scale=self.guidance.draw(rng),
            warmup=min(1.0, grown),
        )

    def prepare(self, roles: Roles, batch: Batch, draws: Draws, due: Collection[str]) -> Shared:
        scale = self.guidance.scale(draws.guidance_scale)
        with torch.no_grad():
            x_t = self.schedule.add_noise(batch.x0, draws.noise, draws.t)
            teacher = roles.teacher(x_t, draws.t, batch.cond, guidance_scale=scale)
            below = roles.student(teacher.at(draws.u), draws.u, batch.cond)
            return Shared(x_t, velocity(teacher), velocity(below), teacher.x0)

    def student(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        pred = roles.student(shared.x_t, draws.t, batch.cond)
        moved, c = velocity(pred), self.settings.normalize
        with torch.no_grad():
            tangent = self.tangent(moved, draws, shared)
            size = tangent.flatten(1).square().mean(1).sqrt()
            if c:
                tangent = tangent / (size + c).reshape(-1, *[1] * (tangent.ndim - 1))
            stats = student_statistics(pred.x0, batch.x0, shared.teacher_x0) | {"tangent": size.mean()}
        each = (moved - moved.detach() - tangent).square().flatten(1).mean(1)
        a = angle(self.schedule, draws.t)
        weight = bounded_gain(pred.gain(-np.sin(a), np.cos(a)), "huber")  # g is normalised: its gain counts once
        loss = each.mean() if weight is None else (expand(weight, each) * each).mean()
        return Loss(loss, {"consistency": loss.detach()}, stats)

    def calls_per_step(self) -> dict[str, int]:
        return {"student": 2, "teacher": 1}

    def tangent(self, moved: Tensor, draws: Draws, shared: Shared) -> Tensor:
        """g [B, ...] for the student's F at (x_t, t), ``moved``."""
        a, r = angle(self.schedule, draws.t), draws.warmup
        cos, sin, h = np.cos(a), np.sin(a), a - angle(self.schedule, draws.u)
        y = expand(1 / np.hypot(*self.schedule.alpha_sigma(draws.t)), moved) * shared.x_t
        rate = (moved - shared.below) / expand(np.where(h > 0, np.sin(h), 1.0), moved)
        first = expand(cos * np.sqrt(1 - (r * sin) ** 2), moved) * (moved - shared.of_teacher)
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
