"""Samplers: at which times the network is called, and how its prediction becomes the next state.

A sampler is a frozen dataclass. It is given ``num_inference_steps``, or ``timesteps`` (native times), or ``sigmas``;
`times` are those of its run on a schedule, `step` makes one step: a jump along the prediction, and re-noising.
`fewstep.sampling.sample` runs it. A new sampler is one class and one line in `SAMPLERS`: its class variables and
`diffusers_schedulers` say how other programs sample like it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fewstep.diffusion.consistency import consistency
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedule import Array, Schedule, Time, expand, host
from fewstep.sampling.diffusers_schedulers import (
    SchedulerPlan,
    ancestral_noise,
    ddim_schedulers,
    jump_schedulers,
    on_training_grids,
)
from fewstep.sampling.grids import FROM_STRENGTH, Numbers, check_decreasing, spaced_times, times_of_sigmas


@dataclass
class Step:
    """The inputs of one step of a sampler.

    Attributes:
        prediction: the network's prediction at (x_t, t).
        time, next: native times t and of the next state.
        last: whether this is the last step.
        draw: returns the next unit normal of the state's shape.
        ask: calls the network again, ``ask(x, t)``.
        before: time and x0 of the step before, None in the first.
    """

    prediction: Prediction
    time: float
    next: float
    last: bool
    draw: Callable[[], Tensor]
    ask: Callable[[Tensor, float], Prediction]
    before: tuple[float, Tensor] | None = None

    @property
    def schedule(self) -> Schedule:
        return self.prediction.schedule


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Base of all samplers.

    Args:
        num_inference_steps: how many steps, on the grid ``timestep_spacing``.
        timesteps: the sampler's own times instead, decreasing, in native time.
        sigmas: or noise levels, decreasing: sigma/alpha (VP, EDM) or sigma (flow).
        timestep_spacing: a grid of `fewstep.sampling.grids.spaced_times`; empty takes the sampler's own.
        steps_offset: of the leading grid.
        final: "clean" ends at alpha = 1, sigma = 0; "end" at the schedule's end (VP index 0, EDM sigma_min), which is
            diffusers' ``set_alpha_to_one=False`` and ``final_sigmas_type="sigma_min"``. Empty takes the sampler's own.
        strength: share of the noise that an image gets before it is sampled anew (image-to-image), 1 for all of it.
            Grids picked from a training grid (LCM's, TCD's) are picked from its lowest part, with all their steps;
            of all others the last part is left, rounded down, and up on flow schedules, as diffusers' pipelines do.

    Raises:
        ValueError: unless exactly one of the first three is given, and for options out of range.

    Attributes:
        name: in recipes and on the command line.
        spacing: the grid of ``num_inference_steps`` when no ``timestep_spacing`` is given.
        lands: "clean" or "end", the ``final`` when none is given.
        multistep: whether a step uses the prediction of the step before.
        jumps: whether a step without fresh noise is nothing but a jump along the prediction, as DDIM's.
        diffusers_names: schedulers of diffusers whose published files this sampler can run.
        diffusers_start: how those start (`sample`): Euler schedulers scale unit noise by the first sigma.
        diffusers_eta: whether those take ``eta`` in every step.
        boundary: whether its x0 passes LCM's boundary scalings (`fewstep.diffusion.consistency`).
        comfyui_node: node of ComfyUI that makes its steps on LCM's grid of 50 down to index 0; empty: there is none.
    """

    num_inference_steps: int | None = None
    timesteps: Numbers | None = None
    sigmas: Numbers | None = None
    timestep_spacing: str = ""
    steps_offset: int = 0
    final: str = ""
    strength: float = 1.0

    name: ClassVar[str] = ""
    spacing: ClassVar[str] = "trailing"
    lands: ClassVar[str] = "clean"
    multistep: ClassVar[bool] = False
    jumps: ClassVar[bool] = False
    diffusers_names: ClassVar[tuple[str, ...]] = ()
    diffusers_start: ClassVar[Literal["unit", "table"]] = "unit"
    diffusers_eta: ClassVar[bool] = False
    boundary: ClassVar[bool] = False
    comfyui_node: ClassVar[str] = ""

    @classmethod
    def options(cls) -> frozenset[str]:
        """Names of its settings; not every sampler has ``eta`` and ``original_inference_steps``."""
        return frozenset(f.name for f in fields(cls))

    def diffusers_schedulers(self, times: Array) -> Iterator[SchedulerPlan]:
        """Schedulers of diffusers that may step like it at these ``times`` of a VP schedule, the best first."""
        return jump_schedulers(self._original, times) if self.jumps and self.fresh_noise == 0 else iter(())

    def flow_scheduler(self) -> str:
        """The scheduler of diffusers that steps like it on flow schedules; empty if there is none."""
        return "FlowMatchEulerDiscreteScheduler" if self.jumps and self.fresh_noise == 0 else ""

    def comfyui_sampler(self, schedule: Schedule) -> str:
        """ComfyUI's sampler that steps like it on such a schedule, given its levels; empty if there is none."""
        return "euler" if self.jumps and self.fresh_noise == 0 else ""

    def __post_init__(self) -> None:
        given = [k for k in ("num_inference_steps", "timesteps", "sigmas") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{type(self).__name__} takes one of num_inference_steps, timesteps and sigmas, not "
                f"{' and '.join(given) or 'none'}."
            )
        if self.final not in ("", "clean", "end"):
            raise ValueError(f"Unknown final '{self.final}': use clean or end.")
        if not 0 <= self.fresh_noise <= 1:
            raise ValueError(f"eta must be between 0 and 1, not {self.fresh_noise:g}.")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, not {self.strength:g}.")

    def times(self, schedule: Schedule) -> Array:
        """The n + 1 decreasing native times of a run: those of n network calls, then the last state's."""
        last = self._final_time(schedule)
        if self.timesteps is not None:
            times, what = np.atleast_1d(host(self.timesteps)), "timesteps"
        elif self.sigmas is not None:
            times, what = times_of_sigmas(schedule, self.sigmas), "sigmas"
        else:
            assert self.num_inference_steps is not None
            times, what = self._spaced(schedule, self.num_inference_steps), "The grid"
            if times[-1] == last:  # the network would be called at the last state's own time
                times = self._spaced(schedule, self.num_inference_steps + 1)[:-1]
        schedule.alpha_sigma(times)  # raises for times outside the schedule
        return np.append(self._part(check_decreasing(times, what, last), schedule), last)

    def _final_time(self, schedule: Schedule) -> float:
        """The last state's time."""
        return float(schedule.clean if (self.final or self.lands) == "clean" else schedule.end)

    def _spaced(self, schedule: Schedule, n: int) -> Array:
        return spaced_times(schedule, n, self._grid, self.steps_offset, self._original, self.strength)

    def _part(self, times: Array, schedule: Schedule) -> Array:
        """The last part of ``times`` that the strength leaves."""
        if self.strength == 1 or (self.num_inference_steps is not None and self._grid in FROM_STRENGTH):
            return times
        wanted = len(times) * self.strength
        count = math.ceil(wanted - 1e-9) if schedule.family == "flow" else math.floor(wanted + 1e-9)
        if count == 0:
            raise ValueError(
                f"strength {self.strength:g} leaves none of {len(times)} steps: use at least {1 / len(times):.2g}, or "
                "more steps."
            )
        return times[-count:]

    @property
    def _grid(self) -> str:
        return self.timestep_spacing or self.spacing

    @property
    def _original(self) -> int:
        return int(getattr(self, "original_inference_steps", 50))

    @property
    def fresh_noise(self) -> float:
        """``eta``, its share of fresh noise; 0 for samplers without that option."""
        return float(getattr(self, "eta", 0.0))

    def end(self, schedule: Schedule, time: float, next_time: float, last: bool) -> float:
        """The target time s for a network conditioned on it (input ``end``)."""
        return next_time

    def targets(self, schedule: Schedule) -> list[tuple[float, float]]:
        """(t, s) of every step of a run as `walk` has it: no network of extra inputs is trained below the end."""
        pairs = list(pairwise(self.times(schedule).tolist()))
        ends = [self.end(schedule, t, after, i == len(pairs) - 1) for i, (t, after) in enumerate(pairs)]
        return [(t, max(end, schedule.end)) for (t, _), end in zip(pairs, ends, strict=True)]

    def step(self, at: Step) -> Tensor:
        """The next state, [B, ...], in the schedule's own coordinates."""
        raise NotImplementedError


