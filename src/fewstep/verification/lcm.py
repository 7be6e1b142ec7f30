"""LCM: one step of the student against the teacher composed down the training grid, its exact fixed point."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.diffusion.consistency import consistency
from fewstep.methods.lcm import LCM
from fewstep.models.cond import Cond
from fewstep.models.roles import Roles
from fewstep.verification.bench import Bench
from fewstep.verification.consistency import RING_STEPS, composed_teacher, convergence_rows, loss_row
from fewstep.verification.fixed_points import LCMFixedPoint
from fewstep.verification.report import Row
from fewstep.verification.sizes import lengths, spread


def fixed_rows(bench: Bench, method: LCM) -> list[Row]:
    """Rows without training: no loss at the fixed point, which approaches the flow map as the grid is refined."""
    point = LCMFixedPoint(bench.teacher, method.grid.numpy(), bench.guidance_scale)
    return [loss_row(bench, method, point), *convergence_rows(bench)]


def trained_rows(bench: Bench, method: LCM, roles: Roles) -> list[Row]:
    """One step of the trained student against the teacher composed on the training grid, start by start."""
    x, cond = bench.starts
    grid = method.grid.tolist()
    composed, distance, scale = composed_teacher(bench, grid)
    steps = max(1.0, len(grid[1:]) / RING_STEPS)
    slack = scale * steps
    embed = bench.guidance_scale if method.settings.guidance_embed else None
    with torch.no_grad():
        pred = roles.student(x.float(), bench.schedule.start, cond, guidance_embed=embed)
    x_end = consistency(pred).double()
    error = lengths(x_end - composed)
    return [
        Row("one step: median error", 0.0, error.median().item(), 0.015 * slack, distance.median().item()),
        Row("one step: 95th percentile", 0.0, _percentile(error), 0.05 * slack, _percentile(distance)),
        *mode_rows(bench, x_end, composed, cond, scale, steps),
    ]


def mode_rows(bench: Bench, x_end: Tensor, truth: Tensor, cond: Cond | None, scale: float, steps: float) -> list[Row]:
    """Mass, mean and standard deviation of every mode, worst over the modes that hold at least 1 % of the truth.

    Their limits grow as those of single samples: by ``scale``, and by ``steps``, in tens of solver steps.
    """
    if bench.guidance_scale != 1.0:
        return []  # guided samples follow no mixture
    label = None if cond is None else cond["label"]
    of_student, of_truth = bench.mixture.assign(x_end, label), bench.mixture.assign(truth, label)
    mass, mean, std = [0.0], [0.0], [0.0]
    for k in range(bench.mixture.num_components):
        theirs, mine = truth[of_truth == k], x_end[of_student == k]
        if len(theirs) < 0.01 * len(truth):
            continue
        mass.append(abs(len(mine) - len(theirs)) / len(truth))
        if len(mine) < 2:
            mean.append(float("inf"))
            continue
        mean.append((mine.mean(dim=0) - theirs.mean(dim=0)).norm().item())
        std.append(abs(spread(mine) / spread(theirs) - 1))
    return [
        Row("worst mode: mass", 0.0, max(mass), 0.01),
        Row("worst mode: mean", 0.0, max(mean), 0.02 * scale * steps),
        Row("worst mode: std, relative", 0.0, max(std), 0.05 * steps),
    ]


def _percentile(x: Tensor) -> float:
    return float(x.quantile(0.95))
