"""DMD2 with a student that is conditioned on the end of each jump: a second stage of flow maps."""

import dataclasses

import pytest
import torch

from fewstep.data.random import Rng
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Progress
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.flowmap import FlowMap
from fewstep.models.denoiser import Denoiser
from fewstep.models.mlp import MLP
from fewstep.models.roles import Weights
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, build_roles
from fewstep.verification.bench import Bench

SCHEDULES = {"vp": Schedule.scaled_linear(), "flow": Schedule.flow(shift=3.0), "edm": Schedule.edm()}
QUIET = {"tell_end": True, "adversarial_weight": 0.0, "guidance_scale": 1.0}
TRAINING = TrainingSettings(precision="fp64", batch_size=8)


class Teacher(MLP):
    """Takes the embedding of a role's extra inputs beside its own."""

    extra_width = 16

    def forward(self, x, t, cond=None, *, extra=None, **inputs):
        said = super().forward(x, t, cond, **inputs)
        return said if extra is None else said + extra[:, :1]


def roles_of(method, init=None):
    torch.manual_seed(0)
    schedule = method.schedule
    kind = "flow" if schedule.family == "flow" else "epsilon"
    teacher = Denoiser(Teacher(schedule, 1, width=16, depth=1).double(), schedule, kind)
    return build_roles(teacher, method, TRAINING, Weights("lora", rank=2), init=init)


def mixture(schedule):
    return Bench(GaussianMixture([0.3, 0.7], [-1.2, 0.8], [0.25, 0.35]), schedule)


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_continues_a_trained_flow_map(name):
    """The second stage begins with the first one's predictions at every end, and trains."""
    schedule = SCHEDULES[name]
    first = roles_of(FlowMap(schedule, guidance_scale=1.0))
    with torch.no_grad():
        for tensor in first.tensors_of("student").values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    saved = {key: tensor.detach().clone() for key, tensor in first.tensors_of("student").items()}
    method = DMD2(schedule, **QUIET, rollout="ode", match="x_s", any_steps=4, student_every=1)
    second = roles_of(method, saved)
    x, t = torch.linspace(-1, 1, 4).double()[:, None], float(schedule.start)
    middle = float(schedule.training_grid(4)[2])
    ends = [middle, schedule.end]
    said = [[roles.student(x, t, end=end).output for end in ends] for roles in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*said, strict=True)) and not torch.equal(*said[0])
    before = second.tensors_of("student")["extras.project.end.weight"].detach().clone()
    trainer = Trainer(method, second, mixture(schedule).source, TRAINING)
    for step in range(2):  # in the first both scores are the teacher's
        trainer.step(step)
    assert not torch.equal(second.tensors_of("student")["extras.project.end.weight"], before)


class Student:
    """Notes the end of each call; predicts 0."""

    def __init__(self, schedule):
        self.schedule, self.accepts, self.calls = schedule, frozenset({"end"}), []

    def __call__(self, x, t, cond=None, end=None):
        self.calls.append((float(t), end))
        return Prediction(x, torch.zeros_like(x), t, self.schedule, "v_prediction")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("settings", [
    {"rollout": "renoise"}, {"rollout": "ode", "match": "x_s"}, {"rollout": "ode", "match": "x_s", "any_steps": 5},
])  # fmt: skip
def test_each_call_is_conditioned_on_where_its_jump_goes(name, settings):
    """As a sampler conditions it, the call that learns too."""
    schedule = SCHEDULES[name]
    method, bench = DMD2(schedule, **QUIET, **settings), mixture(schedule)
    exits = set()
    for step in range(12):
        rng = Rng(3, step, 4, dtype=torch.float64)
        batch = bench.source.batch(rng)
        draws = method.draw(batch, rng, Progress(step, 12))
        student = Student(schedule)
        roles = type("Roles", (), {"student": student})
        method.prepare(roles, batch, draws, {"student"})
        times = [*draws.times, schedule.end]
        wanted = [(times[i], times[i + 1]) for i in range(draws.exit + 1)]
        if settings["rollout"] == "renoise":
            wanted = [(t, schedule.end) for t, _ in wanted]
        assert student.calls == wanted
        exits.add(draws.exit)
    assert len(exits) > 2


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_step_on_the_ode_is_a_jump_to_the_end(name):
    """The only told student on the ode whose predictions of clean data are matched."""
    method = DMD2(SCHEDULES[name], **QUIET, rollout="ode", num_inference_steps=1)
    batch, draws = mixture(method.schedule).draw(method, 4)
    student = Student(method.schedule)
    method.prepare(type("Roles", (), {"student": student}), batch, draws, {"student"})
    assert student.calls == [(method.schedule.start, method.schedule.end)]


@pytest.mark.parametrize("changes", [{"fake_init_from": "student"}, {"fake_pull": 0.03}])
def test_a_fake_score_cannot_have_the_students_weights(changes):
    with pytest.raises(ValueError, match="leave fake_init_from at teacher and fake_pull at 0"):
        DMD2(SCHEDULES["vp"], **QUIET, **changes)
    DMD2(SCHEDULES["vp"], **dict(QUIET, tell_end=False), **changes)


def test_without_it_nothing_is_conditioned():
    method = DMD2(SCHEDULES["vp"], **dict(QUIET, tell_end=False))
    assert all(not spec.extra_inputs for spec in method.roles())
    assert dataclasses.replace(method.settings, tell_end=True) != method.settings
