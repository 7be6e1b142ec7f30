"""Human feedback against the exact optimum of one linear reward with a threshold and an anchor."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fewstep.diffusion.mixture import GaussianMixture
from fewstep.methods.feedback import Feedback
from fewstep.models.cond import Cond
from fewstep.models.helpers import PointReward
from fewstep.models.roles import Roles
from fewstep.training.trainer import Trainer
from fewstep.verification.bench import Bench, training_settings
from fewstep.verification.report import Row
from fewstep.verification.sizes import rms

WIDE = GaussianMixture([1.0], [[0.0, 0.0]], [3.0])  # whose one-step samples, and so their rewards, differ widely
STEPS = 2000


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
    settings = training_settings(steps, batch_size=256, warmup_steps=min(20, steps))
    return bench.train(method, settings, show_progress, roles)


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
