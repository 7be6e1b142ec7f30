"""PDD at its exact fixed point, and a trained student of a few steps against all solver steps of its teacher."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedule import Array
from fewstep.methods.pdd import PDD
from fewstep.models.bank import LayerBank
from fewstep.models.cond import Cond
from fewstep.models.roles import Roles
from fewstep.sampling import DDIMSampler, sample
from fewstep.sampling.sample import first_state
from fewstep.sampling.solvers import solve
from fewstep.verification.bench import Bench
from fewstep.verification.contract import contract_rows
from fewstep.verification.report import Row
from fewstep.verification.sizes import rms

STEPS = 2500
_OF_DDIM = 0.24  # the limit, as a share of what as many of DDIM's steps are off: 0.04 on a ring of flow matching
_DRAWS, _ROWS = 6, 64


class FixedPoint:
    """The student without a loss: layer i predicts how far the teacher's solver step i goes, where its steps lead."""

    accepts = frozenset({"end"})

    def __init__(self, bench: Bench, method: PDD) -> None:
        self.bench, self.method = bench, method
        layer = torch.nn.Linear(1, 1, dtype=torch.float64)
        self.bank = LayerBank(layer, method.schedule, method.grid.tolist())

    def mixtures(self, x: Tensor, t: float, cond: Cond | None, rows: Array) -> list[Prediction]:
        """As `fewstep.models.denoiser.Denoiser.mixtures`."""
        schedule, grid = self.method.schedule, self.method.grid
        flow, first = schedule.family == "flow", int(abs(grid - t).argmin())
        way = grid if flow else schedule.noise_to_signal(grid)
        slopes, state = [torch.zeros_like(x)] * first, x
        for i in range(first, len(grid) - 1):
            after = solve(
                self.bench.teacher, state, grid[i : i + 2], cond, self.bench.guidance_scale, self.method.settings.solver
            )
            moved = after - state if flow else after / schedule.alpha(grid[i + 1]) - state / schedule.alpha(grid[i])
            slopes.append(moved / (way[i + 1] - way[i]))
            state = after
        mixed = torch.einsum("rn,nb...->rb...", torch.from_numpy(rows).to(x.dtype), torch.stack(slopes))
        return [Prediction(x, slope, t, schedule, "flow" if flow else "epsilon") for slope in mixed]

    def jump(self, x: Tensor, t: float, end: float, cond: Cond | None) -> Tensor:
        """The state at ``end`` by one block from x at t."""
        return self.mixtures(x, t, cond, self.bank.between(t, end))[0].at(end)


def fixed_rows(bench: Bench, method: PDD) -> list[Row]:
    """Rows without training: no loss at the fixed point by any solver and input, and its blocks in a row."""
    rows = []
    for solver in ("ddim", "heun"):
        for student_input in ("simulated", "noised"):
            settings = dataclasses.replace(method.settings, solver=solver, student_input=student_input)
            other = type(method)(method.schedule, settings)
            loss = fixed_point_loss(bench, other)
            rows.append(Row(f"{solver}, {student_input}: loss at the exact fixed point", 0.0, loss, 1e-25))
            if settings != method.settings:
                rows += contract_rows(bench, other, f"{solver}, {student_input}: ")
        gap = composition_gap(bench, other)
        rows.append(Row(f"{solver}: unequal blocks against all solver steps: rms", 0.0, gap, 1e-13))
    return rows


def fixed_point_loss(bench: Bench, method: PDD, student: Any = None, draws: int = _DRAWS) -> float:
    """The largest loss of some draws, where the student is its fixed point, or ``student``."""
    roles: Any = dataclasses.make_dataclass("_Roles", ["teacher", "student"])(
        bench.teacher, student or FixedPoint(bench, method)
    )
    found = []
    for step in range(draws):
        batch, drawn = bench.draw(method, _ROWS, step)
        loss = method.student(roles, batch, drawn, method.prepare(roles, batch, drawn, {"student"}))
        found.append(sum(float(term.total) for term in loss.terms()))
    return max(found)


def composition_gap(bench: Bench, method: PDD) -> float:
    """How far blocks of a half, a quarter and a quarter of all solver steps lead from these steps one by one: rms."""
    count = method.settings.num_grid_steps
    point, x = FixedPoint(bench, method), bench.starts[0][:_ROWS]
    cond = None if bench.starts[1] is None else bench.starts[1][:_ROWS]
    edges = [0, count // 2, (count // 2 + count) // 2, count]
    state = x
    for first, last in pairwise(sorted(set(edges))):
        state = point.jump(state, float(method.grid[first]), float(method.grid[last]), cond)
    return rms(state - solve(bench.teacher, x, method.grid, cond, bench.guidance_scale, method.settings.solver))


def trained_rows(bench: Bench, method: PDD, roles: Roles) -> list[Row]:
    """The trained student at each of its numbers of steps, against all steps of the teacher from the same noise.

    The limit is a share of what as many steps of DDIM are off, the floor how far the teacher's steps are from its ODE.
    """
    x, truth, floor = _truth(bench, method)
    rows = []
    for few in method.settings.num_inference_steps:
        times = method.grid[:: method.settings.num_grid_steps // few]
        with torch.no_grad():
            student = sample(roles.student, DDIMSampler(timesteps=times[:-1]), x.float(), bench.starts[1]).x0
        ddim = rms(solve(bench.teacher, x, times, bench.starts[1], bench.guidance_scale) - truth)
        name = f"{few} steps: rms to {method.settings.num_grid_steps} of the teacher"
        rows.append(Row(f"{name} (DDIM: {ddim:.3g})", 0.0, rms(student.double() - truth), _OF_DDIM * ddim, floor))
    return rows


def _truth(bench: Bench, method: PDD) -> tuple[Tensor, Tensor, float]:
    """(unit noise as a sampler's first state, the teacher's samples by all solver steps, their distance to its ODE)."""
    generator = torch.Generator().manual_seed(bench.seed + 5)
    noise = torch.randn(bench.starts[0].shape, generator=generator, dtype=torch.float64)
    grid, cond = method.grid, bench.starts[1]
    x = first_state(bench.schedule, noise, float(grid[0]))
    truth = solve(bench.teacher, x, grid, cond, bench.guidance_scale, method.settings.solver)
    return noise, truth, rms(truth - bench.flow(x, float(grid[0]), float(grid[-1]), cond))
