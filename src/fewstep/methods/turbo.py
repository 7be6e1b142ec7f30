"""Adversarial diffusion distillation: ADD, SDXL-Turbo's method (Sauer et al. 2023, arXiv 2311.17042).

The student predicts clean data, in one call, from one of a few noise levels, of which the last is noise alone. A
discriminator on a frozen encoder's features of the decoded images makes each prediction look real; the teacher, called
where the prediction has been noised again, keeps it true to the prompt. Each step:

    x_s = alpha_s x0 + sigma_s eps           s one of N levels;  x_s = eps at the last
    x = x0_student(x_s, s),  y = decode(x)
    x_psi = stop_gradient x0_teacher(alpha_t x + sigma_t eps', t)           t any level, the teacher guided
    student:        adversarial_weight L_G(y) + distillation_weight c(t) |y - decode(x_psi)|^2
    discriminator:  hinge(decode(x0) against y) + r1_weight R1 on decode(x0), at the inputs of its heads

The heads are StyleGAN-T's (`fewstep.methods.parts.projection`), given the pooled prompt and, where the student has seen
the image it started from, the encoder's summary of that image. Both sides are augmented (DiffAugment).

=============  ==================  ================================================================================
weighting      c(t)                what it is
=============  ==================  ================================================================================
exponential    alpha_t             the paper's default in its ablations
sds            alpha_t sigma_t /2  score distillation: in latents, c makes the gradient w(t) (eps_teacher - eps'),
                                   with DreamFusion's w = sigma_t^2
nfsd           the same            the released models' weighting (paper, no details). UNVERIFIED: here noise-
                                   free score distillation as commonly coded (Katzir et al. 2023): eps_teacher - eps'
                                   becomes guidance_scale (eps_c - eps_0), plus eps_0 below t = 200. There is no
                                   negative prompt, so eps_0 - eps_negative, its term above 200, is 0
=============  ==================  ================================================================================

(EDM's alpha and sigma are first scaled to squares that sum to 1.)

The training code was never released. Where the paper is silent we chose: the levels are those of the `trailing` grid,
where students are sampled; both players move at every step, from one shared forward; real images are decoded data,
so that the autoencoder gives nobody away; the summary is the loss's own encoder's (there: DINOv2 ViT-L's class token);
squared distances are means over pixels, and the adversarial loss a mean over heads: the paper's 2.5 beside a sum over
five heads is 0.5 here. Trained by distillation alone the predictions collapse to the modes of what the teacher knows,
as in the paper's table: |x - x_psi|^2 moves every prediction inwards and nothing moves them apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.diffusion.schedule import Array, Schedule, expand
from fewstep.methods import Batch, HeadSpec, Loss, Method, Player, Progress, Rng, Sampling
from fewstep.methods.parts.augment import POLICIES, Policy, augmented, draw_augmentation
from fewstep.methods.parts.discriminators import generator_loss
from fewstep.methods.parts.distances import distance
from fewstep.methods.parts.inputs import Terminal, noised_rows, pure_rows
from fewstep.methods.parts.projection import (
    conditioned_heads,
    projection_condition,
    projection_heads,
    projection_loss,
    taps_of,
)
from fewstep.methods.parts.score_pair import noise_levels
from fewstep.methods.parts.statistics import student_statistics
from fewstep.methods.settings import Count, FixedGuidance, Weight, checked
from fewstep.models.cond import Cond
from fewstep.models.helpers import Helpers
from fewstep.models.roles import Roles

Weighting: TypeAlias = Literal["exponential", "sds", "nfsd"]
EARLY = 0.2  # share of the noise levels, the lowest, in which NFSD keeps eps_0


@dataclass
class Draws:
    """Random numbers of one step.

    Attributes:
        level: [B] int64, at which of the method's ``timesteps`` the student is asked.
        noise: [B, ...] unit normal, of x_s.
        teacher_level: [B] int64, at which of its ``levels`` the teacher is.
        teacher_noise: [B, ...] unit normal, eps'.
        fake_augment, real_augment: [B, 7] uniforms on the host; None without a discriminator.
    """

    level: Tensor
    noise: Tensor
    teacher_level: Tensor
    teacher_noise: Tensor
    fake_augment: Tensor | None
    real_augment: Tensor | None


@dataclass
class Shared:
    """The student's state x_s [B, ...], its prediction x, and what the losses compare: y, or x itself in latents.

    ``fake`` and ``real`` are the encoder's features of both sides, ``condition`` [B, ...] the condition of their heads.
    """

    x_s: Tensor
    x0_student: Tensor
    seen: Tensor
    fake: list[Tensor]
    real: list[Tensor]
    condition: Tensor | None


class Turbo(Method):
    """ADD; its weights set to 0 leave the discriminator, or the teacher, out."""

    name = "turbo"
    summary = "Adversarial diffusion distillation (ADD): a GAN on pretrained features beside distillation."
    players: tuple[Player, ...] = (Player("student"), Player("discriminator"))
    sampler = "euler-ancestral"
    truth_settings: ClassVar[dict[str, Any]] = {"guidance_scale": 1.0}

    @checked
    class Settings:
        """Settings of ADD.

        Attributes:
            num_levels: N, the student's noise levels: 999, 749, 499, 249 of a table; the first is noise alone.
            terminal: "noise": the student's input at the first level is noise alone; "table": as the table has it.
            adversarial_weight: of the GAN; 0 leaves the discriminator out.
            distillation_weight: the paper's lambda over its five heads; 0 leaves the teacher out.
            weighting: c(t): "exponential", "sds" or "nfsd" (unverified).
            space: where the distillation's distance is taken: "pixels" (steadier, according to the paper) or "latents".
            guidance_scale: of the teacher (1 = off); unpublished.
            encoder: "scenes-64", or a vision model of transformers by folder or hub name (the paper: DINOv2's ViT-S).
            augment: of "color", "translation" and "cutout".
            r1_weight: gamma of R1 on real images; 1e-2 suits points in the plane.
        """

        num_levels: Count = 4
        terminal: Terminal = "noise"
        adversarial_weight: Weight = 1.0
        distillation_weight: Weight = 0.5
        weighting: Weighting = "exponential"
        space: Literal["pixels", "latents"] = "pixels"
        guidance_scale: FixedGuidance = 4.0
        encoder: str = "facebook/dinov2-small"
        augment: tuple[Policy, ...] = POLICIES
        r1_weight: Weight = 1e-5

        def __post_init__(self) -> None:
            if not (self.adversarial_weight or self.distillation_weight):
                raise ValueError(
                    "adversarial_weight and distillation_weight are both 0: nothing is left to learn from."
                )

    settings: Settings

    def __init__(self, schedule: Schedule, settings: Settings | None = None, **overrides: Any) -> None:
        super().__init__(schedule, settings, **overrides)
        settings = self.settings
        self.plays, self.asks = settings.adversarial_weight > 0, settings.distillation_weight > 0
        self.timesteps = schedule.timesteps(settings.num_levels).double()
        levels = noise_levels(schedule)
        # At alpha = 0 nothing of the student's prediction would be left.
        self.levels = torch.from_numpy(levels[schedule.alpha_sigma(levels)[0] > 0])
        if self.plays:
            self.encoder = settings.encoder
        else:
            self.players = (Player("student"),)

    def heads(self) -> tuple[HeadSpec, ...]:
        return (HeadSpec("discriminator", _build, "encoder", conditioned=True),) if self.plays else ()

    @classmethod
    def sampling(cls, settings: Settings) -> Sampling:
        return Sampling(settings.num_levels, eta=1.0)

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Draws:
        shape = batch.x0.shape[1:]
        return Draws(
            level=rng.sample.integers("level", 0, len(self.timesteps)),
            noise=rng.sample.normal("noise", shape),
            teacher_level=rng.sample.integers("teacher_level", 0, len(self.levels)),
            teacher_noise=rng.sample.normal("teacher_noise", shape),
            fake_augment=draw_augmentation(rng, "fake_augment") if self.plays else None,
            real_augment=draw_augmentation(rng, "real_augment") if self.plays else None,
        )

    def prepare(self, roles: Roles, batch: Batch, draws: Draws, due: Collection[str]) -> Shared:
        settings, s = self.settings, self.timesteps[draws.level]
        x_s = noised_rows(self.schedule, batch.x0, draws.noise, s, settings.terminal)
        x0_student = roles.student(x_s, s, batch.cond).x0
        shared = Shared(x_s, x0_student, self._seen(roles, x0_student), [], [], None)
        if draws.fake_augment is not None and draws.real_augment is not None:
            y = shared.seen if settings.space == "pixels" else roles.decode(x0_student)
            taps = taps_of(roles)
            shared.fake = roles.encoder.features(augmented(y, draws.fake_augment, settings.augment), taps)
            with torch.no_grad():
                data = roles.decode(batch.x0)
                shared.real = roles.encoder.features(augmented(data, draws.real_augment, settings.augment), taps)
                shared.condition = self._condition(roles, batch.cond, data, s)
        return shared

    def student(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        terms = {}
        if self.plays:
            terms["adversarial"] = generator_loss(conditioned_heads(roles, shared.condition)(shared.fake))
        if self.asks:
            terms["distillation"] = self.distillation(roles, batch.cond, draws, shared)
        settings = self.settings
        weights = {"adversarial": settings.adversarial_weight, "distillation": settings.distillation_weight}
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        parts = {name: term.detach() for name, term in terms.items()}
        return Loss(total, parts, student_statistics(shared.x0_student.detach(), batch.x0))

    def discriminator(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        heads = conditioned_heads(roles, shared.condition)
        return projection_loss(heads, shared.real, shared.fake, "hinge", self.settings.r1_weight)

    def distillation(self, roles: Roles, cond: Cond | None, draws: Draws, shared: Shared) -> Tensor:
        """Mean over the batch of c(t) times the mean square of y - decode(x_psi)."""
        t = self.levels[draws.teacher_level]
        with torch.no_grad():
            x_t = self.schedule.add_noise(shared.x0_student, draws.teacher_noise, t)
            target = self._seen(roles, self._teacher_x0(roles, cond, x_t, t, shared.x0_student))
        return distance(shared.seen, target, "l2", weight=self.weight(t))

    def weight(self, t: Tensor) -> Array:
        """c(t) at host times [B]."""
        alpha, sigma = self._unit(t)
        return alpha if self.settings.weighting == "exponential" else np.asarray(alpha * sigma / 2)

    def calls_per_step(self) -> dict[str, int]:
        teacher = (2 if self.settings.weighting == "nfsd" else 1) if self.asks else 0
        return {"student": 1, "teacher": teacher}

    def _seen(self, roles: Roles, latents: Tensor) -> Tensor:
        return roles.decode(latents) if self.settings.space == "pixels" else latents

    def _teacher_x0(self, roles: Roles, cond: Cond | None, x_t: Tensor, t: Tensor, x0_student: Tensor) -> Tensor:
        """x_psi [B, ...], the teacher's prediction in the place of the student's."""
        scale = self.settings.guidance_scale
        if self.settings.weighting != "nfsd":
            return roles.teacher(x_t, t, cond, guidance_scale=scale).x0
        if cond is None:
            raise ValueError("The weighting nfsd needs data with a condition: use exponential or sds.")
        without, given = (roles.teacher(x_t, t, c).epsilon for c in (cond.null(), cond))
        early = expand((t < self.levels[int(EARLY * len(self.levels))]).double().numpy(), x_t)
        alpha, sigma = self.schedule.alpha_sigma(t)
        return x0_student - expand(np.asarray(sigma / alpha), x_t) * (scale * (given - without) + early * without)

    def _condition(self, roles: Roles, cond: Cond | None, data: Tensor, s: Tensor) -> Tensor | None:
        """The pooled prompt and the summary of the data, zero where the student has not seen them."""
        summary = roles.encoder.summary(data)
        seen = expand((~pure_rows(self.schedule, s, self.settings.terminal)).double().numpy(), summary)
        return projection_condition(roles.helpers, cond, seen * summary)

    def _unit(self, t: Tensor) -> tuple[Array, Array]:
        alpha, sigma = self.schedule.alpha_sigma(t)
        norm = np.hypot(alpha, sigma) if self.schedule.family == "edm" else 1.0
        return np.asarray(alpha / norm), np.asarray(sigma / norm)


def _build(channels: Mapping[str, int], helpers: Helpers) -> nn.Module:
    assert helpers.encoder is not None
    return projection_heads(channels, helpers.pooled_width + helpers.encoder.summary_width)
