"""A reward beside distribution matching, on a Gaussian: it moves the mean and nothing else."""

from __future__ import annotations

import math

import numpy as np
import torch

from fewstep.diffusion.schedule import Array, Schedule
from fewstep.methods.feedback import Feedback, Goal
from fewstep.methods.parts.score_pair import ScorePair
from fewstep.verification.feedback import gradient_at
from fewstep.verification.report import Row
from tests.verification.closed_forms.dmd2 import gradient, normal, root

_MEAN, _VARIANCE, _PULL = 1.0, 0.6, 0.3
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
