"""LCM and TCD against their exact fixed points, and those against the exact flow map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.diffusion.consistency import consistency
from fewstep.methods.base import Progress
from fewstep.methods.lcm import LCM
from fewstep.methods.tcd import TCD
from fewstep.models.cond import Cond
from fewstep.models.roles import Roles
from fewstep.sampling.solvers import Solver, solve
from fewstep.verification.bench import Bench
from fewstep.verification.fixed_points import FixedPoint, LCMFixedPoint, TCDFixedPoint, compose
from fewstep.verification.report import Row
from fewstep.verification.sizes import rms, spread

# The limits are set on the ring of eight modes with std 0.1 on ten hops, where the composed teacher is 0.126 off
# the flow map (median); elsewhere they scale with that distance or with the components' width, and with the hops.
_RING_DISTANCE, _RING_WIDTH, _RING_HOPS = 0.126, 0.1414, 10


def lcm_rows(bench: Bench, method: LCM, roles: Roles) -> list[Row]:
    """One step of the trained student against the teacher composed on the training grid, start by start."""
    x, cond = bench.starts
    grid = method.grid.numpy()
    composed = compose(bench.teacher, x, grid[::-1].tolist(), cond, bench.guidance_scale)
    distance = _norm(composed - bench.flow(x, grid[-1], grid[0], cond))
    scale = _scale(bench, distance.median().item())
    hops = max(1.0, len(grid[1:]) / _RING_HOPS)
    slack = scale * hops
    answer = _student(bench, method, roles, cond)
    error = _norm(answer - composed)
    return [
        Row("one step: median error", 0.0, error.median().item(), 0.015 * slack, distance.median().item()),
        Row("one step: 95th percentile", 0.0, _percentile(error), 0.05 * slack, _percentile(distance)),
        *mode_rows(bench, answer, composed, cond, scale, hops),
    ]


def tcd_rows(bench: Bench, method: TCD, roles: Roles) -> list[Row]:
    """Jumps of the trained student from the start to five times s, against the fixed point's."""
    x, cond = bench.starts
    grid = method.grid.numpy()
    ends = [float(grid[len(grid[1:]) * i // 5]) for i in range(5)]
    scale = _scale(bench, _norm(compose(bench.teacher, x, grid[::-1].tolist(), cond, bench.guidance_scale)
                                - bench.flow(x, grid[-1], grid[0], cond)).median().item())  # fmt: skip
    point = _tcd_fixed_point(bench, method)
    truth = point.denoiser()(x, grid[-1], cond)
    rows = []
    for s in ends:
        with torch.no_grad():
            jump = roles.student(x.float(), grid[-1], cond, end=s if method.settings.tell_end else None).at(s)
        error = rms(jump.double() - truth.at(s))
        distance = rms(truth.at(s) - bench.flow(x, grid[-1], s, cond))
        rows.append(Row(f"jump {grid[-1]:g} -> {s:g}: rms error", 0.0, error, 0.03 * scale, distance))
    return rows


def loss_rows(bench: Bench, method: LCM | TCD) -> list[Row]:
    """The loss at the exact fixed point, for the student and its target: zero where the student can reach it."""
    reachable = isinstance(method, LCM) or method.settings.single_end
    if not reachable:
        return []
    point: FixedPoint
    if isinstance(method, LCM):
        point = LCMFixedPoint(bench.teacher, method.grid.numpy(), bench.guidance_scale)
    else:
        point = _tcd_fixed_point(bench, method)
    rng = Rng(bench.seed, 0, 256, dtype=torch.float64)
    batch: Batch = bench.source.batch(rng)
    roles = _Oracle(bench, point)
    draws = method.draw(batch, rng, Progress(0, 1))
    shared = method.prepare(roles, batch, draws, {"student"})  # type: ignore[arg-type]
    loss = method.student(roles, batch, draws, shared).total.item()  # type: ignore[arg-type]
    return [Row("loss at the exact fixed point", 0.0, loss, 1e-20 * max(1.0, bench.width**2 + _square(batch.x0)))]


def convergence_rows(bench: Bench, solver: Solver = "ddim") -> list[Row]:
    """The fixed point nears the flow map as the grid is refined: the error halves with the hop (by DDIM), or quarters.

    Tables of fewer than 500 steps have no such grids, and no such row.
    """
    if bench.schedule.family == "vp" and bench.schedule.num_train_timesteps < 500:
        return []
    x, cond = bench.starts
    x, cond = x[:1024], None if cond is None else cond[:1024]
    schedule = bench.schedule
    exact = bench.flow(x, schedule.start, schedule.end, cond)
    errors = []
    for hops in (125, 250, 500):
        grid = schedule.training_grid(hops)[::-1].copy()
        errors.append(_norm(solve(bench.teacher, x, grid, cond, bench.guidance_scale, solver) - exact).median().item())
    ratio, order = errors[1] / errors[2], 1 if solver == "ddim" else 2
    return [Row("teacher on 250 / 500 hops: ratio of distances to the flow map", 2.0**order, ratio, 0.2 * 2.0**order)]


def mode_rows(bench: Bench, answer: Tensor, truth: Tensor, cond: Cond | None, scale: float, hops: float) -> list[Row]:
    """Mass, mean and standard deviation of every mode, worst over the modes that hold at least 1 % of the truth.

    Means and spreads are let off by as much as single samples are: ``scale`` times ``hops``, in tens of hops.
    """
    if bench.guidance_scale != 1.0:
        return []  # guided samples follow no mixture
    label = None if cond is None else cond["label"]
    of_answer, of_truth = bench.mixture.assign(answer, label), bench.mixture.assign(truth, label)
    mass, mean, std = [0.0], [0.0], [0.0]
    for k in range(bench.mixture.num_components):
        theirs, mine = truth[of_truth == k], answer[of_answer == k]
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
        Row("worst mode: mean", 0.0, max(mean), 0.02 * scale * hops),
        Row("worst mode: std, relative", 0.0, max(std), 0.05 * hops),
    ]


class _Oracle:
    """Roles whose student and target are the exact fixed point."""

    def __init__(self, bench: Bench, point: FixedPoint) -> None:
        self.teacher, self.student = bench.teacher, point.denoiser()
        self.target = self.student


def _tcd_fixed_point(bench: Bench, method: TCD) -> TCDFixedPoint:
    ends: Sequence[int] | None = (0,) if method.settings.single_end else None
    return TCDFixedPoint(bench.teacher, method.grid.numpy(), bench.guidance_scale, ends)


def _student(bench: Bench, method: LCM, roles: Roles, cond: Cond | None) -> Tensor:
    told = bench.guidance_scale if method.settings.guidance_embed else None
    with torch.no_grad():
        x = bench.starts[0].float()
        return consistency(roles.student(x, bench.schedule.start, cond, guidance_embed=told)).double()


def _scale(bench: Bench, distance: float) -> float:
    return max(distance / _RING_DISTANCE, bench.width / _RING_WIDTH)


def _norm(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1).norm(dim=1)


def _square(x: Tensor) -> float:
    return float(x.square().mean())


def _percentile(x: Tensor) -> float:
    return float(x.quantile(0.95))