# ---------------------------------------------------------------- moves that samplers and solvers share


def renoise(schedule: Schedule, x: Tensor, s: Time, t: Time, z: Tensor) -> Tensor:
    """From x_s to x_t, t noisier: (alpha_t/alpha_s) x + sqrt(sigma_t^2 - (alpha_t sigma_s/alpha_s)^2) z.

    Times are numbers or [B].
    """
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule.alpha_sigma(s), schedule.alpha_sigma(t)
    ratio = np.asarray(alpha_t / alpha_s)
    std = np.asarray(np.sqrt(np.maximum(sigma_t**2 - (ratio * sigma_s) ** 2, 0)))
    return torch.addcmul(expand(ratio, x) * x, expand(std, x), z.to(x.dtype))


def ancestral(at: Step, eta: float) -> Tensor:
    """Jump to ``at.next`` with a part of the noise drawn anew: DDIM's eta (Song et al. 2021, eq. 16), on any schedule.

    eta = 1 is the posterior of the forward process, and the same as k-diffusion's ancestral step.
    """
    schedule, prediction = at.schedule, at.prediction
    (alpha_t, sigma_t), (alpha, sigma) = schedule.alpha_sigma(at.time), schedule.alpha_sigma(at.next)
    std = np.asarray(eta * sigma * np.sqrt(np.maximum(1 - (sigma * alpha_t / (alpha * sigma_t)) ** 2, 0)))
    if std == 0:
        return prediction.at(at.next)
    kept = prediction.combine(alpha, np.asarray(np.sqrt(sigma**2 - std**2)))
    return torch.addcmul(kept, expand(std, kept), at.draw().to(kept.dtype))


