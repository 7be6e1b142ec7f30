"""Rows that methods which learn slopes share: a student's steps from noise against the exact flow map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fewstep.data.random import stream_key
from fewstep.models.roles import Roles
from fewstep.sampling import make_sampler, sample
from fewstep.sampling.sample import first_state
from fewstep.verification.bench import Bench
from fewstep.verification.report import Row
from fewstep.verification.sizes import rms

SEVERAL_DIMENSIONS = 2.5  # times as large as on a line, where the map is steep between more than two modes


def distance_rows(bench: Bench, method: Any, roles: Roles, limits: Mapping[int, float], end: float) -> list[Row]:
    """The student's distance to the exact flow map in so many steps, start by start, from the same unit noise.

    Args:
        limits: by number of steps, for data of unit size on a line; they grow with the data's size.
        end: native time where the method's sampler ends.
    """
    start, cond = bench.starts
    generator = torch.Generator().manual_seed(stream_key(bench.seed, "noise of slopes"))
    noise, schedule = torch.randn(start.shape, generator=generator), bench.schedule
    exact = bench.flow(first_state(schedule, noise.double(), schedule.start), schedule.start, end, cond)
    scale = max(1.0, rms(exact - exact.mean(dim=0))) * (1.0 if bench.mixture.dim == 1 else SEVERAL_DIMENSIONS)
    rows = []
    for n, limit in limits.items():
        x = sample(roles.student, make_sampler(method.sampler, num_inference_steps=n), noise, cond).x0
        name = f"{n} step{'s' if n > 1 else ''}: rms distance to the exact flow map"
        rows.append(Row(name, 0.0, rms(x.double() - exact), limit * scale))
    return rows
