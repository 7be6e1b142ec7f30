"""Solvers of the teacher's probability-flow ODE along any grid."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fewstep.diffusion.schedule import Time, host, working
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.sampling.grids import check_decreasing
from fewstep.sampling.sample import walk
from fewstep.sampling.samplers import SAMPLERS

Solver = Literal["ddim", "heun", "dpm++2m"]
SOLVERS = {name: SAMPLERS[name] for name in get_args(Solver)}


@torch.no_grad()
def solve(
    denoiser: Denoiser,
    x: Tensor,
    times: Time,
    cond: Cond | None = None,
    guidance_scale: float | Tensor = 1.0,
    solver: Solver = "ddim",
) -> Tensor:
    """Take x [B, ...] at times[0] along the decreasing native ``times`` to times[-1].

    Args:
        solver: "ddim" (first order, one call a step), "heun" (second order, two calls), "dpm++2m" (second order, one
            call).

    Raises:
        ValueError: unknown solver, or times that do not decrease.
    """
    if solver not in SOLVERS:
        raise ValueError(f"Unknown solver '{solver}': use {', '.join(SOLVERS)}.")
    grid = check_decreasing(np.atleast_1d(host(times)), "times", -np.inf)
    if len(grid) == 1:
        return working(x)
    steps = SOLVERS[solver](num_inference_steps=len(grid) - 1)
    return walk(denoiser, steps, working(x), grid, _no_noise, cond, guidance_scale)[-1]


def _no_noise() -> Tensor:
    raise AssertionError("An ODE solver draws no noise.")
