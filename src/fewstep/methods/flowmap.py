"""Flow maps by splitting: alpha-Flow (Zhang et al. 2025, arXiv 2510.20771) with a teacher; MeanFlow without a JVP.

The student is conditioned on an end r and predicts the mean slope u of the trajectory from t to r; its jump to r is
then the flow map, for any pair of times and any number of steps. Each step, in the coordinates of `parts.slopes`:

    tau_s = tau_t - alpha (tau_t - tau_r)      a first part of the way, which shrinks as training goes on
    x_s = the guided teacher's jump from x_t to s
    u* = alpha v + (1 - alpha) stop_gradient u_student(x_s, s, r)          v: the teacher's slope at (x_t, t)
    loss = w | u_student(x_t, t, r) - u* |^2                               at r = t the target is v: the teacher is kept

w is 1 at r = t and elsewhere proportional to 1 / alpha (alpha-Flow), 1 at the first alpha: u* differs from u_student by
alpha times an error, so that without it a jump would learn ever less beside the diagonal.

alpha = 1/2 is the bootstrap of shortcut models, alpha -> 0 MeanFlow's identity u = v - (tau_t - tau_r) du/dtau (Geng et
al. 2025, arXiv 2505.13447). Its derivative needs a JVP, which fused attention and checkpointing do not have, or
differences, which multiply the network's own errors by (tau_t - tau_r) over twice their width; a split shrinks them.

Without a teacher v is that of the data, eps - x0 (``velocity: data``). MeanFlow's adaptive weight is left out: where
targets are random it moves the optimum. Times are continuous. A quarter of the rows ends exactly at the schedule's end:
an embedding of r has to have seen each end that a sampler asks for.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedule import Array, Schedule, expand
from fewstep.methods import Batch, Loss, Method, Progress, Rng, RoleSpec
from fewstep.methods.guidance import OFF, Guidance
from fewstep.methods.parts.slopes import level, slope_errors, time_at_height, time_at_level
from fewstep.methods.parts.statistics import student_statistics
from fewstep.methods.settings import GuidanceScale, Share, checked
from fewstep.models.roles import Roles

LOWEST = 1e-3  # of the heights of t: below it a slope is a difference of nearly equal numbers
FALLING = 0.8  # of the training steps, over which alpha falls


@dataclass
class Draws:
    """Random numbers of one step.

    Attributes:
        t, end: [B] float64 on the host, native times, end <= t.
        noise: [B, ...] unit normal.
        guidance_scale: [B] float64, the teacher's scale w (1 = off).
        alpha: the first part's share of the way.
    """

    t: Tensor
    end: Tensor
    noise: Tensor
    guidance_scale: Tensor
    alpha: float


@dataclass
class Shared:
    """x_t and the target slope, [B, ...] each, without a graph; the teacher's x0 at t, None without a teacher."""

    x_t: Tensor
    target: Tensor
    teacher_x0: Tensor | None


