"""One CM step (CD, CT, iCT) against the same step by hand, on the same draws: intermediates, loss, every gradient."""

import dataclasses
import math

import numpy as np
import pytest
import reference
import torch
from reference import (
    CASES,
    HOPS,
    actual,
    alpha_sigma,
    ask,
    assert_same,
    consistency,
    every_step,
    grid,
    jump,
    noises,
    off,
    problem,
    row_scales,
)
from torch import nn

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.methods.base import Progress
from fewstep.methods.cm import CM, ICT, Draws
from fewstep.methods.parts.dropout import dropout_seed
from fewstep.models.denoiser import Denoiser, edm_precondition
from fewstep.models.roles import Roles
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import build_roles, follow

SETTINGS = {
    "cd": dict(solver="heun"),
    "cd ddim": dict(solver="ddim", weighting="inverse"),
    "cd guided": dict(solver="heun", guidance_scale=4.0, loss="huber", huber_c=0.3),
    "cd drawn scale": dict(solver="heun", guidance_scale=(2.0, 8.0), target_decay=0.95),
    "ct": dict(variant="ct"),
    "ct lagging": dict(variant="ct", loss="sample-huber", huber_c=0.3, target_decay=0.9),
    "ict": dict(variant="ct", timestep_sampling="lognormal", loss="sample-huber", huber_c=0.3, weighting="inverse"),
}


def draws(name, settings):
    """Every hop, the lowest one twice."""
    scales = row_scales(settings.get("guidance_scale", 1.0))
    index = np.array([0, 1, 2, 3, 4, 0])
    times = grid(name).astype(np.float64)
    t, u = (torch.from_numpy(times[i]) for i in (index + 1, index))
    return Draws(t, u, *noises(1), scales.double(), torch.arange(6))


def levels(name, t):
    """The paper's sigma: sigma/alpha, or flow's own time."""
    alpha, sigma = (c.flatten() for c in alpha_sigma(name, t))
    return sigma if name == "flow" else sigma / alpha


def by_hand(p, random, detach_target=True):
    """The step from algorithms 2 and 3, in the paper's variables y = x / alpha at noise level sigma / alpha."""
    settings, text, x0 = p.method.settings, p.batch.cond["text"], p.batch.x0
    t, u = random.t.numpy(), random.u.numpy()
    (alpha_t, sigma_t), (alpha_u, sigma_u) = alpha_sigma(p.name, t), alpha_sigma(p.name, u)
    x_t = alpha_t * x0 + sigma_t * random.noise

    def teacher(x, time):
        w = random.guidance_scale.reshape(-1, 1, 1, 1)
        said = [ask(p.base, {}, p.name, x, time, c) for c in (text, p.null.expand(6, 3))]
        pairs = [reference.x0_epsilon(p.name, p.kind, x, output, time) for output in said]
        return tuple(without + w * (with_ - without) for with_, without in zip(*pairs, strict=True))

    if settings.variant == "ct":
        x_u = alpha_u * (x0 + sigma_u / alpha_u * random.noise)
    else:
        first = teacher(x_t, t)
        x_u = jump(p.name, first, u)
        if settings.solver == "heun":
            clean = sigma_u == 0
            second = teacher(x_u, np.where(u == 0, 0.1, u) if p.name == "flow" else u)  # rows at clean data unused
            if p.name == "flow":
                velocity = (first[1] - first[0] + second[1] - second[0]) / 2
                stepped = x_t + (sigma_u - sigma_t) * velocity
            else:
                y = x_t / alpha_t + (sigma_u / alpha_u - sigma_t / alpha_t) * (first[1] + second[1]) / 2
                stepped = alpha_u * y
            x_u = torch.where(clean, x_u, stepped)

    def function(weights, x, time):
        pair = reference.x0_epsilon(p.name, p.kind, x, ask(p.base, weights, p.name, x, time, text), time)
        at_end = torch.from_numpy(time == grid(p.name)[0]).reshape(-1, 1, 1, 1)
        return torch.where(at_end, x, consistency(p.name, x, pair[0], time))

    student = p.tensors("student")
    answer = function(student, x_t, t)
    target = function(p.tensors("target") if settings.target_decay else student, x_u, u)
    target = target.detach() if detach_target else target
    difference = (answer - target).flatten(1)
    if settings.loss == "sample-huber":
        c = settings.huber_c * math.sqrt(8)
        each = (difference.norm(dim=1) ** 2 + c**2).sqrt() - c
    elif settings.loss == "huber":
        each = ((difference**2 + settings.huber_c**2).sqrt() - settings.huber_c).mean(1)
    else:
        each = (difference**2).mean(1)
    weight = 1 / (levels(p.name, t) - levels(p.name, u)) if settings.weighting == "inverse" else torch.ones(6).double()
    loss = (weight * each).mean()
    loss.backward()
    return reference.Step(x_t, x_u, target, loss, {key: leaf.grad for key, leaf in student.items()})


