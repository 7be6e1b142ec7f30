"""Trajectory consistency distillation: TCD (Zheng et al. 2024, arXiv 2402.19159).

LCM whose end point is any time s below the time u of the teacher's step. The trajectory consistency function of
first order, TCF(1), is the jump itself, with the ordinary network and no s-input:

    x_u = one guided DDIM step of the teacher from t to u,   s uniform on the grid, s <= u
    loss = d( J(student at x_t; s),  stop_gradient J(target at x_u; s) )          J(.; u) = x_u at s = u

One epsilon(x, t) has to serve every s, so TCF(1) cannot reach zero loss: its L2 optimum is the mean of the secant
slopes weighted by (sigma_s - sigma_t alpha_s / alpha_t)^2. `tell_end` (TCF(S+)) gives the student s as an input
and lifts this. Training code was never released; grid and weights follow the paper and its authors' replies.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.diffusion.schedule import Schedule
from fewstep.methods import Batch, Loss, Method, Progress, Rng, RoleSpec, Sampling
from fewstep.methods.guidance import Guidance
from fewstep.methods.parts.distances import Distance, bounded_gain, distance
from fewstep.methods.parts.solver_step import SolverStep, solver_step
from fewstep.methods.parts.statistics import student_statistics
from fewstep.methods.settings import Count, GuidanceScale, checked
from fewstep.models.roles import Roles


@dataclass
class Draws:
    """Random numbers of one TCD step.

    Attributes:
        index: [B] int64, which solver step of the grid: from grid[index + 1] down to grid[index].
        end_index: [B] int64, the end time s = grid[end_index], uniform over 0 ... index (s = u included).
        noise: [B, ...] unit normal.
        guidance_scale: [B] float64, the teacher's scale w (1 = off).
    """

    index: Tensor
    end_index: Tensor
    noise: Tensor
    guidance_scale: Tensor


@dataclass
class Shared(SolverStep):
    """The solver step, its end times s [B] (host), and the target's jump to s, [B, ...], without a graph."""

    s: Tensor
    target: Tensor
    end: Tensor | None


class TCD(Method):
    """TCD as its authors released it (LoRA, no EMA target); `tell_end` makes it TCF(S+)."""

    name = "tcd"
    summary = "Trajectory consistency: jumps to any earlier time; sampled with any share of new noise (eta)."
    sampler = "tcd"
    reads_clean_data: ClassVar[bool] = True
    truth_settings: ClassVar[dict[str, Any]] = {"num_grid_steps": 10, "guidance_scale": 1.0, "loss": "l2"}

    @checked
    class Settings:
        """Settings of TCD.

        Attributes:
            num_grid_steps: N, solver steps of the training grid (50: 20 of 1000 table steps each).
            guidance_scale: the teacher's w (1 = off), one number or [low, high] drawn per sample.
            tell_end: give the student s as an input, TCF(S+). An export holds it for its own number of steps.
            single_end: always jump to the grid's end (s = 0), for comparison: LCM in jump form.
            loss: "l2" (the paper) or "huber", element-wise with huber_c.
            target_decay: EMA decay of the target; 0 uses the student itself.
        """

        num_grid_steps: Count = 50
        guidance_scale: GuidanceScale = 4.0
        tell_end: bool = False
        single_end: bool = False
        loss: Distance = "l2"
        huber_c: float = 1e-3
        target_decay: float = 0.0

    settings: Settings

    def __init__(self, schedule: Schedule, settings: Settings | None = None, **overrides: Any) -> None:
        super().__init__(schedule, settings, **overrides)
        self.grid = torch.from_numpy(schedule.training_grid(self.settings.num_grid_steps))
        self.guidance = Guidance.of(self.settings.guidance_scale)

    def roles(self) -> tuple[RoleSpec, ...]:
        end = ("end",) if self.settings.tell_end else ()
        return RoleSpec("student", end), RoleSpec("target", follows="student", decay=self.settings.target_decay)

    @classmethod
    def sampling(cls, settings: Settings) -> Sampling:
        return Sampling(eta=0.3)

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Draws:
        index = rng.sample.integers("index", 0, self.settings.num_grid_steps)
        fraction = rng.sample.uniform("end") * (0.0 if self.settings.single_end else 1.0)
        return Draws(
            index=index,
            end_index=(fraction * (index + 1)).to(torch.int64),
            noise=rng.sample.normal("noise", batch.x0.shape[1:]),
            guidance_scale=self.guidance.draw(rng),
        )

    def prepare(self, roles: Roles, batch: Batch, draws: Draws, due: Collection[str]) -> Shared:
        t, u, s = self.grid[draws.index + 1], self.grid[draws.index], self.grid[draws.end_index]
        step = solver_step(roles, self.schedule, batch, draws.noise, t, u, self.guidance.scale(draws.guidance_scale))
        end = s if self.settings.tell_end else None
        with torch.no_grad():
            target = roles.target(step.x_u, u, batch.cond, end=end).at(s)
        return Shared(**vars(step), s=s, target=target, end=end)

    def student(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        pred = roles.student(shared.x_t, shared.t, batch.cond, end=shared.end)
        weight = bounded_gain(pred.gain(*self.schedule.alpha_sigma(shared.s)), self.settings.loss)
        loss = distance(pred.at(shared.s), shared.target, self.settings.loss, self.settings.huber_c, weight)
        with torch.no_grad():
            stats = student_statistics(pred.x0, batch.x0, shared.teacher_x0)
        return Loss(loss, parts={"consistency": loss.detach()}, stats=stats)

    def calls_per_step(self) -> dict[str, int]:
        return {"student": 1, "teacher": 1, "target": 1}
