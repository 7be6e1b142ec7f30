"""Feedback in closed form: free samples stop at a threshold; beside distribution matching a reward moves the mean."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.diffusion.schedule import Array, Schedule
from fewstep.methods.feedback import Draws, Feedback, Goal, Shared
from fewstep.methods.parts.score_pair import ScorePair
from fewstep.models.helpers import PointReward
from fewstep.verification.report import Row
from tests.verification.closed_forms.dmd2 import gradient, normal, root

_MEAN, _VARIANCE, _PULL = 1.0, 0.6, 0.3
_MOVE, _MOVES = 4e-3, 700  # step size and number of the gradient steps of free samples
_FAR = 1e3  # a threshold that nothing reaches


def rows() -> list[Row]:
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
        slope = gradient_at(feedback, mean + std * z)
        return by_mean + float(slope.sum()), by_std + float((slope * z).sum())

    return root(pulls, 0.8, 0.7)


def threshold_rows(schedule: Schedule) -> list[Row]:
    """Samples that move freely stop where their reward is the threshold; those beyond it never move."""
    goal = Goal("points", 0.5, 0.7)
    feedback = Feedback(schedule, rewards=(goal,))
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
