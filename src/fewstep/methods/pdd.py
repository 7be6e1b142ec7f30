"""Parallel decoding distillation: PDD (arXiv 2607.26004).

The teacher's solver takes N steps on a grid. The student has N last layers in place of one (`fewstep.models.bank`), one
for each solver step, and predicts all slopes u_i of a block of steps from the state x_n where the block begins:

    x_k = x_n + sum of D_i u_i(x_n) for n <= i < k       where its own slopes lead, every layer asked at x_n
    loss = | u_k(x_n) - stop_gradient u_teacher(x_k) |^2  k: one solver step of the block, drawn

u is the slope and D the length of a step (`Schedule.slope_mix`): flow and t on flow schedules, elsewhere noise and
sigma/alpha, whatever the networks predict. The jump with the mixture of outputs that is weighted by D is then the whole
sum. So one call samples a block, as the step of any sampler that conditions the network on its end: 2, 4 and 8 steps of
one student.

The target is the teacher alone. At the fixed point, where every block ends in the teacher's own state, the loss is 0
for any distribution of x_n. There is no average of weights, no discriminator, no second network that learns.

=========  ========================================================================================================
simulated  x_n is where the student's own earlier blocks lead from noise. A step takes the whole trajectory, block after
           block with the same weights; a block's call gives its end too. Prompts are enough.
noised     x_n is data, noised to the beginning of one block, drawn
=========  ========================================================================================================

The papers carry x_n from one update to the next. Here nothing is carried, so that a batch is a function of its step;
and their midpoint rule is Heun's here, which is of the same order and needs no times between those of the grid.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from fewstep.diffusion.schedule import Schedule
from fewstep.methods import Batch, Loss, Method, Progress, Rng, RoleSpec, Sampling
from fewstep.methods.parts.distances import distance
from fewstep.methods.parts.rollout import Policy
from fewstep.methods.parts.statistics import student_statistics
from fewstep.methods.settings import Count, FixedGuidance, checked
from fewstep.models.bank import fused, interval_lengths
from fewstep.models.roles import Roles
from fewstep.sampling.sample import first_state
from fewstep.sampling.samplers import heun, only_first_order

StepCounts = Annotated[
    tuple[Count, ...], Field(min_length=1), BeforeValidator(lambda value: (value,) if isinstance(value, int) else value)
]
"""Numbers of steps of a student, or one number."""


@dataclass
class Draws:
    """Random numbers of one PDD step; the first three are the same in every row, micro-batch and process.

    Attributes:
        starts: at which solver steps the blocks begin, one for each term of the loss.
        length: solver steps of a block.
        targets: for each block the solver steps whose slopes are learned.
        noise: [B, ...] unit normal.
    """

    starts: tuple[int, ...]
    length: int
    targets: tuple[tuple[int, ...], ...]
    noise: Tensor


class PDD(Method):
    """PDD by Euler's or Heun's steps of the teacher, without images by default."""

    name = "pdd"
    summary = "Parallel decoding: a last layer for every solver step of the teacher; many steps in one call, no images."
    sampler = "ddim"
    truth_settings: ClassVar[dict[str, Any]] = {"targets_per_block": 2, "guidance_scale": 1.0}

    @checked
    class Settings:
        """Settings of PDD.

        Attributes:
            num_grid_steps: N, the teacher's solver steps and the student's last layers (the paper: 128 to 256; 32 for
                published image models).
            num_inference_steps: numbers of steps that the student is trained for, each a divisor of N, one drawn for
                every training step. The first is the student's default.
            targets_per_block: solver steps whose slopes are learned at once in a block; each costs a step of the
                teacher.
            guidance_scale: the teacher's w (1 = off).
            solver: "ddim", one call of the teacher a solver step, or "heun", two.
            student_input: "simulated" or "noised" (above).
            last_layer_rate: how fast the last layers learn, as a share of training.learning_rate, its warm-up and its
                schedule; None: 0.1 beside a LoRA, 1 with all weights.
        """

        num_grid_steps: Count = 32
        num_inference_steps: StepCounts = (4,)
        targets_per_block: Count = 1
        guidance_scale: FixedGuidance = 4.0
        solver: Literal["ddim", "heun"] = "ddim"
        student_input: Policy = "simulated"
        last_layer_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

        def __post_init__(self) -> None:
            for steps in self.num_inference_steps:
                if self.num_grid_steps % steps:
                    raise ValueError(f"num_grid_steps ({self.num_grid_steps}) must be a multiple of {steps} steps.")
                if self.targets_per_block > self.num_grid_steps // steps:
                    raise ValueError(
                        f"targets_per_block ({self.targets_per_block}) must be at most the "
                        f"{self.num_grid_steps // steps} solver steps of a block of {self.num_grid_steps} in {steps}."
                    )
            if len(set(self.num_inference_steps)) < len(self.num_inference_steps):
                raise ValueError(f"num_inference_steps must differ, not {list(self.num_inference_steps)}.")

    settings: Settings

    def __init__(self, schedule: Schedule, settings: Settings | None = None, **overrides: Any) -> None:
        super().__init__(schedule, settings, **overrides)
        count = self.settings.num_grid_steps
        self.grid = np.append(schedule.timesteps(count).numpy().astype(np.float64), schedule.clean)
        self.lengths = interval_lengths(schedule, self.grid.tolist())

    def roles(self) -> tuple[RoleSpec, ...]:
        return (RoleSpec("student", bank=tuple(self.grid.tolist()), bank_rate=self.settings.last_layer_rate),)

    @classmethod
    def sampling(cls, settings: Settings) -> Sampling:
        few, *others = settings.num_inference_steps
        return Sampling(few, no_other_steps=True, other_steps=tuple(others))

    @classmethod
    def needs_images(cls, settings: Settings) -> bool:
        return settings.student_input == "noised"

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Draws:
        settings = self.settings
        counts, few = settings.num_inference_steps, rng.shared.integer("steps", 0, len(settings.num_inference_steps))
        length = settings.num_grid_steps // counts[few]
        starts = tuple(range(0, settings.num_grid_steps, length))
        if settings.student_input == "noised":
            starts = (starts[rng.shared.integer("start", 0, len(starts))],)
        targets = tuple(self._draw_targets(rng, n, length) for n in starts)
        return Draws(starts, length, targets, rng.sample.normal("noise", batch.x0.shape[1:]))

    def _draw_targets(self, rng: Rng, start: int, length: int) -> tuple[int, ...]:
        """Different solver steps of a block, all sets of them equally likely."""
        left = list(range(start, start + length))
        return tuple(
            left.pop(rng.shared.integer(f"target/{start}/{i}", 0, len(left)))
            for i in range(self.settings.targets_per_block)
        )

    def prepare(self, roles: Roles, batch: Batch, draws: Draws, due: Collection[str]) -> Tensor:
        first = draws.starts[0]
        if first > 0:  # of data, noised: a trajectory begins at noise
            return self.schedule.add_noise(batch.x0, draws.noise, float(self.grid[first]))
        return first_state(self.schedule, draws.noise, float(self.grid[0]))

    def student(self, roles: Roles, batch: Batch, draws: Draws, shared: Tensor) -> Loss:
        return self._block(roles, batch, draws, shared, 0)

    def _block(self, roles: Roles, batch: Batch, draws: Draws, x: Tensor, number: int) -> Loss:
        """The loss of a block that begins at x [B, ...], and after it those of the blocks that follow."""
        start, targets = draws.starts[number], draws.targets[number]
        stop = start + draws.length
        single = [np.eye(len(self.lengths))[k] for k in targets]
        to_targets = [fused(self.lengths, start, k) for k in targets if k > start]
        rows = np.stack([*single, *to_targets, fused(self.lengths, start, stop)])
        slopes = roles.student.mixtures(x, float(self.grid[start]), batch.cond, rows)
        mixed, terms = iter(slopes[len(targets) :]), []
        for k, predicted in zip(targets, slopes, strict=False):
            with torch.no_grad():
                x_k = next(mixed).at(float(self.grid[k])) if k > start else x
                wanted = self._teacher_slope(roles, batch, x_k, k)
            terms.append(distance(predicted.slope, wanted))
        loss = torch.stack(terms).mean() / len(draws.starts)
        reached = slopes[-1].at(float(self.grid[stop])).detach()
        parts = {f"block_{start}": torch.stack(terms).mean().detach()}
        if number + 1 < len(draws.starts):
            return Loss(loss, parts, then=lambda: self._block(roles, batch, draws, reached, number + 1))
        ends = stop == len(self.lengths) and batch.has_data
        return Loss(loss, parts, student_statistics(reached, batch.x0) if ends else {})

    def _teacher_slope(self, roles: Roles, batch: Batch, x: Tensor, k: int) -> Tensor:
        """The slope of the teacher's solver from x [B, ...] over solver step k."""
        t, u, scale = float(self.grid[k]), float(self.grid[k + 1]), self.settings.guidance_scale
        first = roles.teacher(x, t, batch.cond, guidance_scale=scale)
        if self._calls_of(k) == 1:
            return first.slope
        x_u = heun(first, roles.teacher(first.at(u), u, batch.cond, guidance_scale=scale))
        return self.schedule.mean_slope(first.x, t, x_u, u)

    def _calls_of(self, k: int) -> int:
        """Calls of the teacher for its solver step k."""
        single = self.settings.solver == "ddim" or only_first_order(self.schedule, self.grid[k], self.grid[k + 1])
        return 1 if single else 2

    def calls(self, draws: Draws) -> Mapping[str, float]:
        asked = sum(self._calls_of(k) for targets in draws.targets for k in targets)
        return {"student": len(draws.starts), "teacher": asked}

    def calls_per_step(self) -> Mapping[str, float]:
        settings = self.settings
        each = float(np.mean([self._calls_of(k) for k in range(settings.num_grid_steps)]))
        blocks = float(np.mean(settings.num_inference_steps)) if settings.student_input == "simulated" else 1.0
        return {"student": blocks, "teacher": blocks * settings.targets_per_block * each}
