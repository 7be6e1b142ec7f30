"""Improved distribution matching distillation: DMD2 (Yin et al. 2024, arXiv 2405.14867).

The student samples from noise in N calls. No pairs fix which image belongs to which noise: the distribution of its
samples is trained to be the teacher's. Each step:

    x = the student's prediction of x0 at one of its N times, after as many of its own calls without a gradient
    student, every R-th step:  x moves along  mu_fake(x_t) - mu_real(x_t)                  (matching, sec. 3)
                               and towards what the discriminator takes for data           (sec. 4.3)
    critic, at every step:     the fake score learns to denoise x,
                               its heads to tell x from data, both noised

mu_real is the teacher's, guided; mu_fake that of a copy of it, which must know the student's predictions better than
the student changes them: hence two time scales (sec. 4.2), and no pairs of noise and image as DMD (Yin et al. 2023)
needed. The discriminator sees data, which the teacher has only learned from; guidance acts on the matching alone.

Both players start from the same x, made before either moved, and a critic's step comes with every student's: R steps of
the critic to one of the student's, as in the released code.

Choices where code and paper leave one, or where this goes another way: all roles are LoRAs on one base, or all are full
copies (released: the student alone as LoRA). The student's adversarial gradient is formed before its own graph is used,
and the critic's two terms go backward one after the other: one graph at a time, and no number changes. Captions of the
predictions are those of the batch. Nothing averages the weights; training.ema_decay keeps an average for evaluation.
SDXL's one-step student was first fitted to 10,000 samples of its teacher (`init` takes such a student).
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.diffusion.schedule import Schedule
from fewstep.methods import Batch, Loss, Method, Player, Progress, Rng, RoleSpec, Sampling
from fewstep.methods.parts.inputs import Terminal
from fewstep.methods.parts.matching import DistributionMatching, MatchingDraws
from fewstep.methods.parts.rollout import Policy, Rollout, RolloutDraws
from fewstep.methods.parts.score_gan import GANDraws, ScoreGAN
from fewstep.methods.parts.score_pair import ScorePair, Weighting
from fewstep.methods.settings import Count, FixedGuidance, Halvings, Weight, checked
from fewstep.models.roles import Roles


@dataclass(kw_only=True)
class Draws(RolloutDraws, MatchingDraws, GANDraws):
    """Random numbers of one DMD2 step. Times are native, [B], on the host; noises unit normals [B, ...]."""


@dataclass
class Shared:
    """The state x_t [B, ...] at native time t, a host number, and the student's prediction there, its clean data.

    The prediction has a graph when the student is due.
    """

    t: float
    x_t: Tensor
    x0_student: Tensor


class DMD2(Method):
    """DMD2 in N steps with backward simulation (the default) or in one; with its GAN or without it."""

    name = "dmd2"
    summary = "Distribution matching: a fake score follows the student, which closes its gap to the teacher's; a GAN."
    sampler = "renoise"
    renamed: ClassVar[dict[str, str]] = {"fake_begins": "fake_init_from"}
    truth_settings: ClassVar[dict[str, Any]] = {
        "num_inference_steps": 1, "guidance_scale": 1.0, "student_every": 2, "weighting": "kl",
        "adversarial_weight": 0.0, "head": "residual",
    }  # fmt: skip

    @checked
    class Settings:
        """Settings of DMD2.

        Attributes:
            num_inference_steps: N, the student's calls, on the trailing grid: 999, 749, 499, 249.
            timesteps: other times instead, decreasing; [399] is SDXL's one-step student, which starts from unit noise
                at a time where an error of eps weighs 1.2 in x0 and not 14.6.
            guidance_scale: the teacher's w in the matching (1 = off). The paper: 8 for SDXL, 1.75 for SD1.5.
            weighting: of the matching, "l1" or "kl" (`parts.score_pair`).
            fake_init_from: whose first weights the fake score has: "teacher", or "student", where ``init`` has moved
                those.
            student_every: R, steps of the critic to one of the student's: 5; 10 for SD1.5. The least that keeps the
                predictions' brightness from swinging (``student/x0_mean`` in the log); a higher rate of the critic in
                its place is worse.
            student_input: "simulated", or "noised", data in place of the student's own way (`parts.rollout`).
            terminal: "noise" or "table", what stands for noise at the first time.
            adversarial_weight: of the GAN in the student's loss; 0 leaves the discriminator out. Losses are means, and
                the matching's gradient shrinks with the root of the number of elements: 5e-3 is for 4 x 128 x 128, 3e-3
                for 3 x 64 x 64 (ImageNet); for a few numbers take 0.05 to 0.2.
            discriminator_weight: of the discriminator's loss beside the fake score's.
            discriminator_backbone: "fake", whose features learn with the heads, or "teacher", frozen features (FastGen,
                which had results as good).
            head: "conv", down to one logit, or "residual", one for each position. halvings: of a conv head, whose map
                must come down to 4x4: 0 from 4x4 (scenes-64) or 8x8 with four logits, 1 for SD1.5, 3 for SDXL.
        """

        num_inference_steps: Count = 4
        timesteps: tuple[float, ...] | None = None
        guidance_scale: FixedGuidance = 8.0
        weighting: Weighting = "l1"
        fake_init_from: Literal["teacher", "student"] = "teacher"
        student_every: Count = 5
        student_input: Policy = "simulated"
        terminal: Terminal = "noise"
        adversarial_weight: Weight = 5e-3
        discriminator_weight: Weight = 1e-2
        discriminator_backbone: Literal["fake", "teacher"] = "fake"
        head: Literal["conv", "residual"] = "conv"
        halvings: Halvings = 0

    settings: Settings

    def __init__(self, schedule: Schedule, settings: Settings | None = None, **overrides: Any) -> None:
        super().__init__(schedule, settings, **overrides)
        settings = self.settings
        grid = schedule.timesteps(settings.num_inference_steps) if settings.timesteps is None else settings.timesteps
        times = torch.as_tensor(grid, dtype=torch.float64)
        self.rollout = Rollout(schedule, times, settings.student_input, settings.terminal)
        self.scores = ScorePair(schedule, settings.guidance_scale, settings.weighting)
        self.matching = DistributionMatching(self.scores)
        self.gan: ScoreGAN | None = None
        owned: tuple[str, ...] = ("fake",)
        if settings.adversarial_weight:
            backbone, head, halvings = settings.discriminator_backbone, settings.head, settings.halvings
            weights = settings.adversarial_weight, settings.discriminator_weight
            self.gan = ScoreGAN(self.scores, backbone, head, halvings, *weights)
            owned = ("fake", self.gan.name)
        self.players = (Player("student", every=settings.student_every), Player("critic", owns=owned))

    def roles(self) -> tuple[RoleSpec, ...]:
        return RoleSpec("student"), RoleSpec("fake", init_from=self.settings.fake_init_from)

    @classmethod
    def sampling(cls, settings: Settings) -> Sampling:
        times = tuple(settings.timesteps or ())
        return Sampling(len(times) or settings.num_inference_steps, no_other_steps=True, timesteps=times)

    @classmethod
    def needs_images(cls, settings: Settings) -> bool:
        return settings.adversarial_weight > 0 or settings.student_input == "noised"

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Draws:
        shape = batch.x0.shape[1:]
        due = progress.plays("student")
        draws = Draws(**self.rollout.draw(rng, shape))
        self.matching.draw(draws, rng, shape, due)
        if self.gan:
            self.gan.draw(draws, rng, shape, due)
        return draws

    def prepare(self, roles: Roles, batch: Batch, draws: Draws, due: Collection[str]) -> Shared:
        x_t = self.rollout.state(roles.student, batch.x0, draws.noise, draws.exit, batch.cond)
        t = float(self.rollout.timesteps[draws.exit])
        with nullcontext() if "student" in due else torch.no_grad():
            return Shared(t, x_t, roles.student(x_t, t, batch.cond).x0)

    def student(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        x = shared.x0_student
        matched = self.matching.student(roles, batch, x, draws)
        return self.gan.student(roles, x, draws, batch.cond, matched) if self.gan else matched

    def critic(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        x0 = shared.x0_student.detach()
        denoised = self.matching.fake(roles, x0, draws, batch.cond)

        def discriminator_term() -> Loss:
            assert self.gan is not None
            return self.gan.critic(roles, x0, batch.x0, draws, batch.cond)

        return replace(denoised, then=discriminator_term if self.gan else None)

    def calls(self, draws: Draws) -> dict[str, float]:
        return self._calls(self.rollout.calls(draws.exit))

    def calls_per_step(self) -> dict[str, float]:
        return self._calls(self.rollout.calls((len(self.rollout.timesteps) - 1) / 2))

    def _calls(self, of_rollout: float) -> dict[str, float]:
        calls: dict[str, float] = {"student": 1 + of_rollout, "teacher": 1, "fake": 2}
        if self.gan:
            calls[self.gan.backbone] += 3
        return calls
