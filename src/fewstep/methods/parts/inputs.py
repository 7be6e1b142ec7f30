"""The inputs of a student of N calls in training: states at one of its own sampling times.

=========  ========================================================================================================
simulated  where its own calls lead it: DMD2's backward simulation (Yin et al. 2024, sec. 4.4), so that it learns to
           mend what its earlier calls did; the number of calls is one for the whole batch, the gradient the last one's
noised     data, noised: what it would meet if its earlier calls were perfect (ADD; FastGen's DMD2)
=========  ========================================================================================================

The first of the times is met with noise alone: as it is ("noise", what these methods are trained and sampled with), or
times sigma ("table"), with alpha times data in it where data is noised. Conversions keep the table's alpha and sigma
either way. On EDM schedules both are sigma times the noise, on flow schedules both are the noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fewstep.data.random import Rng
from fewstep.diffusion.schedule import Schedule
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.sampling.sample import first_state

Policy: TypeAlias = Literal["simulated", "noised"]
Terminal: TypeAlias = Literal["noise", "table"]


@dataclass(frozen=True)
class Inputs:
    """States for a student that is sampled at ``timesteps``.

    Attributes:
        schedule: of the student.
        timesteps: [N] decreasing native times, on the host.
        policy: "simulated" or "noised". terminal: "noise" or "table".

    Raises:
        ValueError: times that do not decrease, or lie outside the schedule.
    """

    schedule: Schedule
    timesteps: Tensor
    policy: Policy = "simulated"
    terminal: Terminal = "noise"

    def __post_init__(self) -> None:
        if self.timesteps.ndim != 1 or not len(self.timesteps) or (self.timesteps.diff() >= 0).any():
            raise ValueError(f"timesteps must be one or more times that decrease, not {self.timesteps.tolist()}.")
        if (self.schedule.alpha_sigma(self.timesteps)[1] == 0).any():
            raise ValueError("timesteps must be above clean data, where a student has nothing to do.")

    def draw_exit(self, rng: Rng) -> int:
        """j, at which of the times the student is trained: uniform, one for the whole batch on every rank."""
        return rng.shared.integer("exit", 0, len(self.timesteps))

    def noises(self, exit: int) -> int:
        """How many unit normals of the state's shape `state` needs."""
        return exit + 1 if self.policy == "simulated" else 1

    def state(self, student: Denoiser, x0: Tensor, noise: Tensor, exit: int, cond: Cond | None) -> Tensor:
        """x_t [B, ...] at ``timesteps[exit]``, without a graph.

        Args:
            x0: [B, ...] data.
            noise: [B, `noises`, ...] unit normals; of a simulation the first is its start, the others follow each call.
        """
        if self.policy == "noised" and (exit > 0 or self.terminal == "table"):
            return self.schedule.add_noise(x0, noise[:, 0], self.timesteps[exit])
        start = "unit" if self.terminal == "noise" else "table"
        x = first_state(self.schedule, noise[:, 0], float(self.timesteps[0]), start)
        with torch.no_grad():
            for i in range(exit):
                x0_student = student(x, self.timesteps[i], cond).x0
                x = self.schedule.add_noise(x0_student, noise[:, i + 1], self.timesteps[i + 1])
        return x


def noised_rows(schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor, terminal: Terminal) -> Tensor:
    """Data [B, ...] noised to times t [B] (host), each row to its own; `pure_rows` are noise alone."""
    x_t, pure = schedule.add_noise(x0, noise, t), pure_rows(schedule, t, terminal)
    rows = pure.reshape(-1, *[1] * (x0.ndim - 1)).to(x_t.device, non_blocking=True)
    return torch.where(rows, first_state(schedule, noise, schedule.start, "unit").to(x_t.dtype), x_t)


def pure_rows(schedule: Schedule, t: Tensor, terminal: Terminal) -> Tensor:
    """[B] bool on the host: which rows of `noised_rows` show nothing of their data."""
    blind = torch.from_numpy(np.atleast_1d(schedule.alpha_sigma(t)[0] == 0))
    return blind | (t == schedule.start) if terminal == "noise" else blind
