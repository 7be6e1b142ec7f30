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
and the critic's two terms go backward one after the other, so that no two graphs of a network are held at once; that
changes no number. Captions of the predictions are those of the data in the batch. A second stream of captions without
images, which the released code has for its larger teachers, is not supported: the trainer feeds data alone. Nothing
averages the weights; training.ema_decay keeps an average for evaluation. SDXL's one-step student was first fitted to
10,000 samples of its teacher (`init` takes such a student). Precision: see `parts.score_pair`.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.diffusion.schedule import Schedule
from fewstep.methods import Batch, Loss, Method, Player, Progress, Rng, RoleSpec, Sampling
from fewstep.methods.parts.discriminators import Discriminator, generator_loss, logged_discriminator_loss
from fewstep.methods.parts.distances import with_gradient
from fewstep.methods.parts.inputs import Inputs, Policy, Terminal
from fewstep.methods.parts.score_pair import ScorePair, Weighting, matching_loss
from fewstep.methods.parts.statistics import student_statistics
from fewstep.methods.settings import Count, FixedGuidance, Halvings, Weight, checked
from fewstep.models.roles import Roles


@dataclass
class Draws:
    """Random numbers of one DMD2 step. Times are native, [B], on the host; noises unit normals [B, ...].

    Attributes:
        exit: at which of its times the student is trained; the same in every row, micro-batch and process.
        noise: [B, exit + 1, ...] where the student's own calls start, and what noises their predictions ([B, 1, ...]
            when data is noised).
        fake_time, fake_noise: where the fake score learns.
        matching_time, matching_noise: where both scores are compared; None where the student is not due.
        played_time, played_noise: where the student is judged; None like those, or without adversarial loss, like
        judged_time, judged_noise: where the discriminator learns of the predictions, and
        data_time, data_noise: of data.
    """

    exit: int
    noise: Tensor
    fake_time: Tensor
    fake_noise: Tensor
    matching_time: Tensor | None = None
    matching_noise: Tensor | None = None
    played_time: Tensor | None = None
    played_noise: Tensor | None = None
    judged_time: Tensor | None = None
    judged_noise: Tensor | None = None
    data_time: Tensor | None = None
    data_noise: Tensor | None = None


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
            student_input: "simulated", or "noised", data in place of the student's own way (`parts.inputs`).
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
        self.inputs = Inputs(schedule, times, settings.student_input, settings.terminal)
        self.scores = ScorePair(schedule, settings.guidance_scale, settings.weighting)
        self.gan: Discriminator | None = None
        owned: tuple[str, ...] = ("fake",)
        if settings.adversarial_weight:
            backbone, head, halvings = settings.discriminator_backbone, settings.head, settings.halvings
            self.gan = Discriminator("logistic", backbone, taps="last", head=head, halvings=halvings)
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
        shape, exit = batch.x0.shape[1:], self.inputs.draw_exit(rng)
        draws = Draws(
            exit=exit,
            noise=rng.sample.normal("noise", (self.inputs.noises(exit), *shape)),
            fake_time=self.scores.draw_time(rng, "fake_time"),
            fake_noise=rng.sample.normal("fake_noise", shape),
        )
        due = progress.plays("student")
        if due:
            draws.matching_time = self.scores.draw_time(rng, "matching_time", 0.02, 0.98)
            draws.matching_noise = rng.sample.normal("matching_noise", shape)
        for name in (*["played"] * due, "judged", "data") if self.gan else ():
            setattr(draws, f"{name}_time", self.scores.draw_time(rng, f"{name}_time"))
            setattr(draws, f"{name}_noise", rng.sample.normal(f"{name}_noise", shape))
        return draws

    def prepare(self, roles: Roles, batch: Batch, draws: Draws, due: Collection[str]) -> Shared:
        x_t = self.inputs.state(roles.student, batch.x0, draws.noise, draws.exit, batch.cond)
        t = float(self.inputs.timesteps[draws.exit])
        with nullcontext() if "student" in due else torch.no_grad():
            return Shared(t, x_t, roles.student(x_t, t, batch.cond).x0)

    def student(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        x = shared.x0_student
        assert draws.matching_time is not None and draws.matching_noise is not None
        matched = self.scores.matching(roles, x, draws.matching_noise, draws.matching_time, batch.cond)
        loss = matching_loss(x, matched.gradient)
        parts, stats = {"matching": loss.detach()}, dict(matched.stats)
        if batch.has_data:
            stats |= student_statistics(x, batch.x0)
        stats["matching_pull"] = matched.gradient.norm() / x.numel()
        if self.gan is None:
            return Loss(loss, parts, stats)
        leaf = x.detach().requires_grad_()
        logits = self._judged(roles, batch, leaf, draws.played_time, draws.played_noise)
        adversarial = generator_loss(logits, "logistic")
        (grad,) = torch.autograd.grad(self.settings.adversarial_weight * adversarial, leaf)
        stats["adversarial_pull"] = grad.norm()
        gan = with_gradient(self.settings.adversarial_weight * adversarial, x, grad)
        return Loss(loss + gan, parts | {"adversarial": adversarial.detach()}, stats)

    def critic(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        x0 = shared.x0_student.detach()
        loss = self.scores.denoising_loss(roles, x0, draws.fake_noise, draws.fake_time, batch.cond)

        def discriminator_term() -> Loss:
            real = self._judged(roles, batch, batch.x0, draws.data_time, draws.data_noise)
            fake = self._judged(roles, batch, x0, draws.judged_time, draws.judged_noise)
            assert draws.data_time is not None and draws.judged_time is not None
            times = draws.data_time, draws.judged_time
            gan_loss = logged_discriminator_loss(real, fake, "logistic", times, self.scores.levels)
            weighted = self.settings.discriminator_weight * gan_loss.total
            return Loss(weighted, {"discriminator": gan_loss.total.detach()}, gan_loss.stats)

        return Loss(loss, {"denoising": loss.detach()}, then=discriminator_term if self.gan else None)

    def calls(self, draws: Draws) -> dict[str, float]:
        return self._calls(draws.exit if self.settings.student_input == "simulated" else 0)

    def calls_per_step(self) -> dict[str, float]:
        simulated = self.settings.student_input == "simulated"
        return self._calls((len(self.inputs.timesteps) - 1) / 2 if simulated else 0)

    def _calls(self, exit: float) -> dict[str, float]:
        calls: dict[str, float] = {"student": 1 + exit, "teacher": 1, "fake": 2}
        if self.gan:
            calls[self.gan.backbone] += 3
        return calls

    def _judged(self, roles: Roles, batch: Batch, x: Tensor, t: Tensor | None, noise: Tensor | None) -> list[Tensor]:
        """The discriminator's logits of x [B, ...], noised to t."""
        assert self.gan is not None and t is not None and noise is not None
        x_t = self.schedule.add_noise(x, noise, t)
        return self.gan.logits(roles, self.gan.features(roles, x_t, t, batch.cond))
