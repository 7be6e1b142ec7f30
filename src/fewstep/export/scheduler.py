"""The scheduler of diffusers that steps like a student's sampler, with its settings, and what a call must add.

All that a scheduler's file can hold is put there, so that a call with ``num_inference_steps=4`` alone is right. What it
cannot hold (TCD's eta, PCM's edges where they are uneven) is an argument of the call, given in the README. Every
choice is checked: diffusers' scheduler is built and its timesteps are compared with the sampler's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fewstep.diffusion.schedule import Array, Schedule
from fewstep.models.families import Family
from fewstep.models.hub import quiet
from fewstep.sampling import Sampler
from fewstep.sampling.diffusers_schedulers import SchedulerPlan


def build_scheduler(plan: SchedulerPlan) -> Any:
    """diffusers' scheduler of a plan."""
    import diffusers

    with quiet():  # diffusers warns of the base's settings that this scheduler does not know
        return getattr(diffusers, plan.scheduler).from_config(plan.config)


def plan_scheduler(
    sampler: Sampler, schedule: Schedule, base: Mapping[str, Any], prediction: str, family: type[Family]
) -> SchedulerPlan:
    """The scheduler for a sampler of ours.

    Args:
        base: config of the teacher's scheduler.
        prediction: prediction kind of the student's network.
        family: of the pipeline that the scheduler will be put into.

    Raises:
        ValueError: one sentence where diffusers has no scheduler that steps so.
    """
    times = sampler.times(schedule)
    if schedule.family == "flow":
        return _flow(sampler, schedule, times, base, family)
    if schedule.family != "vp":
        raise ValueError("Students on EDM schedules have no pipeline in diffusers: use them through fewstep.")
    kept = {key: value for key, value in base.items() if not key.startswith("_")}  # their class, and default settings
    kept |= {"prediction_type": prediction, "clip_sample": False, "thresholding": False, "steps_offset": 0}
    for candidate in sampler.diffusers_schedulers(times):
        plan = replace(candidate, config={**kept, **candidate.config})
        if _times_of(plan, len(times) - 1) == times[:-1].tolist():
            return plan
    raise ValueError(f"diffusers has no scheduler that steps like '{sampler.name}' with these settings.")


def _times_of(plan: SchedulerPlan, n: int) -> list[float]:
    """The times at which diffusers calls the network; empty where it refuses the grid."""
    scheduler, given = build_scheduler(plan), plan.call.get("timesteps")
    try:
        if given is not None:
            scheduler.set_timesteps(timesteps=given)
        else:
            scheduler.set_timesteps(n)
    except (ValueError, ZeroDivisionError):
        return []
    return [float(t) for t in scheduler.timesteps]


# ---------------------------------------------------------------- flow


def _flow(
    sampler: Sampler, schedule: Schedule, times: Array, base: Mapping[str, Any], family: type[Family]
) -> SchedulerPlan:
    if not family.flow_schedulers:
        raise ValueError(f"diffusers has no few-step scheduler for a flow model in a pipeline of {family.title}.")
    one_step = "FlowMatchEulerDiscreteScheduler" if len(times) == 2 else ""  # to clean data: no fresh noise is drawn
    name = sampler.flow_scheduler() or one_step
    if not name:
        noise = f" with eta {sampler.fresh_noise:g}" if sampler.fresh_noise else ""
        raise ValueError(f"diffusers has no scheduler of flow models that steps like '{sampler.name}'{noise}.")
    n, total = len(times) - 1, int(base.get("num_train_timesteps", 1000))
    shift, common = schedule.shift_at(n), {"num_train_timesteps": total, "use_dynamic_shifting": False}
    even = np.allclose(times[:-1], schedule.timesteps(n).numpy(), rtol=0, atol=1e-9)
    if even and family.passes_sigmas:
        stretch = {"shift_terminal": schedule.terminal} if schedule.terminal and n > 1 else {}
        return SchedulerPlan(name, {**common, "shift": shift, **stretch})
    if even and not schedule.terminal:
        return SchedulerPlan(name, {**common, **few_step_shift(shift, n, total)})
    return SchedulerPlan(name, {**common, "shift": 1.0}, {"sigmas": [float(t) for t in times[:-1]]})


def few_step_shift(shift: float, n: int, total: int = 1000) -> dict[str, float]:
    """``shift`` and ``shift_terminal`` with which FlowMatchEuler's n levels are the shifted n/n, ..., 1/n.

    By itself it spaces n levels evenly between 1 and (nearly) 0, shifts them, and so ends at 0.009 where 0.5 is
    wanted. The shift and the stretch that ends at ``shift_terminal`` are fractional linear in the step's number k, and
    so are the levels that are wanted; they agree in the first level, and two numbers settle the rest.
    """
    terminal = shift / n / (1 + (shift - 1) / n)
    if n == 1 or shift == 1:
        return {"shift": 1.0, "shift_terminal": terminal} if n > 1 else {"shift": 1.0}
    pole, found = shift * n / (shift - 1), shift
    for _ in range(100):  # its lowest level depends on the shift that is looked for
        lowest = found / total / (1 + (found - 1) / total)
        found = pole / (pole - (n - 1) / (1 - lowest))
    return {"shift": found, "shift_terminal": terminal}
