"""Latent adversarial diffusion distillation: LADD, SD3-Turbo's method (Sauer et al. 2024, arXiv 2403.12015).

ADD without pixels: the frozen teacher's own features of noised latents replace the image encoder, and the noise level
chooses what they show, form at high levels and texture at low ones. Trained on the teacher's own samples it needs no
distillation loss. Each step:

    x_s = alpha_s x0 + sigma_s eps,  x = x0_student(x_s, s)          s one of N levels; x_s = eps at the last
    fake = alpha_t x + sigma_t eps',  real = alpha_t x0 + sigma_t eps''        log(sigma_t / alpha_t) ~ N(1, 1)
    student: L_G(fake),  discriminator: L_D(real, fake)

Both are compared by heads on the teacher's features, image positions only, as maps, conditioned on t and the pooled
prompt. The paper draws t logit-normal(1, 1) on flow's [0, 1], which is just this normal of the log of the noise ratio,
and so carries over to every schedule.

The training code was never released, nor most of its settings. We chose: one noise level for both sides of a sample
with noises of their own; heads as ADD's with 3x3 convolutions and group norm; t as sines of the log noise ratio; hinge,
as in ADD (NVIDIA's FastGen takes "logistic"); both players at every step. Any data serve: the paper's are the teacher's
samples at one guidance scale, which put the guidance into the student.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.diffusion.schedule import Schedule
from fewstep.methods import Batch, HeadSpec, Loss, Method, Player, Progress, Rng, Sampling
from fewstep.methods.parts.discriminators import AdversarialLoss, generator_loss
from fewstep.methods.parts.inputs import Terminal, noised_rows
from fewstep.methods.parts.projection import (
    conditioned_heads,
    projection_condition,
    projection_heads,
    projection_loss,
    taps_of,
)
from fewstep.methods.parts.statistics import student_statistics
from fewstep.methods.settings import Count, Weight, checked
from fewstep.models.cond import Cond
from fewstep.models.extras import sinusoid
from fewstep.models.helpers import Helpers
from fewstep.models.roles import Roles

LEVEL_WIDTH = 32


@dataclass
class Draws:
    """Random numbers of one step.

    Attributes:
        level: [B] int64, at which of the method's ``timesteps`` the student is asked.
        noise: [B, ...] unit normal, of x_s.
        ratio: [B] float64, the log of sigma/alpha at which both sides are judged.
        fake_noise, real_noise: [B, ...] unit normals of their own.
    """

    level: Tensor
    noise: Tensor
    ratio: Tensor
    fake_noise: Tensor
    real_noise: Tensor


@dataclass
class Shared:
    """The student's state x_s [B, ...], its prediction x, the teacher's features of both, the heads' condition."""

    x_s: Tensor
    x0_student: Tensor
    fake: list[Tensor]
    real: list[Tensor]
    condition: Tensor | None