def heun(first: Prediction, second: Prediction) -> Tensor:
    """From x at first.t to second.t by the mean of two slopes; ``second`` is the prediction after the first one's jump.

    Slopes are in `Schedule.solver_level`; times are numbers or [B]. Rows of `only_first_order` keep the state after the
    jump.
    """
    schedule, x = first.schedule, first.x
    euler = only_first_order(schedule, first.t, second.t)
    scale_t, level_t = (np.where(euler, 1.0, of(first.t)) for of in (schedule.solver_scale, schedule.solver_level))
    scale = schedule.solver_scale(second.t)
    half = np.asarray(scale * (schedule.solver_level(second.t) - level_t) / 2)
    straight = expand(np.asarray(scale / scale_t), x) * x
    slopes = first.slope + second.combine(*schedule.slope_mix, euler)
    x = torch.addcmul(straight, expand(half, straight), slopes)
    if not euler.any():
        return x
    mask = torch.from_numpy(np.atleast_1d(euler)).reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(mask.to(x.device, non_blocking=True), second.x, x)


def ancestral_in_comfyui(eta: float, schedule: Schedule) -> str:
    """ComfyUI's sampler that steps like `ancestral`; none on flow schedules, where euler_ancestral has another eta."""
    return "euler" if eta == 0 else "euler_ancestral" if schedule.family == "vp" else ""


def only_first_order(schedule: Schedule, t: Time, s: Time) -> Any:
    """Whether Heun's step from t to s has no second slope: to clean data, or from pure noise of a VP schedule."""
    alpha_t, sigma = schedule.alpha_sigma(t)[0], schedule.alpha_sigma(s)[1]
    return np.asarray((sigma == 0) | ((alpha_t == 0) & (schedule.family != "flow")))


