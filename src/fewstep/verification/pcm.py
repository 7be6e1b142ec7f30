"""PCM against its exact fixed point: each phase, all phases in a row, and a discriminator against the exact student."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.methods.pcm import PCM, Draws, Shared
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.roles import Roles
from fewstep.sampling import PhasedSampler
from fewstep.verification.bench import Bench
from fewstep.verification.consistency import convergence_rows, stage_rows
from fewstep.verification.contract import gan_contract_rows
from fewstep.verification.fixed_points import PCMFixedPoint, compose
from fewstep.verification.report import Row
from fewstep.verification.sizes import rms

_DISCRIMINATOR_STEPS, _DISCRIMINATOR_BATCH = 120, 256


def fixed_rows(bench: Bench, method: PCM) -> list[Row]:
    """Rows without training a student: the fixed point's loss and steps, the discriminator's contract and optimum."""
    rows = gan_contract_rows(bench, method)
    return [*oracle_rows(bench, method), *rows, *discriminator_rows(bench, method), *convergence_rows(bench)]


def trained_rows(bench: Bench, method: PCM, roles: Roles) -> list[Row]:
    """The trained student's jump over each phase from the teacher's own states, then all of them from the start."""
    phases = _phases(method)
    name = f"{len(phases)} steps on the edges"
    return stage_rows(bench, roles.student, phases, "phase", 0.06 * bench.width, name, 0.1 * bench.width)


def _phases(method: PCM) -> list[list[float]]:
    """The times of the grid in each phase, from its upper edge down to its lower one; the noisiest phase first."""
    settings, grid = method.settings, method.grid.numpy()
    sampler = PhasedSampler(num_inference_steps=settings.num_phases, original_inference_steps=settings.num_grid_steps)
    edges = pairwise(sampler.times(method.schedule).tolist())
    return [grid[(grid <= t) & (grid >= s)][::-1].tolist() for t, s in edges]


class Oracle:
    """Roles whose student and target are the exact fixed point; the student's clean data may be shifted.

    Attributes:
        shift: [D], added to the student's x0; the gradient of a loss there is its gradient in the student's x0.
    """

    def __init__(self, bench: Bench, method: PCM) -> None:
        point = PCMFixedPoint(bench.teacher, method.grid.numpy(), method.edges.numpy(), bench.guidance_scale)
        self.shift = torch.zeros(bench.mixture.dim, dtype=torch.float64, requires_grad=True)

        def shifted(x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
            return point(x, t, cond) + self.shift

        self.teacher, self.target = bench.teacher, point.denoiser()
        self.student = Denoiser(shifted, bench.schedule, "sample")
        self.heads: dict[str, Any] = {}


def oracle_rows(bench: Bench, method: PCM) -> list[Row]:
    """Zero loss at the fixed point, and its steps from edge to edge."""
    oracle: Any = Oracle(bench, method)
    quiet = type(method)(method.schedule, dataclasses.replace(method.settings, adversarial_weight=0.0))
    batch, draws, shared = player_inputs(bench, quiet, oracle, 0, 256)
    loss = quiet.student(oracle, batch, draws, shared).total.item()
    x, cond = bench.starts
    phases = _phases(method)
    four = compose(oracle.target, x, [phases[0][0], *(phase[-1] for phase in phases)], cond)
    composed = compose(bench.teacher, x, method.grid.tolist()[::-1], cond, bench.guidance_scale)
    size = max(1.0, bench.width**2 + float(batch.x0.square().mean()))
    return [
        Row("loss at the exact fixed point", 0.0, loss, 1e-20 * size),
        Row("its steps on the edges, to the composed teacher: rms", 0.0, rms(four - composed), 1e-9 * size),
    ]


def discriminator_rows(bench: Bench, method: PCM) -> list[Row]:
    """A discriminator trained against the fixed point, on new samples: both sides have the same distribution.

    The optimal discriminator is then constant, with hinge loss 2 and no gradient for the student. One trained on finite
    data leaves a small gradient, so it is compared with that on a student three widths off, which it does tell apart.
    """
    settings = method.settings
    solver_steps = min(settings.num_grid_steps, 2 * settings.num_phases)
    settings = dataclasses.replace(settings, num_grid_steps=solver_steps, adversarial_weight=1.0)
    gan = type(method)(method.schedule, settings)
    loss, grad = train_discriminator(bench, gan, 0.0)
    loss_beside, grad_beside = train_discriminator(bench, gan, 3 * bench.width)
    return [
        Row("hinge loss of a discriminator against the exact student", 2.0, loss, 0.05),
        Row("the same, three widths off: below 2 by", 1.0, 2 - loss_beside, 0.9),
        Row("its gradient on the exact student, over that three widths off", 0.0, grad / grad_beside, 0.6),
    ]


def train_discriminator(bench: Bench, gan: PCM, offset: float) -> tuple[float, float]:
    """Train a discriminator against the exact student shifted by ``offset``; (loss, gradient norm) on new samples."""
    oracle: Any = Oracle(bench, gan)
    oracle.shift.data += offset
    roles = Roles(bench.teacher, seed=bench.seed)
    (spec,) = gan.heads()
    oracle.heads[spec.name] = roles.add_heads(spec.name, spec.build).double()
    optimizer = torch.optim.AdamW(roles.parameters(spec.name), lr=1e-3, betas=(0.0, 0.999))
    for step in range(_DISCRIMINATOR_STEPS):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / _DISCRIMINATOR_STEPS)  # noise in the weights averages out
        optimizer.zero_grad()
        gan.discriminator(oracle, *player_inputs(bench, gan, oracle, step, _DISCRIMINATOR_BATCH)).total.backward()
        optimizer.step()
    oracle.shift.grad = None
    batch, draws, shared = player_inputs(bench, gan, oracle, _DISCRIMINATOR_STEPS, 16 * _DISCRIMINATOR_BATCH)
    loss = gan.discriminator(oracle, batch, draws, shared).total.item()
    student_loss = gan.student(oracle, batch, draws, shared).total
    (grad,) = torch.autograd.grad(student_loss, oracle.shift)
    return loss, float(grad.norm())


def player_inputs(bench: Bench, method: PCM, oracle: Any, step: int, size: int) -> tuple[Batch, Draws, Shared]:
    """The arguments of the players of ``method`` after the roles: batch, draws and shared."""
    batch, draws = bench.draw(method, size, step)
    return batch, draws, method.prepare(oracle, batch, draws, {"student", "discriminator"})
