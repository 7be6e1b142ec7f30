"""Phased consistency models: PCM (Wang et al. 2024, arXiv 2405.18407).

Time is cut into M phases. Within a phase the student maps every point of the guided trajectory to the phase's lower
edge s in one jump, so that M jumps from edge to edge lead to clean data and nothing is noised again. Each step:

    x_u = one guided DDIM step of the teacher from t to u          t on a grid of N times, u the next one below
    a = J(student at x_t; s),   b = stop_gradient J(target at x_u; s)          J(.; s) = x_u where u = s
    loss = d(a, b) + adversarial_weight L_adv(a against b)

J is the jump in (x0, epsilon) to the edge of t's phase (eq. 3): the boundary condition holds by itself and one
prediction for every t suffices, so zero loss can be reached. L_adv (eq. 8-9) is a hinge GAN between a and b, both
noised to a random time of the phase with noises of their own, judged by heads on the frozen teacher's features. Where
the student is consistent a and b are alike, and it vanishes: no data is imitated behind the teacher's back.

Sample on the edges it was trained on: a student asked just above an edge was taught to move to that edge, and no
further. With ideal students of four phases, diffusers' trailing steps on the edges of N = 50 cost 0.18 where the edges
themselves cost nothing; N = 40, the default, has edges that are its trailing steps.

Choices where code and paper differ, or both err: both players move at every step, from one shared forward (the release
alternates: the same ratio at twice the cost); noised times stay below the next edge (there they reach past it);
noising is exact on flow schedules (there its deviation is too small); the student's hinge is -D, which does not fall
silent above 1 (there relu(1 - D)).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fewstep.diffusion.schedule import Schedule
from fewstep.methods import Batch, Loss, Method, Player, Progress, Rng, RoleSpec, Sampling
from fewstep.methods.guidance import Guidance
from fewstep.methods.parts.discriminators import Discriminator, generator_loss
from fewstep.methods.parts.distances import Distance, distance
from fewstep.methods.parts.solver_step import SolverStep, solver_step
from fewstep.methods.parts.statistics import student_statistics
from fewstep.methods.settings import Count, GuidanceScale, Weight, checked
from fewstep.models.cond import Cond
from fewstep.models.roles import Roles
from fewstep.sampling.samplers import renoise


@dataclass
class Draws:
    """Random numbers of one PCM step.

    Attributes:
        index: [B] int64, which solver step of the grid: from grid[index + 1] down to grid[index].
        noise: [B, ...] unit normal.
        guidance_scale: [B] float64, the teacher's scale w (1 = off).
        dropped: [B] bool, rows that lose their caption; None without caption_dropout.
        height: [B] float64 in [0, 1), how far up their phase a and b are noised.
        fake_noise, real_noise: [B, ...] unit normals that noise a and b; like height, None without adversarial loss.
    """

    index: Tensor
    noise: Tensor
    guidance_scale: Tensor
    dropped: Tensor | None
    height: Tensor | None
    fake_noise: Tensor | None
    real_noise: Tensor | None


@dataclass
class Shared(SolverStep):
    """The solver step, the edge [B] (host) below it, the student's x0, its jump x_edge and the target's, [B, ...].

    The target has no graph.

    ``fake`` and ``real`` are the teacher's features of both, noised; None without the adversarial loss.
    """

    edge: Tensor
    x0: Tensor
    x_edge: Tensor
    target: Tensor
    fake: list[Tensor] | None = None
    real: list[Tensor] | None = None


class PCM(Method):
    """PCM in its small-cfg form (a guided teacher; the defaults) or normal-cfg (caption_dropout, guidance_scale 1)."""

    name = "pcm"
    summary = "Phased consistency: jumps from edge to edge of a few phases, without new noise; adversarial help."
    players: tuple[Player, ...] = (Player("student"), Player("discriminator"))
    sampler = "phased"
    truth_settings: ClassVar[dict[str, Any]] = {
        "num_grid_steps": 12, "guidance_scale": 1.0, "loss": "l2", "adversarial_weight": 0.0,
    }  # fmt: skip

    @checked
    class Settings:
        """Settings of PCM.

        Attributes:
            num_phases: M, and how many steps its students take.
            num_grid_steps: N, solver steps of the training grid. Where M divides N and N the table, other programs'
                trailing steps are the edges; otherwise sample with this library's `phased` alone.
            guidance_scale: the teacher's w (1 = off), one number or [low, high] drawn per sample (the paper: 5 to 6 on
                SD1.5, 7 to 8 on SDXL); the student, which cannot see it, then learns a mean.
            caption_dropout: share of images without their caption. 0.1, with guidance_scale 1, is normal-cfg: the
                student keeps its teacher's need of guidance (2.5 to 3.5 at 4 steps), which then obeys negative
                prompts. For four phases and more.
            loss: "huber" or "l2", element-wise with huber_c.
            adversarial_weight: of L_adv; 0 leaves the discriminator out.
            target_decay: EMA decay of the target; 0 uses the student itself (the paper: 0.99 for all weights, M = 1).
        """

        num_phases: Count = 4
        num_grid_steps: Count = 40
        guidance_scale: GuidanceScale = 5.0
        caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
        loss: Distance = "huber"
        huber_c: float = 1e-3
        adversarial_weight: Weight = 0.1
        target_decay: float = 0.0

        def __post_init__(self) -> None:
            if self.caption_dropout and self.guidance_scale != 1:
                raise ValueError("caption_dropout belongs to PCM's normal-cfg form: set guidance_scale to 1 with it.")

    settings: Settings

    def __init__(self, schedule: Schedule, settings: Settings | None = None, **overrides: Any) -> None:
        super().__init__(schedule, settings, **overrides)
        settings = self.settings
        grid = schedule.training_grid(settings.num_grid_steps)
        edges = schedule.phase_edges(settings.num_phases, settings.num_grid_steps)
        self.grid, self.edges = torch.from_numpy(grid), torch.from_numpy(edges)
        # A solver step that lands on an edge belongs to the phase above that edge: it is what anchors the phase.
        self.phase = torch.from_numpy(np.searchsorted(edges, grid[:-1], side="right") - 1)
        self.guidance = Guidance.of(settings.guidance_scale)
        self.gan: Discriminator | None = Discriminator("hinge") if settings.adversarial_weight else None
        if self.gan is None:
            self.players = (Player("student"),)

    def roles(self) -> tuple[RoleSpec, ...]:
        return RoleSpec("student"), RoleSpec("target", follows="student", decay=self.settings.target_decay)

    @classmethod
    def sampling(cls, settings: Settings) -> Sampling:
        scale = 3.0 if settings.caption_dropout else 1.0
        return Sampling(settings.num_phases, guidance_scale=scale, no_other_steps=True)

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Draws:
        shape, dropout = batch.x0.shape[1:], self.settings.caption_dropout
        return Draws(
            index=rng.sample.integers("index", 0, self.settings.num_grid_steps),
            noise=rng.sample.normal("noise", shape),
            guidance_scale=self.guidance.draw(rng),
            dropped=rng.sample.uniform("caption") < dropout if dropout else None,
            height=rng.sample.uniform("height") if self.gan else None,
            fake_noise=rng.sample.normal("fake_noise", shape) if self.gan else None,
            real_noise=rng.sample.normal("real_noise", shape) if self.gan else None,
        )

    def prepare(self, roles: Roles, batch: Batch, draws: Draws, due: Collection[str]) -> Shared:
        batch = dataclasses.replace(batch, cond=self._captions(batch.cond, draws.dropped))
        t, u, phase = self.grid[draws.index + 1], self.grid[draws.index], self.phase[draws.index]
        step = solver_step(roles, self.schedule, batch, draws.noise, t, u, self.guidance.scale(draws.guidance_scale))
        edge = self.edges[phase]
        pred = roles.student(step.x_t, t, batch.cond)
        x_edge = pred.at(edge)
        with torch.no_grad():
            target = roles.target(step.x_u, u, batch.cond).at(edge)
        shared = Shared(**vars(step), edge=edge, x0=pred.x0.detach(), x_edge=x_edge, target=target)
        if self.gan and draws.height is not None:
            assert draws.fake_noise is not None and draws.real_noise is not None
            noised = self.noised_time(phase, draws.height)
            fake = renoise(self.schedule, x_edge, edge, noised, draws.fake_noise)
            real = renoise(self.schedule, target, edge, noised, draws.real_noise)
            shared.fake = self.gan.features(roles, fake, noised, batch.cond)
            with torch.no_grad():
                shared.real = self.gan.features(roles, real, noised, batch.cond)
        return shared

    def student(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        loss = distance(shared.x_edge, shared.target, self.settings.loss, self.settings.huber_c)
        parts, stats = {"consistency": loss.detach()}, student_statistics(shared.x0, batch.x0, shared.teacher_x0)
        if self.gan is None or shared.fake is None:
            return Loss(loss, parts, stats)
        adversarial = generator_loss(self.gan.logits(roles, shared.fake), self.gan.loss)
        total = loss + self.settings.adversarial_weight * adversarial
        return Loss(total, parts | {"adversarial": adversarial.detach()}, stats)

    def discriminator(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        assert self.gan is not None
        return self.gan.player_loss(roles, shared.real, shared.fake)

    def calls_per_step(self) -> dict[str, int]:
        return {"student": 1, "teacher": 3 if self.gan else 1, "target": 1}

    def noised_time(self, phase: Tensor, height: Tensor) -> Tensor:
        """Times [B] from the lower edge of a phase up to, but not, the next one: even over table indices (VP).

        On other schedules even over the solver steps of the grid, whose spacing reflects the relevant noise levels.
        """
        low, high = self.edges[phase], self.edges[phase + 1]
        if self.schedule.family == "vp":
            return torch.floor(low + height * (high - low))
        first = torch.searchsorted(self.grid, self.edges)
        place = first[phase] + height * (first[phase + 1] - first[phase])
        return torch.from_numpy(np.interp(place.numpy(), np.arange(len(self.grid)), self.grid.numpy()))

    @staticmethod
    def _captions(cond: Cond | None, dropped: Tensor | None) -> Cond | None:
        if dropped is None:
            return cond
        if cond is None:
            raise ValueError("caption_dropout needs data with a condition: set it to 0.")
        return cond.drop(dropped)
