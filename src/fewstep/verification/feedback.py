"""Human feedback against closed forms: free samples stop at a threshold, an anchor's optimum is exact."""

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

WIDE = GaussianMixture([1.0], [[0.0, 0.0]], [3.0])  # whose one-step samples, and so their rewards, differ widely
STEPS = 2000
_MOVE, _MOVES = 4e-3, 700  # step size and number of the gradient steps of free samples


def fixed_rows(bench: Bench, method: Feedback) -> list[Row]:
    """Rows that need no trained student."""
    return _threshold_rows(method)


def _threshold_rows(method: Feedback) -> list[Row]:
    """Samples that move freely stop where their reward is the threshold; those beyond it never move."""
    goal = Goal("points", 0.5, 0.7)
    feedback = Feedback(method.schedule, rewards=(goal,))
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(64, 2, generator=generator, dtype=torch.float64)
    began, reward = samples.clone(), PointReward()
    edge = torch.full((1, 2), goal.threshold / math.sqrt(2), dtype=torch.float64)
    edge = torch.cat([edge * (1 + step) for step in (1e-12, 0.5)])
    below = reward(began) < goal.threshold
    for _ in range(_MOVES):
        samples = samples - _MOVE * len(samples) / goal.weight * gradient_at(feedback, samples)
    return [
        Row("gradient at and beyond the threshold", 0.0, float(gradient_at(feedback, edge).abs().sum()), 0.0),
        Row("mean reward of samples that began below it", goal.threshold, float(reward(samples)[below].mean()), _MOVE),
        Row("the highest of them", goal.threshold, float(reward(samples)[below].max()), _MOVE),
        Row("movement of the others", 0.0, float((samples - began)[~below].abs().sum()), 0.0),
    ]


def gradient_at(method: Feedback, samples: Tensor) -> Tensor:
    """The gradient of the method's loss at samples [B, D]."""
    leaf = samples.detach().requires_grad_()
    roles: Any = SimpleNamespace(decode=lambda x: x, reward=lambda name: PointReward())
    draws, shared = Draws(0, leaf[:, None]), Shared(0.0, leaf, leaf)
    loss = method.student(roles, Batch(samples, prompts=("",) * len(samples)), draws, shared)
    (slope,) = torch.autograd.grad(loss.total, leaf)
    return slope


# ---------------------------------------------------------------- a trained student


class _Beside(nn.Module):
    """The exact teacher, frozen, plus a small trained network on its output, as a LoRA would be."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.added = bench.network()
        self.added.mean.zero_()
        self.exact = bench.teacher.network

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        predicted: Tensor = self.exact(x, t, cond).to(x.dtype) + self.added(x, t, cond)
        return predicted


def train(bench: Bench, method: Feedback, steps: int, show_progress: bool = False) -> Trainer:
    """Train the network added to the exact teacher on feedback for ``steps`` steps."""
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
    """One-step samples against the exact optimum of one linear reward with a threshold and an anchor.

    The optimum lies ``weight D / (2 anchor_weight)`` from the teacher's sample along the reward's gradient, but no
    further than the threshold, and at the teacher's sample if that is beyond it. There are no rows for other settings.
    """
    settings = method.settings
    if len(settings.rewards) > 1 or settings.num_inference_steps > 1 or not settings.anchor_weight:
        return []
    (goal,), reward, (noise, cond) = settings.rewards, PointReward(), bench.starts
    with torch.no_grad():
        noise, time = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1)), float(method.times[0])
        before, after = bench.teacher(noise, time, cond).x0, roles.student(noise, time, cond).x0
    room = (goal.threshold - reward(before)).clamp_min(0)
    shift = room.clamp_max(goal.weight * before.shape[1] / (2 * settings.anchor_weight))
    exact = before + shift[:, None] / math.sqrt(before.shape[1])
    off = rms(after - exact) / rms(exact - before)
    return [
        Row("one step: rms distance to the exact optimum, relative to its shift", 0.0, off, 0.05),
        Row("one step: mean reward", float(reward(exact).mean()), float(reward(after).mean()), 0.005),
        Row("one step: 99th percentile of the reward of those that the threshold stops", goal.threshold,
            float(reward(after)[(room > 0) & (room == shift)].quantile(0.99)), 0.06),
    ]  # fmt: skip
