"""Time grids: public ones by their usual names, or the user's own numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, cast

import numpy as np
from torch import Tensor

from fewstep.diffusion.schedule import SPACINGS, Array, LCMGrid, Schedule, Spacing, check_steps, host

Numbers: TypeAlias = "Sequence[float] | Array | Tensor"

GRIDS = ("trailing", "leading", "linspace", "karras", "lcm", "lcm-v1", "turbo", "phases")


FROM_STRENGTH = ("lcm", "lcm-v1")
"""Grids that a strength below 1 picks from the lowest part of the training grid; others are cut."""


def spaced_times(
    schedule: Schedule, n: int, spacing: str, steps_offset: int = 0, original_steps: int = 50, strength: float = 1.0
) -> Array:
    """The ``n`` decreasing network times of a named grid, float64 in native time.

    ============  ================================================================================
    trailing      999, 749, 499, 249 of 1,000: few-step UNets, Lightning, DMD2, FLUX's ``k/n``
    leading       751, 501, 251, 1 with offset 1: Stable Diffusion's own default; never for few steps
    linspace      999, 666, 333, 0
    karras        Karras et al. 2022, eq. 5, in noise-to-signal ratio
    lcm           999, 759, 499, 259: a subset of ``original_steps``, as diffusers has it now
    lcm-v1        999, 759, 519, 279: the stride of LCM's first release
    turbo         999, 899, 799, 699: SDXL-Turbo's own demo and ComfyUI's SDTurboScheduler (at most ten)
    phases        999, 739, 499, 239: the upper edges of ``n`` phases, where PCM students are trained
    ============  ================================================================================

    ``strength`` changes the grids of `FROM_STRENGTH` only.

    Raises:
        ValueError: for an unknown name, or more steps than the grid has.
    """
    n = check_steps(n)
    if spacing in SPACINGS:
        return host(schedule.timesteps(n, cast(Spacing, spacing), steps_offset))
    if spacing == "karras":
        times = schedule.time_at(schedule.karras(n))
        times[0] = schedule.start  # computed through logarithms, it may be off by a rounding
        return times
    if spacing in FROM_STRENGTH:
        return host(schedule.lcm_timesteps(n, original_steps, cast(LCMGrid, spacing), strength))
    if spacing == "turbo":
        return _turbo(schedule, n)
    if spacing == "phases":
        return np.ascontiguousarray(schedule.phase_edges(n, original_steps)[:0:-1])
    raise ValueError(f"Unknown timestep_spacing '{spacing}': use {', '.join(GRIDS)}.")


def _turbo(schedule: Schedule, n: int) -> Array:
    if schedule.family != "vp" or n > 10:
        raise ValueError("The turbo grid has at most ten steps and belongs to VP schedules.")
    total = schedule.num_train_timesteps
    return np.asarray(total - 1 - np.arange(n) * (total // 10), dtype=np.float64)


def times_of_sigmas(schedule: Schedule, sigmas: Numbers) -> Array:
    """Native times of noise levels: sigma/alpha on VP and EDM schedules, sigma itself on flow schedules.

    A closing 0, which some programs write, is dropped.
    """
    levels = np.atleast_1d(host(sigmas))
    if len(levels) > 1 and levels[-1] == 0:
        levels = levels[:-1]
    return levels if schedule.family == "flow" else schedule.time_at(levels)


def check_decreasing(times: Array, what: str, last: float) -> Array:
    """``times``, one decreasing row of them.

    Raises:
        ValueError: they do not decrease, or do not stay above ``last``, the last state's time.
    """
    if times.ndim != 1 or not len(times):
        raise ValueError(f"{what} must be a list of at least one number.")
    if not np.isfinite(times).all() or (np.diff(times) >= 0).any():
        raise ValueError(f"{what} must decrease from step to step, not {_words(times)}.")
    if times[-1] <= last:
        raise ValueError(f"{what} must stay above {last:g}, where this sampler ends, not {_words(times)}.")
    return times


def _words(times: Array) -> str:
    return ", ".join(f"{t:g}" for t in times[:8]) + (", ..." if len(times) > 8 else "")
