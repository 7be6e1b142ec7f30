"""A first step that keeps the teacher's diversity: DP-DMD (Wu et al. 2026, arXiv 2602.03139).

Distribution matching may leave out what its teacher would show. Here the student's first step on the ODE is fitted to
the teacher's trajectory from the same noise, and the matching reaches later steps alone:

    z = the teacher's state after K of M guided steps of DDIM from the noise, at time t_K
    loss = mean (slope_student(noise) - mean slope from the noise to z)^2

Slopes are those of solver steps (`Schedule.mean_slope`): in t on flow schedules, in sigma/alpha elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Loss
from fewstep.methods.parts.distances import distance
from fewstep.methods.settings import Count, Weight, checked
from fewstep.models.cond import Cond
from fewstep.models.roles import Roles
from fewstep.sampling.solvers import solve


@checked
class FirstStepSettings:
    """A first step of its own.

    Attributes:
        first_weight: of its loss (DP-DMD: 0.05); above 0 the matching leaves that step alone. 0 leaves the loss out.
        first_solver_steps: [K, M]: its target are the first K of the teacher's M steps below the student's first time.
    """

    first_weight: Weight = 0.0
    first_solver_steps: tuple[Count, Count] = (10, 30)


class FirstStep:
    """The loss of a student's first step, from noise at its own first time.

    Args:
        schedule: of student and teacher.
        settings: weight and target. guidance_scale: of the teacher.
        first: the native time at which the student meets noise.

    Attributes:
        times: [K + 1], the teacher's: ``first``, and below it K times of its grid of M steps.

    Raises:
        ValueError: K not below M or more than there are below ``first``, or no signal there, where there is no slope.
    """

    def __init__(self, schedule: Schedule, settings: FirstStepSettings, guidance_scale: float, first: float) -> None:
        self.schedule, self.weight, self.guidance_scale = schedule, settings.first_weight, guidance_scale
        self.solver_steps, total = settings.first_solver_steps
        if self.solver_steps >= total:
            raise ValueError(f"first_solver_steps must be [K, M] with K below M, not {[self.solver_steps, total]}.")
        if schedule.family == "vp" and schedule.alpha_sigma(first)[0] == 0:
            raise ValueError("first_weight needs a schedule that starts with some signal: this one has alpha 0 there.")
        grid = schedule.timesteps(total).double()
        below = grid[grid < first][: self.solver_steps]
        if len(below) < self.solver_steps:
            raise ValueError(
                f"first_solver_steps: only {len(below)} of {total} steps of the teacher lie below {first:g}, the "
                f"student's first time, not {self.solver_steps}: lower K or raise M."
            )
        self.times = torch.cat([torch.tensor([first], dtype=torch.float64), below])

    def loss(self, roles: Roles, x: Tensor, cond: Cond | None) -> Loss:
        """The loss at first states x [B, ...]: one call of the student, K of the teacher."""
        start, end = float(self.times[0]), float(self.times[-1])
        wanted = solve(roles.teacher, x, self.times, cond, self.guidance_scale)
        reached = roles.student(x, start, cond).at(end)
        slope = self.schedule.mean_slope
        term = distance(slope(x, start, reached, end), slope(x, start, wanted, end))
        return Loss(self.weight * term, {"first": term.detach()})
