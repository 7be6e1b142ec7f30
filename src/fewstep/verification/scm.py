"""sCM against the exact consistency function: its tangent there, its matching (rCM), a trained student in one step."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from fewstep.diffusion.schedule import Time, host
from fewstep.methods.scm import SCM, angle
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.roles import Roles
from fewstep.verification.bench import Bench
from fewstep.verification.consistency import oracle
from fewstep.verification.contract import contract_rows
from fewstep.verification.distribution import distribution_rows
from fewstep.verification.dmd2_switches import fake_row, rollout_from_starts
from fewstep.verification.report import Row
from fewstep.verification.slopes import distance_rows

STEPS = 5500
LIMITS = {1: 0.25}
"""Of the distance to the exact flow map in one step, on two modes of unit size on a line."""
_ROWS, _STEP, _CALLS = 64, 1e-3, 4


class ExactConsistency:
    """The exact flow map to clean data as a network that predicts x0, for rows of few times."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def __call__(self, x: Tensor, t: Time, cond: Cond | None = None) -> Tensor:
        times, found = np.broadcast_to(host(t), (len(x),)), torch.empty_like(x)
        for time in np.unique(times):
            rows = torch.from_numpy(times == time)
            some = None if cond is None else cond[rows]
            found[rows] = self.bench.flow(x[rows], float(time), self.bench.schedule.clean, some)
        return found


def fixed_rows(bench: Bench, method: SCM) -> list[Row]:
    """Rows without training: at the exact consistency function the mean square of the tangent falls as h^2."""
    rows = matching_rows(bench, method)
    for a in (0.4, 1.0, 1.4):
        sizes = [tangent_size(bench, method, a, step) for step in (_STEP, _STEP / 2)]
        name = f"angle {a:g}: squared tangent at the exact consistency function"
        rows.append(Row(f"{name}, angle step {_STEP:g} / {_STEP / 2:g}: ratio", 4.0, sizes[0] / sizes[1], 0.4))
    return rows


def matching_rows(bench: Bench, method: SCM) -> list[Row]:
    """With matching: the contract; a student that is the exact consistency function samples the teacher's own data.

    So its fake score is the teacher: the second term has the first one's optimum. Not with guidance.
    """
    matched = SCM(method.schedule, dataclasses.replace(method.settings, matching_weight=1.0))
    rows = contract_rows(bench, matched, "matched: ") if not method.settings.matching_weight else []
    student = Denoiser(ExactConsistency(bench), bench.schedule, "sample")
    exits = {0, min(matched.settings.any_steps, _CALLS) - 1}  # later ones are drawn too rarely
    for exit in sorted(exits) if bench.guidance_scale == 1.0 else ():
        batch, draws = rollout_from_starts(bench, matched, exit)
        rows.append(fake_row(f"matched after {exit + 1} of its calls", bench, matched, student, batch, draws))
    return rows


def tangent_size(bench: Bench, method: SCM, a: float, step: float) -> float:
    """The mean square of g at the exact consistency function, on rows at the angle ``a``, in float64."""
    batch, draws = bench.draw(method, _ROWS)
    t, u = (method.time_at(np.full(_ROWS, at)) for at in (a, a - step))
    draws = dataclasses.replace(draws, t=t, u=u, warmup=1.0)
    exact = Denoiser(ExactConsistency(bench), bench.schedule, "sample")
    roles = oracle(bench, exact)
    along = method.along(roles, batch, draws)
    prediction = exact(along.x_t, t, batch.cond)
    moved = prediction.combine(-np.sin(angle(bench.schedule, t)), np.cos(angle(bench.schedule, t)))
    return float(method.tangent(moved, draws, along).square().mean())


def trained_rows(bench: Bench, method: SCM, roles: Roles) -> list[Row]:
    """The trained student in one step against the exact flow map, and its samples' distribution."""
    rows = distance_rows(bench, method, roles, LIMITS, bench.schedule.clean)
    return [*rows, *distribution_rows(bench, method, roles)]
