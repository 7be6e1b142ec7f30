"""Distribution matching with regression on pairs: DMD (Yin et al. 2024, arXiv 2311.18828).

A one-step student x = G(z, c) learns from two scores and from pairs that the teacher made. Each step (algorithm 1):

    x = G(z, c),   x_ref = G(z_ref, c_ref)             (z_ref, c_ref, y_ref): a pair; one call for both
    L_KL  = the gradient g = (mu_fake - mu_real) / mean |x - mu_real| at x, noised to t   (`parts/score_pair.py`)
    L_reg = d(x_ref, y_ref)
    student:  L_KL + regression_weight L_reg
    fake:     denoises x, without a graph to the student, at a time of its own; as often as the student moves

L_KL alone drops modes while the fake score lags behind, L_reg alone blurs; the pairs tie each noise to its image. The
teacher is guided in g as its pairs were; student and fake score are not, and the student is sampled without guidance.

Departures from the paper. Regression is on latents (l2 or huber) unless ``regression_space`` is "features": then both
are decoded and seen through a frozen encoder, as by LPIPS, which the paper takes, but without LPIPS' learned weights
(its ablation: l2 is 0.12 FID worse on CIFAR-10). L_KL sees the fresh noise only, as in the class-conditional runs; the
text-to-image ones add x_ref to it. Pairs and fresh noise are equally many (there: two fresh ones to a pair). The weight
drops alpha_t of eq. 8, as the code does. A fake score of epsilon or v has its own error for a loss (`ScorePair`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.diffusion.schedule import Schedule
from fewstep.diffusion.well_posed import student_times
from fewstep.methods import Batch, Loss, Method, Player, Progress, Rng, RoleSpec, Sampling
from fewstep.methods.parts.distances import Distance, distance, feature_distance
from fewstep.methods.parts.score_pair import MATCHED, ScorePair, Weighting, critic_rate, matching_loss
from fewstep.methods.parts.statistics import student_statistics
from fewstep.methods.settings import FixedGuidance, Weight, checked
from fewstep.models.cond import Cond
from fewstep.models.roles import Roles
from fewstep.sampling.sample import first_state


@dataclass
class Draws:
    """Random numbers of one DMD step.

    Attributes:
        start: [B, ...] unit normal z, what the student's predictions are made of.
        time: [B] float64 native times at which both scores are compared, from 2 % to 98 % of the levels.
        noise: [B, ...] unit normal, which noises the predictions for both.
        fake_time: [B] float64 native times at which the fake score learns, of all levels.
        fake_noise: [B, ...] unit normal, which noises the predictions for it.
    """

    start: Tensor
    time: Tensor
    noise: Tensor
    fake_time: Tensor
    fake_noise: Tensor


@dataclass
class Shared:
    """The student's clean predictions x and x_ref, [B, ...] each, with their graph."""

    x0_student: Tensor
    reference: Tensor


