"""Reflow against the exact flow map: its lines in closed form, and a trained student in one step and more."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fewstep.data.batch import Batch, Pairs
from fewstep.data.random import Rng
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule, expand
from fewstep.methods.base import Progress
from fewstep.methods.reflow import Reflow
from fewstep.models.roles import Roles
from fewstep.sampling.sample import first_state
from fewstep.verification.bench import Bench
from fewstep.verification.consistency import oracle
from fewstep.verification.distribution import distribution_rows
from fewstep.verification.report import Row
from fewstep.verification.sizes import rms
from fewstep.verification.slopes import distance_rows

STEPS = 5500
LIMITS = {1: 0.075, 2: 0.042, 4: 0.032}
"""Of the distance to the exact flow map by steps, on two modes of unit size on a line."""
WINDOWS_LIMIT = 0.09
"""Of the same in as many steps as there are windows, where a student is straight in windows."""
MEAN, VARIANCE = 0.4, 0.6
_ROWS = 256


def fixed_rows(bench: Bench, method: Reflow) -> list[Row]:
    """Rows without training: on one Gaussian, the slope of the lines against the closed form of the student there.

    With one window the pairs are those of the bench's solver and of the exact flow. There are no rows with more.
    """
    if method.settings.windows > 1:
        return []
    gaussian = Bench(GaussianMixture([1.0], [MEAN], [VARIANCE**0.5]), bench.schedule, bench.seed)
    batch, _ = gaussian.draw(method, _ROWS)
    assert batch.pairs is not None
    x = first_state(bench.schedule, batch.pairs.noise, bench.schedule.start)
    exact = gaussian.flow(x, bench.schedule.start, bench.schedule.clean, None)
    slopes = [slope_error(gaussian, method, x0) for x0 in (exact, batch.pairs.x0)]
    solver = rms(batch.pairs.x0 - exact)
    return [
        Row("lines of the exact flow of a Gaussian: rms distance to the closed form", 0.0, slopes[0], 1e-9),
        Row("lines of its solver's pairs: rms distance to the closed form", 0.0, slopes[1], 3 * solver, solver),
    ]


def slope_error(gaussian: Bench, method: Reflow, x0: Tensor) -> float:
    """How far the lines' slopes at their own points are from `straight_slope`, for pairs with the samples x0 [B, 1]."""
    rng = Rng(gaussian.seed, 0, len(x0), dtype=torch.float64)
    batch = gaussian.source_of(method).batch(rng)
    assert batch.pairs is not None
    pairs = Batch(batch.x0, pairs=Pairs(batch.pairs.noise, x0))
    draws = method.draw(pairs, rng, Progress(0, 1))
    shared = method.prepare(oracle(gaussian, gaussian.teacher), pairs, draws, {"student"})
    return rms(shared.slope - straight_slope(gaussian.schedule, shared.x_t, shared.t))


def straight_slope(schedule: Schedule, x: Tensor, t: Tensor) -> Tensor:
    """eps - x0 of the reflowed student of N(`MEAN`, `VARIANCE`) at x [B, 1] and t [B], in closed form.

    The exact flow is affine, x0 = MEAN + k (x_T - alpha_T MEAN), so a line's two ends, and all its points, are affine
    in x0; through each point of a time goes one line.
    """
    alpha_top, sigma_top = (float(c) for c in schedule.alpha_sigma(schedule.start))
    alpha, sigma = schedule.alpha_sigma(t)
    k = (VARIANCE / (alpha_top**2 * VARIANCE + sigma_top**2)) ** 0.5
    top, tau_top = 1 / (alpha_top + sigma_top), sigma_top / (alpha_top + sigma_top)
    # z_top = top (alpha_T MEAN + (x0 - MEAN) / k), slope = (z_top - x0) / tau_top = a x0 + b, z_t = x0 + tau slope
    a, b = (top / k - 1) / tau_top, top * MEAN * (alpha_top - 1 / k) / tau_top
    tau = sigma / (alpha + sigma)
    z_t = expand(np.asarray(1 / (alpha + sigma)), x) * x
    x0 = (z_t - expand(np.asarray(tau * b), x)) / expand(np.asarray(1 + tau * a), x)
    return a * x0 + b


def trained_rows(bench: Bench, method: Reflow, roles: Roles) -> list[Row]:
    """The trained student's steps from noise against the exact flow map; 1, 2 and 4, or one for each window."""
    windows = method.settings.windows
    limits = LIMITS if windows == 1 else {windows: WINDOWS_LIMIT}
    rows = distance_rows(bench, method, roles, limits, bench.schedule.clean)
    return [*rows, *(distribution_rows(bench, method, roles) if windows == 1 else [])]
