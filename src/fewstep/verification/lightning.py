"""Lightning: the contract of both adversarial losses, and a trained student beside its teacher's steps."""

from __future__ import annotations

import dataclasses

import torch

from fewstep.methods.lightning import Lightning
from fewstep.models.roles import Roles
from fewstep.verification.bench import Bench
from fewstep.verification.contract import contract_rows
from fewstep.verification.distribution import distribution_rows
from fewstep.verification.fixed_points import compose
from fewstep.verification.report import Row
from fewstep.verification.sizes import rms


def fixed_rows(bench: Bench, method: Lightning) -> list[Row]:
    """Rows that need no trained student."""
    rows = []
    for loss in ("conditional", "unconditional"):
        if method.settings.loss != loss:
            other = type(method)(method.schedule, dataclasses.replace(method.settings, loss=loss))
            rows += [
                dataclasses.replace(row, quantity=f"{loss}: {row.quantity}") for row in contract_rows(bench, other)
            ]
    return rows


def trained_rows(bench: Bench, method: Lightning, roles: Roles) -> list[Row]:
    """A trained student's steps, one by one from the teacher's own states, then all of them from the start.

    Only the mean square error has that fixed point. For adversarial losses the distribution of samples is compared.
    """
    if method.settings.loss != "mse":
        return distribution_rows(bench, method, roles)
    x, cond = bench.starts
    last = len(method.grid) - 1
    few, rows = method.settings.num_inference_steps, []
    for k in range(few):
        path = [float(t[0]) for t in method.teacher_times(torch.tensor([k * method.starts // few]))]
        composed = compose(bench.teacher, x, path, cond, bench.guidance_scale)
        with torch.no_grad():
            jump = roles.student(x.float(), path[0], cond).at(path[-1]).double()
        distance = rms(composed - bench.flow(x, path[0], path[-1], cond))
        rows.append(
            Row(f"step {path[0]:g} -> {path[-1]:g}: rms error", 0.0, rms(jump - composed), 0.08 * bench.width, distance)
        )
        x = composed
    start, cond = bench.starts
    times = method.grid[:: last // few].tolist()
    with torch.no_grad():
        x_end = compose(roles.student, start.float(), times, cond).double()
    distance = rms(x - bench.flow(start, times[0], times[-1], cond))
    return [*rows, Row(f"{few} steps: rms error", 0.0, rms(x_end - x), 0.25 * bench.width, distance)]
