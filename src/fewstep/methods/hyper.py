"""Hyper-SD: trajectory segmented consistency distillation, TSCD (Ren et al. 2024, arXiv 2404.13686, sec. 3.2).

Trajectory consistency (`tcd`) inside k segments of time, fewer from stage to stage: k = 8, 4, 2, 1. A stage begins with
the student of the one before (a recipe's `init`). Each step (algorithm 1):

    x_t = alpha_t x0 + sigma_t eps                  t = t_n on a grid of N times, u = t_(n-1) the next one below
    x_u = one DDIM step from t to u                 of the teacher, guided; later of the student the stage began with
    s   a time of the grid, uniform from the floor of t's segment up to u
    a = J(student at x_t; s),   b = stop_gradient J(EMA target at x_u; s)           J(.; s) = x_u where u = s
    loss = mse_weight |a - b|^2 + adversarial_weight softplus(-D(a)),   D tells b from a

One epsilon(x, t) has to serve every s of a segment, so that TSCD like TCF(1) cannot reach zero loss, but comes the
nearer the shorter its segments are: at one step each it can. `tell_end` lifts that. With one segment and no D it is
`tcd`.

D is Lightning's (`parts/trajectory_discriminator.py`): encoder and middle of the first model, which see the jump's end
alone, noised first where s is the schedule's end.

Where the paper is silent, or errs. It prints the segment's floor as floor(t_n / (T / k)) T / k, by which t_n = T, the
time that counts most, and every other boundary is its own floor and no s is left; the ceiling less one is meant. N must
be a multiple of k, or a solver step would cross a boundary and end below its floor. s is on the grid, as `tcd` has it:
between two of its times a jump from the upper one would be a target and never be trained. Training code, N, the range
of w, the weights of both terms and the decay of the target were not published: the defaults here are ours.

Human feedback is a stage of its own, and the one-step student is `dmd` with ``fake_begins: student``: on all weights at
``timestep: 800``, or as the LoRA that `tcd`'s sampler takes on to eight steps (docs/methods/hyper.md).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.diffusion.schedule import Schedule
from fewstep.methods import Batch, Loss, Method, Player, Progress, Rng, RoleSpec, Sampling
from fewstep.methods.guidance import OFF, Guidance
from fewstep.methods.parts.distances import distance
from fewstep.methods.parts.solver_step import SolverStep, solver_step
from fewstep.methods.parts.statistics import student_statistics
from fewstep.methods.parts.trajectory_discriminator import BACKBONE, Judged, TrajectoryDiscriminator
from fewstep.methods.settings import Count, GuidanceScale, Halvings, Held, Weight, checked
from fewstep.models.roles import Roles


@dataclass
class Draws:
    """Random numbers of one TSCD step.

    Attributes:
        index: [B] int64, which solver step of the grid: from grid[index + 1] down to grid[index].
        end_index: [B] int64, the end time s = grid[end_index], uniform from the floor of the solver step's segment to
            index.
        noise: [B, ...] unit normal, and offset_noise times one normal to a channel.
        guidance_scale: [B] float64, the teacher's scale w (1 = off).
        level: [B] float64 in [0, 1), which t* a jump to the schedule's end is noised to; None without adversarial
            loss, like
        level_noise: [B, ...] the unit normal of both sides.
    """

    index: Tensor
    end_index: Tensor
    noise: Tensor
    guidance_scale: Tensor
    level: Tensor | None
    level_noise: Tensor | None


@dataclass
class Shared(SolverStep):
    """The solver step, the ends s [B] (host), the student's x0, its jump x_s and the target's, [B, ...].

    The target's has no graph. ``judged`` is the student's before the discriminator, where there is one.
    """

    s: Tensor
    x0: Tensor
    x_s: Tensor
    target: Tensor
    judged: Judged | None = None


class Hyper(Method):
    """One TSCD stage of k segments: students of k steps, or, of one segment, of as many as `tcd`'s sampler takes."""

    name = "hyper"
    summary = "Trajectory consistency inside 8, 4, 2, then 1 segments of time, a stage for each; adversarial help."
    players: tuple[Player, ...] = (Player("student"), TrajectoryDiscriminator.player)
    sampler = "phased"
    truth_settings: ClassVar[dict[str, Any]] = {"num_grid_steps": 8, "adversarial_weight": 0.0, "target_decay": 0.0}
    truth_cases: ClassVar[tuple[dict[str, Any], ...]] = ({"segments": 4}, {"segments": 1})

    @checked
    class Settings:
        """Settings of Hyper-SD's TSCD.

        Attributes:
            segments: k: 8, then 4, 2, 1.
            num_grid_steps: N, solver steps of the training grid, a multiple of k; 40 has the trailing steps of every
                stage.
            hop_by: whose step leads from t to u: "teacher", guided, in the first stage (or in all), or "beginning", in
                later ones: what the student was when the stage began, without guidance.
            guidance_scale: the teacher's w (1 = off), one number or [low, high] drawn per sample.
            mse_weight, adversarial_weight: of both terms; None is ours for k: 1 and 0 from 8 segments on, 1 and 0.005
                from 4, 0.5 and 0.01 for 2, 0.3 and 0.02 for 1, by which the GAN's gradient is two to three times
                that of the mean square on latents of 1,024 numbers when a stage begins. 0 leaves the discriminator out.
            target_decay: EMA decay of the target; 0 uses the student itself.
            offset_noise: one more normal to each channel, times this (not on flow schedules).
            tell_end: give the student s as an input. An export holds it for its own number of steps.
            discriminator_weights: "full" or "lora", of the student's rank. halvings: of its head, whose map must come
                down to 4x4: 0 for scenes-64, 1 for SD1.5 at 512 pixels, 3 for SDXL at 1024.
        """

        segments: Count = 8
        num_grid_steps: Count = 40
        hop_by: Literal["teacher", "beginning"] = "teacher"
        guidance_scale: GuidanceScale = 1.0
        mse_weight: Weight | None = None
        adversarial_weight: Weight | None = None
        target_decay: float = 0.95
        offset_noise: Weight = 0.0
        tell_end: bool = False
        discriminator_weights: Held = "full"
        halvings: Halvings = 0

        def __post_init__(self) -> None:
            k, n = self.segments, self.num_grid_steps
            if n % k:
                raise ValueError(f"num_grid_steps ({n}) must be a multiple of segments ({k}).")
            if self.hop_by == "beginning" and self.tell_end:
                raise ValueError("hop_by beginning is for students without an end input: take teacher with tell_end.")
            if self.hop_by == "beginning" and Guidance.of(self.guidance_scale) != OFF:
                raise ValueError("hop_by beginning takes guidance_scale 1: the student it begins with has it built in.")

    settings: Settings

    def __init__(self, schedule: Schedule, settings: Settings | None = None, **overrides: Any) -> None:
        super().__init__(schedule, settings, **overrides)
        settings = self.settings
        self.guidance = Guidance.of(settings.guidance_scale)
        if settings.offset_noise and schedule.family == "flow":
            raise ValueError("offset_noise is for VP and EDM schedules: set it to 0 for a flow model.")
        self.grid = torch.from_numpy(schedule.training_grid(settings.num_grid_steps))
        self.stride = settings.num_grid_steps // settings.segments
        mse, adversarial = _weights(settings.segments)
        self.mse_weight = mse if settings.mse_weight is None else settings.mse_weight
        self.adversarial_weight = adversarial if settings.adversarial_weight is None else settings.adversarial_weight
        if settings.segments == 1:
            self.sampler = "tcd"
        self.gan: TrajectoryDiscriminator | None = None
        if self.adversarial_weight:
            held, halvings = settings.discriminator_weights, settings.halvings
            self.gan = TrajectoryDiscriminator(schedule, held=held, halvings=halvings)
        else:
            self.players = (Player("student"),)

    def roles(self) -> tuple[RoleSpec, ...]:
        end = ("end",) if self.settings.tell_end else ()
        roles = [RoleSpec("student", end), RoleSpec("target", follows="student", decay=self.settings.target_decay)]
        if self.settings.hop_by == "beginning":
            roles.append(RoleSpec("beginning", follows="student", decay=1.0))
        return (*roles, self.gan.role) if self.gan else tuple(roles)

    @classmethod
    def sampling(cls, settings: Settings) -> Sampling:
        whole = settings.segments == 1
        return Sampling(settings.segments, eta=0.3 if whole else 0.0, no_other_steps=not whole)

    def floor(self, index: Tensor) -> Tensor:
        """The grid index of the lower end of a step's segment, (ceil(n / (N / k)) - 1) N / k, for its t = grid[n]."""
        n = index + 1
        return (torch.ceil(n / self.stride).to(torch.int64) - 1) * self.stride

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Draws:
        shape, offset = batch.x0.shape[1:], self.settings.offset_noise
        index = rng.sample.integers("index", 0, self.settings.num_grid_steps)
        floor = self.floor(index)
        noise = rng.sample.normal("noise", shape)
        if offset:
            noise = noise + offset * rng.sample.normal("offset", (shape[0], *[1] * (len(shape) - 1)))
        return Draws(
            index,
            floor + (rng.sample.uniform("end") * (index + 1 - floor)).to(torch.int64),
            noise,
            self.guidance.draw(rng),
            *(self.gan.draw(rng, shape) if self.gan else (None, None)),
        )

    def prepare(self, roles: Roles, batch: Batch, draws: Draws, due: Collection[str]) -> Shared:
        t, u, s = self.grid[draws.index + 1], self.grid[draws.index], self.grid[draws.end_index]
        scale, end = self.guidance.scale(draws.guidance_scale), s if self.settings.tell_end else None
        step = solver_step(roles, self.schedule, batch, draws.noise, t, u, scale, by=self.settings.hop_by)
        pred = roles.student(step.x_t, t, batch.cond, end=end)
        with torch.no_grad():
            target = roles.target(step.x_u, u, batch.cond, end=end).at(s)
        shared = Shared(**vars(step), s=s, x0=pred.x0.detach(), x_s=pred.at(s), target=target)
        if self.gan:
            shared.judged = self.gan.judge(roles, shared.x_s, s, draws.level, draws.level_noise, batch.cond)
        return shared

    def student(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        error = distance(shared.x_s, shared.target)
        stats = student_statistics(shared.x0, batch.x0, shared.teacher_x0)
        loss, parts = self.mse_weight * error, {"consistency": error.detach()}
        if self.gan is None or shared.judged is None:
            return Loss(loss, parts, stats)
        adversarial, grad = self.gan.student(roles, shared.judged)
        with torch.no_grad():  # gradient norms of both weighted terms at the student's jump
            away = (shared.x_s - shared.target).norm()
            stats["consistency_pull"] = 2 * self.mse_weight * away / shared.x_s.numel()
            stats["adversarial_pull"] = self.adversarial_weight * grad.norm()
        total = loss + self.adversarial_weight * adversarial
        return Loss(total, parts | {"adversarial": adversarial.detach()}, stats)

    def discriminator(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        assert self.gan is not None and shared.judged is not None
        return self.gan.discriminator(roles, shared.target, shared.s, shared.judged, batch.cond)

    def calls_per_step(self) -> dict[str, int]:
        calls = {"student": 1, self.settings.hop_by: 1, "target": 1}
        return calls | ({BACKBONE: self.gan.calls} if self.gan else {})


def _weights(segments: int) -> tuple[float, float]:
    """(mse_weight, adversarial_weight) of a stage: the mean square leads while segments are short, then the GAN."""
    return next(weights for least, weights in _OURS if segments >= least)


_OURS = ((8, (1.0, 0.0)), (4, (1.0, 0.005)), (2, (0.5, 0.01)), (1, (0.3, 0.02)))