# ---------------------------------------------------------------- few-step samplers


@dataclass(frozen=True, kw_only=True)
class LCMSampler(Sampler):
    """Jump to clean data, add fresh noise, repeat (Luo et al. 2023; Song et al. 2023, alg. 1).

    The public step re-noises the prediction as if it were clean, though its time is the schedule's end; ``exact``
    takes that into account (on EDM schedules both are the published ``sqrt(t^2 - sigma_min^2)``).

    Args:
        original_inference_steps: N of the training grid of "lcm" (diffusers' LCMScheduler, the default) and "lcm-v1".
    """

    original_inference_steps: int = 50
    exact: bool = False

    name: ClassVar[str] = "lcm"
    spacing: ClassVar[str] = "lcm"
    diffusers_names: ClassVar[tuple[str, ...]] = ("LCMScheduler", "FlowMatchLCMScheduler")
    boundary: ClassVar[bool] = True

    def diffusers_schedulers(self, times: Array) -> Iterator[SchedulerPlan]:
        return on_training_grids("LCMScheduler", self.original_inference_steps, times, {})

    def flow_scheduler(self) -> str:
        return "FlowMatchLCMScheduler"

    def comfyui_sampler(self, schedule: Schedule) -> str:
        return "" if self.exact and schedule.end != schedule.clean else "lcm"

    def end(self, schedule: Schedule, time: float, next_time: float, last: bool) -> float:
        return float(schedule.end)

    def step(self, at: Step) -> Tensor:
        x0, schedule = consistency(at.prediction), at.schedule
        if at.last:
            return x0
        lives_at = schedule.end if self.exact or schedule.family == "edm" else schedule.clean
        return renoise(schedule, x0, lives_at, at.next, at.draw())


@dataclass(frozen=True, kw_only=True)
class RenoiseSampler(Sampler):
    """Jump to clean data, add fresh noise, repeat: DMD2's own loop (Yin et al. 2024, sec. 4.4).

    LCM's sampler without the boundary condition of LCM's students: the two agree to 1e-6 on VP tables at times of 100
    and above, so other programs' LCM samplers step alike there, given these times.
    """

    name: ClassVar[str] = "renoise"
    diffusers_names: ClassVar[tuple[str, ...]] = ("SCMScheduler",)

    def diffusers_schedulers(self, times: Array) -> Iterator[SchedulerPlan]:
        return on_training_grids("LCMScheduler", 50, times, {}) if times[-2] >= 100 else iter(())

    def flow_scheduler(self) -> str:
        return "FlowMatchLCMScheduler"

    def comfyui_sampler(self, schedule: Schedule) -> str:
        return "lcm"

    def end(self, schedule: Schedule, time: float, next_time: float, last: bool) -> float:
        return float(schedule.end)

    def step(self, at: Step) -> Tensor:
        x0 = at.prediction.x0
        return x0 if at.last else at.schedule.add_noise(x0, at.draw(), at.next)


@dataclass(frozen=True, kw_only=True)
class TCDSampler(Sampler):
    """Strategic stochastic sampling (Zheng et al. 2024, alg. 4; diffusers' TCDScheduler).

    Jump past the next time to ``s = (1 - eta) next`` — scaled as a table index, rounded down, on VP — and diffuse
    back up to it. Ends at the schedule's end, VP index 0. eta = 0 never draws.
    """

    eta: float = 0.3
    original_inference_steps: int = 50

    name: ClassVar[str] = "tcd"
    spacing: ClassVar[str] = "lcm"
    lands: ClassVar[str] = "end"
    jumps: ClassVar[bool] = True
    diffusers_names: ClassVar[tuple[str, ...]] = ("TCDScheduler",)
    diffusers_eta: ClassVar[bool] = True
    comfyui_node: ClassVar[str] = "TCDModelSamplingDiscrete of ComfyUI-TCD"

    def diffusers_schedulers(self, times: Array) -> Iterator[SchedulerPlan]:
        if self.eta == 0:
            return super().diffusers_schedulers(times)
        call = {"eta": self.eta}
        return on_training_grids("TCDScheduler", self.original_inference_steps, times, call, set_alpha_to_one=False)

    def end(self, schedule: Schedule, time: float, next_time: float, last: bool) -> float:
        s = (1 - self.eta) * next_time
        if schedule.family == "vp":
            return float(max(math.floor(s + 1e-9), next_time if last else 0))
        return max(s, float(next_time if last else schedule.end))

    def step(self, at: Step) -> Tensor:
        s = self.end(at.schedule, at.time, at.next, at.last)
        x = at.prediction.at(s)
        if at.last or self.eta == 0:
            return x
        return renoise(at.schedule, x, s, at.next, at.draw())


