"""The hop that consistency methods learn from: noise the data to t, let the teacher step to u, one grid point below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.diffusion.schedule import Schedule
from fewstep.models.roles import Roles
from fewstep.sampling.samplers import heun

Solver: TypeAlias = Literal["heun", "ddim"]


@dataclass(frozen=True)
class Guidance:
    """A guidance scale w (1 = off): one number, or drawn per sample from [low, high].

    Published LCM ranges count from 0; add one to each end.
    """

    low: float
    high: float

    @classmethod
    def of(cls, value: float | tuple[float, float] | list[float]) -> Guidance:
        """From a number or a pair; raises ValueError for anything else."""
        pair = [value, value] if isinstance(value, int | float) else list(value)
        if len(pair) != 2 or pair[0] > pair[1]:
            raise ValueError(f"guidance_scale must be one number or [low, high], not {pair}.")
        if not all(0 <= scale < math.inf for scale in pair):
            raise ValueError(f"guidance_scale must be at least 0 and finite (1 is off), not {value}.")
        return cls(float(pair[0]), float(pair[1]))

    @property
    def fixed(self) -> bool:
        return self.low == self.high

    def draw(self, rng: Rng) -> Tensor:
        """[rows] host float64."""
        return rng.sample.uniform("guidance_scale", self.low, self.high)

    def scale(self, drawn: Tensor) -> float | Tensor:
        """What the teacher is called with: the fixed number, or the drawn scales."""
        return self.low if self.fixed else drawn


def choose_solver(solver: Solver | None, schedule: Schedule) -> Solver:
    """``solver``, or by default heun on EDM schedules, where the papers use it, and ddim elsewhere.

    Raises:
        ValueError: there is no such solver.
    """
    if solver not in (None, "heun", "ddim"):
        raise ValueError(f"Unknown solver '{solver}': use heun, ddim.")
    return solver or ("heun" if schedule.family == "edm" else "ddim")


@dataclass
class Hop:
    """x_t [B, ...] at native times t [B], where it lands, x_u at u [B] (host times), and the teacher's x0 at t.

    Without a teacher there is no such x0.
    """

    t: Tensor
    u: Tensor
    x_t: Tensor
    x_u: Tensor
    teacher_x0: Tensor | None


def guided_hop(
    roles: Roles,
    schedule: Schedule,
    batch: Batch,
    noise: Tensor,
    t: Tensor,
    u: Tensor,
    guidance_scale: float | Tensor,
    solver: Solver = "ddim",
    by: str = "teacher",
) -> Hop:
    """Noise ``batch.x0`` to t and take one guided step of the teacher to u, without a graph; Heun's takes two calls.

    ``by`` names another role to take the step.

    The step is a jump in (x0, epsilon), whatever the teacher predicts; the public LCM scripts treat its raw output
    as epsilon, which is wrong for v-prediction.
    """
    return roll_out(roles, schedule, batch, noise, [t, u], guidance_scale, solver, by=by)


def roll_out(
    roles: Roles,
    schedule: Schedule,
    batch: Batch,
    noise: Tensor,
    times: Sequence[Tensor],
    guidance_scale: float | Tensor,
    solver: Solver = "ddim",
    x_t: Tensor | None = None,
    by: str = "teacher",
) -> Hop:
    """The same over several hops: from ``times[0]`` through every one of ``times``, [B] each, to the last (CTM).

    ``x_t`` stands in for the noised data. A row whose time does not change stays where it is.
    """
    teacher_x0, teacher = None, getattr(roles, by)
    with torch.no_grad():
        x = x_t = schedule.add_noise(batch.x0, noise, times[0]) if x_t is None else x_t
        for t, u in pairwise(times):
            first = teacher(x, t, batch.cond, guidance_scale=guidance_scale)
            x = first.at(u)
            if solver == "heun":
                x = heun(first, teacher(x, u, batch.cond, guidance_scale=guidance_scale))
            teacher_x0 = first.x0 if teacher_x0 is None else teacher_x0
    return Hop(times[0], times[-1], x_t, x, teacher_x0)


def data_hop(schedule: Schedule, batch: Batch, noise: Tensor, t: Tensor, u: Tensor) -> Hop:
    """A hop that needs no teacher: the same data under the same noise at both times (Song et al. 2023, sec. 5).

    It is the Euler step of sigma/alpha with E[x0 | x_t] replaced by x0 itself: right in the mean over x0, not for each.
    """
    return Hop(t, u, schedule.add_noise(batch.x0, noise, t), schedule.add_noise(batch.x0, noise, u), None)
