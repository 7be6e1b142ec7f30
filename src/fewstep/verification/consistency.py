"""Rows shared by consistency methods: the loss at a fixed point, its convergence with the grid, the scale of limits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fewstep.data.random import Rng
from fewstep.methods.base import Progress
from fewstep.sampling.solvers import Solver, solve
from fewstep.verification.bench import Bench
from fewstep.verification.fixed_points import FixedPoint, compose
from fewstep.verification.report import Row
from fewstep.verification.sizes import lengths

# The limits of LCM and TCD are set on the ring of eight modes with std 0.1 on ten solver steps, where the composed
# teacher is 0.126 off the flow map (median); elsewhere they scale with that distance or with the components' width.
RING_STEPS = 10
_RING_DISTANCE, _RING_WIDTH = 0.126, 0.1414


def composed_teacher(bench: Bench, grid: list[float]) -> tuple[Tensor, Tensor, float]:
    """(the teacher composed down the grid from the starts, its distances [n] to the flow map, the scale of limits)."""
    x, cond = bench.starts
    composed = compose(bench.teacher, x, grid[::-1], cond, bench.guidance_scale)
    distance = lengths(composed - bench.flow(x, grid[-1], grid[0], cond))
    return composed, distance, max(distance.median().item() / _RING_DISTANCE, bench.width / _RING_WIDTH)


def loss_row(bench: Bench, method: Any, point: FixedPoint) -> Row:
    """The loss of ``method`` in float64 where student and target are the exact fixed point."""
    rng = Rng(bench.seed, 0, 256, dtype=torch.float64)
    batch = bench.source.batch(rng)
    student = point.denoiser()
    roles: Any = SimpleNamespace(teacher=bench.teacher, student=student, target=student)
    draws = method.draw(batch, rng, Progress(0, 1))
    loss = method.student(roles, batch, draws, method.prepare(roles, batch, draws, {"student"})).total.item()
    size = max(1.0, bench.width**2 + float(batch.x0.square().mean()))
    return Row("loss at the exact fixed point", 0.0, loss, 1e-20 * size)


def convergence_rows(bench: Bench, solver: Solver = "ddim") -> list[Row]:
    """The fixed point approaches the flow map: half the step size halves the error (DDIM) or quarters it (Heun).

    There is no row for schedules of fewer than 500 table steps, which have no such grids.
    """
    if bench.schedule.family == "vp" and bench.schedule.num_train_timesteps < 500:
        return []
    x, cond = bench.starts
    x, cond = x[:1024], None if cond is None else cond[:1024]
    schedule = bench.schedule
    exact = bench.flow(x, schedule.start, schedule.end, cond)
    errors = []
    for solver_steps in (125, 250, 500):
        grid = schedule.training_grid(solver_steps)[::-1].copy()
        errors.append(
            lengths(solve(bench.teacher, x, grid, cond, bench.guidance_scale, solver) - exact).median().item()
        )
    ratio, order = errors[1] / errors[2], 1 if solver == "ddim" else 2
    return [Row("teacher on 250 / 500 steps: ratio of distances to the flow map", 2.0**order, ratio, 0.2 * 2.0**order)]
