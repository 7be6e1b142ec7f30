"""Consistency models: CD and CT (Song et al. 2023, arXiv 2303.01469), iCT (Song and Dhariwal 2024, 2310.14189).

The student maps any point of a probability-flow trajectory to its end in one call: f(x, t), with f(x, end) = x built
in by c_skip and c_out. Each step, t and u are neighbours on a grid of N solver steps, u the cleaner, and

    x_t = alpha_t x0 + sigma_t z
    x_u = one Heun step of the teacher from t to u        CD, algorithm 2
          alpha_u x0 + sigma_u z, the same x0 and z       CT, algorithm 3: no teacher
    loss = lambda d( f_student(x_t, t),  stop_gradient f_target(x_u, u) )

On other schedules than the paper's, the same with y = x / alpha at noise level sigma / alpha: a solver step is the same
jump, and levels stand where the paper has sigma. CT here starts from the teacher's weights, as ECT and the released
launch lines do; a student of `Roles.add_network` starts from scratch.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fewstep.diffusion.consistency import consistency
from fewstep.diffusion.schedule import Array, Schedule
from fewstep.methods import Batch, Loss, Method, Progress, Rng, RoleSpec
from fewstep.methods.guidance import OFF, Guidance
from fewstep.methods.parts.distances import Distance, distance
from fewstep.methods.parts.dropout import dropout_seed
from fewstep.methods.parts.solver_step import Solver, SolverStep, choose_solver, data_step, solver_step
from fewstep.methods.parts.statistics import student_statistics
from fewstep.methods.settings import Count, GuidanceScale, checked
from fewstep.models.roles import Roles


@dataclass
class Draws:
    """Random numbers of one CM step.

    Attributes:
        t, u: [B] float64 on the host, neighbours on the grid, u the cleaner one.
        noise: [B, ...] unit normal.
        guidance_scale: [B] float64, the teacher's scale w (1 = off).
        dropout: [B] int64 on the host; the first is the seed of both forwards' dropout masks.
    """

    t: Tensor
    u: Tensor
    noise: Tensor
    guidance_scale: Tensor
    dropout: Tensor


@dataclass
class Shared(SolverStep):
    """The solver step, the target's x0 at its lower end, [B, ...], without a graph; lambda, host [B] (None: all 1)."""

    target: Tensor
    weight: Array | None


