"""A discriminator of jumps from one state: the student's or the teacher's (SDXL-Lightning, sec. 3.3 and 3.4).

It is the diffusion model's own encoder and middle, all of it trained, with a convolutional head: of the model that a
whole chain of students began with. It sees both jumps at the time of their end, with the logistic loss. On clean
data an encoder sees no structure: jumps to the schedule's end are noised first, both with one noise, to a
time t* drawn from a few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewstep.data.random import Rng
from fewstep.diffusion.schedule import Schedule, Time
from fewstep.methods.base import HeadSpec, Loss, Player, RoleSpec
from fewstep.methods.parts.discriminators import Discriminator, generator_loss, logged_discriminator_loss
from fewstep.methods.parts.distances import with_gradient
from fewstep.methods.parts.score_pair import noise_levels
from fewstep.methods.settings import Held
from fewstep.models.cond import Cond
from fewstep.models.roles import Roles
from fewstep.sampling.samplers import renoise

BACKBONE, HEADS = "discriminator", "heads"


@dataclass
class Judged:
    """A student's jump before the discriminator.

    Attributes:
        at: [B] native times (host) at which both jumps are seen; noise: [B, ...] what those that need it are
            noised with.
        seen: [B, ...] the jump there, with its graph; leaf: its copy without.
        features: the discriminator's, of the leaf. beside: of where it started, for one that sees that too.
    """

    at: Tensor
    noise: Tensor
    seen: Tensor
    leaf: Tensor
    features: list[Tensor]
    beside: list[Tensor] | None = None


class TrajectoryDiscriminator:
    """The GAN of both jumps.

    Args:
        schedule: of both.
        times: t*, as shares of the way from clean data to noise; weights: how often each.
        held: "full", all weights of the encoder, or "lora".
        halvings: of the head, whose map must come down to 4x4.
        beside: whether it sees where they started, too.
    """

    player = Player("discriminator", owns=(BACKBONE, HEADS))

    def __init__(
        self,
        schedule: Schedule,
        times: Sequence[float] = (0.01, 0.25, 0.5, 0.75),
        weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        held: Held = "full",
        halvings: int = 0,
        beside: bool = False,
    ) -> None:
        self.schedule = schedule
        self.levels = _levels(schedule, times)
        share = torch.tensor(weights, dtype=torch.float64)
        self.shares = (share / share.sum()).cumsum(0)[:-1]
        self.role = RoleSpec(BACKBONE, features_only=True, weights=held)
        images = 2 if beside else 1
        self.gan = Discriminator("logistic", BACKBONE, HEADS, "last", "conv", halvings, images)

    @property
    def calls(self) -> int:
        """Number of encoder calls in a step."""
        return 1 + self.gan.images

    def spec(self) -> HeadSpec:
        """What a method returns from `Method.heads`."""
        return self.gan.spec()

    def draw(self, rng: Rng, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[B] numbers in [0, 1), which t* it is, and [B, *shape] unit normals that both jumps are noised with."""
        return rng.sample.uniform("level"), rng.sample.normal("level_noise", shape)

    def judge(
        self,
        roles: Roles,
        x_s: Tensor,
        s: Tensor,
        level: Tensor | None,
        noise: Tensor | None,
        cond: Cond | None,
        start: tuple[Tensor, Time] | None = None,
    ) -> Judged:
        """The discriminator's features of a student's jump [B, ...] to s [B], from ``start`` (x_t, t)."""
        assert level is not None and noise is not None
        at = self.judged_at(s, level)
        seen = renoise(self.schedule, x_s, s, at, noise)
        leaf = seen.detach().requires_grad_()
        judged = Judged(at, noise, seen, leaf, self.gan.features(roles, leaf, at, cond))
        if self.gan.images == 2:  # the start x_t of both jumps, without noise added, at its own time t
            assert start is not None
            judged.beside = self.gan.features(roles, *start, cond)
        return judged

    def student(self, roles: Roles, judged: Judged) -> tuple[Tensor, Tensor]:
        """softplus(-D), which the student minimises, and its gradient at what was seen, [B, ...].

        That gradient is formed at once: the graph of the features stays for the discriminator's own loss.
        """
        adversarial = generator_loss(self._logits(roles, judged.features, judged), self.gan.loss)
        (grad,) = torch.autograd.grad(adversarial, judged.leaf, retain_graph=True)
        return with_gradient(adversarial, judged.seen, grad), grad

    def discriminator(self, roles: Roles, real: Tensor, s: Tensor, judged: Judged, cond: Cond | None) -> Loss:
        """softplus(-D(real)) + softplus(D(fake)); real: [B, ...] where the student should have landed, at s [B]."""
        seen = renoise(self.schedule, real, s, judged.at, judged.noise)
        logits = self._logits(roles, self.gan.features(roles, seen, judged.at, cond), judged)
        return logged_discriminator_loss(logits, self._logits(roles, judged.features, judged), self.gan.loss)

    def judged_at(self, s: Tensor, level: Tensor) -> Tensor:
        """s [B] itself, or t* where s is the schedule's end, or clean."""
        return torch.where(s <= self.schedule.end, self.levels[torch.searchsorted(self.shares, level, right=True)], s)

    def _logits(self, roles: Roles, features: Sequence[Tensor], judged: Judged) -> list[Tensor]:
        if judged.beside is not None:
            features = [torch.cat(pair, dim=1) for pair in zip(features, judged.beside, strict=True)]
        return self.gan.logits(roles, features)


def _levels(schedule: Schedule, shares: Sequence[float]) -> Tensor:
    """Shares of the way to noise as native times: 0.25 is index 249 of 1,000, or 0.25 shifted on flow schedules."""
    levels = noise_levels(schedule)
    place = np.round(np.asarray(shares) * len(levels)).astype(np.int64) - 1
    return torch.from_numpy(levels[np.maximum(place, 0)])
