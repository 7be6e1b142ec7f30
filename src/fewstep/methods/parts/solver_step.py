"""The solver step that consistency methods learn from: noise the data to t, and let the teacher step to u below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.diffusion.schedule import Schedule
from fewstep.models.roles import Roles
from fewstep.sampling.samplers import heun, only_first_order

Solver: TypeAlias = Literal["heun", "ddim"]


def choose_solver(solver: Solver | None, schedule: Schedule) -> Solver:
    """``solver``, or by default heun on EDM schedules, where the papers use it, and ddim elsewhere."""
    return solver or ("heun" if schedule.family == "edm" else "ddim")


@dataclass
class SolverStep:
    """x_t [B, ...] at native times t [B], the next state x_u at u [B] (host times), and the teacher's x0 at t.

    Without a teacher there is no such x0.
    """

    t: Tensor
    u: Tensor
    x_t: Tensor
    x_u: Tensor
    teacher_x0: Tensor | None


def solver_step(
    roles: Roles,
    schedule: Schedule,
    batch: Batch,
    noise: Tensor,
    t: Tensor,
    u: Tensor,
    guidance_scale: float | Tensor,
    solver: Solver = "ddim",
    by: str = "teacher",
) -> SolverStep:
    """Noise ``batch.x0`` to t and take one guided step of the teacher to u, without a graph; Heun's takes two calls.

    ``by`` names another role to take the step.

    The step is a jump in (x0, epsilon), whatever the teacher predicts; the public LCM scripts treat its raw output
    as epsilon, which is wrong for v-prediction.
    """
    return solve_along(roles, schedule, batch, noise, [t, u], guidance_scale, solver, by=by)


def solve_along(
    roles: Roles,
    schedule: Schedule,
    batch: Batch,
    noise: Tensor,
    times: Sequence[Tensor],
    guidance_scale: float | Tensor,
    solver: Solver = "ddim",
    x_t: Tensor | None = None,
    by: str = "teacher",
) -> SolverStep:
    """The same over several solver steps: from ``times[0]`` through all of ``times``, [B] each, to the last (CTM).

    ``x_t`` stands in for the noised data. A row whose time does not change stays where it is.
    """
    teacher_x0, teacher = None, getattr(roles, by)
    with torch.no_grad():
        x = x_t = schedule.add_noise(batch.x0, noise, times[0]) if x_t is None else x_t
        for t, u in pairwise(times):
            first = teacher(x, t, batch.cond, guidance_scale=guidance_scale)
            x = first.at(u)
            if solver == "heun" and not only_first_order(schedule, t, u).all():
                x = heun(first, teacher(x, u, batch.cond, guidance_scale=guidance_scale))
            teacher_x0 = first.x0 if teacher_x0 is None else teacher_x0
    return SolverStep(times[0], times[-1], x_t, x, teacher_x0)


def data_step(schedule: Schedule, batch: Batch, noise: Tensor, t: Tensor, u: Tensor) -> SolverStep:
    """A step that needs no teacher: the same data under the same noise at both times (Song et al. 2023, sec. 5).

    It is the Euler step of sigma/alpha with E[x0 | x_t] replaced by x0 itself: right in the mean over x0, not for each.
    """
    return SolverStep(t, u, schedule.add_noise(batch.x0, noise, t), schedule.add_noise(batch.x0, noise, u), None)
