"""Small runs that really train, healthy ones and ones spoilt on purpose, for `fewstep diagnose` to tell apart.

The data are a ring of six modes with a closed-form teacher; students and critics are small networks. Two methods stand
for the families to come: `Duel` is adversarial, `Match` has a fake score.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import softplus

from fewstep.data.batch import Batch
from fewstep.data.sources import MixtureSource
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Loss, Method, Player, RoleSpec
from fewstep.methods.lcm import LCM
from fewstep.methods.parts.statistics import (
    discriminator_statistics,
    fake_score_statistics,
    student_statistics,
)
from fewstep.methods.tcd import TCD
from fewstep.models.denoiser import Denoiser
from fewstep.models.mlp import MLP
from fewstep.models.roles import Roles
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, follow

VP = Schedule.scaled_linear()
RING = GaussianMixture.ring(6, 1.0, 0.3, num_classes=3)
THIN = GaussianMixture.ring(6, 1.0, 0.02, num_classes=3)  # of which a discriminator can be sure
START = 999


class Duel(Method):
    """One step from noise; a discriminator of noised answers and noised data; no other guide (but `pull`)."""

    name = "duel"
    players = (Player("student"), Player("critic"))

    @dataclass(frozen=True)
    class Settings:
        """Settings of Duel.

        Attributes:
            blind: the discriminator sees data noised so far that nothing is left of it.
            clear: it sees them without any noise.
            scale: of the student's answers.
            distil: weight of the teacher's pull to its own guess at the noised answer (ADD's second loss).
            adversary: weight of the discriminator's opinion.
        """

        blind: bool = False
        clear: bool = False
        scale: float = 1.0
        distil: float = 0.0
        adversary: float = 1.0

    def roles(self):
        return RoleSpec("student"), RoleSpec("critic")

    def draw(self, batch, rng, progress):
        shape = batch.x0.shape[1:]
        times = rng.sample.integers("time", 100, 700)
        return [rng.sample.normal(name, shape) for name in ("start", "real", "fake", "again")], times

    def prepare(self, roles, batch, draws, due):
        return self.settings.scale * roles.student(draws[0][0], START, batch.cond).x0

    def logits(self, roles, x0, noise, times, cond):
        if self.settings.blind or self.settings.clear:
            times = torch.full_like(times, START if self.settings.blind else 0)
        return roles.critic(self.schedule.add_noise(x0, noise, times), times, cond).output[:, 0]

    def student(self, roles, batch, draws, shared):
        noises, times = draws
        adversarial = softplus(-self.logits(roles, shared, noises[2], times, batch.cond)).mean()
        with torch.no_grad():
            x_t = self.schedule.add_noise(shared.detach(), noises[3], times)
            guess = roles.teacher(x_t, times, batch.cond).x0
        distil = (shared - guess).square().mean()
        total = self.settings.adversary * adversarial + self.settings.distil * distil
        return Loss(total, {"adversarial": adversarial.detach()}, student_statistics(shared.detach(), batch.x0))

    def critic(self, roles, batch, draws, shared):
        noises, times = draws
        real = self.logits(roles, batch.x0, noises[1], times, batch.cond)
        fake = self.logits(roles, shared.detach(), noises[2], times, batch.cond)
        loss = (softplus(-real) + softplus(fake)).mean()
        return Loss(loss, stats=discriminator_statistics(real.detach(), fake.detach()))


class Match(Method):
    """Distribution matching (DMD): the student follows teacher minus fake score, which learns its answers."""

    name = "match"

    @dataclass(frozen=True)
    class Settings:
        """Settings of Match."""

        guidance_scale: float = 1.0
        bias: float = 0.0  # a teacher that is off by so much

    players = (Player("student", every=3), Player("critic"))

    def roles(self):
        return RoleSpec("student"), RoleSpec("critic")

    def draw(self, batch, rng, progress):
        shape = batch.x0.shape[1:]
        times = rng.sample.integers("time", 20, 980)
        return [rng.sample.normal(name, shape) for name in ("start", "match", "fake")], times

    def prepare(self, roles, batch, draws, due):
        return roles.student(draws[0][0], START, batch.cond).x0

    def student(self, roles, batch, draws, shared):
        noises, times = draws
        with torch.no_grad():
            x_t = self.schedule.add_noise(shared.detach(), noises[1], times)
            fake = roles.critic(x_t, times, batch.cond).x0
            real = roles.teacher(x_t, times, batch.cond, guidance_scale=self.settings.guidance_scale).x0
            real = real + self.settings.bias
            g = (fake - real) / (shared - real).abs().mean(1, keepdim=True).clamp_min(1e-3)
        loss = 0.5 * (shared - (shared - g).detach()).square().mean()
        return Loss(loss, {"matching": loss.detach()}, student_statistics(shared.detach(), batch.x0))

    def critic(self, roles, batch, draws, shared):
        noises, times = draws
        answers = shared.detach()
        x_t = self.schedule.add_noise(answers, noises[2], times)
        said = roles.critic(x_t, times, batch.cond).x0
        with torch.no_grad():
            teacher = roles.teacher(x_t, times, batch.cond).x0
        loss = (said - answers).square().mean()
        return Loss(loss, stats=fake_score_statistics(said.detach(), teacher, answers))


class Tampered:
    """A source of data that are not the teacher's: scaled and moved, and NaN from a step on."""

    def __init__(self, source, scale=1.0, by=0.0, nan_from=None):
        self.source, self.scale, self.by, self.nan_from = source, scale, by, nan_from

    def batch(self, rng):
        batch = self.source.batch(rng)
        broken = self.nan_from is not None and rng.step >= self.nan_from
        return Batch(self.scale * batch.x0 + (math.nan if broken else self.by), batch.cond)


