"""CM against its exact fixed points: CD's is the composed teacher, CT's the conditional means down the grid."""

from __future__ import annotations

import torch

from fewstep.diffusion.consistency import consistency
from fewstep.methods.cm import CM
from fewstep.models.roles import Roles
from fewstep.verification.bench import Bench
from fewstep.verification.consistency import LAST, convergence_rows, loss_row, oracle, residual_rows
from fewstep.verification.distribution import distribution_rows
from fewstep.verification.fixed_points import CTFixedPoint, FixedPoint, LCMFixedPoint
from fewstep.verification.report import Row
from fewstep.verification.sizes import rms

SAMPLES = 16_384  # samples on which CT's residual must vanish in the mean


def cm_fixed_point(bench: Bench, method: CM) -> FixedPoint | None:
    """The method's fixed point on its last grid; None for CT where it is not known exactly."""
    grid = method.grid.numpy()
    if method.settings.variant == "cd":
        return LCMFixedPoint(bench.teacher, grid, bench.guidance_scale, method.solver)
    if bench.mixture.dim > 1 or bench.mixture.num_classes or method.settings.loss != "l2":
        return None
    return CTFixedPoint(bench.mixture, bench.schedule, grid)


def fixed_rows(bench: Bench, method: CM) -> list[Row]:
    """One step at the fixed point, without training: CD's loss is zero, CT's residual is uncorrelated."""
    point = cm_fixed_point(bench, method)
    if method.settings.variant == "cd":
        assert point is not None
        return [loss_row(bench, method, point), *convergence_rows(bench, method.solver)]
    if point is None:
        return []
    batch, draws = bench.draw(method, SAMPLES, progress=LAST)
    roles = oracle(bench, point.denoiser())
    shared = method.prepare(roles, batch, draws, {"student"})
    predicted = consistency(roles.student(shared.x_t, shared.t, batch.cond))
    return residual_rows("at the exact fixed point", predicted, predicted - shared.target)


def trained_rows(bench: Bench, method: CM, roles: Roles) -> list[Row]:
    """One step of the trained student against the fixed point, start by start.

    The limit is 0.02 of the data's size (rms) in one dimension and 0.05 in more, where the map is steep between modes.
    Where the fixed point is not known, the distribution of samples is compared.
    """
    point = cm_fixed_point(bench, method)
    if point is None:
        return distribution_rows(bench, method, roles)
    x, cond = bench.starts
    start, end = bench.schedule.start, bench.schedule.end
    with torch.no_grad():
        predicted = consistency(roles.student(x.float(), start, cond)).double()
    truth = consistency(point.denoiser()(x, start, cond))
    exact = bench.flow(x, start, end, cond)
    centre = exact.mean(dim=0)
    size, scale = rms(exact - centre), max(1.0, (len(method.grid) - 1) / 10)
    limit = (0.02 if bench.mixture.dim == 1 else 0.05) * max(1.0, size) * scale
    spread, wanted = rms(predicted - predicted.mean(dim=0)), rms(truth - truth.mean(dim=0))
    return [
        Row("one step: rms error", 0.0, rms(predicted - truth), limit, rms(truth - exact)),
        Row("one step: spread of the samples", wanted, spread, limit, abs(wanted - size)),
    ]
