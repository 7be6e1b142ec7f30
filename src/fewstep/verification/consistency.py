"""Rows shared by consistency methods: the loss at a fixed point, its convergence with the grid, the scale of limits."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fewstep.methods.base import Progress
from fewstep.models.denoiser import Denoiser
from fewstep.sampling.solvers import Solver, solve
from fewstep.verification.bench import Bench
from fewstep.verification.fixed_points import FixedPoint, compose
from fewstep.verification.report import Row
from fewstep.verification.sizes import lengths, rms, standard_errors

# The limits of LCM and TCD are set on the ring of eight modes with std 0.1 on ten solver steps, where the composed
# teacher is 0.126 off the flow map (median); elsewhere they scale with that distance or with the components' width.
RING_STEPS = 10
LAST = Progress(999, 1000)  # CM's grid may grow until then
_RING_DISTANCE, RING_WIDTH = 0.126, 0.1414  # of its components


def composed_teacher(bench: Bench, grid: list[float]) -> tuple[Tensor, Tensor, float]:
    """(the teacher composed down the grid from the starts, its distances [n] to the flow map, the scale of limits)."""
    x, cond = bench.starts
    composed = compose(bench.teacher, x, grid[::-1], cond, bench.guidance_scale)
    distance = lengths(composed - bench.flow(x, grid[-1], grid[0], cond))
    return composed, distance, max(distance.median().item() / _RING_DISTANCE, bench.width / RING_WIDTH)


def loss_row(bench: Bench, method: Any, point: FixedPoint) -> Row:
    """The loss of ``method`` in float64 where student and target are the exact fixed point."""
    batch, draws = bench.draw(method, 256, progress=LAST)
    roles = oracle(bench, point.denoiser())
    loss = method.student(roles, batch, draws, method.prepare(roles, batch, draws, {"student"})).total.item()
    size = max(1.0, bench.width**2 + float(batch.x0.square().mean()))
    return Row("loss at the exact fixed point", 0.0, loss, 1e-20 * size)


def oracle(bench: Bench, student: Denoiser, **others: Denoiser) -> Any:
    """Roles of the exact teacher whose student and target are ``student``, unless ``others`` names another target."""
    return SimpleNamespace(**{"teacher": bench.teacher, "student": student, "target": student} | others)


def residual_rows(name: str, predicted: Tensor, residual: Tensor) -> list[Row]:
    """A squared error has its minimum where the residual has mean zero and is uncorrelated with the prediction."""
    name = f"residual {name}, in standard errors:"
    return [
        Row(f"{name} its mean", 0.0, standard_errors(residual), 4.0),
        Row(f"{name} times the prediction", 0.0, standard_errors(residual * predicted), 4.0),
    ]


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


def stage_rows(
    bench: Bench,
    student: Denoiser,
    paths: Sequence[Sequence[float]],
    step: str,
    limit: float,
    whole: str,
    limit_of_whole: float,
) -> list[Row]:
    """A student's jumps, each from the teacher's own state, then all of them from the start.

    Args:
        paths: for each jump the teacher's times, from where it starts down to where it ends.
        step, whole: names of the rows of a jump and of all jumps.
    """
    start, cond = bench.starts
    x, rows = start, []
    for path in paths:
        t, s = path[0], path[-1]
        composed = compose(bench.teacher, x, path, cond, bench.guidance_scale)
        with torch.no_grad():
            jump = student(x.float(), t, cond).at(s).double()
        distance = rms(composed - bench.flow(x, t, s, cond))
        rows.append(Row(f"{step} {t:g} -> {s:g}: rms error", 0.0, rms(jump - composed), limit, distance))
        x = composed
    times = [paths[0][0], *(path[-1] for path in paths)]
    with torch.no_grad():
        x_end = compose(student, start.float(), times, cond).double()
    distance = rms(x - bench.flow(start, times[0], times[-1], cond))
    return [*rows, Row(f"{whole}: rms error", 0.0, rms(x_end - x), limit_of_whole, distance)]
