"""Straight trajectories: reflow (Liu et al. 2022, arXiv 2209.03003); in windows PeRFlow (Yan et al. 2024, 2405.07510).

=============  =====================================================================================================
windows        the ends of a line
=============  =====================================================================================================
1              a pair: noise, and the sample that the teacher's solver made of it (the stream "pairs")
K > 1          data noised to a window's upper edge, and where the teacher's solver takes it at the lower edge
=============  =====================================================================================================

    z_t  = a point of the straight line between both ends, in the coordinates of `parts.slopes`
    loss = | slope of the student at (z_t, t) - slope of the line |^2

The optimum is the mean slope of all lines through a point. Where lines do not cross, as on a line or in short windows,
one step follows them to their end. The student is an ordinary network, which any sampler of ordinary networks can use,
with any number of steps.

Windows meet at the times at which euler calls the network in K steps, whatever the schedule's shift or terminal.
At an edge two windows meet, and a continuous network cannot have the slopes of both. ``reach`` leaves out the last part
of each window above its lower edge, where no sampler of K steps calls the network.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fewstep.diffusion.schedule import USUAL_STEPS, Array, Schedule, Time, expand
from fewstep.methods import Batch, Loss, Method, Progress, Rng, Sampling
from fewstep.methods.parts.slopes import from_line, level, slope_errors, to_line
from fewstep.methods.parts.solver_step import Solver, solve_along
from fewstep.methods.parts.statistics import student_statistics
from fewstep.methods.settings import Count, FixedGuidance, checked
from fewstep.models.cond import Cond
from fewstep.models.roles import Roles
from fewstep.sampling.sample import first_state
from fewstep.sampling.samplers import only_first_order


@dataclass
class Draws:
    """Random numbers of one step.

    Attributes:
        window: which of them, the cleanest first; the same in every row, micro-batch and process.
        height: [B] float64 in (0, 1], where on the line, 1 at its noisy end.
        noise: [B, ...] unit normal, of the data; None with one window, whose pairs have theirs.
    """

    window: int
    height: Tensor
    noise: Tensor | None


@dataclass
class Shared:
    """x_t [B, ...] at native times t [B] (host), the line's slope [B, ...], its clean end, the rows' condition."""

    x_t: Tensor
    t: Tensor
    slope: Tensor
    below: Tensor
    cond: Cond | None


class Reflow(Method):
    """Reflow on the teacher's pairs (one window), or PeRFlow on data (several)."""

    name = "reflow"
    summary = "Straight trajectories, whole (reflow) or in windows (PeRFlow): an ordinary network for any sampler."
    sampler = "euler"
    streams = ("data", "pairs")
    reads_clean_data: ClassVar[bool] = True
    truth_settings: ClassVar[dict[str, Any]] = {"guidance_scale": 1.0}

    @checked
    class Settings:
        """Settings of Reflow.

        Attributes:
            windows: K; 1 learns from pairs of the teacher, more from data and its solver.
            solver_steps: of the teacher within a window of several.
            solver: "ddim", one call a solver step, or "heun", two.
            reach: share of each of several windows that is learnt, from its upper edge.
            guidance_scale: of the teacher (1 = off), and of its pairs by default.
        """

        windows: Count = 1
        solver_steps: Count = 4
        solver: Solver = "ddim"
        reach: Annotated[float, Field(gt=0, le=1)] = 0.9
        guidance_scale: FixedGuidance = 4.0

    settings: Settings

    def __init__(self, schedule: Schedule, settings: Settings | None = None, **overrides: Any) -> None:
        super().__init__(schedule, settings, **overrides)
        if self.settings.windows == 1:
            self.grid = schedule.training_grid(min(USUAL_STEPS, schedule.num_train_timesteps))
            self.count = 1
        else:
            self.grid = windows_grid(schedule, self.settings.windows, self.settings.solver_steps)
            self.count = (len(self.grid) - 1) // self.settings.solver_steps

    @classmethod
    def streams_of(cls, settings: Settings) -> tuple[str, ...]:
        return cls.streams if settings.windows == 1 else ("data",)

    @classmethod
    def needs_images(cls, settings: Settings) -> bool:
        return settings.windows > 1  # otherwise the pairs are its images

    @classmethod
    def sampling(cls, settings: Settings) -> Sampling:
        return Sampling(num_inference_steps=settings.windows if settings.windows > 1 else 4)

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Draws:
        several = self.settings.windows > 1
        return Draws(
            window=rng.shared.integer("window", 0, self.count),
            height=1 - rng.sample.uniform("height", 0.0, self.settings.reach if several else 1.0),
            noise=rng.sample.normal("noise", batch.x0.shape[1:]) if several else None,
        )

    def prepare(self, roles: Roles, batch: Batch, draws: Draws, due: Collection[str]) -> Shared:
        times = self.times(draws.window)
        t = torch.from_numpy(np.interp(draws.height.numpy(), np.linspace(0, 1, len(times)), times))
        top, bottom = float(times[-1]), float(times[0])
        if draws.noise is None:
            pairs, bottom = batch.needed_pairs("Reflow in one window", ", or set windows"), self.schedule.clean
            x_top, below, cond = first_state(self.schedule, pairs.noise, top), pairs.x0, pairs.cond
        else:
            down = [torch.full_like(t, time) for time in times[::-1].tolist()]
            scale, cond = self.settings.guidance_scale, batch.cond
            step = solve_along(roles, self.schedule, batch, draws.noise, down, scale, self.settings.solver)
            x_top, below = step.x_t, step.x_u
        x_t, slope = on_line(self.schedule, (x_top, top), (below, bottom), t)
        return Shared(x_t, t, slope, below, cond)

    def student(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        pred = roles.student(shared.x_t, shared.t, shared.cond)
        loss = slope_errors(pred, shared.slope).mean()
        with torch.no_grad():
            data = shared.below if draws.noise is None else batch.x0
            stats = student_statistics(pred.x0, data)
        return Loss(loss, {"line": loss.detach()}, stats)

    def calls_per_step(self) -> dict[str, float]:
        return {"student": 1, "teacher": sum(map(self._teacher_calls, range(self.count))) / self.count}

    def calls(self, draws: Draws) -> dict[str, float]:
        return {"student": 1, "teacher": self._teacher_calls(draws.window)}

    def _teacher_calls(self, window: int) -> int:
        """Calls of the teacher for the solver steps of a window; pairs have theirs already."""
        if self.settings.windows == 1:
            return 0
        times, heun = self.times(window), self.settings.solver == "heun"
        return sum(1 + (heun and not only_first_order(self.schedule, t, u)) for u, t in pairwise(times.tolist()))

    def times(self, window: int) -> Array:
        """The increasing solver times of a window, edges included; with one window those of the whole grid."""
        steps = (len(self.grid) - 1) // self.count
        return self.grid[window * steps : (window + 1) * steps + 1]


def windows_grid(schedule: Schedule, windows: int, solver_steps: int) -> Array:
    """The increasing times of so many windows, ``solver_steps`` in each: upper edges are where euler calls the network.

    Between the edges times are spaced as on the schedule's training grid. On EDM schedules the last of euler's calls
    is at the schedule's end, where no window is left: there is one window less.
    """
    edges = np.unique(np.append(schedule.timesteps(windows).numpy(), schedule.end))
    knots = schedule.training_grid((len(edges) - 1) * solver_steps)
    places = np.interp(edges, knots, np.arange(len(knots)))
    inner = np.interp(np.arange(len(knots)) / solver_steps, np.arange(len(edges)), places)
    grid = np.interp(inner, np.arange(len(knots)), knots)
    grid = np.round(grid) if schedule.family == "vp" else grid
    grid[::solver_steps] = edges
    return np.asarray(grid)


def on_line(
    schedule: Schedule, above: tuple[Tensor, float], below: tuple[Tensor, float], t: Time
) -> tuple[Tensor, Tensor]:
    """The states at ``t`` [B] on straight lines between two states [B, ...] at two times, and the lines' slopes."""
    z_top, z_low = (to_line(schedule, x, time) for x, time in (above, below))
    tau_top, tau_low = (float(level(schedule, time)) for _, time in (above, below))
    slope = (z_top - z_low) / (tau_top - tau_low)
    z_t = torch.addcmul(z_low, expand(np.asarray(level(schedule, t) - tau_low), z_low), slope)
    return from_line(schedule, z_t, t), slope
