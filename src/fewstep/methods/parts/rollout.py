"""The inputs of a student of N calls in training: states at one of its own sampling times.

=========  ========================================================================================================
simulated  where its own calls lead it: DMD2's backward simulation (Yin et al. 2024, sec. 4.4), so that it learns to
           mend what its earlier calls did; the number of calls is one for the whole batch, the gradient the last one's
noised     data, noised: what it would meet if its earlier calls were perfect (ADD; FastGen's DMD2)
=========  ========================================================================================================

The first of the times is met with noise alone, or with the table's share of it (`parts.inputs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from fewstep.data.random import Rng
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.parts.inputs import Terminal
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.sampling.sample import first_state

Policy: TypeAlias = Literal["simulated", "noised"]


@dataclass(kw_only=True)
class RolloutDraws:
    """Where the student is trained, and what leads it there.

    Attributes:
        exit: at which of its times; the same in every row, micro-batch and process.
        noise: [B, exit + 1, ...] unit normals: where the student's own calls start, and what noises their predictions
            ([B, 1, ...] when data is noised).
    """

    exit: int
    noise: Tensor


@dataclass(frozen=True)
class Rollout:
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

    def draw(self, rng: Rng, shape: Sequence[int]) -> dict[str, Any]:
        """The fields of `RolloutDraws`, for states of this shape [...]."""
        exit = self.draw_exit(rng)
        return {"exit": exit, "noise": rng.sample.normal("noise", (self.noises(exit), *shape))}

    def noises(self, exit: int) -> int:
        """How many unit normals of the state's shape `state` needs."""
        return exit + 1 if self.policy == "simulated" else 1

    def calls(self, exit: float) -> float:
        """The student's calls before the one at ``exit``."""
        return exit if self.policy == "simulated" else 0

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
