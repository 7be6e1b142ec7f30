"""The scheduler of diffusers that steps like a student's sampler, settings and all, and what a call must add.

What a scheduler's file can hold is held there, so that ``pipe(prompt, num_inference_steps=4)`` is right; what it cannot
(TCD's eta, PCM's edges where they are uneven) is an argument of the call, and the card says so. Every choice is made
by building diffusers' scheduler and comparing its timesteps with the sampler's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fewstep.diffusion.schedule import Array, Schedule
from fewstep.models.hub import quiet
from fewstep.sampling import Sampler

_GRIDS = (50, 1000, 500, 250, 200, 125, 100, 40, 25, 20, 10)  # of LCM's and TCD's original_inference_steps
_ANEW, _JUMPS = ("lcm", "renoise"), ("euler", "ddim", "ctm", "tcd", "phased")  # samplers, of flow models without eta
_OWN_SIGMAS = ("Flux",)  # pipelines that lay the levels k/n themselves


@dataclass(frozen=True)
class SchedulerPlan:
    """How a pipeline of diffusers samples like us.

    Attributes:
        scheduler: class in diffusers; config: its settings.
        call: arguments that the pipeline's call needs beside prompt and num_inference_steps.
    """

    scheduler: str
    config: dict[str, Any]
    call: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        """diffusers' scheduler."""
        import diffusers

        with quiet():  # the base's config has settings of other schedulers
            return getattr(diffusers, self.scheduler).from_config(self.config)


def plan_scheduler(
    sampler: Sampler, schedule: Schedule, base: Mapping[str, Any], prediction: str, pipeline: str
) -> SchedulerPlan:
    """The scheduler for a sampler of ours.

    Args:
        base: config of the teacher's scheduler. prediction: kind of the student's network.
        pipeline: class name of the pipeline it will stand in.

    Raises:
        ValueError: one sentence where diffusers has nothing that steps so.
    """
    times = sampler.times(schedule)
    if schedule.family == "flow":
        return _flow(sampler, schedule, times, base, pipeline)
    if schedule.family != "vp":
        raise ValueError("Students on EDM schedules have no pipeline in diffusers: use them through fewstep.")
    kept = {key: value for key, value in base.items() if not key.startswith("_")}  # their class, and what to forget
    kept |= {"prediction_type": prediction, "clip_sample": False, "thresholding": False, "steps_offset": 0}
    for name, config, call in _candidates(sampler, times):
        plan = SchedulerPlan(name, {**kept, **config}, call)
        if _times_of(plan, len(times) - 1) == times[:-1].tolist():
            return plan
    raise ValueError(f"diffusers has no scheduler that steps like '{sampler.name}' with these settings.")


def _candidates(sampler: Sampler, times: Array) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(class, settings, arguments of the call), the best first."""
    n, eta, clean = len(times) - 1, getattr(sampler, "eta", 0.0), bool(times[-1] < 0)
    own = getattr(sampler, "original_inference_steps", 50)
    told = {"timesteps": [int(t) for t in times[:-1]]} if (times == times.round()).all() else None
    trailing: dict[str, Any] = {"timestep_spacing": "trailing"}
    if sampler.name == "lcm" or (sampler.name == "renoise" and times[-2] >= 100):  # LCM's boundary is far below
        for grid in dict.fromkeys((own, *_GRIDS)):
            yield "LCMScheduler", {"original_inference_steps": grid}, {}
        if told:
            yield "LCMScheduler", {"original_inference_steps": own}, told
    elif sampler.name == "tcd" and eta > 0:
        for grid in dict.fromkeys((own, *_GRIDS)):
            yield "TCDScheduler", {"original_inference_steps": grid, "set_alpha_to_one": False}, {"eta": eta}
        if told:
            yield "TCDScheduler", {"original_inference_steps": own, "set_alpha_to_one": False}, {"eta": eta, **told}
    elif eta == 0 and sampler.name in ("ddim", "euler", "tcd", "ctm", "phased"):
        if 1000 % n == 0:  # elsewhere diffusers' DDIM misses its own next time
            yield "DDIMScheduler", {**trailing, "set_alpha_to_one": clean}, {}
        if not clean:
            for grid in dict.fromkeys((own, *_GRIDS)):
                yield "TCDScheduler", {"original_inference_steps": grid, "set_alpha_to_one": False}, {}
        last = "zero" if clean else "sigma_min"
        jumps = {"solver_order": 1, "algorithm_type": "dpmsolver++", "final_sigmas_type": last, **trailing}
        yield "DPMSolverMultistepScheduler", jumps, {}
        if told:
            yield "DPMSolverMultistepScheduler", jumps, told
    elif eta == 1 and clean and sampler.name in ("ddim", "euler-ancestral"):
        yield "DDPMScheduler", {**trailing, "variance_type": "fixed_small"}, {}
    elif sampler.name == "ddim" and 1000 % n == 0:
        yield "DDIMScheduler", {**trailing, "set_alpha_to_one": clean}, {"eta": eta}


def _times_of(plan: SchedulerPlan, n: int) -> list[float]:
    """At which times diffusers asks the network; none where it refuses the grid."""
    scheduler, told = plan.build(), plan.call.get("timesteps")
    try:
        if told is not None:
            scheduler.set_timesteps(timesteps=told)
        else:
            scheduler.set_timesteps(n)
    except (ValueError, ZeroDivisionError):
        return []
    return [float(t) for t in scheduler.timesteps]


# ---------------------------------------------------------------- flow


def _flow(sampler: Sampler, schedule: Schedule, times: Array, base: Mapping[str, Any], pipeline: str) -> SchedulerPlan:
    if pipeline.startswith("StableDiffusionPipeline"):
        raise ValueError("diffusers has no few-step scheduler for a flow model in a StableDiffusionPipeline.")
    if getattr(sampler, "eta", 0.0) != 0 or sampler.name not in (*_ANEW, *_JUMPS):
        raise ValueError(f"diffusers has no scheduler of flow models that steps like '{sampler.name}' here.")
    name = "FlowMatchLCMScheduler" if sampler.name in _ANEW else "FlowMatchEulerDiscreteScheduler"
    n, shift, total = len(times) - 1, schedule.shift, int(base.get("num_train_timesteps", 1000))
    common = {"num_train_timesteps": total, "use_dynamic_shifting": False}
    even = np.allclose(times[:-1], schedule.shifted(np.arange(n, 0, -1) / n), rtol=0, atol=1e-9)
    if even and pipeline.startswith(_OWN_SIGMAS):
        return SchedulerPlan(name, {**common, "shift": shift})
    if even:
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
