"""Results made up for pages and tables: FD and its resampled values as given, three images."""

import torch

from fewstep.evaluation.metrics import centred_interval
from fewstep.evaluation.result import Comparison, Result

CAPTIONS = ["a red circle", "a <blue> square & a star", "two shapes", "a green triangle"]


def noise(seed=0, scale=0.1):
    return scale * torch.randn(200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def result(model, steps, fd, around=None, seed=None, facts=None, **figures):
    """A result whose FD's resampled values are ``fd`` plus ``around`` [200]."""
    resampled = {name: fd + (noise() if around is None else around) for name in ("FD", "detail FD")}
    figures = {"evaluations": float(steps), "FD": fd, "detail FD": fd, **figures}
    intervals = {name: centred_interval(values, fd) for name, values in resampled.items()}
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(steps))
    return Result(model, steps, images, figures, intervals, resampled, seed, facts or {})


def comparison(*students, floors=None, about="unseen prompts", count=0, teachers=(1, 2, 4, 8)):
    """A teacher of 50 steps (FD 1, 100 evaluations), at few steps n of FD 1 + 40 / n, and the students given."""
    full = result("teacher", 50, 1.0, evaluations=100.0)
    few = [result("teacher", n, 1.0 + 40 / n, noise(n), evaluations=2.0 * n) for n in teachers]
    return Comparison([full, *few, *students], CAPTIONS, 0, floors or {}, about, count)
