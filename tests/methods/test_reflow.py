"""One reflow step, of pairs and of windows, against the same step by hand; its draws, closed form, refusals."""

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
    grid,
    jump,
    off,
    student_on,
)
from reference import x0_epsilon as clean_and_noise

from fewstep.data.batch import Batch, Pairs
from fewstep.data.random import Rng
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Progress
from fewstep.methods.reflow import Draws, Reflow
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.recipe.load import parse_recipe
from fewstep.sampling import make_sampler
from fewstep.verification.bench import Bench
from fewstep.verification.checks import TWO_MODES
from fewstep.verification.reflow import MEAN, VARIANCE, fixed_rows, straight_slope

GAUSSIAN = GaussianMixture([1.0], [MEAN], [VARIANCE**0.5])
SETTINGS = {
    "pairs": dict(),
    "windows": dict(windows=5, solver_steps=1, guidance_scale=4.0),
    "heun": dict(windows=4, solver_steps=2, solver="heun", guidance_scale=1.0),
}
HEIGHTS = torch.tensor([1.0, 0.8, 0.55, 0.3, 0.12, 0.97], dtype=torch.float64)


def build(name, kind, variant, weights="full"):
    method = Reflow(SCHEDULES[name], **SETTINGS[variant])
    roles, base = student_on(method, name, kind, weights)
    batch, null = captioned(6)
    other, _ = captioned(6)
    noise = torch.randn(6, 2, 2, 2).double()
    pairs = Pairs(noise, other.x0, Cond({"text": other.cond["text"]}, null={"text": null}))
    return method, roles, base, dataclasses.replace(batch, pairs=pairs), null


