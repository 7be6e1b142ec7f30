"""CTM against its table: the teacher composed between any two times of the grid, and the teacher on the diagonal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.data.random import stream_key
from fewstep.methods.ctm import CTM
from fewstep.models.roles import Roles
from fewstep.sampling import CTMSampler
from fewstep.sampling.sample import walk
from fewstep.verification.bench import Bench
from fewstep.verification.consistency import convergence_rows, oracle, residual_rows
from fewstep.verification.fixed_points import CTMFixedPoint
from fewstep.verification.report import Row
from fewstep.verification.sizes import rms

SAMPLES = 8192  # samples on which the diagonal's residual must vanish in the mean


def fixed_rows(bench: Bench, method: CTM) -> list[Row]:
    """Rows without training: no loss at the fixed point for any h, t and s; the diagonal; steps without noise."""
    point = CTMFixedPoint(bench.teacher, method.grid.numpy(), bench.guidance_scale, method.solver)
    student = point.denoiser()
    worst = max(_worst_loss(bench, method, student, n) for n in range(1, method.settings.max_hops + 1))
    size = max(1.0, float(bench.mixture.sample(1024, torch.Generator().manual_seed(0)).square().mean()))
    rows = [Row("largest loss at the exact fixed point, over all h, t and s", 0.0, worst, 1e-20 * size)]
    if bench.guidance_scale == 1.0:
        rows += _diagonal_rows(bench, method, student)
    x, cond = bench.starts
    x, cond = x[:64], None if cond is None else cond[:64]
    times = method.grid.numpy()[::-1].copy()
    fewer = times[[0, len(times) // 2, -1]]
    paths = [walk(student, CTMSampler(num_inference_steps=1), x, some, _no_noise, cond) for some in (times, fewer)]
    apart = rms(paths[0][-1] - paths[1][-1])
    rows.append(Row("its steps at eta 0: two and as many as the grid's, rms apart", 0.0, apart, 1e-9 * size))
    return [*rows, *convergence_rows(bench, method.solver)]


def trained_rows(bench: Bench, method: CTM, roles: Roles) -> list[Row]:
    """The trained student's jumps between all times of the grid, from the teacher's own states, and its diagonal.

    Jumps are compared where the loss compares them: at the grid's end, where the exact composed teacher carries them.
    The limit is 0.02 of the data's size (rms) in one dimension and 0.05 in more, where the map is steep between modes.
    """
    x, cond = bench.starts
    grid = method.grid.tolist()
    point = CTMFixedPoint(bench.teacher, grid, bench.guidance_scale, method.solver)
    states = {grid[-1]: x}
    for t, u in zip(grid[:0:-1], grid[-2::-1], strict=True):
        states[u] = point.denoiser()(states[t], t, cond, end=u).at(u)
    exact = bench.flow(x, grid[-1], grid[0], cond)
    scale = max(1.0, (len(grid) - 1) / 8)
    limit = (0.02 if bench.mixture.dim == 1 else 0.05) * max(1.0, rms(exact - exact.mean(dim=0))) * scale
    errors = []
    for i, t in enumerate(grid):
        for s in grid[:i]:
            with torch.no_grad():
                x_s = roles.student(states[t].float(), t, cond, end=s).at(s).double()
            carried = x_s if s == grid[0] else point.denoiser()(x_s, s, cond, end=grid[0]).at(grid[0])
            errors.append(rms(carried - states[grid[0]]))
    one = errors[-len(grid[1:])]  # from the start to the end
    diagonal = [_diagonal_error(bench, roles, t) for t in grid[1:]]
    return [
        Row("one step: rms error", 0.0, one, limit, rms(states[grid[0]] - exact)),
        Row("all jumps of the grid, carried to its end: rms error", 0.0, _root_mean_square(errors), limit),
        Row("worst of them", 0.0, max(errors), 3 * limit),
        Row("diagonal: rms distance to the teacher, over all times", 0.0, _root_mean_square(diagonal), 5 * limit),
    ]


def _worst_loss(bench: Bench, method: CTM, student: Any, num_steps: int) -> float:
    """Largest loss of a single sample over all starts and ends that ``num_steps`` solver steps leave."""
    last = len(method.grid) - 1
    pairs = [(i, end) for i in range(num_steps, last + 1) for end in range(i - num_steps + 1)]
    batch, draws = bench.draw(method, len(pairs), num_steps)
    index, end = torch.tensor(pairs).T
    draws = dataclasses.replace(draws, num_steps=num_steps, index=index, end_index=end)
    quiet = type(method)(method.schedule, dataclasses.replace(method.settings, adversarial_weight=0.0))
    shared = quiet.prepare(oracle(bench, student), batch, draws, {"student"})
    return float((shared.x_est - shared.target).detach().square().mean(1).max())


def _diagonal_rows(bench: Bench, method: CTM, student: Any) -> list[Row]:
    """Data minus the exact diagonal."""
    batch, draws = bench.draw(method, SAMPLES)
    t = method.grid[torch.arange(SAMPLES) % (len(method.grid) - 1) + 1]
    x = bench.schedule.add_noise(batch.x0, draws.diagonal_noise, t)
    x0 = student(x, t, batch.cond, end=t).x0
    return residual_rows("of the exact diagonal", x0, batch.x0 - x0)


def _diagonal_error(bench: Bench, roles: Roles, t: float) -> float:
    """Root mean square of g(x, t, t) - D(x, t) over the marginal at t."""
    generator = torch.Generator().manual_seed(stream_key(bench.seed, "diagonal", t) % 2**63)
    cond = bench.starts[1]
    label = None if cond is None else cond["label"]
    x = bench.mixture.sample_at(len(bench.starts[0]), bench.schedule, t, generator, label)
    with torch.no_grad():
        x0 = roles.student(x.float(), t, cond, end=t).x0.double()
    return rms(x0 - bench.teacher(x, t, cond, bench.guidance_scale).x0)


def _no_noise() -> Tensor:
    raise AssertionError("Steps at eta 0 draw no noise.")


def _root_mean_square(values: Sequence[float]) -> float:
    return float((sum(value**2 for value in values) / len(values)) ** 0.5)