def trainer(method, folder, seed=0, mixture=RING, tamper=None, **settings):
    """A run of ``method`` in ``folder`` on the ring's exact teacher, students and critics from scratch."""
    roles = Roles(Denoiser(mixture.network(VP, "sample"), VP, "sample"))
    source = Tampered(MixtureSource(mixture, range(3)), **(tamper or {}))
    torch.manual_seed(seed)
    for spec in method.roles():
        if spec.follows is None:
            net = MLP(VP, 2, width=64, depth=2, num_classes=3, accepts=frozenset(spec.extra_inputs), std=0.77)
            roles.add_network(spec.name, net, "sample")
    settings = TrainingSettings(
        **{"steps": 210, "batch_size": 64, "learning_rate": 1e-3, "log_every": 7, "checkpoint_every": 1000} | settings
    )
    follow(roles, method, settings)
    return Trainer(method, roles, source, settings, seed=seed, run_dir=folder)


HOPS = {"num_grid_steps": 10, "guidance_scale": 1.0, "loss": "l2"}
GAN = {"mixture": THIN, "learning_rate": 3e-4, "betas": (0.0, 0.99)}
HEALTHY = {
    "lcm": (LCM(VP, **HOPS), {}),
    "lcm guided": (LCM(VP, **HOPS | {"guidance_scale": 3.0}), {}),
    "tcd": (TCD(VP, **HOPS), {}),
    "duel": (Duel(VP), GAN),
    "match": (Match(VP), {}),
}
# What is spoilt -> the method, its settings, and what is to be found first.
SPOILT = {
    "student's rate 1000 times too high": (LCM(VP, **HOPS), {"learning_rate": 1.0}, "learning rate too high"),
    "student's and critic's rate too high": (Duel(VP), GAN | {"learning_rate": 1.0}, "learning rate too high"),
    "rate next to nothing": (LCM(VP, **HOPS), {"learning_rate": 1e-7}, "learning rate too low"),
    "data become NaN": (TCD(VP, **HOPS), {"tamper": {"nan_from": 107}}, "not finite"),
    "discriminator fast and without noise": (
        Duel(VP, clear=True),
        GAN | {"learning_rate": 7e-6, "critic_learning_rate": 3e-3, "betas": (0.5, 0.99)},
        "discriminator too strong",
    ),
    "discriminator sees noise alone": (Duel(VP, blind=True), GAN, "discriminator blind"),
    "discriminator does not learn": (Duel(VP), GAN | {"critic_learning_rate": 1e-9}, "discriminator blind"),
    "critic hardly learns": (Match(VP), {"critic_learning_rate": 1e-6}, "fake score lagging"),
    "guidance 20": (LCM(VP, **HOPS | {"guidance_scale": 20.0}), {}, "saturation of the teacher"),
    "guidance 8": (Match(VP, guidance_scale=8.0), {}, "saturation"),
    "answers scaled": (Duel(VP, scale=4.0), GAN | {"learning_rate": 1e-5, "critic_learning_rate": 3e-4}, "saturation"),
    "teacher off by 0.7": (Match(VP, bias=0.7), {}, "drift of the mean"),
    "no adversary": (Duel(VP, distil=2.0, adversary=0.0), GAN, "lost diversity"),
    "data moved": (LCM(VP, **HOPS), {"tamper": {"by": 2.0}}, "teacher does not fit the data"),
    "data five times too large": (TCD(VP, **HOPS), {"tamper": {"scale": 5.0}}, "teacher does not fit the data"),
}