def draws(variant):
    noise = torch.randn(6, 2, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    window = {"pairs": 0, "windows": 2, "heun": 1}[variant]
    return Draws(window, HEIGHTS, None if variant == "pairs" else noise)


def by_hand(name, kind, variant, p, random):
    """The line's two ends, the straight line between them in (x0, eps), and the slope eps - x0 of it."""
    method, roles, base, batch, null = p
    pairs, settings = batch.pairs, method.settings
    if variant == "pairs":
        text, knots = pairs.cond["text"], grid(name, 50).astype(float)
        t = np.interp(HEIGHTS.numpy(), np.linspace(0, 1, 51), knots)
        top = knots[-1]
        x_top = 80.0 * pairs.noise if name == "edm" else pairs.noise
        low, x_low = None, pairs.x0
    else:
        text, n = batch.cond["text"], settings.solver_steps
        windows = settings.windows - (name == "edm")  # whose last call is at the end itself
        knots = grid(name, windows * n).astype(float)[random.window * n : (random.window + 1) * n + 1]
        t = np.interp(HEIGHTS.numpy(), np.linspace(0, 1, n + 1), knots)
        top, low = knots[-1], knots[0]
        alpha, sigma = alpha_sigma(name, np.full(6, top))
        x_top = x = alpha * batch.x0 + sigma * random.noise

        def teacher(x, time):
            time = np.full(6, time)
            said = [ask(base, {}, name, x, time, c) for c in (text, null.expand(6, 3))]
            some = [clean_and_noise(name, kind, x, output, time) for output in said]
            w = settings.guidance_scale
            return tuple(without + w * (with_ - without) for with_, without in zip(*some, strict=True))

        for above, below in zip(knots[:0:-1], knots[-2::-1], strict=True):
            first = teacher(x, above)
            landed = jump(name, first, np.full(6, below))
            if settings.solver == "heun":
                second = teacher(landed, below)
                (a, sa), (b, sb) = (alpha_sigma(name, np.full(6, time)) for time in (above, below))
                if name == "flow":
                    landed = x + (sb - sa) * (first[1] - first[0] + second[1] - second[0]) / 2
                else:
                    landed = b * (x / a + (sb / b - sa / a) * (first[1] + second[1]) / 2)
            x = landed
        x_low = x
    (a_top, s_top), (a_low, s_low) = (
        (torch.ones(()), torch.zeros(())) if time is None else alpha_sigma(name, np.full(6, time))
        for time in (top, low)
    )
    # x_top = a_top X + s_top E and x_low = a_low X + s_low E: the two unknowns of the line
    determinant = a_top * s_low - a_low * s_top
    clean, noise = (s_low * x_top - s_top * x_low) / determinant, (a_top * x_low - a_low * x_top) / determinant
    alpha, sigma = alpha_sigma(name, t)
    x_t, slope = alpha * clean + sigma * noise, noise - clean
    student = {key: q.detach().clone().requires_grad_() for key, q in roles.tensors_of("student").items()}
    mine = clean_and_noise(name, kind, x_t, ask(base, student, name, x_t, t, text), t)
    error = mine[0] - clean if kind == "sample" else mine[1] - mine[0] - slope
    weight = (15 / (1 + sigma / alpha)).clamp_max(1) ** 2 if kind == "epsilon" else 1.0  # of its error's gain
    loss = (weight * error**2).mean()
    return x_t, slope, loss, dict(zip(student, torch.autograd.grad(loss, student.values()), strict=True))


@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("variant", SETTINGS)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_step_is_the_papers(name, kind, variant, weights):
    p, random = build(name, kind, variant, weights), draws(variant)
    method, roles, _, batch, _ = p
    x_t, slope, loss, slopes = by_hand(name, kind, variant, p, random)
    shared = method.prepare(roles, batch, random, {"student"})
    mine = method.student(roles, batch, random, shared)
    assert off(shared.x_t, x_t) <= 1e-9 and off(shared.slope, slope) <= 1e-9 and not shared.slope.requires_grad
    assert off(mine.total, loss) <= 1e-9
    for key, gradient in gradients(mine.total, roles, "student").items():
        assert slopes[key].abs().max() > 0 and off(gradient, slopes[key]) <= 1e-9, key


@pytest.mark.parametrize(("windows", "reach"), [(1, 1.0), (4, 0.9), (4, 0.5)])
def test_heights_reach_down_from_the_noisy_end_of_every_window(windows, reach):
    method = Reflow(Schedule.flow(), windows=windows, reach=0.9 if windows == 1 else reach)
    batch = Batch(torch.zeros(5000, 2))
    drawn = [method.draw(batch, Rng(3, step, 5000), Progress(step, 50)) for step in range(40)]
    assert {one.window for one in drawn} == set(range(windows))
    for one in drawn:
        assert 1 - reach < one.height.min() < 1.01 - reach and 0.99 < one.height.max() <= 1
        assert one.height.mean() == pytest.approx(1 - reach / 2, abs=0.02)
        assert (one.noise is None) == (windows == 1)


MEETING = SCHEDULES | {
    "zero snr": Schedule.scaled_linear().zero_terminal_snr(),
    "terminal": Schedule.flow(2.2, terminal=0.02),  # Qwen-Image
    "shift by steps": Schedule.flow(lambda steps: 40.0 / steps),  # as FLUX.2's
    "both": Schedule.flow(lambda steps: 1 + 20.0 / steps, terminal=0.1),
}


@pytest.mark.parametrize("windows", [2, 3, 4, 7])
@pytest.mark.parametrize("name", MEETING)
def test_windows_meet_where_their_sampler_calls_the_network(name, windows):
    """The upper edges are the times of as many steps, to the bit, and the lowest edge is the schedule's end."""
    schedule = MEETING[name]
    method = Reflow(schedule, windows=windows, solver_steps=5)
    settings = method.sampling(method.settings)
    times = make_sampler(method.sampler, num_inference_steps=settings.num_inference_steps).times(schedule)[:-1]
    assert len(times) == windows
    if name == "edm":  # the last call is at the schedule's end, where no way is left
        assert times[-1] == schedule.end
        times = times[:-1]
    batch = Batch(torch.zeros(2, 1))
    drawn = {method.draw(batch, Rng(3, step, 2), Progress(step, 9)).window for step in range(40 * windows)}
    assert drawn == set(range(len(times)))
    edges = [method.times(window) for window in sorted(drawn)]
    assert all(len(times) == 6 and (np.diff(times) > 0).all() for times in edges)
    assert times.tolist() == [times[-1] for times in edges[::-1]]
    assert [schedule.end, *times[:0:-1]] == [times[0] for times in edges]


@pytest.mark.parametrize("name", SCHEDULES)
def test_solver_times_within_windows_are_spaced_as_those_of_training_grids(name):
    schedule = SCHEDULES[name]
    count = 4 * (4 if name != "edm" else 3)
    grid = Reflow(schedule, windows=4, solver_steps=4).grid
    assert np.allclose(grid, schedule.training_grid(count), rtol=1e-12, atol=1e-14)


def test_the_teacher_is_not_asked_where_heuns_step_ends_at_clean_data():
    schedule, asked = SCHEDULES["flow"], []
    method = Reflow(schedule, windows=4, solver_steps=2, solver="heun", guidance_scale=1.0)

    def network(x, t, cond):
        asked.append(float(t[0]))
        return x

    roles = type("Roles", (), {"teacher": Denoiser(network, schedule, "flow")})
    batch, calls = Batch(torch.ones(2, 1).double()), []
    for window in range(4):
        asked.clear()
        one = Draws(window, torch.ones(2).double(), torch.ones(2, 1).double())
        method.prepare(roles, batch, one, {"student"})
        assert min(asked) > 0
        calls.append(len(asked))
        assert method.calls(one)["teacher"] == len(asked)
    assert calls == [3, 4, 4, 4] and method.calls_per_step()["teacher"] == 15 / 4


def test_as_many_steps_as_windows():
    assert [Reflow.sampling(Reflow.Settings(windows=k)).num_inference_steps for k in (1, 2, 8)] == [4, 2, 8]


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), Schedule.scaled_linear().zero_terminal_snr()])
def test_the_lines_of_a_gaussian_have_the_closed_form(schedule):
    rows = fixed_rows(Bench(TWO_MODES, schedule), Reflow(schedule, guidance_scale=1.0))
    assert len(rows) == 2 and all(row.passed for row in rows), rows
    assert rows[0].measured < 1e-14