class DMD(Method):
    """One step, from pure noise at the schedule's start."""

    name = "dmd"
    summary = "Distribution matching: two scores give the gradient, the teacher's pairs keep the modes; one step."
    players = (Player("student"), Player("fake"))
    streams = ("data", "pairs")
    chosen_start = "timestep"
    renamed: ClassVar[dict[str, str]] = {"fake_begins": "fake_init_from"}
    truth_settings: ClassVar[dict[str, Any]] = {"guidance_scale": 1.0}

    @checked
    class Settings:
        """Settings of DMD.

        Attributes:
            timestep: at which the student meets unit noise; empty is the schedule's start, 999, or, on a table that
                ends above 15 (DDPM's: 157), its noisiest index of at most 15. DMD2 asks SDXL's one-step student at 399,
                where an error of eps weighs 1.2 in x0 and not 14.6.
            guidance_scale: of the teacher in g (1 = off); pairs should be made with the same, and are by default.
            weighting: "l1", the code's, or "kl", the exact gradient of KL(q_t || p_t).
            fake_init_from: whose first weights the fake score has: "teacher", or "student", where ``init`` has moved
                those: the fake score then knows the student's predictions from the first step (Hyper-SD's one step).
            regression_weight: of L_reg; 0.25 in all published runs of one guidance scale but unconditional CIFAR-10.
            regression: "l2" or "huber", element-wise with huber_c, on latents.
            regression_space: "latents", or "features" of the decoded images (`feature_distance`).
            encoder: whose features: "scenes-64", or a vision model of transformers by folder or hub name.
        """

        timestep: float | None = None
        guidance_scale: FixedGuidance = 3.0
        weighting: Weighting = "l1"
        fake_init_from: Literal["teacher", "student"] = "teacher"
        regression_weight: Weight = 0.25
        regression: Distance = "l2"
        huber_c: float = 1e-3
        regression_space: Literal["latents", "features"] = "latents"
        encoder: str = "scenes-64"

    settings: Settings

    def __init__(self, schedule: Schedule, settings: Settings | None = None, **overrides: Any) -> None:
        super().__init__(schedule, settings, **overrides)
        if self.settings.regression_space == "features":
            self.encoder = self.settings.encoder
        if self.settings.timestep is None:
            self.default_times = student_times(schedule, 1)
            self.settings = replace(self.settings, timestep=next(iter(self.default_times), None))
        given = self.settings.timestep
        self.timestep = float(schedule.start if given is None else given)
        if schedule.alpha_sigma(self.timestep)[1] == 0:
            raise ValueError("timestep must be above clean data, where a student has nothing to do.")
        self.players = (Player("student"), Player("fake", rate=critic_rate(schedule)))
        self.scores = ScorePair(schedule, self.settings.guidance_scale, self.settings.weighting)

    def roles(self) -> tuple[RoleSpec, ...]:
        return RoleSpec("student"), RoleSpec("fake", init_from=self.settings.fake_init_from)

    @classmethod
    def sampling(cls, settings: Settings) -> Sampling:
        times = () if settings.timestep is None else (settings.timestep,)
        return Sampling(num_inference_steps=1, no_other_steps=True, timesteps=times)

    @classmethod
    def needs_images(cls, settings: Settings) -> bool:
        return False  # the pairs are its images

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Draws:
        shape = batch.x0.shape[1:]
        return Draws(
            start=rng.sample.normal("start", shape),
            time=self.scores.draw_time(rng, "time", *MATCHED),
            noise=rng.sample.normal("noise", shape),
            fake_time=self.scores.draw_time(rng, "fake_time"),
            fake_noise=rng.sample.normal("fake_noise", shape),
        )

    def prepare(self, roles: Roles, batch: Batch, draws: Draws, due: Collection[str]) -> Shared:
        pairs, cond = batch.needed_pairs("DMD"), batch.cond
        if cond is not None and pairs.cond is not None:
            cond = Cond.cat([cond, pairs.cond])
        x_t = first_state(self.schedule, torch.cat([draws.start, pairs.noise]), self.timestep)
        x = roles.student(x_t, self.timestep, cond).x0
        return Shared(x[: len(draws.start)], x[len(draws.start) :])

    def student(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        settings, x = self.settings, shared.x0_student
        found = self.scores.matching(roles, x, draws.noise, draws.time, batch.cond)
        matching = matching_loss(x, found.gradient)
        wanted = batch.needed_pairs("DMD").x0
        regression = self._regression(roles, shared.reference, wanted)
        parts = {"matching": matching.detach(), "regression": regression.detach()}
        return Loss(
            matching + settings.regression_weight * regression,
            parts,
            stats=student_statistics(x.detach(), wanted) | found.stats,
        )

    def fake(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        return Loss(self.scores.denoising_loss(roles, shared.x0_student, draws.fake_noise, draws.fake_time, batch.cond))

    def _regression(self, roles: Roles, reference: Tensor, wanted: Tensor) -> Tensor:
        """The distance of predictions to what the teacher made of the same noise, [B, ...] each."""
        if self.settings.regression_space == "latents":
            return distance(reference, wanted, self.settings.regression, self.settings.huber_c)
        taps = list(roles.encoder.tap_channels)
        with torch.no_grad():
            seen = roles.encoder.features(roles.decode(wanted), taps)
        return feature_distance(roles.encoder.features(roles.decode(reference), taps), seen)

    def calls_per_step(self) -> dict[str, int]:
        return {"student": 1, "teacher": 1, "fake": 2}
