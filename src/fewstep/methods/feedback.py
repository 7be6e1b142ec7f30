"""Human feedback on a few-step student: Hyper-SD's second stage (Ren et al. 2024, arXiv 2404.13686, sec. 3.3), after
ReFL (Xu et al. 2023, arXiv 2304.05977).

The teacher here is a consistency student that is finished, frozen with its own LoRA in it; the student is a second LoRA
on top, which learns what people like. Each step:

    x_t = state of the student's own sampler after ``exit`` calls from pure noise, without a gradient
    y = decode(x0_student(x_t, t))                                     one call with a gradient
    loss = sum_d  w_d mean relu(threshold_d - r_d(y, prompt))          r_d: reward models, frozen
         + perceptual_weight  distance(decode(x0_student(data noised)), decode(data))
         + anchor_weight      mean (x0_student - x0_teacher)^2         both at x_t

An image whose reward has reached the threshold has no gradient. This and short training keep a student from exploiting
the reward models. The exit is drawn anew in each step, because a gradient through the last call alone is unstable
(ReFL); the whole batch has the same exit.

Choices where the papers are silent: thresholds and weights (unpublished); exits are uniform over all calls, for a
student that shall be good at fewer steps too (ReFL: the last quarter of forty); the perceptual term noises data
straight to one of the student's times (there: diffused, then denoised part of the way) and takes what the encoder
reads in the data for an annotation. ReFL's second term, diffusion on data, would undo few-step training;
`anchor_weight` stands for it, and is 0.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor

from fewstep.diffusion.schedule import Schedule, working
from fewstep.methods import Batch, Loss, Method, Progress, Rng, Sampling
from fewstep.methods.parts.distances import distance
from fewstep.methods.parts.perceptual import perceptual_loss
from fewstep.methods.parts.statistics import student_statistics
from fewstep.methods.settings import Count, Weight, checked
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.rewards import short_name
from fewstep.models.roles import Roles
from fewstep.sampling import SAMPLERS, make_sampler
from fewstep.sampling.sample import first_state, walk


@checked
class Goal:
    """A reward that is to reach a threshold.

    Attributes:
        model: the reward model's name (`fewstep.models.rewards`).
        threshold: the reward from which on it has no gradient, in the model's own units.
        weight: of what is missing.
        name: what it is called in the log; by default `short_name`.
    """

    model: str
    threshold: FiniteFloat
    weight: Weight = 1.0
    name: str = ""

    @property
    def label(self) -> str:
        return self.name or short_name(self.model)


@dataclass
class Draws:
    """Random numbers of one step.

    Attributes:
        exit: how many calls go before the one that is trained; the same in every row, micro-batch and process.
        noise: [B, exit + 1, ...] unit normals: where the student's sampler starts, and what it draws.
        level: [B] int64, at which of the student's times data are shown to it; None without the perceptual term, like
        level_noise: [B, ...] unit normal.
    """

    exit: int
    noise: Tensor
    level: Tensor | None = None
    level_noise: Tensor | None = None


@dataclass
class Shared:
    """The state x_t [B, ...] at native time t, a host number, and the student's prediction there, with its graph."""

    t: float
    x_t: Tensor
    x0_student: Tensor


