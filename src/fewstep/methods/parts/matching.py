"""Distribution matching: a fake score learns the student's predictions, which move along two scores' difference.

Both scores are compared at one noise level, from 2 % to 98 % of all, where neither is singular (`ScorePair`).

``match: x_s`` noises the jumps of a student on the ODE in place of its clean predictions, to levels between the jump's
two times: every call then lands where the teacher's marginal is (TDM: Luo et al. 2025, arXiv 2503.06674).

``guidance_apart`` makes guidance a term of its own (decoupled DMD: Liu et al. 2025, arXiv 2511.22677; Z-Image-Turbo):

    g = w (mu_fake(x_t) - mu_real(x_t)) - u (guided mu_real(x_t') - mu_real(x_t'))      mu_real alone is unguided

The second bracket is guidance_scale - 1 times what the condition adds, at the student's predictions, noised to a level
t' no noisier than the student's own; u is 1 / mean |x - mu_real(x_t')| with "l1", and 1 with "kl".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedule import Schedule, working
from fewstep.methods.base import Loss
from fewstep.methods.parts.score_pair import (
    MATCHED,
    FakeTarget,
    Jump,
    ScorePair,
    Weighting,
    difference,
    matching_loss,
    over_distance,
)
from fewstep.methods.parts.statistics import student_statistics
from fewstep.methods.settings import FixedGuidance, checked
from fewstep.models.cond import Cond
from fewstep.models.roles import Roles

Match: TypeAlias = Literal["x0", "x_s"]


@checked
class MatchingSettings:
    """What two scores compare.

    Attributes:
        guidance_scale: the teacher's w in the matching (1 = off). DMD2's paper: 8 for SDXL, 1.75 for SD1.5.
        guidance_apart: guidance as a term of its own.
        weighting: "l1" or "kl" (`parts.score_pair`).
        match: "x0", the student's predictions, or "x_s", its jumps.
        fake_target: what the fake score learns of jumps: "x0", the predictions (TDM), or "score", the exact one.
    """

    guidance_scale: FixedGuidance = 8.0
    guidance_apart: bool = False
    weighting: Weighting = "l1"
    match: Match = "x0"
    fake_target: FakeTarget = "x0"


@dataclass(kw_only=True)
class MatchingDraws:
    """Where scores are learnt and compared: native times [B] on the host, unit normals [B, ...].

    Attributes:
        fake_time, fake_noise: where the fake score learns.
        matching_time, matching_noise: where both scores are compared; None where the student is not due, like
        guidance_time, guidance_noise: where guidance alone acts; None where it is part of the matching, too.
    """

    fake_time: Tensor | None = None
    fake_noise: Tensor | None = None
    matching_time: Tensor | None = None
    matching_noise: Tensor | None = None
    guidance_time: Tensor | None = None
    guidance_noise: Tensor | None = None


class DistributionMatching:
    """The losses of a student and of its fake score.

    Attributes:
        scores: both scores, the real one guided. compared: as they are compared, unguided where guidance is apart.
        guidance_apart, match, fake_target: as `MatchingSettings` has them.
    """

    def __init__(self, schedule: Schedule, settings: MatchingSettings) -> None:
        self.scores = self.compared = ScorePair(schedule, settings.guidance_scale, settings.weighting)
        self.guidance_apart, self.match, self.fake_target = (
            settings.guidance_apart, settings.match, settings.fake_target,
        )  # fmt: skip
        if self.guidance_apart:
            self.compared = ScorePair(schedule, 1.0, settings.weighting)

    @property
    def teacher_calls(self) -> int:
        """The teacher's calls in a step of the student."""
        return 2 if self.guidance_apart else 1

    def jump(self, pred: Prediction, s: float) -> Jump | None:
        """The student's jump to native time s, without a graph, where it is matched; clean data are its x0 anyway."""
        matched = self.match == "x_s" and s != self.scores.schedule.clean
        return Jump(pred.at(s).detach(), s) if matched else None

    def draw(self, draws: MatchingDraws, rng: Rng, shape: Sequence[int], due: bool, t: float, s: float) -> None:
        """Fill in the random numbers of the fake score, and of the student, at its time t, where it is due.

        Args:
            s: the native time to which its call leads on the ODE.
        """
        above, upto = (s, t) if self.match == "x_s" else (None, None)
        draws.fake_time = self.scores.draw_time(rng, "fake_time", above=above, upto=upto)
        draws.fake_noise = rng.sample.normal("fake_noise", shape)
        if due:
            draws.matching_time = self.scores.draw_time(rng, "matching_time", *MATCHED, above, upto)
            draws.matching_noise = rng.sample.normal("matching_noise", shape)
        if due and self.guidance_apart:
            draws.guidance_time = self.scores.draw_time(rng, "guidance_time", *MATCHED, upto=t)
            draws.guidance_noise = rng.sample.normal("guidance_noise", shape)

    def student(self, roles: Roles, batch: Batch, x: Tensor, draws: MatchingDraws, jump: Jump | None) -> Loss:
        """The loss of the student's predictions x [B, ...], with their graph, and its statistics."""
        assert draws.matching_time is not None and draws.matching_noise is not None
        matched = self.compared.matching(roles, x, draws.matching_noise, draws.matching_time, batch.cond, jump)
        gradient, stats = matched.gradient, dict(matched.stats)
        if self.guidance_apart:
            gradient = gradient - self.guidance(roles, x, draws, batch.cond)
        loss = matching_loss(x, gradient)
        if batch.has_data:
            stats |= student_statistics(x, batch.x0)
        stats["matching_pull"] = gradient.norm() / x.numel()
        return Loss(loss, {"matching": loss.detach()}, stats)

    @torch.no_grad()
    def guidance(self, roles: Roles, x: Tensor, draws: MatchingDraws, cond: Cond | None) -> Tensor:
        """What guidance adds to the real score's clean data at predictions x [B, ...], noised to its own time."""
        assert draws.guidance_time is not None and draws.guidance_noise is not None
        t, scale = draws.guidance_time, self.scores.guidance_scale
        x_t = self.scores.schedule.add_noise(x, draws.guidance_noise, t)
        guided, plain = roles.teacher.with_and_without_guidance(x_t, t, cond, scale)
        added = difference(guided, plain)
        return over_distance(added, working(x), plain.x0) if self.scores.weighting == "l1" else added

    def fake(self, roles: Roles, x0: Tensor, draws: MatchingDraws, cond: Cond | None, jump: Jump | None) -> Loss:
        """The fake score's loss of the student's predictions x0 [B, ...], without a graph."""
        assert draws.fake_time is not None and draws.fake_noise is not None
        noise, t = draws.fake_noise, draws.fake_time
        loss = self.scores.denoising_loss(roles, x0, noise, t, cond, jump, self.fake_target)
        return Loss(loss, {"denoising": loss.detach()})
