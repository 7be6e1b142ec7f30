"""The inputs of a student of few calls in training: states at one of its own sampling times.

=========  ========================================================================================================
simulated  where its own calls lead it: DMD2's backward simulation (Yin et al. 2024, sec. 4.4), so that it learns to
           mend what its earlier calls did; the number of calls is one for the whole batch, the gradient the last one's
noised     data, noised: what it would meet if its earlier calls were perfect (ADD; FastGen's DMD2)
=========  ========================================================================================================

Its calls lead on by noising each prediction afresh ("renoise"), or by jumps on the ODE ("ode": TDM, DP-DMD, LightX2V),
as its sampler will. Its times are fixed, or drawn anew in every step, of one to N calls (CDM: arXiv 2605.06376), so
that one student serves any number of steps. The first of the times is met with noise alone, or with the table's share
of it (`parts.inputs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fewstep.data.random import Rng
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.parts.inputs import Terminal
from fewstep.methods.parts.score_pair import MATCHED, noise_levels
from fewstep.methods.settings import Count, CountOrNone, checked
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.sampling.sample import first_state

Policy: TypeAlias = Literal["simulated", "noised"]
Move: TypeAlias = Literal["renoise", "ode"]


@checked
class RolloutSettings:
    """Where a student is trained.

    Attributes:
        num_inference_steps: N, the student's calls, on the trailing grid: 999, 749, 499, 249.
        timesteps: other times instead, decreasing; [399] is SDXL's one-step student, which starts from unit noise at a
            time where an error of eps weighs 1.2 in x0 and not 14.6. By default, on a table that ends above 15 (DDPM's:
            157), the trailing grid below the noisiest index of at most 15 (`diffusion.well_posed`).
        any_steps: above 0, random times of 1 to so many steps in every training step (CDM): one student for all.
        rollout: how its own calls lead on: "renoise", or "ode", for DDIM and Euler samplers.
        student_input: "simulated", or "noised", data in place of the student's own calls.
        terminal: "noise" or "table", what stands for noise at the first time.
    """

    num_inference_steps: Count = 4
    timesteps: tuple[float, ...] | None = None
    any_steps: CountOrNone = 0
    rollout: Move = "renoise"
    student_input: Policy = "simulated"
    terminal: Terminal = "noise"

    def __post_init__(self) -> None:
        if self.any_steps and self.timesteps is not None:
            raise ValueError("any_steps draws the student's times: leave timesteps out, or set any_steps to 0.")

    @property
    def most_steps(self) -> int:
        """The largest number of the student's calls."""
        return self.any_steps or (self.num_inference_steps if self.timesteps is None else len(self.timesteps))


@dataclass(kw_only=True)
class RolloutDraws:
    """Where the student is trained, and what leads it there.

    Attributes:
        times: the student's native times in this step, decreasing, and
        exit: at which of them it is trained; the same in every row, micro-batch and process.
        noise: [B, n, ...] unit normals: where the student's own calls start, and what noises their predictions (n is
            exit + 1; 1 on the ODE, or when data is noised).
    """

    times: tuple[float, ...]
    exit: int
    noise: Tensor