class Feedback(Method):
    """ReFL for few-step students: several rewards with thresholds, instance feedback, an anchor."""

    name = "feedback"
    summary = "Human feedback: a LoRA of its own on a few-step student, until reward models reach their thresholds."
    streams = ("data", "prompts")
    sampler = "tcd"
    continues: ClassVar[bool] = True
    truth_settings: ClassVar[dict[str, Any]] = {
        "rewards": (Goal("points", 0.5, 0.4),), "num_inference_steps": 1, "anchor_weight": 1.0,
    }  # fmt: skip

    @checked
    class Settings:
        """Settings of human feedback.

        Attributes:
            rewards: one or several rewards with their thresholds. PickScore's threshold is our choice: the best
                published students have 0.23 in the mean.
            held_out: a reward model that is logged and never trained on. When the others rise and it falls, the student
                exploits the reward models.
            sampler, num_inference_steps, eta, num_grid_steps: how the student generates images, as the student from
                which it starts; LCM's and TCD's steps are taken from that one's grid of num_grid_steps.
            first_exit: exits are uniform over first_exit ... num_inference_steps - 1.
            perceptual_weight: weight of the term that keeps the content of the data; 0 leaves it out.
            encoder: the image encoder of that term: "scenes-64", which detects things, or a vision model
                of transformers.
            anchor_weight: weight of the distance to the student's prediction before training; 0 leaves it out.
        """

        rewards: tuple[Goal, ...] = (Goal("pickscore", 0.25),)
        held_out: str = ""
        sampler: str = "tcd"
        num_inference_steps: Count = 4
        eta: float = 0.3
        num_grid_steps: Count = 50
        first_exit: Annotated[int, Field(ge=0)] = 0
        perceptual_weight: Weight = 0.0
        encoder: str = "scenes-64"
        anchor_weight: Weight = 0.0

        def __post_init__(self) -> None:
            if not self.rewards:
                raise ValueError("rewards: name one or more, as in 'rewards: [{model: pickscore, threshold: 0.25}]'.")
            labels = [goal.label for goal in self.rewards]
            for goal in self.rewards:
                if labels.count(goal.label) > 1 or goal.label in ("held_out", "perceptual", "anchor"):
                    raise ValueError(f"Two terms of the loss are called {goal.label}: give the reward another name.")
                if goal.model == self.held_out:
                    raise ValueError(
                        f"held_out is {self.held_out}, which is trained on: it must be another reward model."
                    )
            if self.first_exit >= self.num_inference_steps:
                raise ValueError(
                    f"first_exit must be one of the {self.num_inference_steps} calls, counted from 0, not "
                    f"{self.first_exit}."
                )
            if self.perceptual_weight and self.num_inference_steps < 2:
                raise ValueError("perceptual_weight needs a student of two steps or more: one starts from noise alone.")

    settings: Settings

    def __init__(self, schedule: Schedule, settings: Settings | None = None, **overrides: Any) -> None:
        super().__init__(schedule, settings, **overrides)
        settings = self.settings
        self.sampler = settings.sampler
        known = {field.name for field in fields(SAMPLERS[self.sampler])} if self.sampler in SAMPLERS else set()
        options = {"eta": settings.eta, "original_inference_steps": settings.num_grid_steps}
        own = {key: value for key, value in options.items() if key in known}
        self.own_sampler = make_sampler(self.sampler, num_inference_steps=settings.num_inference_steps, **own)
        self.times = self.own_sampler.times(schedule)
        self.rewards = tuple(goal.model for goal in settings.rewards)
        self.measures = (settings.held_out,) if settings.held_out else ()
        self.encoder = settings.encoder if settings.perceptual_weight else ""

    @classmethod
    def needs_images(cls, settings: Settings) -> bool:
        return settings.perceptual_weight > 0

    @classmethod
    def sampling(cls, settings: Settings) -> Sampling:
        return Sampling(settings.num_inference_steps, eta=settings.eta)

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Draws:
        shape, steps = batch.x0.shape[1:], self.settings.num_inference_steps
        exit = rng.shared.integer("exit", self.settings.first_exit, steps)
        draws = Draws(exit, rng.sample.normal("noise", (exit + 1, *shape)))
        if self.settings.perceptual_weight:
            draws.level = rng.sample.integers("level", 1, steps)  # level 0 is pure noise, without content
            draws.level_noise = rng.sample.normal("level_noise", shape)
        return draws

    def prepare(self, roles: Roles, batch: Batch, draws: Draws, due: Collection[str]) -> Shared:
        x_t, t = self.state(roles.student, draws, batch.cond), float(self.times[draws.exit])
        return Shared(t, x_t, roles.student(x_t, t, batch.cond).x0)

    def state(self, student: Denoiser, draws: Draws, cond: Cond | None) -> Tensor:
        """The state of the student's own sampler after ``draws.exit`` calls, [B, ...], without a graph."""
        start, *others = draws.noise.unbind(1)
        x = first_state(self.schedule, start, float(self.times[0]))
        with torch.no_grad():
            return walk(student, self.own_sampler, x, self.times, iter(others).__next__, cond, until=draws.exit)[-1]

    def student(self, roles: Roles, batch: Batch, draws: Draws, shared: Shared) -> Loss:
        settings, images = self.settings, roles.decode(shared.x0_student)
        terms, stats = {}, student_statistics(shared.x0_student, batch.x0) if batch.has_data else {}
        for goal in settings.rewards:
            reward = working(roles.reward(goal.model)(images, batch.prompts))
            terms[f"{goal.label}_missing"] = (goal.weight, torch.relu(goal.threshold - reward).mean())
            stats |= reward_statistics(goal.label, reward) | {
                f"{goal.label}_reached": (reward.detach() >= goal.threshold).to(reward.dtype).mean()
            }
        if settings.perceptual_weight:
            terms["perceptual"] = (settings.perceptual_weight, self.perceptual(roles, batch, draws))
        if settings.anchor_weight:
            with torch.no_grad():
                before = roles.teacher(shared.x_t, shared.t, batch.cond).x0
            terms["anchor"] = (settings.anchor_weight, distance(shared.x0_student, before))
        if settings.held_out:
            with torch.no_grad():
                stats |= reward_statistics("held_out", roles.reward(settings.held_out)(images, batch.prompts))
        total = torch.stack([weight * term for weight, term in terms.values()]).sum()
        return Loss(total, {name: term.detach() for name, (_, term) in terms.items()}, stats)

    def perceptual(self, roles: Roles, batch: Batch, draws: Draws) -> Tensor:
        """The perceptual distance of the student's prediction from noised data to the data."""
        assert draws.level is not None and draws.level_noise is not None
        if not batch.has_data:
            raise ValueError("perceptual_weight needs images to compare with: train on some, or leave it at 0.")
        t = torch.from_numpy(self.times)[draws.level]
        x_t = self.schedule.add_noise(batch.x0, draws.level_noise, t)
        x0_student = roles.student(x_t, t, batch.cond).x0
        with torch.no_grad():
            data = roles.decode(batch.x0)
        return perceptual_loss(roles.encoder, roles.decode(x0_student), data)

    def calls(self, draws: Draws) -> dict[str, float]:
        return self._calls(draws.exit)

    def calls_per_step(self) -> dict[str, float]:
        return self._calls((self.settings.first_exit + self.settings.num_inference_steps - 1) / 2)

    def _calls(self, exit: float) -> dict[str, float]:
        settings = self.settings
        return {"student": exit + 1 + bool(settings.perceptual_weight), "teacher": int(settings.anchor_weight > 0)}


def reward_statistics(name: str, reward: Tensor) -> dict[str, Tensor]:
    """``<name>_mean`` and ``<name>_std`` of rewards [B], without a graph."""
    reward = working(reward.detach())
    return {f"{name}_mean": reward.mean(), f"{name}_std": reward.std(correction=0)}
