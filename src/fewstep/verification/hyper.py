"""Hyper-SD's TSCD: segments that cover every time, jumps that compose, and a student against its exact fixed point."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.methods.base import Progress
from fewstep.methods.hyper import Draws, Hyper
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.roles import Roles
from fewstep.sampling import PhasedSampler
from fewstep.verification.bench import Bench
from fewstep.verification.consistency import convergence_rows, oracle
from fewstep.verification.contract import contract_rows, gan_contract_rows
from fewstep.verification.fixed_points import CTMFixedPoint, TCDFixedPoint, compose
from fewstep.verification.report import Row
from fewstep.verification.sizes import rms

STAGES = (8, 4, 2, 1)
_SAMPLES = 16


def fixed_rows(bench: Bench, method: Hyper) -> list[Row]:
    """Rows that need no trained student, for 8, 4, 2 and 1 segments of the method's grid."""
    rows = gan_contract_rows(bench, method)
    if method.settings.hop_by == "teacher" and bench.guidance_scale == 1.0 and not method.settings.tell_end:
        settings = dataclasses.replace(method.settings, hop_by="beginning", adversarial_weight=1.0)
        later = type(method)(method.schedule, settings)  # with its discriminator: an untrained student is consistent
        rows += contract_rows(bench, later, "later stages: ")
    solver_steps = method.settings.num_grid_steps
    for k in sorted({*(k for k in STAGES if solver_steps % k == 0), solver_steps}, reverse=True):
        stage = _stage(method, k)
        rows += [*end_rows(stage), *jump_rows(bench, stage), gradient_row(bench, stage)]
    return [*rows, *convergence_rows(bench)]


