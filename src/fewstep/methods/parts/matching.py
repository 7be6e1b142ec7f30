"""Distribution matching: a fake score learns the student's predictions, which move along two scores' difference.

Both scores are compared at one noise level, from 2 % to 98 % of all, where neither is singular (`ScorePair`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.methods.base import Loss
from fewstep.methods.parts.score_pair import ScorePair, matching_loss
from fewstep.methods.parts.statistics import student_statistics
from fewstep.models.cond import Cond
from fewstep.models.roles import Roles


@dataclass(kw_only=True)
class MatchingDraws:
    """Where scores are learnt and compared: native times [B] on the host, unit normals [B, ...].

    Attributes:
        fake_time, fake_noise: where the fake score learns.
        matching_time, matching_noise: where both scores are compared; None where the student is not due.
    """

    fake_time: Tensor | None = None
    fake_noise: Tensor | None = None
    matching_time: Tensor | None = None
    matching_noise: Tensor | None = None


@dataclass(frozen=True)
class DistributionMatching:
    """The losses of a student and of its fake score."""

    scores: ScorePair

    def draw(self, draws: MatchingDraws, rng: Rng, shape: Sequence[int], due: bool) -> None:
        """Fill in the random numbers of the fake score, and of the student where it is due."""
        draws.fake_time = self.scores.draw_time(rng, "fake_time")
        draws.fake_noise = rng.sample.normal("fake_noise", shape)
        if due:
            draws.matching_time = self.scores.draw_time(rng, "matching_time", 0.02, 0.98)
            draws.matching_noise = rng.sample.normal("matching_noise", shape)

    def student(self, roles: Roles, batch: Batch, x: Tensor, draws: MatchingDraws) -> Loss:
        """The loss of the student's predictions x [B, ...], with their graph, and its statistics."""
        assert draws.matching_time is not None and draws.matching_noise is not None
        matched = self.scores.matching(roles, x, draws.matching_noise, draws.matching_time, batch.cond)
        loss, stats = matching_loss(x, matched.gradient), dict(matched.stats)
        if batch.has_data:
            stats |= student_statistics(x, batch.x0)
        stats["matching_pull"] = matched.gradient.norm() / x.numel()
        return Loss(loss, {"matching": loss.detach()}, stats)

    def fake(self, roles: Roles, x0: Tensor, draws: MatchingDraws, cond: Cond | None) -> Loss:
        """The fake score's loss of the student's predictions x0 [B, ...], without a graph."""
        assert draws.fake_time is not None and draws.fake_noise is not None
        loss = self.scores.denoising_loss(roles, x0, draws.fake_noise, draws.fake_time, cond)
        return Loss(loss, {"denoising": loss.detach()})
