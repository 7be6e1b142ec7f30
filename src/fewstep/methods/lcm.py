"""Latent consistency models: LCM and LCM-LoRA (Luo et al. 2023, arXiv 2310.04378 and 2311.05556).

The student maps any point of the guided probability-flow trajectory to its end in one call. Each step:

    x_t = alpha_t x0 + sigma_t eps             t on a grid of N times, u the next one below
    x_u = one guided DDIM step of the teacher from t to u
    loss = d( f_student(x_t, t, w),  stop_gradient f_target(x_u, u, w) )

with f(x, end) = x built into f, so that the last solver step is anchored to the teacher.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.diffusion.consistency import coefficients, consistency
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedule import Array, Schedule
from fewstep.methods import Batch, Loss, Method, Progress, Rng, RoleSpec
from fewstep.methods.guidance import Guidance
from fewstep.methods.parts.distances import Distance, bounded_gain, distance
from fewstep.methods.parts.solver_step import SolverStep, solver_step
from fewstep.methods.parts.statistics import student_statistics
from fewstep.methods.settings import Count, GuidanceScale, checked
from fewstep.models.roles import Roles


@dataclass
class Draws:
    """Random numbers of one LCM step.

    Attributes:
        index: [B] int64, which solver step of the grid: from grid[index + 1] down to grid[index].
        noise: [B, ...] unit normal.
        guidance_scale: [B] float64, the teacher's scale w (1 = off).
    """

    index: Tensor
    noise: Tensor
    guidance_scale: Tensor


@dataclass
class Shared(SolverStep):
    """The solver step and the target's prediction at its lower end, [B, ...], without a graph."""

    target: Tensor
    embed: Tensor | None


class LCM(Method):
    """LCM with all weights (guidance_embed, target_decay 0.95) or as a LoRA (neither; the defaults)."""

    name = "lcm"
    summary = "Latent consistency: one jump to clean data along the guided trajectory; re-noise for more steps."
    sampler = "lcm"
    reads_clean_data: ClassVar[bool] = True
    truth_settings: ClassVar[dict[str, Any]] = {"num_grid_steps": 10, "guidance_scale": 1.0, "loss": "l2"}

    @checked
    class Settings:
        """Settings of LCM.

        Attributes:
            num_grid_steps: N, solver steps of the training grid; 50 skips 20 of 1000 table steps at a time (sec. 4.3).
            guidance_scale: the teacher's w (1 = off), one number or [low, high] drawn per sample. Without
                guidance_embed the student cannot see a drawn w and learns a mean over it: keep it fixed.
            guidance_embed: tell the student w (full LCM). No other program can read this from a LoRA.
            loss: "l2" or "huber", element-wise with huber_c.
            target_decay: EMA decay of the target; 0 uses the student itself, as LCM-LoRA does.
        """

        num_grid_steps: Count = 50
        guidance_scale: GuidanceScale = 4.0
        guidance_embed: bool = False
        loss: Distance = "huber"
        huber_c: float = 1e-3
        target_decay: float = 0.0

    settings: Settings

    def __init__(self, schedule: Schedule, settings: Settings | None = None, **overrides: Any) -> None:
        super().__init__(schedule, settings, **overrides)
        self.grid = torch.from_numpy(schedule.training_grid(self.settings.num_grid_steps))
        self.guidance = Guidance.of(self.settings.guidance_scale)

    def roles(self) -> tuple[RoleSpec, ...]:
        inputs = ("guidance_embed",) if self.settings.guidance_embed else ()
        return RoleSpec("student", inputs), RoleSpec("target", follows="student", decay=self.settings.target_decay)

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Draws:
        return Draws(
            index=rng.sample.integers("index", 0, self.settings.num_grid_steps),
            noise=rng.sample.normal("noise", batch.x0.shape[1:]),
            guidance_scale=self.guidance.draw(rng),
        )

    def prepare(self, roles: Roles, batch: Batch, draws: Draws, due: Collection[str]) -> Shared:
        t, u = self.grid[draws.index + 1], self.grid[draws.index]
        step = solver_step(roles, self.schedule, batch, draws.noise, t, u, self.guidance.scale(draws.guidance_scale))
        embed = draws.guidance_scale if self.settings.guidance_embed else None
        with torch.no_grad():
            target = consistency(roles.target(step.x_u, u, batch.cond, guidance_embed=embed))
        return Shared(**vars(step), target=target, embed=embed)

    def student(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        pred = roles.student(shared.x_t, shared.t, batch.cond, guidance_embed=shared.embed)
        x0_student, weight = consistency(pred), self._weight(pred)
        loss = distance(x0_student, shared.target, self.settings.loss, self.settings.huber_c, weight)
        stats = student_statistics(x0_student, batch.x0, shared.teacher_x0)
        return Loss(loss, parts={"consistency": loss.detach()}, stats=stats)

    def _weight(self, pred: Prediction) -> Array | None:
        """Of the rows, by how much an error of their prediction weighs in f(x, t)."""
        of_x0 = coefficients(self.schedule, pred.t)[1]
        return bounded_gain(of_x0 * pred.gain(), self.settings.loss)

    def calls_per_step(self) -> dict[str, int]:
        return {"student": 1, "teacher": 1, "target": 1}
