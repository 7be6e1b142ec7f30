"""Discriminators: heads on the inner features of a network, and the losses of a GAN.

A discriminator is a backbone (any role; most often the frozen teacher), taps (which of its activations), heads (small,
trainable, float32 at least), and a loss. A logit above 0 means real. At which noise level it looks, and at what, is
the method's affair. Gradients flow through a frozen backbone to its input, never into its weights.

=========  =====================================  ======================  ==============================
loss       of the discriminator                   of the generator        the best discriminator's logit
=========  =====================================  ======================  ==============================
hinge      relu(1 - real) + relu(1 + fake)        -fake                   sign(p - q)
logistic   softplus(-real) + softplus(fake)       softplus(-fake)         log p/q
=========  =====================================  ======================  ==============================

Every head counts alike, and so does every position of its map: the losses are means over both. (ADD sums over heads,
which multiplies a weight by their number.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.diffusion.schedule import Time
from fewstep.methods.base import HeadSpec, Loss
from fewstep.methods.parts.heads import ConvHead, Heads, ResidualHead
from fewstep.methods.parts.statistics import by_time, discriminator_statistics
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.roles import Roles

AdversarialLoss: TypeAlias = Literal["hinge", "logistic"]
Logits: TypeAlias = Sequence[Tensor]
"""One tensor [B, positions] for each head."""
Judge: TypeAlias = Callable[[Sequence[Tensor]], list[Tensor]]
"""Heads: features -> logits."""


def discriminator_loss(real: Logits, fake: Logits, kind: AdversarialLoss = "hinge") -> Tensor:
    """What the discriminator minimises; at the optimum 2 (1 - TV) for hinge, 2 log 2 - 2 JS for logistic."""
    if kind == "hinge":
        return _mean([F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True)])
    return _mean([F.softplus(-r).mean() + F.softplus(f).mean() for r, f in zip(real, fake, strict=True)])


def generator_loss(fake: Logits, kind: AdversarialLoss = "hinge") -> Tensor:
    """What the generator minimises: -fake for hinge, softplus(-fake) for logistic (non-saturating)."""
    return _mean([(-f if kind == "hinge" else F.softplus(-f)).mean() for f in fake])


def logged_discriminator_loss(
    real: Logits, fake: Logits, kind: AdversarialLoss = "hinge",
    times: tuple[Tensor, Tensor] | None = None, levels: Tensor | None = None,
) -> Loss:  # fmt: skip
    """`discriminator_loss` of both sides' logits, with the statistics that are logged.

    Args:
        times: host times [B] to which real and fake were noised, among ``levels``, for the log (`by_time`).
    """
    stats = discriminator_statistics(*(torch.cat([head.flatten() for head in side]) for side in (real, fake)))
    if times is not None and levels is not None:
        for name, side, t in zip(("real", "fake"), (real, fake), times, strict=True):
            stats |= by_time({f"d_{name}": torch.cat(list(side), dim=1).sigmoid().mean(1)}, t, levels, name)
    return Loss(discriminator_loss(real, fake, kind), stats=stats)


def r1(heads: Judge, features: Sequence[Tensor]) -> Tensor:
    """Mean over heads and samples of |d(sum of a head's logits) / d(its features)|^2: R1 at the heads' inputs.

    Taken there and not at the image (ADD, sec. 3), so that only the small heads are differentiated twice.
    """
    leaves = [feature.detach().requires_grad_() for feature in features]
    total = torch.stack([logits.sum() for logits in heads(leaves)]).sum()
    slopes = torch.autograd.grad(total, leaves, create_graph=True)
    return _mean([slope.flatten(1).square().sum(dim=1).mean() for slope in slopes])


def _mean(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).mean()


@dataclass(frozen=True)
class Discriminator:
    """Heads on the features of a role.

    Attributes:
        loss: "hinge" or "logistic".
        backbone: the role whose features it sees.
        name: of its heads among ``roles.heads``, and of the player that trains them.
        taps: which features; None takes all that the network offers, "last" the last of them, a UNet's middle.
        head: "residual" (PCM's, a logit a position) or "conv" (DMD2's and Lightning's, down to one logit).
        halvings: of a conv head.
        images: how many images' features a head sees side by side, on their channels.
    """

    loss: AdversarialLoss = "hinge"
    backbone: str = "teacher"
    name: str = "discriminator"
    taps: tuple[str, ...] | Literal["last"] | None = None
    head: Literal["residual", "conv"] = "residual"
    halvings: int = 0
    images: int = 1

    def spec(self) -> HeadSpec:
        """What a method returns from `Method.heads`."""
        return HeadSpec(self.name, self._build, self.backbone, squares=self.head == "conv")

    def _build(self, channels: Mapping[str, int]) -> Heads:
        taps = list(channels)[-1:] if self.taps == "last" else self.taps or tuple(channels)
        for tap in taps:
            if tap not in channels:
                raise ValueError(f"A discriminator cannot look at '{tap}': this network has {', '.join(channels)}.")
        head = ResidualHead if self.head == "residual" else partial(ConvHead, halvings=self.halvings)
        return Heads({tap: self.images * channels[tap] for tap in taps}, head)

    def features(self, roles: Roles, x: Tensor, t: Time, cond: Cond | None) -> list[Tensor]:
        """What it sees of x [B, ...] at time t; half a network call."""
        backbone: Denoiser = getattr(roles, self.backbone)
        return backbone.features(x, t, cond, self._heads(roles).taps)

    def logits(self, roles: Roles, features: Sequence[Tensor]) -> list[Tensor]:
        """Its logits of these features, [B, positions] for every head."""
        return cast("list[Tensor]", self._heads(roles)(features))

    def player_loss(self, roles: Roles, real: Sequence[Tensor] | None, fake: Sequence[Tensor] | None) -> Loss:
        """The loss of the player that trains the heads, from features of both sides; no gradient reaches the student.

        Args:
            real, fake: features of data and of the student's samples, as `features` returns them.
        """
        assert real is not None and fake is not None
        of_real, of_fake = self.logits(roles, real), self.logits(roles, [feature.detach() for feature in fake])
        return logged_discriminator_loss(of_real, of_fake, self.loss)

    def _heads(self, roles: Roles) -> Heads:
        return cast(Heads, roles.heads[self.name])