@every_step(SETTINGS)
def test_a_step_is_the_papers(schedule, kind, variant, weights, native):
    p = problem(CM, schedule, kind, weights, native, **SETTINGS[variant])
    random = draws(schedule, SETTINGS[variant])
    assert_same(actual(p, random), by_hand(p, random))


@pytest.mark.parametrize("variant", ["cd guided", "ct"])
@pytest.mark.parametrize(("schedule", "kind"), CASES)
def test_the_lowest_hop_is_anchored_to_the_bit(schedule, kind, variant):
    step = actual(problem(CM, schedule, kind, **SETTINGS[variant]), draws(schedule, SETTINGS[variant]))
    same = (step.target == step.x_u).flatten(1).all(1)
    assert torch.equal(same, torch.tensor([True, False, False, False, False, True]))


@pytest.mark.parametrize("variant", ["cd", "ct"])
@pytest.mark.parametrize("schedule", ["vp", "edm", "flow"])
def test_no_gradient_flows_through_the_target(schedule, variant):
    p = problem(CM, schedule, "v_prediction", **SETTINGS[variant])
    random = draws(schedule, SETTINGS[variant])
    mine, attached = actual(p, random), by_hand(p, random, detach_target=False)
    assert not mine.target.requires_grad and not mine.x_u.requires_grad
    assert off(mine.loss, attached.loss) <= 1e-10  # the same number, but not the same gradient
    assert min(off(mine.gradients[key], g) for key, g in attached.gradients.items()) > 0.01


def test_the_ema_target_is_the_lagging_weights_not_the_student():
    p = problem(CM, "edm", "sample", target_decay=0.95)
    random = draws("edm", {})
    lagging = actual(p, random)
    with torch.no_grad():
        for key, tensor in p.roles.tensors_of("target").items():
            tensor.copy_(p.roles.tensors_of("student")[key])
    assert off(actual(p, random).target, lagging.target) > 1e-3


def test_edm_networks_are_preconditioned_as_the_paper_says():
    """f = c_skip x + c_out F(c_in x, log(t) / 4), c_in = 1 / sqrt(t^2 + 0.25); the teacher has the plain scalings."""
    torch.manual_seed(0)
    raw = reference.Network().double()
    method = CM(reference.SCHEDULES["edm"], num_grid_steps=HOPS)
    roles = build_roles(
        Denoiser(edm_precondition(raw), method.schedule, "sample"), method, TrainingSettings(precision="fp64"),
        reference.Weights("full"),
    )  # fmt: skip
    x0, text, random = torch.randn(6, 2, 2, 2).double(), torch.randn(6, 3).double(), draws("edm", {})
    batch = Batch(x0, reference.Cond({"text": text}))
    shared = method.prepare(roles, batch, random, {"student"})
    loss = method.student(roles, batch, random, shared).total

    def split(x, t):
        return x, t.reshape(-1, 1, 1, 1), raw(x / (t.reshape(-1, 1, 1, 1) ** 2 + 0.25).sqrt(), t.log() / 4, batch.cond)

    def denoised(x, t):
        x, t, said = split(x, t)
        return 0.25 / (t**2 + 0.25) * x + 0.5 * t / (t**2 + 0.25).sqrt() * said

    def function(x, t):
        x, t, said = split(x, t)
        return 0.25 / ((t - 0.002) ** 2 + 0.25) * x + 0.5 * (t - 0.002) / (t**2 + 0.25).sqrt() * said

    t, u = (time.reshape(-1, 1, 1, 1) for time in (random.t, random.u))
    x_t = x0 + t * random.noise
    d = (x_t - denoised(x_t, random.t)) / t
    euler = x_t + (u - t) * d
    x_u = x_t + (u - t) * (d + (euler - denoised(euler, random.u)) / u) / 2
    assert off(shared.x_u, x_u) <= 1e-10
    assert off(loss, ((function(x_t, random.t) - function(x_u, random.u)) ** 2).mean()) <= 1e-9


# ------------------------------------------------------------------ draws


