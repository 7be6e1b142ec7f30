"""Flow maps against the exact one: the splitting's loss there, and a trained student's jumps."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from fewstep.diffusion.schedule import Time, host
from fewstep.methods.flowmap import FlowMap
from fewstep.methods.parts.slopes import level, time_at_height, to_line
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.roles import Roles
from fewstep.verification.bench import Bench
from fewstep.verification.consistency import oracle
from fewstep.verification.distribution import distribution_rows
from fewstep.verification.report import Row
from fewstep.verification.slopes import distance_rows

STEPS = 4800
LIMITS = {1: 0.11, 2: 0.045, 4: 0.035}
"""Of the distance to the exact flow map by steps, on two modes of unit size on a line, learnt from a teacher."""
_ROWS, _ALPHA = 64, 0.02
_WAYS = ((1.0, 0.0), (1.0, 0.5), (0.7, 0.2))  # heights of t and of the end


class ExactMap:
    """The exact flow map of a bench as a network that predicts its mean slope: all rows share one t and one end."""

    accepts = frozenset({"end"})

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def __call__(self, x: Tensor, t: Time, cond: Cond | None = None, end: Time | None = None) -> Tensor:
        (start,), (stop,) = np.unique(host(t)), np.unique(host(t if end is None else end))
        if start == stop:
            return self.bench.teacher(x, float(start), cond, self.bench.guidance_scale).flow
        schedule = self.bench.schedule
        landed = self.bench.flow(x, float(start), float(stop), cond)
        way = float(level(schedule, float(start)) - level(schedule, float(stop)))
        return (to_line(schedule, x, float(start)) - to_line(schedule, landed, float(stop))) / way

    def denoiser(self) -> Denoiser:
        return Denoiser(self, self.bench.schedule, "flow")


def fixed_rows(bench: Bench, method: FlowMap) -> list[Row]:
    """Rows without training: at the exact flow map the loss vanishes on the diagonal, and elsewhere falls as alpha^3.

    The square of what is left of a jump falls as alpha^4, and is weighted by 1 / alpha.

    There are no rows without a teacher, whose slopes are random.
    """
    if method.settings.velocity == "data":
        return []
    rows = [Row("diagonal: loss at the exact flow map", 0.0, loss_at_map(bench, method, (0.6, 0.6), _ALPHA), 1e-20)]
    for heights in _WAYS:
        losses = [loss_at_map(bench, method, heights, alpha) for alpha in (_ALPHA, _ALPHA / 2)]
        name = f"from height {heights[0]:g} to {heights[1]:g}: loss at the exact flow map"
        rows.append(Row(f"{name}, alpha {_ALPHA:g} / {_ALPHA / 2:g}: ratio", 8.0, losses[0] / losses[1], 0.8))
    return rows


def loss_at_map(bench: Bench, method: FlowMap, heights: tuple[float, float], alpha: float) -> float:
    """The loss of the exact flow map on rows from one height (`time_at_height`) to another, in float64."""
    batch, draws = bench.draw(method, _ROWS)
    t, end = (time_at_height(bench.schedule, torch.full((_ROWS,), height).double()) for height in heights)
    draws = dataclasses.replace(draws, t=t, end=end, alpha=alpha)
    roles = oracle(bench, ExactMap(bench).denoiser())
    return float(method.student(roles, batch, draws, method.prepare(roles, batch, draws, {"student"})).total)


def trained_rows(bench: Bench, method: FlowMap, roles: Roles) -> list[Row]:
    """The trained student in 1, 2 and 4 steps from noise against the exact flow map, start by start.

    Limits are twice as large where slopes are the data's own.
    """
    looser = 2.0 if method.settings.velocity == "data" else 1.0
    limits = {n: looser * limit for n, limit in LIMITS.items()}
    rows = distance_rows(bench, method, roles, limits, bench.schedule.end)
    return [*rows, *distribution_rows(bench, method, roles)]
