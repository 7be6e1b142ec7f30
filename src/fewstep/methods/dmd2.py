"""Improved distribution matching distillation: DMD2 (Yin et al. 2024, arXiv 2405.14867), and what has been added since.

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
the critic to one of the student's, as in the released code. What may differ from DMD2 is in `parts`: where the student
is trained (`rollout`), what is compared (`matching`), a first step apart (`first_step`), the GAN (`score_gan`).

Choices where code and paper leave one, or where this goes another way: all roles are LoRAs on one base, or all are full
copies (released: the student alone as LoRA). The student's adversarial gradient is formed before its own graph is used,
and terms of a loss go backward one after the other: one graph at a time, and no number changes. Captions of the
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
from fewstep.diffusion.well_posed import student_times
from fewstep.methods import Batch, Loss, Method, Player, Progress, Rng, RoleSpec, Sampling
from fewstep.methods.parts.first_step import FirstStep, FirstStepSettings
from fewstep.methods.parts.matching import DistributionMatching, MatchingDraws, MatchingSettings
from fewstep.methods.parts.rollout import Rollout, RolloutDraws, RolloutSettings
from fewstep.methods.parts.score_gan import GANDraws, GANSettings, ScoreGAN
from fewstep.methods.parts.score_pair import Jump, critic_rate
from fewstep.methods.settings import Count, CountOrNone, ShareOrNone, checked
from fewstep.models.roles import Roles


@dataclass(kw_only=True)
class Draws(RolloutDraws, MatchingDraws, GANDraws):
    """Random numbers of one DMD2 step. Times are native, [B], on the host; noises unit normals [B, ...]."""


@dataclass
class Shared:
    """The state x_t [B, ...] at native time t, a host number, and the student's prediction there, its clean data.

    The prediction has a graph when the student is due. ``jump`` is where it leads, without a graph, if that is matched.
    """

    t: float
    x_t: Tensor
    x0_student: Tensor
    jump: Jump | None = None


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
    class Settings(GANSettings, FirstStepSettings, MatchingSettings, RolloutSettings):
        """Settings of DMD2, beside those of its parts.

        Attributes:
            fake_init_from: whose first weights the fake score has: "teacher", or "student", where ``init`` has moved
                those.
            fake_pull: the share of the way to the student's weights that the fake score moves after each of the
                student's updates (SenseFlow: 0.03). Worth a few steps of the critic where its rate is low.
            student_every: R, steps of the critic to one of the student's: 5; 10 for SD1.5. The least that keeps the
                predictions' brightness from swinging (``student/x0_mean`` in the log); a higher rate of the critic in
                its place is worse.
            student_start: steps that the critic learns alone at first.
            tell_end: condition the student on the end of each jump, so that ``init`` may be a flow map.
        """

        fake_init_from: Literal["teacher", "student"] = "teacher"
        fake_pull: ShareOrNone = 0.0
        student_every: Count = 5
        student_start: CountOrNone = 0
        tell_end: bool = False

        def __post_init__(self) -> None:
            RolloutSettings.__post_init__(self)
            if self.tell_end and (self.fake_init_from == "student" or self.fake_pull):
                raise ValueError(
                    "tell_end gives the student an input that its fake score has not: leave fake_init_from at teacher "
                    "and fake_pull at 0."
                )
            if self.tell_end and self.first_weight:
                raise ValueError(
                    "first_weight fits a step to another end than the one that a sampler of tell_end asks for: leave "
                    "one of them out."
                )
            if self.tell_end and self.rollout == "ode" and self.match == "x0" and self.most_steps > 1:
                raise ValueError(
                    "tell_end with rollout ode learns the jumps between a sampler's times with match x_s alone: set "
                    "match to x_s."
                )
            if self.guidance_apart and self.guidance_scale == 1:
                raise ValueError(
                    "guidance_apart takes guidance out of the matching, and with guidance_scale 1 there is none: set "
                    "guidance_scale above 1, or leave guidance_apart out."
                )
            if self.match == "x_s" and self.rollout != "ode":
                raise ValueError("match x_s is for a student whose sampler passes there: set rollout to ode.")
            if self.first_weight and (self.rollout, self.student_input) != ("ode", "simulated"):
                raise ValueError("first_weight needs rollout ode and student_input simulated.")
            if self.first_weight and self.most_steps < 2:
                raise ValueError(
                    "first_weight needs a student of two steps or more: the matching begins with the second."
                )

    settings: Settings

    def __init__(self, schedule: Schedule, settings: Settings | None = None, **overrides: Any) -> None:
        super().__init__(schedule, settings, **overrides)
        self.chosen_start = "any_steps" if self.settings.any_steps else "timesteps"
        if self.settings.timesteps is None and not self.settings.any_steps:
            self.default_times = student_times(schedule, self.settings.num_inference_steps)
            self.settings = replace(self.settings, timesteps=self.default_times or None)
        settings = self.settings
        self.rollout = Rollout.of(schedule, settings, first_exit=int(settings.first_weight > 0))
        self.sampler = "ddim" if settings.rollout == "ode" else "renoise"
        self.matching = DistributionMatching(schedule, settings)
        self.first: FirstStep | None = None
        if settings.first_weight:
            self.first = FirstStep(schedule, settings, settings.guidance_scale, self.rollout.first_time)
        self.gan: ScoreGAN | None = ScoreGAN(self.matching.scores, settings) if settings.adversarial_weight else None
        owned: tuple[str, ...] = ("fake",)
        if self.gan:
            owned = ("fake", self.gan.name)
        student = Player("student", every=settings.student_every, start=settings.student_start)
        self.players = (student, Player("critic", owns=owned, rate=critic_rate(schedule)))

    def roles(self) -> tuple[RoleSpec, ...]:
        settings, pulled = self.settings, "student" if self.settings.fake_pull else None
        fake = RoleSpec("fake", init_from=settings.fake_init_from, pulled_to=pulled, pull=settings.fake_pull)
        return RoleSpec("student", ("end",) if settings.tell_end else ()), fake

    @classmethod
    def sampling(cls, settings: Settings) -> Sampling:
        times = tuple(settings.timesteps or ())
        if not settings.any_steps:
            return Sampling(len(times) or settings.num_inference_steps, no_other_steps=True, timesteps=times)
        own, fewest = min(settings.num_inference_steps, settings.any_steps), 2 if settings.first_weight else 1
        own = max(own, fewest)
        others = tuple(n for n in range(fewest, settings.any_steps + 1) if n != own)
        return Sampling(own, no_other_steps=True, other_steps=others)

    @classmethod
    def needs_images(cls, settings: Settings) -> bool:
        return settings.adversarial_weight > 0 or settings.student_input == "noised"

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Draws:
        shape = batch.x0.shape[1:]
        due = progress.plays("student")
        draws = Draws(**self.rollout.draw(rng, shape))
        self.matching.draw(draws, rng, shape, due, draws.times[draws.exit], self.rollout.next_time(draws))
        if self.gan:
            self.gan.draw(draws, rng, shape, due)
        return draws

    def prepare(self, roles: Roles, batch: Batch, draws: Draws, due: Collection[str]) -> Shared:
        x_t, t = self.rollout.state(roles.student, batch.x0, draws, batch.cond), draws.times[draws.exit]
        to = self.rollout.next_time(draws)
        with nullcontext() if "student" in due else torch.no_grad():
            pred = roles.student(x_t, t, batch.cond, end=self.rollout.end(roles.student, to))
            return Shared(t, x_t, pred.x0, self.matching.jump(pred, to))

    def student(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        x = shared.x0_student
        loss = self.matching.student(roles, batch, x, draws, shared.jump)
        if self.gan:
            loss = self.gan.student(roles, x, draws, batch.cond, loss)
        if self.first is None:
            return loss
        first, start = self.first, self.rollout.first_state(draws)
        return replace(loss, then=lambda: first.loss(roles, start, batch.cond))

    def critic(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        x0 = shared.x0_student.detach()
        denoised = self.matching.fake(roles, x0, draws, batch.cond, shared.jump)

        def discriminator_term() -> Loss:
            assert self.gan is not None
            return self.gan.critic(roles, x0, batch.x0, draws, batch.cond)

        return replace(denoised, then=discriminator_term if self.gan else None)

    def calls(self, draws: Draws) -> dict[str, float]:
        return self._calls(self.rollout.calls(draws.exit))

    def calls_per_step(self) -> dict[str, float]:
        return self._calls(self.rollout.calls(self.rollout.mean_exit))

    def _calls(self, of_rollout: float) -> dict[str, float]:
        calls: dict[str, float] = {"student": 1 + of_rollout, "teacher": self.matching.teacher_calls, "fake": 2}
        if self.first:
            calls["student"] += 1
            calls["teacher"] += self.first.solver_steps
        if self.gan:
            calls[self.gan.backbone] += 3
        return calls
