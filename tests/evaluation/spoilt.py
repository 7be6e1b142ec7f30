"""Small runs that really train, healthy ones and ones spoilt on purpose, for `fewstep diagnose` to tell apart.

The data are a ring of six modes with a closed-form teacher; students and critics are small networks. Two methods stand
for the families to come: `Duel` is adversarial, `Match` has a fake score.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import softplus

from fewstep.data.sources import MixtureSource
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Batch, Loss, Method, Player, RoleSpec
from fewstep.methods.parts.statistics import (
    answer_statistics,
    discriminator_statistics,
    fake_score_statistics,
)
from fewstep.models.denoiser import Denoiser
from fewstep.models.mlp import MLP
from fewstep.models.roles import Roles
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, follow

VP = Schedule.scaled_linear()
RING = GaussianMixture.ring(6, 1.0, 0.3, num_classes=3)
THIN = GaussianMixture.ring(6, 1.0, 0.05, num_classes=3)  # of which a discriminator can be sure
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
        return Loss(total, {"adversarial": adversarial.detach()}, answer_statistics(shared.detach(), batch.x0))

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
        return Loss(loss, {"matching": loss.detach()}, answer_statistics(shared.detach(), batch.x0))

    def critic(self, roles, batch, draws, shared):
        noises, times = draws
        answers = shared.detach()
        x_t = self.schedule.add_noise(answers, noises[2], times)
        said = roles.critic(x_t, times, batch.cond).x0
        with torch.no_grad():
            teacher = roles.teacher(x_t, times, batch.cond).x0
        loss = (said - answers).square().mean()
        return Loss(loss, stats=fake_score_statistics(said.detach(), teacher, answers))


class Moved:
    """A source of data that are not the teacher's: scaled and moved."""

    def __init__(self, source, scale=1.0, by=0.0):
        self.source, self.scale, self.by = source, scale, by

    def batch(self, rng):
        batch = self.source.batch(rng)
        return Batch(self.scale * batch.x0 + self.by, batch.cond)


def trainer(method, folder, seed=0, mixture=RING, scale=1.0, by=0.0, **settings):
    """A run of ``method`` in ``folder`` on the ring's exact teacher, students and critics from scratch."""
    roles = Roles(Denoiser(mixture.network(VP, "sample"), VP, "sample"))
    source = Moved(MixtureSource(mixture, range(3)), scale, by)
    torch.manual_seed(seed)
    for spec in method.roles():
        if spec.follows is None:
            net = MLP(VP, 2, width=64, depth=2, num_classes=3, accepts=frozenset(spec.extra_inputs), std=0.77)
            roles.add_network(spec.name, net, "sample")
    settings = TrainingSettings(
        **{"steps": 600, "batch_size": 128, "learning_rate": 1e-3, "log_every": 20, "checkpoint_every": 10**6} | settings
    )
    follow(roles, method, settings)
    return Trainer(method, roles, source, settings, seed=seed, run_dir=folder)
