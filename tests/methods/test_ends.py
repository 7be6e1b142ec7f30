"""Every end that a sampler gives to a student is one that its method has trained, for all methods with such an input.

An embedding of the end has to have seen its lowest value exactly, for it is the last one of every sampling run: draws
that stopped at 0.001 for 0 made one step six times worse. Between its lowest and its highest value an end may lie
beside those drawn, as near as the method's grid is fine.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule, host
from fewstep.methods.base import Progress
from fewstep.methods.registry import METHODS
from fewstep.models.bank import LayerBank
from fewstep.models.denoiser import Denoiser
from fewstep.sampling import make_sampler, sample
from fewstep.verification.bench import Bench

SCHEDULES = {
    "vp": Schedule.scaled_linear(),
    "zero snr": Schedule.scaled_linear().zero_terminal_snr(),
    "edm": Schedule.edm(),
    "flow": Schedule.flow(shift=3.0),
    "stretched": Schedule.flow(shift=3.0, terminal=0.02),
}
WITH_END = [
    {},
    {"tell_end": True},
    {"tell_end": True, "segments": 2},
    {"velocity": "data", "guidance_scale": 1.0},
    {"tell_end": True, "rollout": "ode", "match": "x_s"},
    {"tell_end": True, "rollout": "ode", "match": "x_s", "any_steps": 4},
    {"tell_end": True, "rollout": "ode", "num_inference_steps": 1},
    {"tell_end": True, "any_steps": 8},
]
CASES = [
    pytest.param(cls, settings, name, id="-".join([cls.name, *settings, name]))
    for cls in METHODS.values()
    for settings in WITH_END
    if settings.keys() <= set(cls.setting_names())
    and any("end" in spec.extra_inputs for spec in cls(SCHEDULES["vp"], **settings).roles())
    for name in SCHEDULES
]
ROWS = 2048


class Recorder:
    """A network that predicts v, and notes the ends that it is given; in training those alone that it learns from."""

    accepts = frozenset({"end"})

    def __init__(self, learns):
        self.ends, self.learns = set(), learns

    def __call__(self, x, t, cond=None, end=None, **extras):
        if end is not None and torch.is_grad_enabled() == self.learns:
            self.ends |= set(host(end).ravel().tolist())
        return torch.zeros_like(x)


def role(schedule, learns=False):
    return Denoiser(Recorder(learns), schedule, "v_prediction")


class Roles:
    """Whatever a method asks for; what the student and its target are given is kept."""

    def __init__(self, schedule):
        self.student = self.target = role(schedule, learns=True)
        self.teacher = self.beginning = self.fake = role(schedule)


def trained_ends(method):
    """The ends that one large batch of training gives to the student, increasing."""
    rows, steps = (4, 80) if method.name == "dmd2" else (ROWS, 8)  # which draws one grid for the whole batch
    x0 = torch.zeros(rows, 1, dtype=torch.float64)
    roles = Roles(method.schedule)
    for step in range(steps):
        rng = Rng(0, step, rows, dtype=torch.float64)
        batch = Batch(x0, None)
        draws = method.draw(batch, rng, Progress(step, 100))
        if hasattr(draws, "guidance_scale"):
            draws = dataclasses.replace(draws, guidance_scale=torch.ones_like(draws.guidance_scale))
        shared = method.prepare(roles, batch, draws, {"student"})
        method.student(roles, batch, draws, shared)
    return np.array(sorted(roles.student.network.ends))


def sampled_ends(method, sampler, **options):
    """The ends that a sampler gives, at several numbers of steps."""
    student = role(method.schedule)
    default = method.sampling(method.settings)
    numbers = default.trained_steps if default.no_other_steps else (1, 2, 4, 8)
    for n in numbers:
        sample(student, make_sampler(sampler, num_inference_steps=n, **options), torch.zeros(2, 1).double())
    return np.array(sorted(student.network.ends))


@pytest.mark.parametrize(("cls", "settings", "name"), CASES)
def test_the_ends_of_sampling_are_those_of_training(cls, settings, name):
    quiet = {"guidance_scale": 1.0, "adversarial_weight": 0.0}
    quiet = {key: value for key, value in quiet.items() if key in cls.setting_names()}
    method = cls(SCHEDULES[name], **quiet | settings)
    trained = trained_ends(method)
    runs = [sampled_ends(method, method.sampler)]
    for other in ("ddim", "renoise", "lcm"):  # those that go on to clean data, or jump there in every step
        if settings.get("segments", 1) == 1 and cls.name not in ("hyper", "dmd2"):
            runs.append(sampled_ends(method, other))
    if cls.name != "dmd2" and "eta" in type(make_sampler(method.sampler, num_inference_steps=1)).options():
        runs.append(sampled_ends(method, method.sampler, eta=0.5))
    gap = np.diff(trained).max(initial=0.0)
    for ends in runs:
        assert ends.min() == trained.min() == method.schedule.end  # to the bit
        assert ends.max() <= trained.max()
        assert np.abs(ends[:, None] - trained[None]).min(axis=1).max() <= gap / 2 + 1e-9


def test_a_jump_to_clean_data_ends_there():
    method = METHODS["flowmap"](SCHEDULES["vp"])
    assert sampled_ends(method, "renoise").tolist() == [0.0]  # though the next state is noisier


def test_methods_of_all_kinds_are_here():
    """All that are conditioned on an end, but PDD, whose last layers are (below), and rCM, whose times are drawn."""
    assert {param.values[0].name for param in CASES} == {"ctm", "tcd", "hyper", "flowmap", "dmd2"}
    banks = {cls.name for cls in METHODS.values() if any(spec.bank for spec in cls(SCHEDULES["vp"]).roles())}
    assert banks == {"pdd"}


@pytest.mark.parametrize("student_input", ["simulated", "noised"])
@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "zero snr"])  # which banks refuse
def test_the_steps_of_sampling_are_the_blocks_of_training(name, student_input, monkeypatch):
    """PDD: both times of every step, to the bit, at every number of steps that its student states."""
    method = METHODS["pdd"](SCHEDULES[name], num_inference_steps=(4, 2, 8, 1), student_input=student_input)
    times, trained, asked = method.grid.tolist(), set(), []
    for step in range(50 if student_input == "simulated" else 400):  # all blocks of a trajectory, or one of them
        rng = Rng(0, step, 2, dtype=torch.float64, device="meta")
        draws = method.draw(Batch(torch.zeros(2, 1, device="meta"), None), rng, Progress(step, 400))
        trained |= {(times[start], times[start + draws.length]) for start in draws.starts}
    student = Bench(GaussianMixture([1.0], [0.0], [1.0]), method.schedule).roles(method, torch.float64).student
    between = LayerBank.between
    monkeypatch.setattr(LayerBank, "between", lambda bank, t, end: asked.append((t, end)) or between(bank, t, end))
    for n in method.sampling(method.settings).trained_steps:
        first = len(asked)
        sampler = make_sampler(method.sampler, timesteps=times[:: len(method.lengths) // n][:n])
        sample(student, sampler, torch.zeros(2, 1).double())
        steps = {(float(host(t).flat[0]), float(host(end).flat[0])) for t, end in asked[first:]}
        assert len(steps) == n and steps <= trained


@pytest.mark.parametrize("any_steps", [1, 4, 10])
@pytest.mark.parametrize("schedule", [
    *SCHEDULES.values(), Schedule.flow(2.2, terminal=0.02), Schedule.flow(lambda steps: 100.0 if steps < 50 else 1.0)
])  # fmt: skip
def test_the_times_of_samplers_lie_within_those_that_are_drawn(schedule, any_steps):
    """Students of random times: at every number of steps that they state, the first time to the bit; so does rCM."""
    method = METHODS["dmd2"](schedule, any_steps=any_steps)
    rcm = METHODS["scm"](schedule, any_steps=any_steps, matching_weight=1.0)
    assert rcm.rollout.inner_levels == method.rollout.inner_levels and rcm.sampler == method.sampler

    def extreme(pick):
        """The most times, each as low or as high as it may be drawn."""
        return SimpleNamespace(integer=lambda name, low, high: high - 1 if name == "steps" else pick(low, high - 1))

    drawn = [method.rollout.draw_times(SimpleNamespace(shared=extreme(pick))) for pick in (min, max)]
    inner = [time for times in drawn for time in times[1:]]
    asked = [make_sampler(method.sampler, num_inference_steps=n).times(schedule)[:-1].tolist()
             for n in method.sampling(method.settings).trained_steps]  # fmt: skip
    assert sorted(map(len, asked)) == list(range(1, any_steps + 1))
    assert {times[0] for times in (*drawn, *asked)} == {float(schedule.start)}
    for times in asked:
        assert all(min(inner) <= time <= max(inner) for time in times[1:])