class LADD(Method):
    """LADD on any latents: data, or the teacher's own samples as in the paper."""

    name = "ladd"
    summary = "Latent adversarial distillation (LADD): a GAN on the frozen teacher's features of noised latents."
    players: tuple[Player, ...] = (Player("student"), Player("discriminator"))
    sampler = "euler-ancestral"

    @checked
    class Settings:
        """Settings of LADD.

        Attributes:
            num_levels: N, the student's noise levels, the first of them noise alone.
            level_weights: how often each is drawn, the noisiest first; empty is evenly.
            warmup_weights: the same in the first ``warmup_steps``: easy levels first.
            terminal: "noise": the student's input at the first level is noise alone; "table": as the table has it.
            loss: "hinge" or "logistic".
            ratio_mean, ratio_std: of log(sigma/alpha) where both sides are judged.
            r1_weight: of R1 at the heads' inputs on real latents; 0 is off.
        """

        num_levels: Count = 4
        level_weights: tuple[Weight, ...] = (0.7, 0.1, 0.1, 0.1)
        warmup_weights: tuple[Weight, ...] = (0.0, 0.0, 0.5, 0.5)
        warmup_steps: int = 500
        terminal: Terminal = "noise"
        loss: AdversarialLoss = "hinge"
        ratio_mean: float = 1.0
        ratio_std: Weight = 1.0
        r1_weight: Weight = 0.0

        def __post_init__(self) -> None:
            used = {"level_weights": self.level_weights}
            if self.warmup_steps:
                used["warmup_weights"] = self.warmup_weights
            for name, weights in used.items():
                if weights and (len(weights) != self.num_levels or not sum(weights) > 0):
                    raise ValueError(
                        f"{name} must be {self.num_levels} weights, one for each of num_levels, and not all 0, or "
                        f"empty, not {list(weights)}."
                    )

    settings: Settings

    def __init__(self, schedule: Schedule, settings: Settings | None = None, **overrides: Any) -> None:
        super().__init__(schedule, settings, **overrides)
        self.timesteps = schedule.timesteps(self.settings.num_levels).double()

    def heads(self) -> tuple[HeadSpec, ...]:
        return (HeadSpec("discriminator", _build, conditioned=True),)

    @classmethod
    def sampling(cls, settings: Settings) -> Sampling:
        return Sampling(settings.num_levels, eta=1.0)

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Draws:
        shape, settings = batch.x0.shape[1:], self.settings
        weights = settings.warmup_weights if progress.step < settings.warmup_steps else settings.level_weights
        shares = np.cumsum(weights or np.ones(settings.num_levels))
        level = np.searchsorted(shares / shares[-1], rng.sample.uniform("level").numpy(), side="right")
        return Draws(
            level=torch.from_numpy(level),
            noise=rng.sample.normal("noise", shape),
            ratio=settings.ratio_mean + settings.ratio_std * torch.special.ndtri(rng.sample.uniform("ratio", 1e-9)),
            fake_noise=rng.sample.normal("fake_noise", shape),
            real_noise=rng.sample.normal("real_noise", shape),
        )

    def prepare(self, roles: Roles, batch: Batch, draws: Draws, due: Collection[str]) -> Shared:
        s, t = self.timesteps[draws.level], self.judged_at(draws.ratio)
        x_s = noised_rows(self.schedule, batch.x0, draws.noise, s, self.settings.terminal)
        x0_student = roles.student(x_s, s, batch.cond).x0
        taps = taps_of(roles)
        fake = self.schedule.add_noise(x0_student, draws.fake_noise, t)
        features = roles.teacher.features(fake, t, batch.cond, taps)
        with torch.no_grad():
            real = roles.teacher.features(self.schedule.add_noise(batch.x0, draws.real_noise, t), t, batch.cond, taps)
            condition = self._condition(roles, batch.cond, t, x0_student)
        return Shared(x_s, x0_student, features, real, condition)

    def student(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        loss = generator_loss(conditioned_heads(roles, shared.condition)(shared.fake), self.settings.loss)
        return Loss(loss, {"adversarial": loss.detach()}, student_statistics(shared.x0_student.detach(), batch.x0))

    def discriminator(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        heads, settings = conditioned_heads(roles, shared.condition), self.settings
        return projection_loss(heads, shared.real, shared.fake, settings.loss, settings.r1_weight)

    def calls_per_step(self) -> dict[str, int]:
        return {"student": 1, "teacher": 2}

    def judged_at(self, ratio: Tensor) -> Tensor:
        """Native times [B] (host) where log(sigma/alpha) is ``ratio``; whole, and within the table, on VP schedules."""
        times = torch.from_numpy(self.schedule.time_at(np.exp(ratio.numpy())))
        return times.round() if self.schedule.family == "vp" else times

    def _condition(self, roles: Roles, cond: Cond | None, t: Tensor, like: Tensor) -> Tensor | None:
        """The pooled prompt and sines of 100 log(sigma/alpha)."""
        ratio = torch.from_numpy(100 * np.log(self.schedule.noise_to_signal(t))).to(
            like.device, like.dtype, non_blocking=True
        )
        return projection_condition(roles.helpers, cond, sinusoid(ratio, LEVEL_WIDTH))


def _build(channels: Mapping[str, int], helpers: Helpers) -> nn.Module:
    return projection_heads(channels, helpers.pooled_width + LEVEL_WIDTH, dims=2)