@dataclass(frozen=True, kw_only=True)
class CTMSampler(Sampler):
    """Gamma sampling of consistency trajectory models (Kim et al. 2024, alg. 2, as their code has it).

    Jump to noise level ``sqrt(1 - eta^2) (next - end) + end`` and diffuse back up. ``eta`` is the paper's gamma and
    scales noise levels (sigma/alpha), unlike TCD's, which scales the time. 0: deterministic; 1: multistep CM.
    """

    eta: float = 0.0

    name: ClassVar[str] = "ctm"
    spacing: ClassVar[str] = "trailing"
    lands: ClassVar[str] = "end"
    jumps: ClassVar[bool] = True

    def end(self, schedule: Schedule, time: float, next_time: float, last: bool) -> float:
        if last or self.eta == 0:
            return next_time
        if self.eta == 1:
            return float(schedule.end)
        lowest = schedule.noise_to_signal(schedule.end)
        level = math.sqrt(1 - self.eta**2) * (schedule.noise_to_signal(next_time) - lowest) + lowest
        return float(schedule.time_at(level))

    def step(self, at: Step) -> Tensor:
        s = self.end(at.schedule, at.time, at.next, at.last)
        x = at.prediction.at(s)
        return x if s == at.next else renoise(at.schedule, x, s, at.next, at.draw())


@dataclass(frozen=True, kw_only=True)
class PhasedSampler(Sampler):
    """Jumps between the edges of PCM's phases, where its students were trained (Wang et al. 2024, alg. 2).

    ``num_inference_steps`` is the number of phases. Other grids leave the edges, where the student is not trained.

    Args:
        eta: share of fresh noise: ``alpha x0 + sigma (sqrt(1 - eta^2) eps + eta z)``, the paper's eq. 44 with
            r = 1 - eta^2.
        original_inference_steps: N of the training grid.
    """

    eta: float = 0.0
    original_inference_steps: int = 50

    name: ClassVar[str] = "phased"
    spacing: ClassVar[str] = "phases"
    lands: ClassVar[str] = "end"
    jumps: ClassVar[bool] = True

    def step(self, at: Step) -> Tensor:
        if at.last or self.eta == 0:
            return at.prediction.at(at.next)
        alpha, sigma = at.schedule.alpha_sigma(at.next)
        kept = at.prediction.combine(alpha, np.asarray(sigma * math.sqrt(1 - self.eta**2)))
        return torch.addcmul(kept, expand(np.asarray(sigma * self.eta), kept), at.draw().to(kept.dtype))


# ---------------------------------------------------------------- samplers of ordinary models


@dataclass(frozen=True, kw_only=True)
class DDIMSampler(Sampler):
    """Denoising diffusion implicit models (Song et al. 2021); ``eta`` = 1 is DDPM's noise."""

    eta: float = 0.0

    name: ClassVar[str] = "ddim"
    jumps: ClassVar[bool] = True
    diffusers_names: ClassVar[tuple[str, ...]] = ("DDIMScheduler",)
    diffusers_eta: ClassVar[bool] = True

    def diffusers_schedulers(self, times: Array) -> Iterator[SchedulerPlan]:
        if self.eta == 0:
            return super().diffusers_schedulers(times)
        return ancestral_noise() if self.eta == 1 and times[-1] < 0 else ddim_schedulers(times, {"eta": self.eta})

    def comfyui_sampler(self, schedule: Schedule) -> str:
        return ancestral_in_comfyui(self.eta, schedule)

    def step(self, at: Step) -> Tensor:
        return ancestral(at, self.eta)


