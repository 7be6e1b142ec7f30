"""DMD2's switches on the data of a bench, without training: each keeps the contract, and what it must compute."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.diffusion.schedule import Time, expand, host
from fewstep.methods.base import Progress
from fewstep.methods.dmd2 import DMD2
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.sampling import make_sampler, sample
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import follow
from fewstep.verification.bench import Bench
from fewstep.verification.contract import contract_rows, gan_contract_rows
from fewstep.verification.fixed_points import compose
from fewstep.verification.report import Row
from fewstep.verification.sizes import rms

STEPS, SCALE, PULL, START, ROWS = 4, 3.0, 0.1, 5, 512
JUMPS: dict[str, Any] = {"rollout": "ode", "match": "x_s", "fake_target": "score"}
SWITCHES: dict[str, dict[str, Any]] = {
    "jumps matched": JUMPS,
    "random times": {"any_steps": STEPS},
    "first step": {"rollout": "ode", "first_weight": 1.0},
    "fake score pulled": {"fake_pull": PULL},
    "late student": {"student_start": START},
    "conditioned on its end": {"tell_end": True, **JUMPS},
}
GUIDED: dict[str, dict[str, Any]] = {"guidance apart": {"guidance_apart": True, "guidance_scale": SCALE}}
"""For data with classes."""


def fixed_rows(bench: Bench, method: DMD2) -> list[Row]:
    """The contract with a discriminator and with each switch, then what each must compute."""
    rows = gan_contract_rows(bench, method)
    switches = SWITCHES | (GUIDED if bench.mixture.num_classes else {})
    made = {name: _with(method, **given) for name, given in switches.items()}
    for name, variant in made.items():
        rows += contract_rows(bench, variant, f"{name}: ")
    return [
        *rows,
        *jump_rows(bench, made["jumps matched"]),
        *time_rows(made["random times"]),
        *guidance_rows(bench, method),
        first_row(bench, made["first step"]),
        pull_row(bench, made["fake score pulled"]),
        late_row(made["late student"]),
        end_row(bench, made["conditioned on its end"]),
    ]


def _with(method: DMD2, **given: Any) -> DMD2:
    usual: dict[str, Any] = {"timesteps": None, "num_inference_steps": STEPS, "student_input": "simulated"}
    settings = dataclasses.replace(method.settings, adversarial_weight=0.0, **usual | given)
    return type(method)(method.schedule, settings)


class FlowMap:
    """A "sample" network whose jumps from its times to the next are the teacher's exact flow."""

    def __init__(self, bench: Bench, times: list[float]) -> None:
        self.bench, self.next = bench, dict(pairwise([*times, float(bench.schedule.clean)]))

    def __call__(self, x: Tensor, t: Time, cond: Cond | None = None) -> Tensor:
        start = float(host(t).flat[0])
        time = min(self.next, key=lambda known: abs(known - start))
        end, schedule = self.next[time], self.bench.schedule
        reached = self.bench.flow(x, time, end, cond)
        (alpha, sigma), (low, above) = ((float(c) for c in schedule.alpha_sigma(u)) for u in (time, end))
        return (reached - above / sigma * x) / (low - alpha * above / sigma)


def jump_rows(bench: Bench, method: DMD2) -> list[Row]:
    """A student that follows the teacher's flow lands where the teacher is: its exact fake score is the teacher.

    There are no rows with guidance, whose flow leads to no marginal.
    """
    rows = []
    for exit in (0, STEPS - 2) if bench.guidance_scale == 1.0 else ():
        batch, draws = rollout_from_starts(bench, method, exit)
        student = Denoiser(FlowMap(bench, list(draws.times)), bench.schedule, "sample")
        name = f"jump {draws.times[exit]:g} -> {draws.times[exit + 1]:g}"
        rows.append(fake_row(name, bench, method, student, batch, draws))
    return rows


def rollout_from_starts(bench: Bench, method: Any, exit: int) -> tuple[Batch, Any]:
    """A batch and draws with this exit, whose rollout begins at the bench's starts, of their conditions."""
    x, cond = bench.starts
    x, cond = x[:ROWS], None if cond is None else cond[:ROWS]
    schedule, noise = bench.schedule, x
    if schedule.family == "edm":
        noise = x / expand(schedule.alpha_sigma(schedule.start)[1], x)
    batch = dataclasses.replace(bench.source.batch(Rng(bench.seed, exit, len(x), dtype=torch.float64)), cond=cond)
    draws = next(d for d in (_drawn(method, batch, bench.seed, i) for i in range(10_000)) if d.exit == exit)
    field = "noise" if isinstance(method, DMD2) else "rollout_noise"
    from_starts = torch.cat([noise[:, None], getattr(draws, field)[:, 1:]], dim=1)
    return batch, dataclasses.replace(draws, **{field: from_starts})


