"""One step of a flow map by splitting against the same step by hand; its draws, its fixed point, its refusals."""

import dataclasses

import numpy as np
import pytest
import torch
from reference import (
    CASES,
    SCHEDULES,
    alpha_sigma,
    ask,
    captioned,
    gradients,
    log_ratios,
    off,
    row_scales,
    student_on,
)
from reference import x0_epsilon as clean_and_noise

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Progress
from fewstep.methods.flowmap import Draws, FlowMap
from fewstep.models.denoiser import Denoiser
from fewstep.verification.bench import Bench
from fewstep.verification.consistency import oracle
from fewstep.verification.flowmap import ExactMap, fixed_rows, loss_at_map

SETTINGS = {
    "unguided": dict(guidance_scale=1.0),
    "drawn scale": dict(guidance_scale=(2.0, 8.0)),
    "data": dict(guidance_scale=1.0, velocity="data"),
}
TIMES = {  # t and r of six rows; two end at t, two at the schedule's end
    "vp": ([999.0, 700.0, 410.5, 300.0, 99.0, 620.0], [0.0, 250.0, 410.5, 120.0, 99.0, 0.0]),
    "edm": ([80.0, 12.0, 3.0, 1.5, 0.4, 20.0], [0.002, 2.0, 3.0, 0.2, 0.4, 0.002]),
    "flow": ([1.0, 0.8, 0.5, 0.3, 0.05, 0.6], [0.0, 0.2, 0.5, 0.1, 0.05, 0.0]),
}
ALPHA = 0.3


def build(name, kind, variant, weights="full"):
    method = FlowMap(SCHEDULES[name], **SETTINGS[variant])
    return method, *student_on(method, name, kind, weights, "end"), *captioned(6)