@dataclass(frozen=True, kw_only=True)
class EulerSampler(Sampler):
    """Euler steps in sigma/alpha: diffusers' EulerDiscrete, and FlowMatchEulerDiscrete on flow schedules.

    The same jump as DDIM's; "linspace" keeps fractions here, as those schedulers do.
    """

    name: ClassVar[str] = "euler"
    jumps: ClassVar[bool] = True
    diffusers_names: ClassVar[tuple[str, ...]] = ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")
    diffusers_start: ClassVar[Literal["unit", "table"]] = "table"

    def _spaced(self, schedule: Schedule, n: int) -> Array:
        if schedule.family == "vp" and self.timestep_spacing == "linspace":
            return np.linspace(0, schedule.start, n)[::-1].copy()  # a single step is at index 0, as it is there
        return super()._spaced(schedule, n)

    def step(self, at: Step) -> Tensor:
        return at.prediction.at(at.next)


@dataclass(frozen=True, kw_only=True)
class EulerAncestralSampler(EulerSampler):
    """k-diffusion's ancestral Euler: SDXL-Turbo's sampler."""

    eta: float = 1.0

    name: ClassVar[str] = "euler-ancestral"
    jumps: ClassVar[bool] = False
    diffusers_names: ClassVar[tuple[str, ...]] = ("EulerAncestralDiscreteScheduler",)

    def diffusers_schedulers(self, times: Array) -> Iterator[SchedulerPlan]:
        if self.eta == 0:
            return jump_schedulers(self._original, times)
        return ancestral_noise() if self.eta == 1 and times[-1] < 0 else iter(())

    def flow_scheduler(self) -> str:
        return "FlowMatchEulerDiscreteScheduler" if self.eta == 0 else ""

    def comfyui_sampler(self, schedule: Schedule) -> str:
        return ancestral_in_comfyui(self.eta, schedule)

    def step(self, at: Step) -> Tensor:
        return ancestral(at, self.eta)


@dataclass(frozen=True, kw_only=True)
class HeunSampler(EulerSampler):
    """Heun's second-order steps (Karras et al. 2022, alg. 1), two calls each: in sigma/alpha; in t on flow schedules.

    First order where the step ends at clean data or starts at pure noise of a VP schedule.
    """

    name: ClassVar[str] = "heun"
    jumps: ClassVar[bool] = False
    diffusers_names: ClassVar[tuple[str, ...]] = ()

    def comfyui_sampler(self, schedule: Schedule) -> str:
        return "heun" if schedule.alpha_sigma(schedule.start)[0] > 0 or schedule.family == "flow" else ""

    def step(self, at: Step) -> Tensor:
        jump = at.prediction.at(at.next)
        if only_first_order(at.schedule, at.time, at.next):
            return jump
        second = at.ask(jump, at.next)
        return heun(at.prediction, second)


