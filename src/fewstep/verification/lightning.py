"""Lightning: the contract of both adversarial losses, and a trained student beside its teacher's steps."""

from __future__ import annotations

import dataclasses

import torch

from fewstep.methods.lightning import Lightning
from fewstep.models.roles import Roles
from fewstep.verification.bench import Bench
from fewstep.verification.consistency import stage_rows
from fewstep.verification.contract import contract_rows
from fewstep.verification.distribution import distribution_rows
from fewstep.verification.report import Row


def fixed_rows(bench: Bench, method: Lightning) -> list[Row]:
    """Rows that need no trained student."""
    rows = []
    for loss in ("conditional", "unconditional"):
        if method.settings.loss != loss:
            other = type(method)(method.schedule, dataclasses.replace(method.settings, loss=loss))
            rows += contract_rows(bench, other, f"{loss}: ")
    return rows


def trained_rows(bench: Bench, method: Lightning, roles: Roles) -> list[Row]:
    """A trained student's steps, one by one from the teacher's own states, then all of them from the start.

    Only the mean square error has that fixed point. For adversarial losses the distribution of samples is compared.
    """
    if method.settings.loss != "mse":
        return distribution_rows(bench, method, roles)
    few, width = method.settings.num_inference_steps, bench.width
    starts = torch.arange(few) * method.starts // few
    paths = torch.stack(method.teacher_times(starts), dim=1).tolist()
    return stage_rows(bench, roles.student, paths, "step", 0.08 * width, f"{few} steps", 0.25 * width)
