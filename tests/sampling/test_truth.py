"""Samplers and solvers without a counterpart to copy: against formulas written out here, and against exact teachers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fewstep.diffusion.consistency import coefficients
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.sampling import (
    SAMPLERS,
    CTMSampler,
    DDIMSampler,
    DPMSolverPP2MSampler,
    EulerAncestralSampler,
    EulerSampler,
    HeunSampler,
    LCMSampler,
    PhasedSampler,
    TCDSampler,
    make_sampler,
    sample,
    solve,
)
from tests.sampling.conftest import toy

VP, EDM, FLOW = Schedule.scaled_linear(), Schedule.edm(), Schedule.flow(shift=3.0)
LINE = GaussianMixture([0.3, 0.7], [-1.2, 0.8], [0.25, 0.35])
BARS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def bar(index):
    return float(BARS[int(index)])


def close(a, b, tolerance=1e-10):
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


# ---------------------------------------------------------------- step by step, written out


def test_ctm_on_edm_is_the_official_gamma_sampler(noise, noises):
    """sample_util.py of the release: s = sqrt(1 - g^2)(t - eps) + eps, then noise up by sqrt(t^2 - s^2)."""
    gamma, grid, smallest = 0.4, [80.0, 20.0, 3.0, 0.002], 0.002
    x = 80.0 * noise
    for i in range(3):
        t, after = grid[i], grid[i + 1]
        s = after if i == 2 else math.sqrt(1 - gamma**2) * (after - smallest) + smallest
        denoised = toy(x, torch.full((3,), t))
        x = s / t * x + (1 - s / t) * denoised
        if i < 2:
            x = x + math.sqrt(after**2 - s**2) * noises[i]
    got = sample(Denoiser(toy, EDM, "sample"), CTMSampler(timesteps=grid[:3], eta=gamma), noise, noises=noises)
    assert close(got.x0, x)


def test_multistep_consistency_on_edm_follows_algorithm_1(noise, noises):
    """Song et al. 2023: x = f(x, t) + sqrt(t'^2 - eps^2) z; f with the shifted scalings, sigma_data 1/2."""
    x = 80.0 * noise
    for i, t in enumerate([80.0, 5.0, 0.5]):
        denoised = toy(x, torch.full((3,), t))
        skip, skip_edm = 0.25 / ((t - 0.002) ** 2 + 0.25), 0.25 / (t**2 + 0.25)
        out, out_edm = (t - 0.002) * 0.5 / math.sqrt(t**2 + 0.25), t * 0.5 / math.sqrt(t**2 + 0.25)
        x = skip * x + out * (denoised - skip_edm * x) / out_edm
        if i < 2:
            x = x + math.sqrt([5.0, 0.5][i] ** 2 - 0.002**2) * noises[i]
    got = sample(Denoiser(toy, EDM, "sample"), LCMSampler(timesteps=[80.0, 5.0, 0.5]), noise, noises=noises)
    assert close(got.x0, x)


def test_exact_lcm_renoises_from_index_0(noise, noises):
    x = noise
    for i, (t, after) in enumerate([(999, 499), (499, None)]):
        x0 = (x - math.sqrt(1 - bar(t)) * toy(x, torch.full((3,), t))) / math.sqrt(bar(t))
        q = 10 * t
        x = 0.25 / (q**2 + 0.25) * x + q / math.sqrt(q**2 + 0.25) * x0
        if after is not None:
            ratio = math.sqrt(bar(after) / bar(0))
            x = ratio * x + math.sqrt(1 - bar(after) - ratio**2 * (1 - bar(0))) * noises[i]
    got = sample(Denoiser(toy, VP), LCMSampler(num_inference_steps=2, exact=True), noise, noises=noises)
    assert close(got.x0, x)


def test_phased_sampling_visits_the_edges(noise, noises):
    """PCM's eq. 44 with r = 1 - eta^2, on the edges of four phases of a 50-step grid."""
    eta, x, edges = 0.6, noise, [999, 739, 499, 239, 0]
    for i in range(4):
        t, s = edges[i], edges[i + 1]
        epsilon = toy(x, torch.full((3,), t))
        x0 = (x - math.sqrt(1 - bar(t)) * epsilon) / math.sqrt(bar(t))
        mixed = epsilon if i == 3 else math.sqrt(1 - eta**2) * epsilon + eta * noises[i]
        x = math.sqrt(bar(s)) * x0 + math.sqrt(1 - bar(s)) * mixed
    got = sample(Denoiser(toy, VP), PhasedSampler(num_inference_steps=4, eta=eta), noise, noises=noises)
    assert close(got.x0, x)
    assert got.timesteps.tolist() == edges[:4]


def test_heun_on_edm_is_algorithm_1(noise):
    grid = EDM.karras(5)
    x = grid[0] * noise
    for t, after in zip(grid, [*grid[1:], 0.0], strict=True):
        d = (x - toy(x, torch.full((3,), t, dtype=torch.float64))) / t
        euler = x + (after - t) * d
        if after == 0:
            x = euler
        else:
            d2 = (euler - toy(euler, torch.full((3,), after, dtype=torch.float64))) / after
            x = x + (after - t) * (d + d2) / 2
    got = sample(Denoiser(toy, EDM, "sample"), HeunSampler(num_inference_steps=5), noise)
    assert close(got.x0, x)


def test_tcd_on_flow_scales_the_time(noise, noises):
    eta, x, grid = 0.3, noise, [1.0, 0.6, 0.3, 0.0]
    for i in range(3):
        t, after = grid[i], grid[i + 1]
        s = (1 - eta) * after
        x = x + (s - t) * toy(x, torch.full((3,), t, dtype=torch.float64))
        if i < 2:
            ratio = (1 - after) / (1 - s)
            x = ratio * x + math.sqrt(after**2 - (ratio * s) ** 2) * noises[i]
    got = sample(Denoiser(toy, FLOW, "flow"), TCDSampler(timesteps=grid[:3], eta=eta), noise, noises=noises)
    assert close(got.x0, x)


def test_the_ancestral_step_is_ddim_with_eta_1(noise, noises):
    for schedule, kind in ((VP, "sample"), (EDM, "sample"), (FLOW, "flow")):
        denoiser = Denoiser(toy, schedule, kind)
        ours = sample(denoiser, EulerAncestralSampler(num_inference_steps=4), noise, noises=noises)
        ddim = sample(denoiser, DDIMSampler(num_inference_steps=4, eta=1.0), noise, noises=noises)
        assert close(ours.x0, ddim.x0, 1e-14)


# ---------------------------------------------------------------- exact teachers


def kolmogorov(x, schedule, t):
    """Largest difference between the distribution of x [B, 1] and that of LINE's noised data at time t."""
    alpha, sigma = (float(v) for v in schedule.alpha_sigma(t))
    ordered = np.sort(x.flatten().numpy())
    truth = sum(
        w * stats.norm.cdf(ordered, alpha * m, math.hypot(alpha * s, sigma))
        for w, m, s in ((0.3, -1.2, 0.25), (0.7, 0.8, 0.35))
    )
    n = len(ordered)
    return max(np.abs(truth - np.arange(n) / n).max(), np.abs(truth - np.arange(1, n + 1) / n).max())


@pytest.mark.parametrize("schedule, kind", [(VP, "epsilon"), (EDM, "sample"), (FLOW, "flow")])
@pytest.mark.parametrize("solver, order, calls", [("ddim", 1, 1), ("heun", 2, 2), ("dpm++2m", 2, 1)])
def test_solvers_converge_to_the_flow_map_at_their_order(schedule, kind, solver, order, calls):
    denoiser = Denoiser(LINE.network(schedule, kind), schedule, kind)
    start, end = schedule.time_at(5.0), schedule.time_at(0.2)
    x = LINE.sample_at(200, schedule, float(start), torch.Generator().manual_seed(0))
    truth = LINE.flow_map(x, schedule, float(start), float(end))
    errors = []
    for n in (100, 200):
        grid = schedule.time_at(np.geomspace(5.0, 0.2, n + 1))
        before = denoiser.cost.calls
        errors.append((solve(denoiser, x, grid, solver=solver) - truth).square().mean().sqrt().item())
        assert denoiser.cost.calls - before == calls * n
    assert 1.8**order < errors[0] / errors[1] < 2.25**order


@pytest.mark.slow
@pytest.mark.parametrize("schedule, kind", [(VP, "epsilon"), (EDM, "sample"), (FLOW, "flow")])
@pytest.mark.parametrize("name", SAMPLERS)
def test_many_steps_reach_the_data(name, schedule, kind):
    """An exact teacher on a fine grid gives the data, within sampling error and O(1/n)."""
    if name in ("lcm", "renoise", "phased"):
        pytest.skip("wants a student: a teacher's answer is no sample")
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options = {"eta": 0.0, "timestep_spacing": "trailing"} if name in ("tcd", "ctm") else {}
    sampler = make_sampler(name, num_inference_steps=200, **options)
    denoiser = Denoiser(LINE.network(schedule, kind), schedule, kind)
    x0 = sample(denoiser, sampler, noise, generator=torch.Generator().manual_seed(2)).x0
    assert kolmogorov(x0, schedule, schedule.end if name in ("tcd", "ctm") else schedule.clean) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("cls", [TCDSampler, CTMSampler])
@pytest.mark.parametrize("schedule", [VP, EDM, FLOW])
def test_a_perfect_student_keeps_the_marginal_for_every_eta(cls, eta, schedule):
    """A student that knows the exact flow map to whatever end it is told: any eta gives the data's distribution."""

    class Student:
        accepts = ("end",)

        def __call__(self, x, t, cond=None, *, end):
            t, s = float(t[0]), float(end[0])
            x_s = LINE.flow_map(x, schedule, t, s)
            (a, b), (c, d) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
            return (x_s - x * float(d / b)) / float(c - d * a / b)  # the x0 whose jump from x lands at x_s

    times = [schedule.start, *schedule.time_at([3.0, 1.0, 0.4]).round(6 if schedule.family != "vp" else 0).tolist()]
    start = LINE.sample_at(4000, schedule, float(times[0]), torch.Generator().manual_seed(3))
    scale = float(schedule.sigma(times[0])) if schedule.family == "edm" else 1.0
    got = sample(
        Denoiser(Student(), schedule, "sample"), cls(timesteps=times, eta=eta), start / scale,
        generator=torch.Generator().manual_seed(4),
    ).x0  # fmt: skip
    assert kolmogorov(got, schedule, schedule.end) < 1.63 / math.sqrt(len(got))  # 1 % level


@pytest.mark.parametrize("schedule", [VP, EDM, FLOW])
def test_a_perfect_consistency_function_keeps_the_marginal(schedule):
    """Four steps of algorithm 1 with the exact flow map to the schedule's end as f(x, t)."""

    def student(x, t, cond=None):
        answer = LINE.flow_map(x, schedule, float(t[0]), schedule.end)
        of_x, of_x0 = (float(c) for c in coefficients(schedule, np.array(float(t[0]))))
        return (answer - of_x * x) / of_x0

    times = [schedule.start, *schedule.time_at([3.0, 1.0, 0.4]).round(6 if schedule.family != "vp" else 0).tolist()]
    start = LINE.sample_at(4000, schedule, float(times[0]), torch.Generator().manual_seed(3))
    scale = float(schedule.sigma(times[0])) if schedule.family == "edm" else 1.0
    generator = torch.Generator().manual_seed(4)
    sampler = LCMSampler(timesteps=times, exact=True)
    got = sample(Denoiser(student, schedule, "sample"), sampler, start / scale, generator=generator).x0
    assert kolmogorov(got, schedule, schedule.end) < 1.63 / math.sqrt(len(got))  # 1 % level


# ---------------------------------------------------------------- grids, starts, draws


@pytest.mark.parametrize("spacing, n, expected", [
    ("trailing", 4, [999, 749, 499, 249]),
    ("leading", 4, [751, 501, 251, 1]),
    ("linspace", 4, [999, 666, 333, 0]),
    ("lcm", 4, [999, 759, 499, 259]),
    ("lcm-v1", 4, [999, 759, 519, 279]),
    ("turbo", 4, [999, 899, 799, 699]),
    ("turbo", 10, [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
    ("phases", 4, [999, 739, 499, 239]),
])  # fmt: skip
def test_public_grids_by_name(spacing, n, expected):
    sampler = EulerSampler(num_inference_steps=n, timestep_spacing=spacing, steps_offset=spacing == "leading")
    assert sampler.times(VP)[:-1].tolist() == expected


def test_the_lcm_grid_picks_from_original_inference_steps():
    assert TCDSampler(num_inference_steps=4, original_inference_steps=40).times(VP)[:-1].tolist() == [
        999,
        749,
        499,
        249,
    ]


def test_tcd_jumps_where_the_spec_says():
    """Section 4.4: eta 0.3 in four steps lands at 531, 349, 181, 0."""
    sampler, grid = TCDSampler(num_inference_steps=4, eta=0.3), [759, 499, 259, 0]
    assert [sampler.end(VP, 999, s, i == 3) for i, s in enumerate(grid)] == [531, 349, 181, 0]


def test_karras_keeps_its_noise_levels():
    levels = VP.noise_to_signal(EulerSampler(num_inference_steps=7, timestep_spacing="karras").times(VP)[:-1])
    assert np.allclose(levels, VP.karras(7), rtol=1e-9)


def test_sigmas_are_noise_to_signal_ratios():
    assert VP.noise_to_signal(EulerSampler(sigmas=[14.0, 3.0, 0.5, 0.0]).times(VP)) == pytest.approx(
        [14.0, 3.0, 0.5, 0.0]
    )
    assert EulerSampler(sigmas=[1.0, 0.6]).times(FLOW).tolist() == [1.0, 0.6, 0.0]
    assert EulerSampler(sigmas=[80.0, 0.6]).times(EDM).tolist() == [80.0, 0.6, 0.0]


def test_starts(noise):
    denoiser = Denoiser(toy, VP)
    sampler = EulerSampler(num_inference_steps=2)
    assert torch.equal(sample(denoiser, sampler, noise).states[0], noise)
    table = sample(denoiser, sampler, noise, start="table").states[0]
    assert close(table, math.sqrt(1 - bar(999)) * noise, 1e-14)
    assert (table / noise).mean().item() == pytest.approx(0.9977, abs=5e-5)
    edm = sample(Denoiser(toy, EDM, "sample"), sampler, noise)
    assert close(edm.states[0], 80 * noise, 1e-14)


def test_trajectory(noise, noises):
    got = sample(Denoiser(toy, VP), TCDSampler(num_inference_steps=4), noise, noises=noises)
    assert len(got.states) == 5
    assert got.states[-1] is got.x0
    assert got.timesteps.tolist() == [999, 759, 499, 259]


def test_precision(noise):
    assert sample(Denoiser(toy, VP), DDIMSampler(num_inference_steps=2), noise).x0.dtype == torch.float64
    assert sample(Denoiser(toy, VP), DDIMSampler(num_inference_steps=2), noise.half()).x0.dtype == torch.float32


def test_a_generator_makes_sampling_repeatable(noise):
    runs = [
        sample(
            Denoiser(toy, VP), TCDSampler(num_inference_steps=4), noise, generator=torch.Generator().manual_seed(s)
        ).x0
        for s in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_a_student_is_conditioned_on_its_target_time_and_guidance(noise):
    heard = []

    def network(x, t, cond=None, *, end, guidance_embed):
        heard.append((float(t[0]), float(end[0]), float(guidance_embed[0])))
        return toy(x, t)

    network.accepts = ("end", "guidance_embed")
    sample(Denoiser(network, VP), TCDSampler(num_inference_steps=2, eta=0.3), noise, guidance_embed=7.5)
    assert heard == [(999, 349, 7.5), (499, 0, 7.5)]


def test_a_student_of_lcm_is_conditioned_on_the_schedules_end(noise):
    heard = []

    def network(x, t, cond=None, *, end):
        heard.append(float(end[0]))
        return toy(x, t)

    network.accepts = ("end",)
    sample(Denoiser(network, EDM, "sample"), LCMSampler(num_inference_steps=2), noise)
    assert heard == pytest.approx([0.002, 0.002])
    sample(Denoiser(network, VP), LCMSampler(num_inference_steps=2), noise)
    assert heard[2:] == [0, 0]


@pytest.mark.parametrize("run", [
    lambda *args: solve(args[0], args[1], [999, 499, 249, 0], *args[2:]),
    lambda *args: sample(args[0], DDIMSampler(timesteps=[999, 499, 249], final="end"), *args[1:]).x0,
], ids=["solve", "sample"])  # fmt: skip
def test_every_step_is_guided(run, noise):
    """Step by step with the formula: null + w (cond - null) of the noise, at every time."""
    cond = Cond({"w": torch.full_like(noise, 0.3)}, null={"w": torch.full_like(noise[:1], -0.2)})
    scale, x = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64), noise
    for t, s in ((999, 499), (499, 249), (249, 0)):
        with_, without = toy(x, torch.tensor(t)) + 0.3 * x, toy(x, torch.tensor(t)) - 0.2 * x
        epsilon = without + scale.reshape(3, 1, 1, 1) * (with_ - without)
        x0 = (x - math.sqrt(1 - bar(t)) * epsilon) / math.sqrt(bar(t))
        x = math.sqrt(bar(s)) * x0 + math.sqrt(1 - bar(s)) * epsilon
    denoiser = Denoiser(lambda x, t, cond: toy(x, t) + cond["w"] * x, VP)
    assert close(run(denoiser, noise, cond, scale), x)


def test_the_callback_sees_every_state_once(noise):
    seen = []
    got = sample(Denoiser(toy, VP), DDIMSampler(num_inference_steps=3), noise, callback=lambda *step: seen.append(step))
    assert [done for done, _ in seen] == [1, 2, 3]
    assert all(x is state for (_, x), state in zip(seen, got.states[1:], strict=True))


def test_guidance_costs_one_batched_call_a_step(noise):
    denoiser = Denoiser(lambda x, t, cond: x * cond["w"], VP)
    cond = Cond({"w": torch.full((3, 1, 1, 1), 0.3)}, null={"w": torch.zeros(1, 1, 1, 1)})
    sample(denoiser, DDIMSampler(num_inference_steps=4), noise, cond, guidance_scale=3.0)
    assert (denoiser.cost.calls, denoiser.cost.evaluations) == (4, 24)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_never_waits_for_the_device(name, noise):
    """No tensor becomes a Python number on the way: each would stall an accelerator."""
    denoiser = Denoiser(lambda x, t, cond=None: 0.3 * x, VP)
    denoiser(noise, 999.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        sample(denoiser, make_sampler(name, num_inference_steps=4), noise)
    waits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::item"}
    assert not [e.name for e in profile.events() if e.name in waits]


# ---------------------------------------------------------------- errors in one sentence


@pytest.mark.parametrize(
    "build, sentence",
    [
        (lambda: EulerSampler(), "takes one of num_inference_steps, timesteps and sigmas, not none"),
        (lambda: EulerSampler(num_inference_steps=2, timesteps=[999]), "not num_inference_steps and timesteps"),
        (lambda: EulerSampler(num_inference_steps=0).times(VP), "at least 1, not 0"),
        (lambda: EulerSampler(timesteps=[499, 999]).times(VP), "must decrease from step to step, not 499, 999"),
        (lambda: EulerSampler(timesteps=[999, 999]).times(VP), "must decrease"),
        (lambda: EulerSampler(timesteps=[]).times(VP), "at least one number"),
        (lambda: EulerSampler(timesteps=[1500, 3]).times(VP), "outside this vp schedule"),
        (lambda: EulerSampler(timesteps=[float("nan"), 3]).times(VP), "outside|decrease"),
        (lambda: TCDSampler(timesteps=[999, 0]).times(VP), "must stay above 0"),
        (lambda: TCDSampler(num_inference_steps=4, eta=1.5), "eta must be between 0 and 1"),
        (lambda: LCMSampler(num_inference_steps=60).times(VP), "exceeds original_inference_steps"),
        (lambda: EulerSampler(num_inference_steps=11, timestep_spacing="turbo").times(VP), "at most ten"),
        (
            lambda: EulerSampler(num_inference_steps=4, timestep_spacing="simple").times(VP),
            "Unknown timestep_spacing 'simple'",
        ),
        (lambda: DDIMSampler(num_inference_steps=4, final="zero"), "Unknown final 'zero'"),
        (lambda: make_sampler("eular", num_inference_steps=4), "Unknown sampler 'eular'"),
        (lambda: make_sampler("euler", num_inference_steps=4, eta=1), "has no option 'eta'"),
        (lambda: solve(Denoiser(toy, VP), torch.zeros(1, 1), [0.0, 999.0]), "must decrease"),
        (lambda: solve(Denoiser(toy, VP), torch.zeros(1, 1), [999.0, 0.0], solver="rk4"), "Unknown solver 'rk4'"),
    ],
)
def test_errors_say_what_to_do(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()


@pytest.mark.parametrize(
    "sampler",
    [
        LCMSampler(num_inference_steps=4),
        LCMSampler(num_inference_steps=4, exact=True),
        TCDSampler(num_inference_steps=4, eta=0.3),
        CTMSampler(num_inference_steps=4, eta=0.3),
        PhasedSampler(num_inference_steps=4, eta=0.3),
        DDIMSampler(num_inference_steps=4, eta=1.0),
        EulerAncestralSampler(num_inference_steps=4),
    ],
)
@pytest.mark.parametrize("schedule", [VP, EDM, FLOW])
def test_the_last_step_draws_nothing(sampler, schedule, noise, noises):
    """n steps use exactly n - 1 noises: one more would shift everybody's later draws."""
    denoiser = Denoiser(toy, schedule, "sample")
    exact = sample(denoiser, sampler, noise, noises=noises[:3]).x0
    assert torch.equal(exact, sample(denoiser, sampler, noise, noises=noises).x0)
    with pytest.raises(ValueError, match="more than the 2 noises"):
        sample(denoiser, sampler, noise, noises=noises[:2])


def test_injected_noises_must_fit(noise, noises):
    with pytest.raises(ValueError, match="more than the 1 noises"):
        sample(Denoiser(toy, VP), LCMSampler(num_inference_steps=4), noise, noises=noises[:1])
    with pytest.raises(ValueError, match=r"noises\[0\] has shape"):
        sample(Denoiser(toy, VP), LCMSampler(num_inference_steps=4), noise, noises=[noises[0][:1]] * 3)
    with pytest.raises(ValueError, match="Unknown start"):
        sample(Denoiser(toy, VP), LCMSampler(num_inference_steps=1), noise, start="zero")


def test_dpm_is_second_order_even_when_sigmas_close_with_0(noise):
    """The step before clean data is of first order, whatever the number of steps; the others are not."""
    denoiser = Denoiser(toy, VP)
    with_zero = sample(denoiser, DPMSolverPP2MSampler(sigmas=[14.0, 3.0, 1.0, 0.0]), noise)
    without = sample(denoiser, DPMSolverPP2MSampler(sigmas=[14.0, 3.0, 1.0]), noise)
    euler = sample(denoiser, EulerSampler(sigmas=[14.0, 3.0, 1.0]), noise)
    assert torch.equal(with_zero.x0, without.x0)
    assert torch.equal(without.states[1], euler.states[1])
    assert not torch.allclose(without.states[2], euler.states[2])