def trained_rows(bench: Bench, method: Hyper, roles: Roles) -> list[Row]:
    """The trained student's jumps from each segment's start, as its exact fixed point has them, then all its steps."""
    x, cond = bench.starts
    grid, stride, rows = method.grid.tolist(), method.stride, []
    point = _fixed_point(bench, method)
    for top in range(len(grid) - 1, 0, -stride):
        for end in sorted({top - stride, top - (stride + 1) // 2}):
            t, s = grid[top], grid[end]
            end_input = s if method.settings.tell_end else None
            with torch.no_grad():
                jump = roles.student(x.float(), t, cond, end=end_input).at(s).double()
            truth = point(x, t, cond, end=end_input).at(s)
            name, distance = f"jump {t:g} -> {s:g}: rms error", rms(truth - bench.flow(x, t, s, cond))
            rows.append(Row(name, 0.0, rms(jump - truth), 0.06 * bench.width, distance))
        x = compose(bench.teacher, x, grid[top - stride : top + 1][::-1], cond, bench.guidance_scale)
    start, cond = bench.starts
    sampler = PhasedSampler(num_inference_steps=method.settings.segments, original_inference_steps=len(grid) - 1)
    times = sampler.times(method.schedule).tolist()
    with torch.no_grad():
        x_end = _steps(roles.student, start.float(), times, cond, method.settings.tell_end).double()
    truth = _steps(point, start, times, cond, method.settings.tell_end)
    distance = rms(truth - bench.flow(start, times[0], times[-1], cond))
    return [*rows, Row(f"{len(times) - 1} steps: rms error", 0.0, rms(x_end - truth), 0.1 * bench.width, distance)]


# ---------------------------------------------------------------- the ends


def end_rows(stage: Hyper) -> list[Row]:
    """Ends s drawn for every solver step: each exists, lies below its start and stays in its segment.

    Lower ends of segments are computed independently: the largest multiple of T / k below t, in grid indices.
    """
    k, solver_steps = stage.settings.segments, stage.settings.num_grid_steps
    index = torch.arange(solver_steps)
    edges = np.arange(k) * (solver_steps / k)
    wanted = torch.from_numpy(np.array([edges[edges < n].max() for n in range(1, solver_steps + 1)]))
    wrong = int((stage.floor(index) != wanted).sum())
    size = 256 * solver_steps
    batch = Batch(torch.zeros(size, 1, dtype=torch.float64))
    draws = stage.draw(batch, Rng(0, 0, size, dtype=torch.float64), Progress(0, 1))
    t, s = stage.grid[draws.index + 1], stage.grid[draws.end_index]
    strays = int((s >= t).sum() + (s > stage.grid[draws.index]).sum() + (draws.end_index < wanted[draws.index]).sum())
    possible = int((index + 1 - wanted).sum())
    missed = possible - len(set(zip(draws.index.tolist(), draws.end_index.tolist(), strict=True)))
    return [
        Row(f"k = {k}: solver steps whose segment starts elsewhere, or leaves no end", 0.0, wrong, 0.0),
        Row(f"k = {k}: ends at or above their start, above u, or in another segment", 0.0, strays, 0.0),
        Row(f"k = {k}: ends of {possible} that are never drawn", 0.0, missed, 0.0),
    ]


# ---------------------------------------------------------------- a student conditioned on s


def jump_rows(bench: Bench, stage: Hyper) -> list[Row]:
    """Conditioned on s, the composed teacher has no loss, and its k steps equal all solver steps of the grid."""
    k, grid = stage.settings.segments, stage.grid.numpy()
    conditioned = _quiet(stage, tell_end=True)
    student = CTMFixedPoint(bench.teacher, grid, bench.guidance_scale, "ddim").denoiser()
    batch, draws, _ = _all_ends(bench, conditioned)
    shared = conditioned.prepare(oracle(bench, student), batch, draws, {"student"})
    worst = float((shared.x_s - shared.target).square().mean(1).max())
    x, cond = bench.starts
    x, cond = x[:64], None if cond is None else cond[:64]
    sampler = PhasedSampler(num_inference_steps=k, original_inference_steps=len(grid) - 1)
    steps = _steps(student, x, sampler.times(stage.schedule).tolist(), cond, True)
    apart = rms(steps - compose(bench.teacher, x, grid[::-1].tolist(), cond, bench.guidance_scale))
    size = max(1.0, rms(batch.x0))
    return [
        Row(f"k = {k}, conditioned on s: largest loss of the composed teacher", 0.0, worst, 1e-20 * size**2),
        Row(f"k = {k}, conditioned on s: its {k} steps to the composed teacher, rms", 0.0, apart, 1e-9 * size),
    ]


# ---------------------------------------------------------------- a student that is not conditioned on s


def gradient_row(bench: Bench, stage: Hyper) -> Row:
    """At the fixed point the gradient of the method's loss, summed over all ends s of a start, vanishes.

    The gradient of a single end does not, except in segments of one solver step.
    """
    quiet = _quiet(stage, tell_end=False)
    point = _fixed_point(bench, quiet)
    batch, draws, starts = _all_ends(bench, quiet)
    shift = torch.zeros(int(starts.max()) + 1, bench.mixture.dim, dtype=torch.float64, requires_grad=True)

    def shifted(x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        return point(x, t, cond).x0.detach() + shift[starts]

    student = Denoiser(shifted, bench.schedule, "sample")
    roles = oracle(bench, student, target=point)
    shared = quiet.prepare(roles, batch, draws, {"student"})
    (gradient,) = torch.autograd.grad(quiet.student(roles, batch, draws, shared).total, shift)
    size = max(1.0, rms(batch.x0))
    name = f"k = {quiet.settings.segments}: gradient of all ends together at the exact fixed point"
    return Row(name, 0.0, float(gradient.abs().max()) * len(batch.x0), 1e-10 * size)


def loss_left(bench: Bench, method: Hyper) -> float:
    """The loss of the exact fixed point over all solver steps and ends: no student without s as an input has less."""
    point = _fixed_point(bench, quiet := _quiet(method, tell_end=False))
    batch, draws, _ = _all_ends(bench, quiet)
    roles = oracle(bench, point)
    return float(quiet.student(roles, batch, draws, quiet.prepare(roles, batch, draws, {"student"})).total)


def _all_ends(bench: Bench, stage: Hyper) -> tuple[Batch, Draws, Tensor]:
    """(a batch of every solver step and end, its draws, the index of each row's start (x_t, t))."""
    floors = stage.floor(torch.arange(stage.settings.num_grid_steps)).tolist()
    pairs = [(i, end) for i, floor in enumerate(floors) for end in range(floor, i + 1)]
    index, end = (torch.tensor(side).repeat_interleave(_SAMPLES) for side in zip(*pairs, strict=True))
    sample = torch.arange(_SAMPLES).repeat(len(pairs))
    few, drawn = bench.draw(stage, _SAMPLES)
    cond = None if few.cond is None else few.cond[sample]
    scale = torch.full((len(sample),), bench.guidance_scale, dtype=torch.float64)
    draws = Draws(index, end, drawn.noise[sample], scale, None, None)
    return Batch(few.x0[sample], cond), draws, index * _SAMPLES + sample


def _fixed_point(bench: Bench, method: Hyper) -> Denoiser:
    grid, scale = method.grid.numpy(), bench.guidance_scale
    if method.settings.tell_end:
        return CTMFixedPoint(bench.teacher, grid, scale, "ddim").denoiser()
    return TCDFixedPoint(bench.teacher, grid, scale, segments=method.settings.segments).denoiser()


def _steps(student: Denoiser, x: Tensor, times: list[float], cond: Cond | None, tell_end: bool) -> Tensor:
    for t, s in pairwise(times):
        x = student(x, t, cond, end=s if tell_end else None).at(s)
    return x


def _stage(method: Hyper, segments: int) -> Hyper:
    return type(method)(method.schedule, dataclasses.replace(method.settings, segments=segments))


def _quiet(stage: Hyper, tell_end: bool) -> Hyper:
    settings = dataclasses.replace(
        stage.settings, tell_end=tell_end, adversarial_weight=0.0, mse_weight=1.0, hop_by="teacher"
    )
    return type(stage)(stage.schedule, settings)