@dataclass(frozen=True, kw_only=True)
class DPMSolverPP2MSampler(Sampler):
    """DPM-Solver++ 2M, midpoint (Lu et al. 2022, alg. 2), as diffusers' DPMSolverMultistep has it by default.

    The first step is of first order, and so is the last one when it ends at clean data or n < 15.
    """

    name: ClassVar[str] = "dpm++2m"
    multistep: ClassVar[bool] = True

    def _spaced(self, schedule: Schedule, n: int) -> Array:
        """diffusers makes n + 1 points for this solver's leading and linspace grids, and drops the lowest."""
        total = schedule.num_train_timesteps
        if schedule.family == "vp" and self.timestep_spacing == "linspace":
            return np.linspace(0, total - 1, n + 1).round()[:0:-1]
        if schedule.family == "vp" and self.timestep_spacing == "leading":
            return np.asarray(np.arange(n, 0, -1) * (total // (n + 1)) + self.steps_offset, dtype=np.float64)
        return super()._spaced(schedule, n)

    def comfyui_sampler(self, schedule: Schedule) -> str:
        """ComfyUI takes log sigma for log sigma/alpha on flow schedules, and ends at clean data, to first order."""
        same = schedule.family != "flow" and self._final_time(schedule) == schedule.clean
        return "dpmpp_2m" if same and schedule.alpha_sigma(schedule.start)[0] > 0 else ""

    def step(self, at: Step) -> Tensor:
        schedule, prediction = at.schedule, at.prediction
        jump = prediction.at(at.next)
        if at.before is None or self._first_order(at):
            return jump
        time_before, x0_before = at.before
        ratio = self._slope_ratio(schedule, time_before, at.time, at.next)
        (alpha_t, sigma_t), (alpha, sigma) = schedule.alpha_sigma(at.time), schedule.alpha_sigma(at.next)
        weight = np.asarray((alpha - sigma * alpha_t / sigma_t) * ratio / 2)
        return torch.addcmul(jump, expand(weight, jump), prediction.x0 - x0_before)

    def _first_order(self, at: Step) -> bool:
        if not at.last:
            return False
        return at.schedule.alpha_sigma(at.next)[1] == 0 or (self.num_steps is not None and self.num_steps < 15)

    @property
    def num_steps(self) -> int | None:
        """Number of steps, before a closing 0 of ``sigmas`` is dropped."""
        given = self.timesteps if self.timesteps is not None else self.sigmas
        return self.num_inference_steps if given is None else len(given)

    @staticmethod
    def _slope_ratio(schedule: Schedule, before: float, now: float, after: float) -> float:
        """(lambda_after - lambda_now) / (lambda_now - lambda_before), lambda = log(alpha/sigma); 0 after pure noise."""
        with np.errstate(divide="ignore"):
            lambdas = [-float(np.log(schedule.noise_to_signal(t))) for t in (before, now, after)]
        return (lambdas[2] - lambdas[1]) / (lambdas[1] - lambdas[0])


SAMPLERS: dict[str, type[Sampler]] = {
    cls.name: cls
    for cls in (
        LCMSampler,
        RenoiseSampler,
        TCDSampler,
        CTMSampler,
        PhasedSampler,
        DDIMSampler,
        EulerSampler,
        EulerAncestralSampler,
        HeunSampler,
        DPMSolverPP2MSampler,
    )
}


@cache
def comfyui_names() -> dict[str, str]:
    """ComfyUI's name -> ours, where it is not ours too, for samplers that step alike on ComfyUI's tables of betas."""
    table, found = Schedule.scaled_linear(), dict[str, str]()
    for name, cls in SAMPLERS.items():
        found.setdefault(cls(num_inference_steps=4).comfyui_sampler(table), name)
    return {theirs: ours for theirs, ours in found.items() if theirs not in ("", *SAMPLERS)}


def sampler_name(name: str, key: str = "sampler") -> str:
    """A key of `SAMPLERS`: ``name`` itself, or the one that ComfyUI calls so.

    Raises:
        ValueError: one sentence that names ``key`` and what is known.
    """
    theirs = comfyui_names()
    found = theirs.get(name, name)
    if found not in SAMPLERS:
        near = difflib.get_close_matches(name, [*SAMPLERS, *theirs], n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"Unknown {key} '{name:.80}': use {', '.join(SAMPLERS)}, or ComfyUI's names {', '.join(theirs)}.{hint}"
        )
    return found


def make_sampler(name: str, **options: Any) -> Sampler:
    """The sampler of that name, ours or ComfyUI's, with these options.

    Raises:
        ValueError: one sentence for an unknown name, or an option that this sampler does not have.
    """
    name = sampler_name(name)
    known = SAMPLERS[name].options()
    for option in options.keys() - known:
        raise ValueError(f"The sampler {name} has no option '{option}': it has {', '.join(sorted(known))}.")
    return SAMPLERS[name](**options)
