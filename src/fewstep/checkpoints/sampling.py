"""An entry's settings as a sampler of ours, which steps like the entry's scheduler in diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import Tensor

from fewstep.checkpoints.registry import Checkpoint
from fewstep.diffusion.schedule import Array, Schedule, Shift
from fewstep.models.families import Family, family_named
from fewstep.sampling import SAMPLERS, DDIMSampler, EulerSampler, Sampler
from fewstep.sampling.samplers import Step

_SCM, _SCM_SECOND = "SCMScheduler", 1.3


@dataclass(frozen=True, kw_only=True)
class StridedDDIM(DDIMSampler):
    """DDIM as diffusers steps: from t to t - T // n, which misses the next time where n does not divide T.

    At 12 steps a state is thus up to one index off the network's time; these files were published for that. Only a
    step below index 0 reaches the final state: 7 trailing steps end at index 0, whatever ``final`` says.
    """

    def times(self, schedule: Schedule) -> Array:
        """Those of the grid; with ``final`` "end" the network may be called at index 0, and the state stays there."""
        if self.num_inference_steps is None:
            return super().times(schedule)
        grid = self._part(self._spaced(schedule, self.num_inference_steps), schedule)
        return np.append(grid, self._final_time(schedule))

    def step(self, at: Step) -> Tensor:
        if self.num_inference_steps is None:
            return super().step(at)
        reached = at.time - at.schedule.num_train_timesteps // self.num_inference_steps
        return super().step(replace(at, next=reached if reached >= 0 else self._final_time(at.schedule)))


def sampler_class(scheduler: str) -> type[Sampler] | None:
    """The sampler that steps like a scheduler of diffusers; None where none does."""
    classes: tuple[type[Sampler], ...] = (StridedDDIM, *SAMPLERS.values())  # the first one named after a scheduler
    return next((cls for cls in classes if scheduler in cls.diffusers_names), None)


def scheduler_config(entry: Checkpoint, base: Mapping[str, Any]) -> dict[str, Any]:
    """The base model's scheduler config with the entry's overrides on top, for diffusers' ``from_config``."""
    return {**base, **entry.scheduler_overrides}


def schedule_of(entry: Checkpoint, base: Mapping[str, Any]) -> Schedule:
    """The entry's noise schedule."""
    return Schedule.from_diffusers({**scheduler_config(entry, base), "_class_name": entry.scheduler})


def sampler_of(
    entry: Checkpoint,
    base: Mapping[str, Any],
    *,
    num_inference_steps: int | None = None,
    timesteps: Sequence[float] | None = None,
    eta: float | None = None,
    strength: float | None = None,
) -> Sampler:
    """The sampler of an entry, as diffusers' scheduler steps with its settings.

    Args:
        base: config of the base model's scheduler.
        num_inference_steps: the entry's default if None. timesteps: the user's own, in native time.
        eta: of TCD and DDIM, the entry's if None. strength: share of the noise that an image gets first (`Sampler`).

    Raises:
        ValueError: one sentence: a scheduler that is not in diffusers or not built in here; eta where there is none.
    """
    config, name = scheduler_config(entry, base), entry.scheduler
    if entry.kind == "lora-heads" and entry.sigmas:
        return _of_heads(entry, num_inference_steps, timesteps, eta, strength)
    cls = sampler_class(name)
    if cls is None:
        word = f"is sampled by {name}" if name else "has a sampler of its authors' own"
        raise ValueError(
            f"{entry.id} {word}, which is not built in here: `fewstep checkpoints {entry.id}` prints its settings."
        )
    options: dict[str, Any] = _grid(entry, cls, config, num_inference_steps, timesteps)
    if cls.diffusers_eta:
        options["eta"] = eta if eta is not None else (entry.eta or 0.0)
    elif eta is not None:
        raise ValueError(f"{entry.id} is sampled by {name}, which has no eta.")
    if cls is StridedDDIM:  # TCDScheduler has the same key and ends at index 0 all the same
        options["final"] = "clean" if config.get("set_alpha_to_one", True) else "end"
    if "original_inference_steps" in cls.options():
        options["original_inference_steps"] = int(config.get("original_inference_steps", 50))
    if strength is not None:
        options["strength"] = strength
    return cls(**options)