class CM(Method):
    """CD (the defaults), CT (``variant="ct"``) or iCT (``**ICT``)."""

    name = "cm"
    summary = "Consistency models: one jump to clean data, learnt from a teacher's ODE (cd) or from data alone (ct)."
    sampler = "lcm"
    renamed: ClassVar[dict[str, str]] = {"log_mean": "P_mean", "log_std": "P_std"}
    truth_settings: ClassVar[dict[str, Any]] = {"num_grid_steps": 10}
    truth_cases: ClassVar[tuple[dict[str, Any], ...]] = ({"variant": "cd"}, {"variant": "ct"})

    @checked
    class Settings:
        """Settings of CM.

        Attributes:
            variant: "cd", solver steps by the teacher, or "ct", solver steps by the data.
            num_grid_steps: N, solver steps of the training grid (the last, where it grows); the paper's 40 points are
                39.
            first_grid_steps: N at the start; it doubles in equal stretches of training (iCT). None: N does not change.
            timestep_sampling: "uniform" over the solver steps, or "lognormal", by the mass that log level ~ N(P_mean,
                P_std^2) has within a solver step (iCT).
            solver: of cd's solver step: "heun", two calls, "ddim", one. None: heun on EDM schedules, ddim elsewhere.
            guidance_scale: of cd's teacher (1 = off: the papers), one number or [low, high], as in LCM.
            loss: "l2", "huber" or "sample-huber" (iCT), with huber_c. CT's fixed point is known for l2.
            weighting: lambda: "uniform" is 1 (CD, CT), "inverse" 1 / (level_t - level_u) (iCT). Flow schedules, whose
                level has no bound, take their own time for it.
            target_decay: EMA decay of the target; 0 uses the student itself (CD on CIFAR-10, iCT).
        """

        variant: Literal["cd", "ct"] = "cd"
        num_grid_steps: Count = 39
        first_grid_steps: Count | None = None
        timestep_sampling: Literal["uniform", "lognormal"] = "uniform"
        P_mean: float = -1.1
        P_std: Annotated[float, Field(gt=0)] = 2.0
        solver: Solver | None = None
        guidance_scale: GuidanceScale = 1.0
        loss: Distance = "l2"
        huber_c: float = 0.00054
        weighting: Literal["uniform", "inverse"] = "uniform"
        target_decay: float = 0.0

        def __post_init__(self) -> None:
            if self.variant == "ct" and Guidance.of(self.guidance_scale) != OFF:
                raise ValueError("Consistency training (variant ct) asks no teacher: leave guidance_scale at 1.")
            if self.first_grid_steps is not None and self.first_grid_steps > self.num_grid_steps:
                raise ValueError(f"first_grid_steps must lie in 1 ... num_grid_steps, not {self.first_grid_steps}.")

    settings: Settings

    def __init__(self, schedule: Schedule, settings: Settings | None = None, **overrides: Any) -> None:
        super().__init__(schedule, settings, **overrides)
        self.grid = self._grid(self.settings.num_grid_steps)
        self.guidance = Guidance.of(self.settings.guidance_scale)
        self.solver = choose_solver(self.settings.solver, schedule)
        if not self._cumulative(self.grid).isfinite().all():
            where = f"N({self.settings.P_mean}, {self.settings.P_std}^2)"
            raise ValueError(f"P_mean and P_std: {where} must have mass within the grid.")
        if self.settings.weighting == "inverse" and not self._inverse(self.grid[1:], self.grid[:-1]).all():
            raise ValueError("Weighting inverse is 0 where this schedule starts from pure noise: use uniform.")

    @property
    def title(self) -> str:
        return f"{super().title} ({self.settings.variant})"

    def roles(self) -> tuple[RoleSpec, ...]:
        return RoleSpec("student"), RoleSpec("target", follows="student", decay=self.settings.target_decay)

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Draws:
        grid = self._grid(self.grid_steps(progress))
        index = torch.searchsorted(self._cumulative(grid), rng.sample.uniform("hop"), right=True)
        return Draws(
            t=grid[index + 1],
            u=grid[index],
            noise=rng.sample.normal("noise", batch.x0.shape[1:]),
            guidance_scale=self.guidance.draw(rng),
            dropout=rng.sample.integers("dropout", 0, 2**63 - 1),
        )

    def prepare(self, roles: Roles, batch: Batch, draws: Draws, due: Collection[str]) -> Shared:
        step = self._solver_step(roles, batch, draws)
        with torch.no_grad(), self._same_dropout(draws):
            target = consistency(roles.target(step.x_u, step.u, batch.cond))
        weight = None if self.settings.weighting == "uniform" else self._inverse(step.t, step.u)
        return Shared(**vars(step), target=target, weight=weight)

    def student(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        with self._same_dropout(draws):
            x0_student = consistency(roles.student(shared.x_t, shared.t, batch.cond))
        loss = distance(x0_student, shared.target, self.settings.loss, self.settings.huber_c, shared.weight)
        stats = student_statistics(x0_student, batch.x0, shared.teacher_x0)
        return Loss(loss, parts={"consistency": loss.detach()}, stats=stats)

    def calls_per_step(self) -> dict[str, int]:
        teacher = {} if self.settings.variant == "ct" else {"teacher": 2 if self.solver == "heun" else 1}
        return {"student": 1, **teacher, "target": 1}

    @classmethod
    def depends_on_length(cls, settings: Settings) -> bool:
        return settings.first_grid_steps is not None

    def grid_steps(self, progress: Progress) -> int:
        """N at a step: first_grid_steps, doubled after every K / (log2(last / first) + 1) steps (iCT)."""
        first, last = self.settings.first_grid_steps, self.settings.num_grid_steps
        if first is None:
            return last
        stretch = max(1, int(progress.total / (math.log2(last // first) + 1)))
        return int(min(first * 2 ** (progress.step // stretch), last))

    def _solver_step(self, roles: Roles, batch: Batch, draws: Draws) -> SolverStep:
        if self.settings.variant == "ct":
            return data_step(self.schedule, batch, draws.noise, draws.t, draws.u)
        scale = self.guidance.scale(draws.guidance_scale)
        return solver_step(roles, self.schedule, batch, draws.noise, draws.t, draws.u, scale, self.solver)

    def _same_dropout(self, draws: Draws) -> Any:
        return dropout_seed(int(draws.dropout.numpy()[0]), draws.noise.device)

    def _grid(self, grid_steps: int) -> Tensor:
        """[N + 1] increasing times; a table of N steps gives index 0 twice, which is no solver step."""
        return torch.from_numpy(np.unique(self.schedule.training_grid(grid_steps)))

    def _cumulative(self, grid: Tensor) -> Tensor:
        """[N] chances of the solver steps, added up from the cleanest to exactly 1."""
        if self.settings.timestep_sampling == "uniform":
            return torch.arange(1, len(grid), dtype=torch.float64) / (len(grid) - 1)
        log_level = torch.from_numpy(self.schedule.noise_to_signal(grid)).log()
        below = torch.erf((log_level - self.settings.P_mean) / (math.sqrt(2) * self.settings.P_std))
        return (below[1:] - below[0]) / (below[-1] - below[0])

    def _inverse(self, t: Tensor, u: Tensor) -> Array:
        level = self.schedule.solver_level
        return np.asarray(1 / (level(t) - level(u)))


ICT: dict[str, Any] = {
    "variant": "ct",
    "first_grid_steps": 10,
    "num_grid_steps": 1280,
    "timestep_sampling": "lognormal",
    "loss": "sample-huber",
    "weighting": "inverse",
}
