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
from fewstep.methods.settings import Halvings, Weight, checked
from fewstep.models.cond import Cond
from fewstep.models.roles import Roles


@checked
class GANSettings:
    """A discriminator beside the scores.

    Attributes:
        adversarial_weight: of the GAN in the student's loss; 0 leaves the discriminator out. Losses are means, and the
            matching's gradient shrinks with the root of the number of elements: 5e-3 is for 4 x 128 x 128, 3e-3 for
            3 x 64 x 64 (ImageNet); for a few numbers take 0.05 to 0.2.
        discriminator_weight: of the discriminator's loss beside the fake score's.
        discriminator_backbone: "fake", whose features learn with the heads, or "teacher", frozen features (FastGen,
            which had results as good).
        head: "conv", down to one logit, or "residual", one for each position. halvings: of a conv head, whose map must
            come down to 4x4: 0 from 4x4 (scenes-64) or 8x8 with four logits, 1 for SD1.5, 3 for SDXL.
    """

    adversarial_weight: Weight = 5e-3
    discriminator_weight: Weight = 1e-2
    discriminator_backbone: Literal["fake", "teacher"] = "fake"
    head: Literal["conv", "residual"] = "conv"
    halvings: Halvings = 0


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
        settings: weights, backbone and head.
    """

    def __init__(self, scores: ScorePair, settings: GANSettings) -> None:
        self.scores, self.weight, self.discriminator_weight = (
            scores, settings.adversarial_weight, settings.discriminator_weight,
        )  # fmt: skip
        self.backbone: str = settings.discriminator_backbone
        self.gan = Discriminator("logistic", self.backbone, taps="last", head=settings.head, halvings=settings.halvings)
        self.name = self.gan.name

    def spec(self) -> HeadSpec:
        """What a method returns from `Method.heads`."""
        return self.gan.spec()

    def draw(self, draws: GANDraws, rng: Rng, shape: Sequence[int], due: bool) -> None:
        """Fill in the random numbers of the discriminator, and of the student where it is due."""
        if due:
            draws.played_time = self.scores.draw_time(rng, "played_time")
            draws.played_noise = rng.sample.normal("played_noise", shape)
        draws.judged_time = self.scores.draw_time(rng, "judged_time")
        draws.judged_noise = rng.sample.normal("judged_noise", shape)
        draws.data_time = self.scores.draw_time(rng, "data_time")
        draws.data_noise = rng.sample.normal("data_noise", shape)

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