def draws(name, variant):
    scale = SETTINGS[variant]["guidance_scale"]
    scales = row_scales(scale)
    noise = torch.randn(6, 2, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, end = (torch.tensor(times, dtype=torch.float64) for times in TIMES[name])
    return Draws(t, end, noise, scales.double(), ALPHA)


def time_of(name, tau):
    """The time whose sigma / (alpha + sigma) is tau."""
    if name == "flow":
        return tau
    ratio = tau / (1 - tau)
    return ratio if name == "edm" else np.interp(np.log(ratio), log_ratios(), np.arange(1000))


def by_hand(name, kind, variant, p, random):
    """The step in z = (1 - tau) x0 + tau eps: MeanFlow's mean velocity over both parts of the way."""
    method, roles, base, batch, null = p
    text, x0, (t, r) = batch.cond["text"], batch.x0, (random.t.numpy(), random.end.numpy())
    column = lambda c: torch.from_numpy(np.asarray(c)).reshape(-1, 1, 1, 1)  # noqa: E731

    def tau(time):
        alpha, sigma = (c.flatten().numpy() for c in alpha_sigma(name, time))
        return sigma / (alpha + sigma)

    alpha, sigma = alpha_sigma(name, t)
    x_t = alpha * x0 + sigma * random.noise
    if variant == "data":
        first = (x0, random.noise)
    else:
        w = random.guidance_scale.reshape(-1, 1, 1, 1)
        said = [ask(base, {}, name, x_t, t, c) for c in (text, null.expand(6, 3))]
        pairs = [clean_and_noise(name, kind, x_t, output, t) for output in said]
        first = tuple(without + w * (with_ - without) for with_, without in zip(*pairs, strict=True))
    v = first[1] - first[0]
    s = time_of(name, tau(t) - ALPHA * (tau(t) - tau(r)))
    alpha_s, sigma_s = alpha_sigma(name, s)
    x_s = (alpha_s + sigma_s) * (x_t / (alpha + sigma) + column(tau(s) - tau(t)) * v)  # a straight line in z
    student = {key: q.detach().clone().requires_grad_() for key, q in roles.tensors_of("student").items()}
    told = {"end": torch.from_numpy(r)}
    rest = clean_and_noise(name, kind, x_s, ask(base, student, name, x_s, s, text, told), s)
    still = column(t == r)
    target = torch.where(still, v, ALPHA * v + (1 - ALPHA) * (rest[1] - rest[0])).detach()
    mine = clean_and_noise(name, kind, x_t, ask(base, student, name, x_t, t, text, told), t)
    in_x0 = (x_t - sigma * target) / (alpha + sigma)  # x_t = (alpha + sigma) x0 + sigma u
    error = mine[0] - in_x0 if kind == "sample" else mine[1] - mine[0] - target
    weight = torch.where(still, torch.ones(()).double(), method.settings.alpha[0] / ALPHA)
    if kind == "epsilon":  # whose error counts 1 + sigma / alpha times, and at most 15 times
        weight = weight * (15 / (1 + sigma / alpha)).clamp_max(1) ** 2
    loss = (weight * error**2).mean()
    return x_t, target, loss, dict(zip(student, torch.autograd.grad(loss, student.values()), strict=True))


@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("variant", SETTINGS)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_step_is_the_papers(name, kind, variant, weights):
    p, random = build(name, kind, variant, weights), draws(name, variant)
    method, roles, _, batch, _ = p
    x_t, target, loss, slopes = by_hand(name, kind, variant, p, random)
    shared = method.prepare(roles, batch, random, {"student"})
    mine = method.student(roles, batch, random, shared)
    assert off(shared.x_t, x_t) <= 1e-10 and not shared.target.requires_grad
    for row, wanted in zip(shared.target, target, strict=True):
        assert off(row, wanted) <= 1e-9
    assert off(mine.total.detach(), loss.detach()) <= 1e-9
    parts = mine.parts["diagonal"] + 0.5 / ALPHA * mine.parts["jump"]
    assert parts.item() == pytest.approx(loss.item(), rel=1e-9) and all(mine.parts.values())
    for key, gradient in gradients(mine.total, roles, "student").items():
        assert slopes[key].abs().max() > 0 and off(gradient, slopes[key]) <= 1e-9, key


DRAWN = 20_000


def drawn(schedule, step=0, total=10, **settings):
    batch = Batch(torch.zeros(DRAWN, 2))
    return FlowMap(schedule, **settings).draw(batch, Rng(3, 0, DRAWN), Progress(step, total))


@pytest.mark.parametrize("name", SCHEDULES)
def test_rows_are_shared_between_the_diagonal_the_whole_way_and_all_others(name):
    schedule = SCHEDULES[name]
    random = drawn(schedule, diagonal=0.3, whole=0.2)
    still, whole = random.t == random.end, random.end == schedule.end
    assert (random.end <= random.t).all() and (random.t > schedule.end).all() and (random.t <= schedule.start).all()
    assert still.double().mean() == pytest.approx(0.3, abs=0.015) and not (still & whole).any()
    assert whole.double().mean() == pytest.approx(0.2, abs=0.015)
    # heights are uniform: of the rows of one time alike, of the others the larger and the smaller of two
    grid = schedule.training_grid(50)
    height = [torch.from_numpy(np.interp(x, grid, np.linspace(0, 1, 51))) for x in (random.t, random.end)]
    between = ~still & ~whole
    for values, mean in ((height[0][~between], 1 / 2), (height[0][between], 2 / 3), (height[1][between], 1 / 3)):
        assert values.mean() == pytest.approx(mean, abs=0.015)


def test_the_share_is_that_of_the_time_which_a_table_has():
    """Before pure noise there is none: with zero terminal SNR the first part reaches down to the last index but one."""
    schedule = Schedule.cosine(20).zero_terminal_snr()
    t, end = torch.tensor([19.0, 12.0]).double(), torch.tensor([0.0, 4.0]).double()
    s, share = FlowMap(schedule).split(t, end, 0.01)
    alpha, sigma = (np.sqrt(x) for x in (schedule.alphas_cumprod, 1 - schedule.alphas_cumprod))
    tau = sigma / (alpha + sigma)
    assert s[0] == 18 and share[0] == pytest.approx((tau[19] - tau[18]) / (tau[19] - tau[0])) and share[0] > 0.05
    assert 11 < s[1] < 12 and share[1] == pytest.approx(0.01)


def test_alpha_falls_geometrically_and_then_stays():
    alphas = [drawn(Schedule.flow(), step, 100, alpha=(0.5, 0.02)).alpha for step in (0, 40, 80, 99)]
    assert alphas == pytest.approx([0.5, 0.1, 0.02, 0.02])
    assert FlowMap.depends_on_length(FlowMap.Settings())
    assert not FlowMap.depends_on_length(FlowMap.Settings(alpha=(0.1, 0.1)))


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), Schedule.scaled_linear().zero_terminal_snr()])
@pytest.mark.parametrize("kind", ["flow", "sample"])
def test_at_the_exact_flow_map_the_loss_falls_as_the_third_power_of_alpha(schedule, kind):
    """Two modes on a line; a network that predicts x0 is compared in x0, and has the same fixed point."""
    bench = Bench(GaussianMixture([0.3, 0.7], [-1.2, 0.8], [0.25, 0.35]), schedule)
    method = FlowMap(schedule, guidance_scale=1.0)
    rows = fixed_rows(bench, method)
    assert len(rows) == 4 and all(row.passed for row in rows), rows
    assert 1e-11 < loss_at_map(bench, method, (1.0, 0.0), 0.02) < 2.5e-5
    if kind == "sample":
        batch, random = bench.draw(method, 64)
        t, end = (torch.full((64,), float(time)).double() for time in (schedule.start, schedule.end))
        random = dataclasses.replace(random, t=t, end=end, alpha=0.02)
        slope = ExactMap(bench).denoiser()
        x0 = Denoiser(lambda x, t, cond, end: slope(x, t, cond, end=end).x0, schedule, "sample")
        x0.network.accepts = frozenset({"end"})
        roles = oracle(bench, x0)
        loss = method.student(roles, batch, random, method.prepare(roles, batch, random, {"student"})).total
        assert 2e-13 < loss < 2.5e-5