class FlowMap(Method):
    """One student for any two times, by a teacher or from data alone."""

    name = "flowmap"
    summary = "Flow maps: the mean slope between any two times, its end an input; any number of steps, no noise."
    sampler = "ctm"
    reads_clean_data: ClassVar[bool] = True
    truth_settings: ClassVar[dict[str, Any]] = {"guidance_scale": 1.0}

    @checked
    class Settings:
        """Settings of FlowMap.

        Attributes:
            velocity: whose slope v is: "teacher", or "data" (then guidance_scale must be 1).
            guidance_scale: of the teacher (1 = off), one number or [low, high], as in LCM.
            diagonal: share of the rows with r = t, where the student learns the teacher itself.
            whole: share of the rows whose r is the schedule's end; the others end anywhere below t.
            alpha: the first and the last share of the way; it falls geometrically over four fifths of training.
        """

        velocity: Literal["teacher", "data"] = "teacher"
        guidance_scale: GuidanceScale = 4.0
        diagonal: Annotated[float, Field(ge=0, le=1)] = 0.5
        whole: Annotated[float, Field(ge=0, le=1)] = 0.25
        alpha: tuple[Share, Share] = (0.5, 0.02)

        def __post_init__(self) -> None:
            if self.velocity == "data" and Guidance.of(self.guidance_scale) != OFF:
                raise ValueError("Flow maps of data (velocity data) ask no teacher: set guidance_scale to 1.")
            if self.diagonal + self.whole > 1:
                raise ValueError(
                    f"diagonal ({self.diagonal:g}) and whole ({self.whole:g}) are shares of the rows: their sum must "
                    "be at most 1."
                )

    settings: Settings

    def __init__(self, schedule: Schedule, settings: Settings | None = None, **overrides: Any) -> None:
        super().__init__(schedule, settings, **overrides)
        self.guidance = Guidance.of(self.settings.guidance_scale)

    def roles(self) -> tuple[RoleSpec, ...]:
        return (RoleSpec("student", ("end",)),)

    @classmethod
    def depends_on_length(cls, settings: Settings) -> bool:
        return settings.alpha[0] != settings.alpha[1]

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Draws:
        one, two, kind = (rng.sample.uniform(name) for name in ("time", "end", "kind"))
        whole, diagonal = kind < self.settings.whole, kind >= 1 - self.settings.diagonal
        between = ~(whole | diagonal)
        high = torch.where(between, torch.maximum(one, two), one).clamp_min(LOWEST)
        low = torch.where(between, torch.minimum(one, two), torch.where(whole, 0.0, high))
        first, last = self.settings.alpha
        return Draws(
            t=time_at_height(self.schedule, high),
            end=time_at_height(self.schedule, low),
            noise=rng.sample.normal("noise", batch.x0.shape[1:]),
            guidance_scale=self.guidance.draw(rng),
            alpha=first * (last / first) ** min(1.0, progress.step / (FALLING * progress.total)),
        )

    def prepare(self, roles: Roles, batch: Batch, draws: Draws, due: Collection[str]) -> Shared:
        s, share = self.split(draws.t, draws.end, draws.alpha)
        with torch.no_grad():
            x_t = self.schedule.add_noise(batch.x0, draws.noise, draws.t)
            first = self._velocity(roles, batch, draws, x_t)
            rest = roles.student(first.at(s), s, batch.cond, end=draws.end).flow
            target = torch.lerp(rest, first.flow, expand(share, rest))
        return Shared(x_t, target, first.x0 if self.settings.velocity == "teacher" else None)

    def student(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        pred = roles.student(shared.x_t, draws.t, batch.cond, end=draws.end)
        errors = slope_errors(pred, shared.target)
        still = (draws.t == draws.end).to(errors, non_blocking=True)
        parts = {"diagonal": errors @ still / len(errors), "jump": errors @ (1 - still) / len(errors)}
        total = parts["diagonal"] + self.settings.alpha[0] / draws.alpha * parts["jump"]
        with torch.no_grad():
            stats = student_statistics(pred.x0, batch.x0, shared.teacher_x0)
        return Loss(total, {name: part.detach() for name, part in parts.items()}, stats)

    def calls_per_step(self) -> dict[str, int]:
        return {"student": 2, "teacher": 1 if self.settings.velocity == "teacher" else 0}

    def split(self, t: Tensor, end: Tensor, alpha: float) -> tuple[Tensor, Array]:
        """The time s between t and the end where the first part stops, [B], and that part's share of the way, [B].

        Rows that end at t stay there with a share of 1. The share is computed from s: a table has no time between
        its last index and pure noise.
        """
        high, low = level(self.schedule, t), level(self.schedule, end)
        found = torch.from_numpy(time_at_level(self.schedule, high - alpha * (high - low)))
        s = torch.where(t == end, t, torch.minimum(torch.maximum(found, end), t))
        way = np.where(high == low, 1.0, high - low)
        return s, np.where(high == low, 1.0, (high - level(self.schedule, s)) / way)

    def _velocity(self, roles: Roles, batch: Batch, draws: Draws, x_t: Tensor) -> Prediction:
        if self.settings.velocity == "teacher":
            scale = self.guidance.scale(draws.guidance_scale)
            return roles.teacher(x_t, draws.t, batch.cond, guidance_scale=scale)
        return Prediction(x_t, draws.noise - batch.x0, draws.t, self.schedule, "flow")
