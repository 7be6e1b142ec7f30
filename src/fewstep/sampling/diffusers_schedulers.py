"""Schedulers of diffusers that may step like a sampler on a VP schedule, by kinds of steps.

Each function yields `SchedulerPlan`s, the best first. They are candidates: `fewstep.export.scheduler` builds each and
takes the first that calls the network at the sampler's own times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fewstep.diffusion.schedule import Array

_GRIDS = (50, 1000, 500, 250, 200, 125, 100, 40, 25, 20, 10)  # original_inference_steps to try after a sampler's own


@dataclass(frozen=True)
class SchedulerPlan:
    """How a pipeline of diffusers samples like a sampler of ours.

    Attributes:
        scheduler: class in diffusers. config: its settings.
        call: arguments that the pipeline's call needs beside prompt and num_inference_steps.
    """

    scheduler: str
    config: dict[str, Any]
    call: dict[str, Any] = field(default_factory=dict)


def explicit(times: Array) -> dict[str, Any] | None:
    """The times as an argument of the call, the last state's left out; None where they are not all table indices."""
    return {"timesteps": [int(t) for t in times[:-1]]} if (times == times.round()).all() else None


def on_training_grids(
    scheduler: str, original: int, times: Array, call: dict[str, Any], **config: Any
) -> Iterator[SchedulerPlan]:
    """LCMScheduler and TCDScheduler, which pick their times from a training grid of ``original`` or more steps."""
    for grid in dict.fromkeys((original, *_GRIDS)):
        yield SchedulerPlan(scheduler, {"original_inference_steps": grid, **config}, call)
    if (given := explicit(times)) is not None:
        yield SchedulerPlan(scheduler, {"original_inference_steps": original, **config}, {**call, **given})


def jump_schedulers(original: int, times: Array) -> Iterator[SchedulerPlan]:
    """Deterministic jumps along the network's prediction: DDIM, or what equals it."""
    clean = bool(times[-1] < 0)
    yield from ddim_schedulers(times, {})
    if not clean:
        for grid in dict.fromkeys((original, *_GRIDS)):
            yield SchedulerPlan("TCDScheduler", {"original_inference_steps": grid, "set_alpha_to_one": False})
    last = "zero" if clean else "sigma_min"
    config = {"solver_order": 1, "algorithm_type": "dpmsolver++", "final_sigmas_type": last}
    config["timestep_spacing"] = "trailing"
    yield SchedulerPlan("DPMSolverMultistepScheduler", config)
    if (given := explicit(times)) is not None:
        yield SchedulerPlan("DPMSolverMultistepScheduler", config, given)


def ddim_schedulers(times: Array, call: dict[str, Any]) -> Iterator[SchedulerPlan]:
    """DDIMScheduler, which misses its own next time unless the number of steps divides 1,000."""
    if 1000 % (len(times) - 1) == 0:
        yield SchedulerPlan(
            "DDIMScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": bool(times[-1] < 0)}, call
        )


def ancestral_noise() -> Iterator[SchedulerPlan]:
    """DDPMScheduler: all of the posterior's noise at every step, ending at clean data."""
    yield SchedulerPlan("DDPMScheduler", {"timestep_spacing": "trailing", "variance_type": "fixed_small"})