@pytest.mark.parametrize("alpha", [0.5, 0.1, 0.02])
def test_jumps_learn_as_fast_as_alpha_falls(alpha):
    """Without a weight a jump's gradient shrinks with alpha beside the diagonal's, to a fiftieth of it at 0.02."""
    bench = Bench(GaussianMixture([0.5, 0.5], [-1.0, 1.0], [0.3, 0.3]), Schedule.flow(3.0), prediction_type="flow")
    sizes = []
    for share in (0.0, 1.0):
        method = FlowMap(bench.schedule, guidance_scale=1.0, diagonal=share, whole=0.0)
        roles = bench.roles(method, torch.float64)
        batch, random = bench.draw(method, 512)
        random = dataclasses.replace(random, alpha=alpha)
        loss = method.student(roles, batch, random, method.prepare(roles, batch, random, {"student"})).total
        found = torch.autograd.grad(loss, roles.parameters("student"), allow_unused=True)
        sizes.append(float(sum(g.square().sum() for g in found if g is not None)) ** 0.5)
    assert 0.25 < sizes[0] / sizes[1] < 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"velocity": "data", "guidance_scale": 3.0}, r"\(velocity data\) ask no teacher: set guidance_scale to 1"),
        ({"velocity": "data"}, "set guidance_scale to 1"),
        ({"diagonal": 0.8, "whole": 0.3}, r"diagonal \(0.8\) and whole \(0.3\) are shares"),
        ({"alpha": (0.5, 1.0)}, "alpha.1: input should be less than 1"),
        ({"alpha": (0.0, 0.5)}, "alpha.0: input should be greater than 0"),
        ({"whole": -0.1}, "whole: input should be greater than or equal to 0"),
        ({"steps": 3}, "FlowMap has no setting 'steps'"),
    ],
)
def test_wrong_settings_are_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        FlowMap(SCHEDULES["vp"], **settings)