@dataclass(frozen=True)
class Rollout:
    """States for a student that is sampled at ``timesteps``.

    Attributes:
        schedule: of the student.
        timesteps: [N] decreasing native times, on the host.
        policy: "simulated" or "noised". terminal: "noise" or "table". move: "renoise" or "ode".
        any_steps: above 0, the times are drawn: the schedule's start, and up to any_steps - 1 of its levels, among
            `inner_levels`.
        first_exit: the first of its times at which the student is trained.

    Raises:
        ValueError: times that do not decrease, or lie outside the schedule.
    """

    schedule: Schedule
    timesteps: Tensor
    policy: Policy = "simulated"
    terminal: Terminal = "noise"
    move: Move = "renoise"
    any_steps: int = 0
    first_exit: int = 0

    @classmethod
    def of(cls, schedule: Schedule, settings: RolloutSettings, first_exit: int = 0) -> Rollout:
        """From a method's settings."""
        grid = schedule.timesteps(settings.num_inference_steps) if settings.timesteps is None else settings.timesteps
        times, inputs = torch.as_tensor(grid, dtype=torch.float64), (settings.student_input, settings.terminal)
        return cls(schedule, times, *inputs, settings.rollout, settings.any_steps, first_exit)

    def __post_init__(self) -> None:
        if self.timesteps.ndim != 1 or not len(self.timesteps) or (self.timesteps.diff() >= 0).any():
            raise ValueError(f"timesteps must be one or more times that decrease, not {self.timesteps.tolist()}.")
        if (self.schedule.alpha_sigma(self.timesteps)[1] == 0).any():
            raise ValueError("timesteps must be above clean data, where a student has nothing to do.")

    def draw(self, rng: Rng, shape: Sequence[int]) -> dict[str, Any]:
        """The fields of `RolloutDraws`, for states of this shape [...]."""
        times = self.draw_times(rng)
        exit = self.draw_exit(rng, len(times))
        return {"times": times, "exit": exit, "noise": rng.sample.normal("noise", (self.noises(exit), *shape))}

    def draw_times(self, rng: Rng) -> tuple[float, ...]:
        """The student's times in this step, one grid for the whole batch on every rank.

        Inner times are levels of `inner_levels`, uniform and each at most once.
        """
        if not self.any_steps:
            return tuple(self.timesteps.tolist())
        levels, (low, high) = noise_levels(self.schedule), self.inner_levels
        steps = rng.shared.integer("steps", self.first_exit + 1, self.any_steps + 1)
        inner = {rng.shared.integer(f"inner_time/{i}", low, high + 1) for i in range(steps - 1)}
        return (float(self.schedule.start), *(float(levels[i]) for i in sorted(inner, reverse=True)))

    @property
    def first_time(self) -> float:
        """The native time at which the student meets noise."""
        return float(self.schedule.start if self.any_steps else self.timesteps[0])

    @cached_property
    def inner_levels(self) -> tuple[int, int]:
        """The lowest and the highest of the levels that are drawn for inner times: of `MATCHED`, and as far beyond as
        samplers of up to any_steps steps ask.
        """
        levels = noise_levels(self.schedule)
        low, high = (int(share * len(levels)) for share in MATCHED)
        for n in range(2, self.any_steps + 1):
            inner = self.schedule.timesteps(n)[1:].double().numpy()
            low = min(low, int(np.searchsorted(levels, inner[-1], side="right")) - 1)
            high = max(high, int(np.searchsorted(levels, inner[0])))
        return max(low, 0), min(high, len(levels) - 2)

    def draw_exit(self, rng: Rng, steps: int) -> int:
        """j, at which of so many times the student is trained: uniform, one for the whole batch on every rank."""
        return rng.shared.integer("exit", self.first_exit, steps)

    def noises(self, exit: int) -> int:
        """How many unit normals of the state's shape `state` needs."""
        return exit + 1 if self.policy == "simulated" and self.move == "renoise" else 1

    def calls(self, exit: float) -> float:
        """The student's calls before the one at ``exit``."""
        return exit if self.policy == "simulated" else 0

    @property
    def mean_exit(self) -> float:
        """The exit on average."""
        if not self.any_steps:
            return (self.first_exit + len(self.timesteps) - 1) / 2
        return (self.first_exit + (self.first_exit + self.any_steps - 1) / 2) / 2

    def next_time(self, draws: RolloutDraws) -> float:
        """The native time to which the call at the exit leads on the ODE: the next of the times, or clean data."""
        return (*draws.times, float(self.schedule.clean))[draws.exit + 1]

    def end(self, student: Denoiser, time: float) -> float | None:
        """The end of a jump to ``time``, for a student with that input: as its samplers give it; None for others.

        Where predictions are noised afresh every jump goes to the schedule's end.
        """
        if "end" not in student.accepts:
            return None
        return max(time, self.schedule.end) if self.move == "ode" else self.schedule.end

    def first_state(self, draws: RolloutDraws) -> Tensor:
        """The state [B, ...] from which the student's own calls start."""
        start = "unit" if self.terminal == "noise" else "table"
        return first_state(self.schedule, draws.noise[:, 0], draws.times[0], start)

    def state(self, student: Denoiser, x0: Tensor, draws: RolloutDraws, cond: Cond | None) -> Tensor:
        """x_t [B, ...] at ``draws.times[draws.exit]``, without a graph; x0: [B, ...] data, where it is noised."""
        times, exit, noise = draws.times, draws.exit, draws.noise
        if self.policy == "noised" and (exit > 0 or self.terminal == "table"):
            return self.schedule.add_noise(x0, noise[:, 0], times[exit])
        x = self.first_state(draws)
        with torch.no_grad():
            for i in range(exit):
                pred = student(x, times[i], cond, end=self.end(student, times[i + 1]))
                if self.move == "ode":
                    x = pred.at(times[i + 1])
                else:
                    x = self.schedule.add_noise(pred.x0, noise[:, i + 1], times[i + 1])
        return x
