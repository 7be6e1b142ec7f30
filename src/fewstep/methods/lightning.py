"""SDXL-Lightning: progressive adversarial distillation (Lin, Wang and Yang 2024, arXiv 2402.13929).

A student of N steps learns where its teacher, of n N steps, gets in n of them; then it is the next one's teacher: 128
-> 32 -> 8 -> 4 -> 2 -> 1. Each step:

    x_t = alpha_t x0 + sigma_t eps             t one of the student's times; eps itself at the noisiest
    x_r = n steps of the teacher from t to u   (guided in the first stage alone)
    x   = J(student at x_t; u)                 the student's jump, one DDIM step

=============  ================================================================================================
loss           the student
=============  ================================================================================================
mse            |x - x_r|^2: progressive distillation (Salimans and Ho 2022), compared where both land; the first stage
conditional    softplus(-D(x, x_t)): D sees where they started, so it asks for the teacher's own trajectories
unconditional  softplus(-D(x)): D sees where they landed; lets go of the trajectory where the student cannot follow it
convert        |x0 - x0 of the teacher|^2: makes of an epsilon network one that predicts x0, before the one-step stage
=============  ================================================================================================

D learns softplus(-D(x_r)) + softplus(D(x)). It is the diffusion model's own encoder and middle, of the model that the
whole chain began with, trained with a convolutional head: features of (x, u), and of (x_t, t) beside them on the
channels. At u = 0, where an encoder sees no structure, x and x_r are first noised alike, with one noise, to a time t*
drawn from 10, 250, 500 and 750 of 1,000.

An MSE in the place of both players' losses would have the same fixed point as an ideal conditional D (for a Gaussian
one their gradients are parallel); what is gained is that a limited D does not see what a limited student cannot do.

The training code was never released. Where the paper is silent: D and student move at every step (it says they
alternate); x and x_r are noised to t* wherever they land on clean data, not in the one-step stage alone; "skip-level"
teachers are those of the stage before (``num_teacher_steps: 8, num_inference_steps: 2``). For D as a LoRA, which the
paper has not, set ``discriminator_weights``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fewstep.diffusion.schedule import Schedule
from fewstep.methods import Batch, Loss, Method, Player, Progress, Rng, RoleSpec, Sampling
from fewstep.methods.parts.distances import distance
from fewstep.methods.parts.inputs import Terminal, noised_rows
from fewstep.methods.parts.solver_step import SolverStep, solve_along
from fewstep.methods.parts.statistics import student_statistics
from fewstep.methods.parts.trajectory_discriminator import BACKBONE, Judged, TrajectoryDiscriminator
from fewstep.methods.settings import Count, FixedGuidance, Halvings, Held, Share, Weight, checked
from fewstep.models.roles import Roles

Objective: TypeAlias = Literal["mse", "conditional", "unconditional", "convert"]


@dataclass
class Draws:
    """Random numbers of one Lightning step.

    Attributes:
        start: [B] int64, which of the times the student starts from, the noisiest first.
        noise: [B, ...] unit normal.
        level: [B] float64 in [0, 1), which t* a jump to clean data is noised to; None without discriminator, like
        level_noise: [B, ...] the unit normal of both sides.
    """

    start: Tensor
    noise: Tensor
    level: Tensor | None
    level_noise: Tensor | None


@dataclass
class Shared(SolverStep):
    """The teacher's solver trajectory from t to u; the student's x0, and its jump to u, [B, ...], with its graph.

    ``judged`` is that jump before the discriminator, where there is one.
    """

    x0: Tensor
    x_student: Tensor
    judged: Judged | None = None


class Lightning(Method):
    """One stage of the chain; its teacher is the stage before."""

    name = "lightning"
    summary = "Progressive distillation, one stage at a time, adversarial where a mean square error would blur."
    players: tuple[Player, ...] = (Player("student"), TrajectoryDiscriminator.player)
    sampler = "ddim"
    truth_settings: ClassVar[dict[str, Any]] = {"loss": "mse", "terminal": "table"}

    @checked
    class Settings:
        """Settings of Lightning.

        Attributes:
            num_inference_steps: N, the student's steps.
            num_teacher_steps: n N, the teacher's; the paper's stages are 128 to 32 to 8 to 4 to 2 to 1.
            num_start_times: from how many trailing times the student is trained, a multiple of N; None: N, but 4 for
                students of one and two steps (250, 500, 750, 1000: the paper).
            loss: "mse", "conditional", "unconditional" or "convert" (above).
            guidance_scale: the teacher's w (1 = off), for the first stage alone: 6 on SDXL, no negative prompt.
            prediction_type: what the student predicts; None: what its teacher does, and "sample" where it is converted.
                One step needs "sample": at t = T an error of epsilon weighs 14.6 in x0 on Stable Diffusion's table.
            terminal: "noise" or "table", what x_t is at the noisiest time.
            renoise_times: the times t*, as shares of the way from clean data to noise; renoise_weights: how often each
                (the paper: alike, then 5 to 1 for the lowest).
            discriminator_weights: "full" (the paper) or "lora", of the student's rank.
            halvings: of the discriminator's head, whose map must come down to 4x4: 0 for scenes-64, 1 for SD1.5 at 512
                pixels, 3 for SDXL at 1024.
        """

        num_inference_steps: Count = 4
        num_teacher_steps: Count = 8
        num_start_times: Count | None = None
        loss: Objective = "conditional"
        guidance_scale: FixedGuidance = 1.0
        prediction_type: Literal["epsilon", "v_prediction", "sample", "flow"] | None = None
        terminal: Terminal = "noise"
        renoise_times: tuple[Share, ...] = (0.01, 0.25, 0.5, 0.75)
        renoise_weights: tuple[Weight, ...] = (1.0, 1.0, 1.0, 1.0)
        discriminator_weights: Held = "full"
        halvings: Halvings = 0

        @property
        def start_times(self) -> int:
            """From how many times the student is trained."""
            default = 4 if self.num_inference_steps in (1, 2) else self.num_inference_steps
            return default if self.num_start_times is None else self.num_start_times

        def __post_init__(self) -> None:
            few, many, starts = self.num_inference_steps, self.num_teacher_steps, self.start_times
            if many % few:
                raise ValueError(f"num_teacher_steps ({many}) must be a multiple of num_inference_steps ({few}).")
            if starts % few:
                raise ValueError(f"num_start_times ({starts}) must be a multiple of num_inference_steps ({few}).")
            if len(self.renoise_times) != len(self.renoise_weights) or not sum(self.renoise_weights) > 0:
                raise ValueError(
                    f"renoise_weights must be as many as renoise_times and not all 0, not {list(self.renoise_weights)}."
                )

    settings: Settings

    def __init__(self, schedule: Schedule, settings: Settings | None = None, **overrides: Any) -> None:
        super().__init__(schedule, settings, **overrides)
        settings = self.settings
        few = settings.num_inference_steps
        self.starts, self.converts = settings.start_times, settings.loss == "convert"
        if schedule.family == "edm":
            raise ValueError("lightning needs trailing grids that lie in each other, and EDM schedules have none.")
        self.substeps = settings.num_teacher_steps // few
        self.grid = _grid(schedule, [settings.num_teacher_steps, self.starts, few])
        self.gan: TrajectoryDiscriminator | None = None
        if settings.loss in ("conditional", "unconditional"):
            self.gan = TrajectoryDiscriminator(
                schedule, settings.renoise_times, settings.renoise_weights, settings.discriminator_weights,
                settings.halvings, beside=settings.loss == "conditional",
            )  # fmt: skip
        else:
            self.players = (Player("student"),)

    def roles(self) -> tuple[RoleSpec, ...]:
        settings = self.settings
        kind = settings.prediction_type or ("sample" if settings.loss == "convert" else None)
        student = RoleSpec("student", prediction_type=kind)
        return (student, self.gan.role) if self.gan else (student,)

    @classmethod
    def sampling(cls, settings: Settings) -> Sampling:
        return Sampling(settings.num_inference_steps, no_other_steps=True)

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Draws:
        shape = batch.x0.shape[1:]
        start, noise = rng.sample.integers("start", 0, self.starts), rng.sample.normal("noise", shape)
        return Draws(start, noise, *(self.gan.draw(rng, shape) if self.gan else (None, None)))

    def prepare(self, roles: Roles, batch: Batch, draws: Draws, due: Collection[str]) -> Shared:
        times = self.teacher_times(draws.start)
        x_t = noised_rows(self.schedule, batch.x0, draws.noise, times[0], self.settings.terminal)
        steps = [times[0], times[-1]] if self.settings.loss == "convert" else times
        step = solve_along(roles, self.schedule, batch, draws.noise, steps, self.settings.guidance_scale, x_t=x_t)
        pred = roles.student(x_t, step.t, batch.cond)
        shared = Shared(**vars(step), x0=pred.x0, x_student=pred.at(step.u))
        if self.gan:
            shared.judged = self.gan.judge(
                roles, shared.x_student, step.u, draws.level, draws.level_noise, batch.cond, start=(x_t, step.t)
            )
        return shared

    def student(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        stats = student_statistics(shared.x0.detach(), batch.x0, shared.teacher_x0)
        if self.settings.loss == "convert":
            assert shared.teacher_x0 is not None
            loss = distance(shared.x0, shared.teacher_x0)
            return Loss(loss, {"convert": loss.detach()}, stats)
        error = distance(shared.x_student, shared.x_u)
        stats["landing_error"] = error.detach()
        if self.gan is None:
            return Loss(error, {"mse": error.detach()}, stats)
        assert shared.judged is not None
        adversarial, _ = self.gan.student(roles, shared.judged)
        return Loss(adversarial, {"adversarial": adversarial.detach()}, stats)

    def discriminator(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        assert self.gan is not None and shared.judged is not None
        return self.gan.discriminator(roles, shared.x_u, shared.u, shared.judged, batch.cond)

    def calls_per_step(self) -> dict[str, int]:
        calls = {"student": 1, "teacher": 1 if self.settings.loss == "convert" else self.substeps}
        return calls | ({BACKBONE: self.gan.calls} if self.gan else {})

    def teacher_times(self, start: Tensor) -> list[Tensor]:
        """The teacher's n + 1 times [B] from the student's, clean data at last if it would step past them."""
        last = len(self.grid) - 1
        first, stride = start * (last // self.starts), last // self.settings.num_teacher_steps
        return [self.grid[(first + k * stride).clamp_max(last)] for k in range(self.substeps + 1)]


def _grid(schedule: Schedule, steps: Sequence[int]) -> Tensor:
    """The trailing times of all these numbers of steps, decreasing, and clean data at last: what every stage shares.

    Trailing grids lie in each other. Where a time falls between two of the table's, rounding can set one a step off:
    then the last number's, the student's own, which is sampled on them, holds. A shift that depends on the number of
    steps is the student's too. Grids that are stretched to one lowest level do not lie in each other: then the finest
    one's times are placed linearly between the student's.
    """
    n, schedule = math.lcm(*steps), schedule.for_steps(steps[-1])
    grid = torch.cat([schedule.timesteps(n).double(), torch.tensor([schedule.clean], dtype=torch.float64)])
    if schedule.terminal:
        plain = Schedule.flow(schedule.shift, schedule.num_train_timesteps)
        known, wanted = ([0.0, *s.timesteps(steps[-1]).numpy()[::-1]] for s in (plain, schedule))
        return torch.from_numpy(np.interp([*plain.timesteps(n).numpy(), 0.0], known, wanted))
    for few in steps:
        grid[: n : n // few] = schedule.timesteps(few).double()
    return grid
