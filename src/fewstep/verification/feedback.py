"""Human feedback against closed forms: what a linear reward tilts, where a threshold stops, what an anchor holds."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Array, Schedule
from fewstep.methods.feedback import Draws, Feedback, Goal, Shared
from fewstep.methods.parts.score_pair import ScorePair
from fewstep.models.cond import Cond
from fewstep.models.helpers import PointReward
from fewstep.models.roles import Roles
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer
from fewstep.verification.bench import Bench
from fewstep.verification.dmd2_theory import gradient, normal, root
from fewstep.verification.report import Row
from fewstep.verification.sizes import rms

WIDE = GaussianMixture([1.0], [[0.0, 0.0]], [3.0])  # whose one-step answers, and so their rewards, differ widely
FEEDBACK_STEPS = 2000
_MEAN, _VARIANCE, _PULL = 1.0, 0.6, 0.3
_MOVE, _MOVES = 4e-3, 700  # of answers that are free, at every step
_FAR = 1e3  # a threshold that nothing reaches


def feedback_fixed_rows(bench: Bench, method: Feedback) -> list[Row]:
    """What holds without training a student."""
    return [*_tilt_rows(), *_threshold_rows(method)]


def _tilt_rows() -> list[Row]:
    """A linear reward beside distribution matching (kl weight) moves the mean of N(m, S) and nothing else.

    By lambda over the mean of alpha^2 / (alpha^2 S + sigma^2) on 60 even angles; at clean data by lambda S: the law is
    then p exp(lambda r), up to its scale.
    """
    rows = []
    cases = ("60 angles", np.linspace(0.05, 1.5, 60), 1e-8), ("clean data", np.array([1e-3]), 1e-5)
    for name, angles, limit in cases:
        alpha, sigma = np.cos(angles), np.sin(angles)
        precision = float((alpha**2 / (alpha**2 * _VARIANCE + sigma**2)).mean())
        exact = _MEAN + _PULL * (_VARIANCE if name == "clean data" else 1 / precision)
        mean, std = _tilted(angles)
        rows.append(Row(f"linear reward beside matching, {name}: mean", exact, mean, limit))
        rows.append(Row(f"linear reward beside matching, {name}: variance", _VARIANCE, std**2, limit))
    return rows


def _tilted(angles: Array) -> tuple[float, float]:
    """(mean, standard deviation) at which matching and reward pull at a Gaussian student equally."""
    schedule = Schedule("vp", alphas_cumprod=np.append(np.cos(angles), 0.0) ** 2)  # a table has two levels or more
    times, scores = [float(i) for i in range(len(angles))], ScorePair(schedule, weighting="kl")
    teacher = normal(schedule, _MEAN, math.sqrt(_VARIANCE))
    feedback = Feedback(Schedule.scaled_linear(), rewards=(Goal("points", _FAR, _PULL),))
    z = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)

    def pulls(mean: float, std: float) -> tuple[float, float]:
        by_mean, by_std = gradient(scores, teacher, None, mean, std, times)
        slope = _slope(feedback, mean + std * z)
        return by_mean + float(slope.sum()), by_std + float((slope * z).sum())

    return root(pulls, 0.8, 0.7)


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
        answers = answers - _MOVE * len(answers) / goal.weight * _slope(feedback, answers)
    return [
        Row("pull at and beyond the threshold", 0.0, float(_slope(feedback, edge).abs().sum()), 0.0),
        Row("mean reward of answers that began below it", goal.threshold, float(reward(answers)[below].mean()), _MOVE),
        Row("the highest of them", goal.threshold, float(reward(answers)[below].max()), _MOVE),
        Row("movement of the others", 0.0, float((answers - began)[~below].abs().sum()), 0.0),
    ]


def _slope(method: Feedback, answers: Tensor) -> Tensor:
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


def train_feedback(bench: Bench, method: Feedback, steps: int, show_progress: bool = False) -> Trainer:
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


def feedback_rows(bench: Bench, method: Feedback, roles: Roles) -> list[Row]:
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
