"""Data as a student's input: noised, and at the first of its times noise alone.

The first time is met with noise as it is ("noise", what these methods are trained and sampled with), or times sigma
("table"), with alpha times data in it where data is noised. Conversions keep the table's alpha and sigma either way. On
EDM schedules both are sigma times the noise, on flow schedules both are the noise.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fewstep.diffusion.schedule import Schedule
from fewstep.sampling.sample import first_state

Terminal: TypeAlias = Literal["noise", "table"]


def noised_rows(schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor, terminal: Terminal) -> Tensor:
    """Data [B, ...] noised to times t [B] (host), each row to its own; `pure_rows` are noise alone."""
    x_t, pure = schedule.add_noise(x0, noise, t), pure_rows(schedule, t, terminal)
    rows = pure.reshape(-1, *[1] * (x0.ndim - 1)).to(x_t.device, non_blocking=True)
    return torch.where(rows, first_state(schedule, noise, schedule.start, "unit").to(x_t.dtype), x_t)


def pure_rows(schedule: Schedule, t: Tensor, terminal: Terminal) -> Tensor:
    """[B] bool on the host: which rows of `noised_rows` show nothing of their data."""
    blind = torch.from_numpy(np.atleast_1d(schedule.alpha_sigma(t)[0] == 0))
    return blind | (t == schedule.start) if terminal == "noise" else blind