def _of_heads(
    entry: Checkpoint, steps: int | None, timesteps: Sequence[float] | None, eta: float | None, strength: float | None
) -> Sampler:
    """Euler's steps at the levels to which the entry's last layers belong: final ones, which no shift bends."""
    assert entry.sigmas is not None
    if steps not in (None, len(entry.sigmas)):
        raise ValueError(f"{entry.id} has last layers for {len(entry.sigmas)} steps, and none for {steps}.")
    if eta is not None:
        raise ValueError(f"{entry.id} is sampled by Euler's steps, which have no eta.")
    chosen = tuple(entry.sigmas if timesteps is None else timesteps)
    return EulerSampler(timesteps=chosen, strength=1.0 if strength is None else strength)


def start_of(entry: Checkpoint) -> Literal["unit", "table"]:
    """How sampling starts (`fewstep.sampling.sample`), as the entry's scheduler does."""
    cls = sampler_class(entry.scheduler)
    return "unit" if cls is None or entry.flow else cls.diffusers_start


def flow_sigmas(entry: Checkpoint, base: Mapping[str, Any], n: int) -> list[float]:
    """The n levels before the shift: the entry's own, or 1, (n-1)/n, ..., 1/n.

    They are always given: by itself diffusers ends four steps of SD3 at 0.009, not at 0.5.
    """
    own = entry.sigmas
    return list(own) if own is not None and len(own) == n else [(n - i) / n for i in range(n)]


def shift_of(entry: Checkpoint, base: Mapping[str, Any]) -> Shift:
    """The shift of an entry's levels at its resolution: the config's, or its family's where the pipeline sets it."""
    config = scheduler_config(entry, base)
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", 1.0))
    family = family_named(entry.family) or Family
    return family.shift(config, entry.resolution**2 // family.pixels_per_token, entry.pipeline_overrides)


def _grid(
    entry: Checkpoint,
    cls: type[Sampler],
    config: Mapping[str, Any],
    steps: int | None,
    timesteps: Sequence[float] | None,
) -> dict[str, Any]:
    """The sampler's options that choose its times."""
    if timesteps is not None:
        return {"timesteps": tuple(timesteps)}
    n = entry.default_steps if steps is None else steps
    if n < 1:
        raise ValueError(f"The number of steps must be at least 1, not {n}.")
    if entry.scheduler == _SCM:
        return {"timesteps": _scm_times(n)}
    if entry.flow:
        schedule = Schedule.flow(shift_of(entry, config), terminal=config.get("shift_terminal") or 0.0)
        return {"sigmas": schedule.stretched(schedule.shifted(flow_sigmas(entry, config, n), n))}
    if entry.timesteps is not None and n == len(entry.timesteps):
        return {"timesteps": entry.timesteps}
    if "original_inference_steps" in cls.options():  # a grid of its own, picked from a training grid
        return {"num_inference_steps": n}
    spacing = config.get("timestep_spacing", "linspace")
    return {
        "num_inference_steps": n,
        "timestep_spacing": spacing,
        "steps_offset": int(config.get("steps_offset", 0)) if spacing == "leading" else 0,
    }


def _scm_times(n: int) -> tuple[float, ...]:
    """TrigFlow's angles from pi/2 down, as flow's times: evenly spaced, but for the second of two, which is 1.3.

    x = cos(a) x0 + sin(a) z is flow's state at s = sin(a) / (cos(a) + sin(a)), times cos(a) + sin(a).
    """
    angles = np.array([np.pi / 2, _SCM_SECOND]) if n == 2 else np.linspace(np.pi / 2, 0, n + 1)[:-1]
    times = np.sin(angles) / (np.cos(angles) + np.sin(angles))
    return tuple(np.minimum(times, 1.0).tolist())