def test_on_a_flow_schedule_the_closed_form_is_the_known_one():
    """v = (1 - sqrt S) / ((1 - t) sqrt S + t) (x - (1 - t) m) - m for data N(m, S)."""
    t, x, m, root = torch.linspace(0, 1, 9).double(), torch.linspace(-2, 3, 9).double(), 0.4, 0.6**0.5
    wanted = (1 - root) / ((1 - t) * root + t) * (x - (1 - t) * m) - m
    assert torch.allclose(straight_slope(Schedule.flow(), x[:, None], t)[:, 0], wanted, atol=1e-14)


def test_pairs_alone_are_needed_in_one_window_and_data_alone_in_several():
    one, several = Reflow.Settings(), Reflow.Settings(windows=4)
    assert Reflow.streams_of(one) == ("data", "pairs") and not Reflow.needs_images(one)
    assert Reflow.streams_of(several) == ("data",) and Reflow.needs_images(several)
    recipe = {"method": {"name": "reflow"}, "teacher": {"path": "scenes-64"}}
    assert parse_recipe(recipe).needs_pairs
    recipe["method"]["windows"] = 4
    assert not parse_recipe(recipe).needs_pairs
    assert Reflow(SCHEDULES["vp"], windows=4).streams == ("data",)


VP_SCHEDULERS = {
    "DDIMScheduler": {"timestep_spacing": "trailing", "clip_sample": False},
    "EulerDiscreteScheduler": {"timestep_spacing": "trailing"},
    "HeunDiscreteScheduler": {"timestep_spacing": "trailing"},
    "DPMSolverMultistepScheduler": {"timestep_spacing": "trailing"},
    "UniPCMultistepScheduler": {"timestep_spacing": "trailing"},
}
FLOW_SCHEDULERS = {
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "FlowMatchHeunDiscreteScheduler": {"shift": 3.0},
    "DPMSolverMultistepScheduler": {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    "UniPCMultistepScheduler": {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
}


@pytest.mark.needs("diffusers")
@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("family, name", [("vp", n) for n in VP_SCHEDULERS] + [("flow", n) for n in FLOW_SCHEDULERS])
def test_any_sampler_of_diffusers_follows_straight_lines(family, name, n):
    """The student of a Gaussian in closed form: every scheduler, of any order, ends where the exact flow does."""
    import diffusers

    table = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    config = VP_SCHEDULERS[name] | table if family == "vp" else FLOW_SCHEDULERS[name]
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(n)
    schedule = Schedule.scaled_linear() if family == "vp" else Schedule.flow(3.0)
    noise = torch.linspace(-1.5, 1.5, 7).double()[:, None]
    if family == "vp":
        start = float(scheduler.timesteps[0])
        x = noise / schedule.alpha_sigma(start)[0].item() if float(scheduler.init_noise_sigma) > 2 else noise
    else:
        start, x = 1.0, noise
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        time = torch.full((7,), float(t) if family == "vp" else float(t) / 1000).double()
        slope = straight_slope(schedule, given, time)
        alpha, sigma = (torch.from_numpy(c)[:, None] for c in schedule.alpha_sigma(time))
        epsilon = (given + alpha * slope) / (alpha + sigma)
        x = scheduler.step(epsilon if family == "vp" else slope, t, x).prev_sample
    exact = Bench(GAUSSIAN, schedule).flow(noise, start, schedule.clean, None)
    assert (x - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"windows": 0}, "windows: input should be greater than or equal to 1"),
        ({"reach": 1.1}, "reach: input should be less than or equal to 1"),
        ({"reach": 0}, "reach: input should be greater than 0"),
        ({"solver": "euler"}, "solver: input should be 'heun' or 'ddim'"),
        ({"guidance_scale": (2.0, 3.0)}, "guidance_scale: input should be a valid number"),
        ({"windows": 400}, "A grid of 1600 steps exceeds the 1000 training timesteps"),
    ],
)
def test_wrong_settings_are_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Reflow(SCHEDULES["vp"], **settings)


def test_data_without_pairs_are_refused_in_one_sentence():
    method, roles, _, batch, _ = build("vp", "epsilon", "pairs")
    with pytest.raises(ValueError, match="Reflow in one window learns from pairs of the teacher"):
        method.prepare(roles, dataclasses.replace(batch, pairs=None), draws("pairs"), {"student"})
