"""A GAN beside two scores: a discriminator of noised images on a score network's features (Yin et al. 2024, sec. 4.3).

It sees data, which the teacher has only learnt from. Each of its three terms has a time and a noise of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.data.random import Rng
from fewstep.methods.base import HeadSpec, Loss
from fewstep.methods.parts.discriminators import Discriminator, generator_loss, logged_discriminator_loss
from fewstep.methods.parts.distances import with_gradient
from fewstep.methods.parts.score_pair import ScorePair
from fewstep.models.cond import Cond
from fewstep.models.roles import Roles


@dataclass(kw_only=True)
class GANDraws:
    """Where the discriminator sees images: native times [B] on the host, unit normals [B, ...].

    Attributes:
        played_time, played_noise: the student's, in its own loss; None where it is not due, or without a GAN, like
        judged_time, judged_noise: the student's, in the discriminator's loss, and
        data_time, data_noise: of data.
    """

    played_time: Tensor | None = None
    played_noise: Tensor | None = None
    judged_time: Tensor | None = None
    judged_noise: Tensor | None = None
    data_time: Tensor | None = None
    data_noise: Tensor | None = None


class ScoreGAN:
    """The adversarial loss of a student and its discriminator's.

    Args:
        scores: whose levels it sees images at.
        backbone: whose features: "fake", which learns with the heads, or "teacher".
        head, halvings: of the discriminator (`Discriminator`).
        weight: of the student's term. discriminator_weight: of the discriminator's.
    """

    def __init__(
        self,
        scores: ScorePair,
        backbone: Literal["fake", "teacher"],
        head: Literal["conv", "residual"],
        halvings: int,
        weight: float,
        discriminator_weight: float,
    ) -> None:
        self.scores, self.weight, self.discriminator_weight = scores, weight, discriminator_weight
        self.gan = Discriminator("logistic", backbone, taps="last", head=head, halvings=halvings)
        self.name, self.backbone = self.gan.name, backbone

    def spec(self) -> HeadSpec:
        """What a method returns from `Method.heads`."""
        return self.gan.spec()

    def draw(self, draws: GANDraws, rng: Rng, shape: Sequence[int], due: bool) -> None:
        """Fill in the random numbers of the discriminator, and of the student where it is due."""
        for name in (*["played"] * due, "judged", "data"):
            setattr(draws, f"{name}_time", self.scores.draw_time(rng, f"{name}_time"))
            setattr(draws, f"{name}_noise", rng.sample.normal(f"{name}_noise", shape))

    def student(self, roles: Roles, x: Tensor, draws: GANDraws, cond: Cond | None, matched: Loss) -> Loss:
        """``matched`` and the adversarial loss of predictions x [B, ...], whose gradient is formed before their graph.

        So no two graphs of a network are held at once.
        """
        leaf = x.detach().requires_grad_()
        adversarial = generator_loss(self._logits(roles, leaf, draws.played_time, draws.played_noise, cond), "logistic")
        (grad,) = torch.autograd.grad(self.weight * adversarial, leaf)
        gan = with_gradient(self.weight * adversarial, x, grad)
        loss, parts, stats = matched.total, matched.parts, matched.stats | {"adversarial_pull": grad.norm()}
        return Loss(loss + gan, parts | {"adversarial": adversarial.detach()}, stats)

    def critic(self, roles: Roles, x0: Tensor, data: Tensor, draws: GANDraws, cond: Cond | None) -> Loss:
        """The discriminator's loss of predictions x0 [B, ...], without a graph, and of data [B, ...]."""
        real = self._logits(roles, data, draws.data_time, draws.data_noise, cond)
        fake = self._logits(roles, x0, draws.judged_time, draws.judged_noise, cond)
        assert draws.data_time is not None and draws.judged_time is not None
        times = draws.data_time, draws.judged_time
        gan_loss = logged_discriminator_loss(real, fake, "logistic", times, self.scores.levels)
        weighted = self.discriminator_weight * gan_loss.total
        return Loss(weighted, {"discriminator": gan_loss.total.detach()}, gan_loss.stats)

    def _logits(
        self, roles: Roles, x: Tensor, t: Tensor | None, noise: Tensor | None, cond: Cond | None
    ) -> list[Tensor]:
        """The discriminator's logits of x [B, ...], noised to t."""
        assert t is not None and noise is not None
        x_t = self.scores.schedule.add_noise(x, noise, t)
        return self.gan.logits(roles, self.gan.features(roles, x_t, t, cond))