def drawn(method, n, step=0, total=1):
    return method.draw(Batch(torch.zeros(n, 2)), Rng(3, step, n), Progress(step, total))


@pytest.mark.parametrize("schedule", reference.SCHEDULES)
def test_hops_are_neighbours_of_the_papers_grid_all_equally_likely(schedule):
    method = CM(reference.SCHEDULES[schedule], num_grid_steps=HOPS)
    np.testing.assert_allclose(method.grid.numpy(), grid(schedule), rtol=1e-13)
    random = drawn(method, 20_000)
    index = (random.t[:, None] == method.grid).int().argmax(1)
    assert torch.equal(method.grid[index], random.t) and torch.equal(method.grid[index - 1], random.u)
    counts = torch.bincount(index, minlength=HOPS + 1)[1:]
    assert (counts - 4000).abs().max() < 5 * 4000**0.5
    assert random.noise.mean() == pytest.approx(0, abs=0.03) and random.noise.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("schedule", reference.SCHEDULES)
def test_lognormal_hops_have_the_mass_of_their_log_levels(schedule):
    shape = {"timestep_sampling": "lognormal", "P_mean": -0.5, "P_std": 1.5}
    method = CM(reference.SCHEDULES[schedule], num_grid_steps=HOPS, **shape)
    alpha, sigma = (c.flatten().numpy() for c in alpha_sigma(schedule, grid(schedule)))
    with np.errstate(divide="ignore"):
        z = (np.log(sigma / alpha) + 0.5) / 1.5
    below = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in z])  # the normal distribution function
    chance = np.diff(below) / (below[-1] - below[0])
    random = drawn(method, 40_000)
    counts = np.array([(random.t.numpy() == t).sum() for t in method.grid.numpy()[1:]])
    assert (np.abs(counts - 40_000 * chance) <= 5 * np.sqrt(40_000 * chance) + 1).all()
    assert counts.argmax() != counts.argmin() and counts.max() > 3 * counts.min()


def test_icts_own_distribution():
    method = CM(reference.SCHEDULES["edm"], **ICT)
    random = drawn(method, 40_000, step=999, total=1000)
    log_t = random.t.log()  # N(-1.1, 2^2), cut off by the grid
    assert log_t.mean() == pytest.approx(-1.1, abs=0.1) and log_t.std() == pytest.approx(1.9, abs=0.1)
    assert method.settings.huber_c == 0.00054 and method.settings.target_decay == 0


