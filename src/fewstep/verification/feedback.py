"""Human feedback against closed forms: what a linear reward tilts, where a threshold stops, what an anchor holds."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.methods.feedback import Draws, Feedback, Goal, Shared
from fewstep.models.cond import Cond
from fewstep.models.helpers import PointReward
from fewstep.models.roles import Roles
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer
from fewstep.verification.bench import Bench
from fewstep.verification.report import Row
from fewstep.verification.sizes import rms

WIDE = GaussianMixture([1.0], [[0.0, 0.0]], [3.0])  # whose one-step answers, and so their rewards, differ widely
STEPS = 2000
_MOVE, _MOVES = 4e-3, 700  # of answers that are free, at every step


def fixed_rows(bench: Bench, method: Feedback) -> list[Row]:
    """What holds without training a student."""
    return _threshold_rows(method)


def _threshold_rows(method: Feedback) -> list[Row]:
    """Answers that are free to move go until their reward is the threshold; those beyond it never move."""
    goal = Goal("points", 0.5, 0.7)
    feedback = Feedback(method.schedule, rewards=(goal,))
    generator = torch.Generator().manual_seed(0)
    answers = torch.randn(64, 2, generator=generator, dtype=torch.float64)
    began, reward = answers.clone(), PointReward()
    edge = torch.full((1, 2), goal.threshold / math.sqrt(2), dtype=torch.float64)
    edge = torch.cat([edge * (1 + step) for step in (1e-12, 0.5)])
    below = reward(began) < goal.threshold
    for _ in range(_MOVES):
        answers = answers - _MOVE * len(answers) / goal.weight * gradient_at(feedback, answers)
    return [
        Row("pull at and beyond the threshold", 0.0, float(gradient_at(feedback, edge).abs().sum()), 0.0),
        Row("mean reward of answers that began below it", goal.threshold, float(reward(answers)[below].mean()), _MOVE),
        Row("the highest of them", goal.threshold, float(reward(answers)[below].max()), _MOVE),
        Row("movement of the others", 0.0, float((answers - began)[~below].abs().sum()), 0.0),
    ]


def gradient_at(method: Feedback, answers: Tensor) -> Tensor:
    """The gradient of the method's loss at answers [B, D]."""
    leaf = answers.detach().requires_grad_()
    roles: Any = SimpleNamespace(decode=lambda x: x, reward=lambda name: PointReward())
    draws, shared = Draws(0, leaf[:, None]), Shared(0.0, leaf, leaf)
    loss = method.student(roles, Batch(answers, prompts=("",) * len(answers)), draws, shared)
    (slope,) = torch.autograd.grad(loss.total, leaf)
    return slope


# ---------------------------------------------------------------- a trained student


class _Beside(nn.Module):
    """The exact teacher, frozen, and what a small network adds to its answers: a LoRA's part on this bench."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.added = bench.network()
        self.added.mean.zero_()
        self.exact = bench.teacher.network

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        said: Tensor = self.exact(x, t, cond).to(x.dtype) + self.added(x, t, cond)
        return said


def train(bench: Bench, method: Feedback, steps: int, show_progress: bool = False) -> Trainer:
    """``steps`` of feedback on what a network adds to the exact teacher."""
    roles = bench.roles(method)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.seed)
        roles.add_network("student", _Beside(bench), "sample")
    settings = TrainingSettings(
        steps=steps,
        batch_size=256,
        learning_rate=3e-3,
        warmup_steps=min(20, steps),
        lr_schedule="cosine",
        log_every=max(1, min(250, steps)),
    )
    trainer = Trainer(method, roles, bench.source, settings, seed=bench.seed, show_progress=show_progress)
    trainer.run()
    return trainer


def trained_rows(bench: Bench, method: Feedback, roles: Roles) -> list[Row]:
    """One-step answers against the exact optimum of one linear reward with a threshold and an anchor.

    Each answer goes from the teacher's along the reward by ``weight D / (2 anchor_weight)``, but no further than to the
    threshold, and not at all if it is beyond it. There are no rows for other settings.
    """
    settings = method.settings
    if len(settings.rewards) > 1 or settings.num_inference_steps > 1 or not settings.anchor_weight:
        return []
    (goal,), reward, (noise, cond) = settings.rewards, PointReward(), bench.starts
    with torch.no_grad():
        noise, time = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1)), float(method.times[0])
        before, said = bench.teacher(noise, time, cond).x0, roles.student(noise, time, cond).x0
    room = (goal.threshold - reward(before)).clamp_min(0)
    way = room.clamp_max(goal.weight * before.shape[1] / (2 * settings.anchor_weight))
    exact = before + way[:, None] / math.sqrt(before.shape[1])
    off = rms(said - exact) / rms(exact - before)
    return [
        Row("one step: rms distance to the exact optimum, of its way", 0.0, off, 0.05),
        Row("one step: mean reward", float(reward(exact).mean()), float(reward(said).mean()), 0.005),
        Row("one step: 99th percentile of the reward of those that the threshold stops", goal.threshold,
            float(reward(said)[(room > 0) & (room == way)].quantile(0.99)), 0.06),
    ]  # fmt: skip
