"""TCD: jumps of the student to five times s against those of its exact fixed point."""

from __future__ import annotations

import torch

from fewstep.methods.tcd import TCD
from fewstep.models.roles import Roles
from fewstep.verification.bench import Bench
from fewstep.verification.consistency import composed_teacher, convergence_rows, loss_row
from fewstep.verification.fixed_points import TCDFixedPoint
from fewstep.verification.report import Row
from fewstep.verification.sizes import rms


def fixed_rows(bench: Bench, method: TCD) -> list[Row]:
    """Rows without training: no loss at the fixed point where a student can have none, and its convergence."""
    reached = [loss_row(bench, method, _fixed_point(bench, method))] if method.settings.single_end else []
    return [*reached, *convergence_rows(bench)]


def trained_rows(bench: Bench, method: TCD, roles: Roles) -> list[Row]:
    """Jumps of the trained student from the start to five times s, against the fixed point's."""
    x, cond = bench.starts
    grid = method.grid.tolist()
    ends = [grid[len(grid[1:]) * i // 5] for i in range(5)]
    *_, scale = composed_teacher(bench, grid)
    truth = _fixed_point(bench, method).denoiser()(x, grid[-1], cond)
    rows = []
    for s in ends:
        with torch.no_grad():
            jump = roles.student(x.float(), grid[-1], cond, end=s if method.settings.tell_end else None).at(s)
        error = rms(jump.double() - truth.at(s))
        distance = rms(truth.at(s) - bench.flow(x, grid[-1], s, cond))
        rows.append(Row(f"jump {grid[-1]:g} -> {s:g}: rms error", 0.0, error, 0.03 * scale, distance))
    return rows


def _fixed_point(bench: Bench, method: TCD) -> TCDFixedPoint:
    ends = (0,) if method.settings.single_end else None
    return TCDFixedPoint(bench.teacher, method.grid.numpy(), bench.guidance_scale, ends)