def test_the_grid_doubles_in_equal_stretches_of_training():
    method = CM(reference.SCHEDULES["edm"], **ICT)
    hops = [method.grid_steps(Progress(k, 800)) for k in range(800)]
    assert hops[::100] == [10, 20, 40, 80, 160, 320, 640, 1280]  # eight stretches of 100
    assert all(hops[k] == hops[k // 100 * 100] for k in range(800))
    assert method.grid_steps(Progress(10**6, 10**6 + 1)) == 1280
    uneven = CM(reference.SCHEDULES["edm"], first_grid_steps=10, num_grid_steps=50)
    hops = [uneven.grid_steps(Progress(k, 1000)) for k in (0, 300, 301, 601, 602, 902, 903, 999)]
    assert hops == [10, 10, 20, 20, 40, 40, 50, 50]  # 1000 / (log2(5) + 1) = 301.03
    first, last = drawn(method, 2000, 0, 800), drawn(method, 2000, 799, 800)
    assert len(first.t.unique()) <= 10 and len(last.t.unique()) > 300
    short = method.grid_steps(Progress(0, 3))  # fewer steps than stretches
    assert short == 10


def test_ct_uses_one_noise_for_both_times():
    for name in reference.SCHEDULES:
        p = problem(CM, name, "sample", variant="ct")
        random = draws(name, {})
        step = actual(p, random)
        (alpha_t, sigma_t), (alpha_u, sigma_u) = (alpha_sigma(name, time.numpy()) for time in (random.t, random.u))
        noise = (step.x_t - alpha_t * p.batch.x0) / sigma_t
        assert torch.allclose(step.x_u, alpha_u * p.batch.x0 + sigma_u * noise, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ dropout


class Dropping(nn.Module):
    """Answers with its dropout mask."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.asked = []

    def forward(self, x, t, cond=None):
        mask = nn.functional.dropout(torch.ones_like(x), 0.5, self.training)
        self.asked.append(mask)
        return self.scale * mask * x


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_student_and_target_drop_the_same_and_others_are_left_alone(decay, device):
    method = CM(reference.SCHEDULES["edm"], variant="ct", target_decay=decay)
    roles = Roles(Denoiser(lambda x, t, cond=None: x, method.schedule, "sample"))
    network = Dropping().to(device)
    roles.add_network("student", network, "sample")
    follow(roles, method, TrainingSettings())
    target = roles.target.network.network
    masks = []
    for step in range(2):
        rng = Rng(0, step, 8, device=device)
        batch = Batch(torch.randn(8, 50, device=device))
        random = method.draw(batch, rng, Progress(0, 1))
        torch.manual_seed(step)
        before = torch.rand(3), torch.rand(3, device=device)
        torch.manual_seed(step)
        shared = method.prepare(roles, batch, random, {"student"})
        torch.randn(5, device=device)  # somebody draws in between
        method.student(roles, batch, random, shared)
        assert torch.equal(target.asked[-1] if decay else network.asked[-2], network.asked[-1])
        masks.append(network.asked[-1])
        torch.manual_seed(step)
        method.prepare(roles, batch, random, {"student"})
        assert torch.equal(torch.rand(3), before[0]) and torch.equal(torch.rand(3, device=device), before[1])
    assert 0.4 < (masks[0] == 0).float().mean() < 0.6 and not torch.equal(*masks)


def test_dropout_seeds_fork_the_generator_of_the_device(monkeypatch):
    """The reference code of consistency models restores the CPU's alone (openai/consistency_models#59)."""
    forked = []

    class Fork:
        def __init__(self, devices, device_type):
            forked.append((list(devices), device_type))

        __enter__ = __exit__ = lambda *_: None

    monkeypatch.setattr(torch.random, "fork_rng", Fork)
    with dropout_seed(3, torch.device("cuda", 1)), dropout_seed(3, torch.device("cpu")):
        pass
    assert forked[0] == ([torch.device("cuda", 1)], "cuda") and forked[1][0] == []


# ------------------------------------------------------------------ calls and settings


@pytest.mark.parametrize(
    ("schedule", "settings", "teacher"),
    [
        ("edm", {}, 2), ("vp", {}, 1), ("flow", {}, 1),
        ("vp", {"solver": "heun"}, 2), ("edm", {"solver": "ddim"}, 1), ("edm", {"variant": "ct"}, 0),
    ],
)  # fmt: skip
def test_what_a_step_asks_of_the_teacher(schedule, settings, teacher):
    p = problem(CM, schedule, "v_prediction", **settings)
    actual(p, draws(schedule, settings))
    assert p.roles.teacher.cost.calls == p.method.calls_per_step().get("teacher", 0) == teacher
    assert p.roles.student.cost.calls == 2  # it is its own target


def test_a_grid_of_every_table_step_has_no_empty_hop():
    method = CM(reference.SCHEDULES["vp"], num_grid_steps=1000, weighting="inverse")
    random = drawn(method, 5000)
    assert (random.t > random.u).all()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rank": 3}, "CM has no setting 'rank'"),
        ({"loss": "lpips"}, r"loss: input should be .*, not 'lpips'"),
        ({"variant": "CT"}, r"variant: input should be .*, not 'CT'"),
        ({"solver": "euler"}, r"solver: input should be .*, not 'euler'"),
        ({"timestep_sampling": "log"}, r"timestep_sampling: input should be .*, not 'log'"),
        ({"weighting": "snr"}, r"weighting: input should be .*, not 'snr'"),
        ({"variant": "ct", "guidance_scale": 3.0}, r"variant ct\) asks no teacher: leave guidance_scale at 1"),
        ({"first_grid_steps": 40}, r"first_grid_steps must lie in 1 \.\.\. num_grid_steps, not 40"),
        ({"first_grid_steps": 0}, "not 0"),
        ({"P_std": 0.0}, "P_std: input should be greater than 0, not 0.0"),
        ({"P_mean": 90.0, "timestep_sampling": "lognormal"}, r"N\(90.0, 2.0\^2\) must have mass within the grid"),
        ({"num_grid_steps": 1001}, "exceeds the 1000 training timesteps"),
    ],
)
def test_wrong_settings_are_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        CM(reference.SCHEDULES["vp"], **settings)


def test_inverse_weights_are_refused_where_they_would_be_zero():
    with pytest.raises(ValueError, match="is 0 where this schedule starts from pure noise: use uniform"):
        CM(reference.SCHEDULES["vp"].zero_terminal_snr(), weighting="inverse")
    assert dataclasses.asdict(CM(reference.SCHEDULES["flow"], weighting="inverse").settings)["weighting"] == "inverse"
