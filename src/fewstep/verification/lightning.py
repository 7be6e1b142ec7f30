"""Lightning: the contract of both its games, and a trained student beside its teacher's steps."""

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
    """What holds without training a student."""
    rows = []
    for loss in ("conditional", "unconditional"):
        if method.settings.loss != loss:
            game = type(method)(method.schedule, dataclasses.replace(method.settings, loss=loss))
            rows += [dataclasses.replace(row, quantity=f"{loss}: {row.quantity}") for row in contract_rows(bench, game)]
    return rows


def trained_rows(bench: Bench, method: Lightning, roles: Roles) -> list[Row]:
    """A trained student's steps, one by one from the teacher's own states, then all of them from the start.

    Only a mean square error has that fixed point: of adversarial students the distribution of samples is compared.
    """
    if method.settings.loss != "mse":
        return distribution_rows(bench, method, roles)
    x, cond = bench.starts
    last = len(method.grid) - 1
    few, rows = method.settings.num_inference_steps, []
    for k in range(few):
        way = [float(t[0]) for t in method.teacher_times(torch.tensor([k * method.starts // few]))]
        landing = compose(bench.teacher, x, way, cond, bench.guidance_scale)
        with torch.no_grad():
            jump = roles.student(x.float(), way[0], cond).at(way[-1]).double()
        distance = rms(landing - bench.flow(x, way[0], way[-1], cond))
        rows.append(
            Row(f"step {way[0]:g} -> {way[-1]:g}: rms error", 0.0, rms(jump - landing), 0.08 * bench.width, distance)
        )
        x = landing
    start, cond = bench.starts
    times = method.grid[:: last // few].tolist()
    with torch.no_grad():
        answer = compose(roles.student, start.float(), times, cond).double()
    distance = rms(x - bench.flow(start, times[0], times[-1], cond))
    return [*rows, Row(f"{few} steps: rms error", 0.0, rms(answer - x), 0.25 * bench.width, distance)]