def fake_row(name: str, bench: Bench, method: Any, student: Denoiser, batch: Batch, draws: Any) -> Row:
    """The fake score's loss must have no slope at the teacher, for every row's own offset and factor.

    That is, within five standard errors: ``student`` is where the teacher is.
    """
    schedule, teacher = bench.schedule, bench.teacher
    offset, factor = (torch.zeros(len(batch.x0), 1, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def fake(x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        return teacher(x, t, cond).x0 + offset + factor * x

    roles: Any = SimpleNamespace(student=student, fake=Denoiser(fake, schedule, "sample"), teacher=teacher)
    shared = method.prepare(roles, batch, draws, set())
    slopes = torch.autograd.grad(method.critic(roles, batch, draws, shared).total, (offset, factor))
    worst = max(float(g.mean().abs() / (g.std() / len(g) ** 0.5 + 1e-300)) for g in slopes)
    return Row(f"{name}: slope of the exact fake score's loss, standard errors", 0.0, worst, 5.0)


def _drawn(method: Any, batch: Any, seed: int, step: int) -> Any:
    return method.draw(batch, Rng(seed, step, len(batch.x0), dtype=torch.float64), Progress(step, 1))


def time_rows(method: DMD2) -> list[Row]:
    """Random times: each grid begins with the schedule's start and goes down, and all numbers of steps occur."""
    grids = [method.rollout.draw_times(Rng(0, step, 2)) for step in range(200)]
    wrong = sum(grid[0] != method.schedule.start or any(a <= b for a, b in pairwise(grid)) for grid in grids)
    missed = STEPS - len({len(grid) for grid in grids})
    return [
        Row("random times: grids of 200 that do not lead down from the start", 0.0, wrong, 0.0),
        Row(f"random times: numbers of steps up to {STEPS} that never occur", 0.0, missed, 0.0),
    ]


def guidance_rows(bench: Bench, method: DMD2) -> list[Row]:
    """What guidance apart adds is scale - 1 times the difference of both branches; for data with classes."""
    if not bench.mixture.num_classes:
        return []
    variant = _with(method, guidance_apart=True, guidance_scale=SCALE, weighting="kl")
    batch, draws = bench.draw(variant, 64)
    assert batch.cond is not None
    roles: Any = SimpleNamespace(teacher=bench.teacher)
    found = variant.matching.guidance(roles, batch.x0, draws, batch.cond)
    x_t = bench.schedule.add_noise(batch.x0, draws.guidance_noise, draws.guidance_time)
    given, null = (bench.teacher(x_t, draws.guidance_time, c).x0 for c in (batch.cond, batch.cond.null()))
    off = rms(found - (SCALE - 1) * (given - null))
    return [Row("guidance apart: distance to scale - 1 times what the condition adds", 0.0, off, 1e-9 * bench.width)]


def first_row(bench: Bench, method: DMD2) -> Row:
    """A student whose first slope is the teacher's mean slope has no loss; the teacher's steps are composed here.

    They begin where the student's own calls do.
    """
    assert method.first is not None
    batch, draws = bench.draw(method, 64)
    x, cond = method.rollout.first_state(draws), batch.cond
    (few, many), start = method.settings.first_solver_steps, draws.times[0]
    times = [start, *[t for t in bench.schedule.timesteps(many).tolist() if t < start][:few]]
    reached = compose(bench.teacher, x, times, cond, method.settings.guidance_scale)
    (alpha, sigma), (low, above) = ((float(c) for c in bench.schedule.alpha_sigma(t)) for t in (times[0], times[-1]))
    x0 = (reached - above / sigma * x) / (low - alpha * above / sigma)
    student = Denoiser(lambda x, t, cond: x0, bench.schedule, "sample")
    roles: Any = SimpleNamespace(teacher=bench.teacher, student=student)
    loss = float(method.first.loss(roles, x, cond).total)
    return Row("first step: loss of the teacher's mean slope", 0.0, loss, 1e-20 * max(1.0, rms(x)) ** 2)


def pull_row(bench: Bench, method: DMD2) -> Row:
    """After an update of the student the fake score is the share nearer to it."""
    roles = bench.roles(method, torch.float64)
    follow(roles, method, TrainingSettings(ema_decay=0.0, precision="fp64"))
    student, fake = (dict(roles.tensors_of(role)) for role in ("student", "fake"))
    wanted = {key: (1 - PULL) * fake[key].detach() + PULL * student[key].detach() for key in fake}
    roles.update_followers("student")
    worst = max(float((roles.tensors_of("fake")[key].detach() - wanted[key]).abs().max()) for key in wanted)
    return Row("fake score pulled: largest distance to its share of the way", 0.0, worst, 1e-12)


def late_row(method: DMD2) -> Row:
    """The student learns at its start, then at every so many steps, and the critic at every step."""
    student, critic = method.players
    steps = range(4 * START)
    wanted = range(START, 4 * START, method.settings.student_every)
    wrong = sum(student.due(step) != (step in wanted) or not critic.due(step) for step in steps)
    return Row(f"late student: steps of {len(steps)} at which others learn", 0.0, wrong, 0.0)


class Heard:
    """A network that predicts 0, and keeps the (t, end) of its calls, of those with a graph or of all others."""

    accepts = frozenset({"end"})

    def __init__(self) -> None:
        self.learnt: set[tuple[float, float]] = set()
        self.asked: set[tuple[float, float]] = set()

    def __call__(self, x: Tensor, t: Time, cond: Cond | None = None, end: Time | None = None) -> Tensor:
        assert end is not None
        found = self.learnt if torch.is_grad_enabled() else self.asked
        found.add((float(host(t).flat[0]), float(host(end).flat[0])))
        return torch.zeros_like(x)


def end_row(bench: Bench, method: DMD2) -> Row:
    """Every jump that the sampler asks for is one that training has learnt, to the bit."""
    heard = Heard()
    roles: Any = SimpleNamespace(student=Denoiser(heard, bench.schedule, "v_prediction"))
    for step in range(20 * STEPS):
        batch, draws = bench.draw(method, 2, step)
        method.prepare(roles, batch, draws, {"student"})
    heard.asked.clear()
    noise = torch.zeros(2, bench.mixture.dim, dtype=torch.float64)
    sample(roles.student, make_sampler(method.sampler, timesteps=method.rollout.timesteps), noise)
    missed = heard.asked - heard.learnt
    return Row(f"conditioned on its end: jumps of {len(heard.asked)} that are not learnt", 0.0, len(missed), 0.0)
