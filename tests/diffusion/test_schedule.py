"""Schedules against formulas written out here, the figures of the papers, and diffusers' own grids."""

import math

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.diffusion.schedule import Schedule, working

SD = Schedule.scaled_linear()
FAMILIES = {
    "sd": SD,
    "cosine": Schedule.cosine(),
    "zero_snr": SD.zero_terminal_snr(),
    "short": Schedule.from_betas([0.1, 0.2, 0.4, 0.5]),
    "edm": Schedule.edm(),
    "flow": Schedule.flow(),
    "flow3": Schedule.flow(shift=3.0),
}


def product_of_betas(betas):
    bar, table = 1.0, []
    for beta in betas:
        bar *= 1 - beta
        table.append(bar)
    return table


def sd_betas(n=1000, first=0.00085, last=0.012):
    return [(first**0.5 + (last**0.5 - first**0.5) * i / (n - 1)) ** 2 for i in range(n)]


# ------------------------------------------------------------------ coefficients


def test_stable_diffusion_table():
    table = product_of_betas(sd_betas())
    for t in (0, 1, 19, 500, 998, 999):
        assert float(SD.alpha(t)) == pytest.approx(math.sqrt(table[t]), rel=1e-13)
        assert float(SD.sigma(t)) == pytest.approx(math.sqrt(1 - table[t]), rel=1e-12)


@pytest.mark.parametrize(
    ("t", "alpha", "sigma", "eta"),
    [
        (0, 0.99957, 0.02915, 0.0292),
        (19, 0.99108, 0.13325, 0.1345),
        (259, 0.81177, 0.58397, 0.7194),
        (499, 0.52694, 0.84990, 1.613),
        (759, 0.22850, 0.97354, 4.261),
        (999, 0.06826, 0.99767, 14.615),
    ],
)
def test_stable_diffusion_figures(t, alpha, sigma, eta):
    assert float(SD.alpha(t)) == pytest.approx(alpha, abs=5e-6)
    assert float(SD.sigma(t)) == pytest.approx(sigma, abs=5e-6)
    assert float(SD.noise_to_signal(t)) == pytest.approx(eta, rel=2e-3)


def test_cosine_table():
    def bar(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    table = product_of_betas(min(1 - bar((i + 1) / 1000) / bar(i / 1000), 0.999) for i in range(1000))
    for t in (0, 300, 999):
        assert float(FAMILIES["cosine"].alpha(t)) == pytest.approx(math.sqrt(table[t]), rel=1e-10)


def test_zero_terminal_snr_table():
    root = np.sqrt(product_of_betas(sd_betas()))
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    rescaled = FAMILIES["zero_snr"]
    assert float(rescaled.alpha(999)) == 0 and float(rescaled.sigma(999)) == 1
    assert rescaled.alpha(torch.arange(1000)).numpy() == pytest.approx(expected, rel=1e-10, abs=1e-15)
    assert float(rescaled.alpha(0)) == pytest.approx(float(SD.alpha(0)), rel=1e-14)


def test_below_pure_noise_everything_is_noise():
    alpha, sigma = FAMILIES["zero_snr"].alpha_sigma([998.0, 998.5, 999.0])
    assert alpha[0] > 0 and alpha[1] == alpha[2] == 0
    assert sigma[1] == sigma[2] == 1 and np.isfinite(sigma).all()


def test_edm_and_flow_coefficients():
    t = torch.tensor([0.002, 1.5, 80.0])
    assert torch.equal(FAMILIES["edm"].alpha(t), torch.ones(3, dtype=torch.float64))
    assert torch.equal(FAMILIES["edm"].sigma(t), t.double())
    t = torch.tensor([0.0, 0.25, 1.0])
    for schedule in (FAMILIES["flow"], FAMILIES["flow3"]):  # shift bends grids, not coefficients
        assert torch.equal(schedule.alpha(t), 1 - t.double()) and torch.equal(schedule.sigma(t), t.double())


@pytest.mark.parametrize("name", FAMILIES)
def test_clean_is_clean_and_index_zero_is_not(name):
    schedule = FAMILIES[name]
    alpha, sigma = schedule.alpha_sigma(schedule.clean)
    assert (alpha, sigma) == (1.0, 0.0)
    if schedule.family == "vp":
        assert schedule.clean == -1 and float(schedule.sigma(0)) > 0 and schedule.end == 0
        assert schedule.start == schedule.num_train_timesteps - 1


@given(st.floats(0, 999))
def test_vp_preserves_variance_at_any_time(t):
    for schedule in (SD, FAMILIES["cosine"], FAMILIES["zero_snr"]):
        alpha, sigma = schedule.alpha_sigma(t)
        assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-14)


@given(st.integers(0, 998), st.floats(0, 1))
def test_between_indices_log_sigma_is_linear(index, fraction):
    low, high = float(SD.noise_to_signal(index)), float(SD.noise_to_signal(index + 1))
    expected = math.exp((1 - fraction) * math.log(low) + fraction * math.log(high))
    assert float(SD.noise_to_signal(index + fraction)) == pytest.approx(expected, rel=1e-10)


@given(st.floats(0, 998))
def test_time_at_inverts_eta(t):
    assert SD.time_at(SD.noise_to_signal(t)) == pytest.approx(t, abs=1e-8)


def test_time_at_of_other_families():
    assert FAMILIES["edm"].time_at(3.0) == 3.0
    assert FAMILIES["flow"].time_at([0.0, 1.0, math.inf]) == pytest.approx([0, 0.5, 1])
    assert SD.time_at([0.0, 1e9]) == pytest.approx([-1, 999])  # clean; clamped
    assert FAMILIES["zero_snr"].time_at([float(FAMILIES["zero_snr"].noise_to_signal(500)), math.inf]) == pytest.approx(
        [500, 999]
    )


def test_an_euler_config_interpolates_sigma_itself():
    euler = Schedule.from_diffusers(
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "interpolation_type": "linear"}
    )
    assert float(euler.noise_to_signal(10.25)) == pytest.approx(
        0.75 * float(SD.noise_to_signal(10)) + 0.25 * float(SD.noise_to_signal(11)), rel=1e-13
    )
    assert float(euler.time_at(euler.noise_to_signal(10.25))) == pytest.approx(10.25, abs=1e-9)


def test_shapes_and_types_of_times():
    times = torch.tensor([3, 500])
    assert SD.alpha(times).shape == (2,) and SD.alpha(3).shape == () and SD.alpha(3).dtype == torch.float64
    assert torch.equal(SD.alpha(times), SD.alpha(times.double())) and torch.equal(SD.alpha(times), SD.alpha([3, 500]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["sd", "edm", "flow"])
def test_add_noise(name, dtype):
    schedule, t = FAMILIES[name], torch.tensor([0.5, 1.0])
    x0, eps = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    x0, eps = x0.to(dtype), eps.to(dtype)
    noised = schedule.add_noise(x0, eps, t)
    assert noised.dtype == working(x0).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for row in range(2):
        expected = float(schedule.alpha(t[row])) * x0[row].double() + float(schedule.sigma(t[row])) * eps[row].double()
        torch.testing.assert_close(
            noised[row].double(), expected, rtol=3e-7 if dtype != torch.float64 else 1e-15, atol=2e-7
        )


# ------------------------------------------------------------------ grids


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 30, 50, 999, 1000])
def test_vp_timesteps_are_diffusers(spacing, n):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(num_train_timesteps=1000, timestep_spacing=spacing, steps_offset=0)
    theirs.set_timesteps(n)
    mine = SD.timesteps(n, spacing)
    assert mine.dtype == torch.int64 and mine.tolist() == theirs.timesteps.tolist()


def test_timesteps_as_figures():
    assert SD.timesteps(4).tolist() == [999, 749, 499, 249]
    assert SD.timesteps(4, "leading", steps_offset=1).tolist() == [751, 501, 251, 1]
    assert SD.timesteps(4, "linspace").tolist() == [999, 666, 333, 0]
    assert FAMILIES["flow"].timesteps(4).tolist() == [1.0, 0.75, 0.5, 0.25]
    assert Schedule.flow(shift=5).timesteps(4).tolist() == pytest.approx([1, 0.9375, 5 / 6, 0.625])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_linspace_is_flow_match_euler(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(7)
    mine = Schedule.flow(shift=shift).timesteps(7, "linspace")
    assert mine.numpy() == pytest.approx(theirs.sigmas[:-1].double().numpy(), rel=1e-6)


LCM_GRIDS = {
    ("lcm", 1): [999],
    ("lcm", 2): [999, 499],
    ("lcm", 4): [999, 759, 499, 259],
    ("lcm", 8): [999, 879, 759, 639, 499, 379, 259, 139],
    ("lcm-v1", 4): [999, 759, 519, 279],
    ("lcm-v1", 8): [999, 879, 759, 639, 519, 399, 279, 159],
}


@pytest.mark.parametrize(("variant", "n"), LCM_GRIDS)
def test_lcm_grids(variant, n):
    assert SD.lcm_timesteps(n, variant=variant).tolist() == LCM_GRIDS[variant, n]


@pytest.mark.parametrize("n", [1, 3, 5, 6, 7, 25, 50])
@pytest.mark.parametrize("original", [50, 100])
def test_lcm_grid_is_diffusers(n, original):
    from diffusers import LCMScheduler

    theirs = LCMScheduler(original_inference_steps=original)
    theirs.set_timesteps(n)
    assert SD.lcm_timesteps(n, original).tolist() == theirs.timesteps.tolist()


def test_lcm_grid_of_flow_picks_from_its_training_grid():
    grid = FAMILIES["flow3"].training_grid(50)
    assert FAMILIES["flow3"].lcm_timesteps(4).tolist() == [grid[50], grid[38], grid[25], grid[13]]


def test_training_grids():
    assert SD.training_grid(50).tolist() == [0, *range(19, 1000, 20)]
    assert SD.training_grid(1).tolist() == [0, 999]
    assert FAMILIES["flow"].training_grid(4).tolist() == [0, 0.25, 0.5, 0.75, 1]
    grid = FAMILIES["edm"].training_grid(17)
    assert len(grid) == 18 and grid[0] == 0.002 and grid[-1] == 80 and (np.diff(grid) > 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_training_grids_run_from_end_to_start(name):
    schedule = FAMILIES[name]
    grid = schedule.training_grid(4)
    assert len(grid) == 5 and grid[0] == schedule.end and grid[-1] == schedule.start
    assert (np.diff(schedule.alpha_sigma(grid)[1]) >= 0).all()


def test_karras_grid():
    n, low, high, rho = 10, 0.002, 80.0, 7
    expected = [(high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(n)]
    assert FAMILIES["edm"].karras(n) == pytest.approx(expected, rel=1e-12)
    assert FAMILIES["edm"].timesteps(n).tolist() == FAMILIES["edm"].karras(n).tolist()
    vp = SD.karras(n)
    assert vp[[0, -1]] == pytest.approx([float(SD.noise_to_signal(999)), float(SD.noise_to_signal(0))], rel=1e-14)
    assert SD.time_at(vp)[[0, -1]].tolist() == [999, 0]
    assert FAMILIES["edm"].karras(1).tolist() == [80]
    assert (FAMILIES["edm"].karras(5, rho=1) == np.linspace(80, 0.002, 5)).all()


def test_phase_edges():
    assert SD.phase_edges(4).tolist() == [0, 239, 499, 739, 999]
    assert SD.phase_edges(1).tolist() == [0, 999]
    assert SD.phase_edges(2).tolist() == [0, 499, 999]
    assert FAMILIES["flow"].phase_edges(4, 8).tolist() == [0, 0.25, 0.5, 0.75, 1]


@given(st.floats(0, 1), st.floats(0.1, 12))
def test_shift_scales_the_noise_ratio(t, shift):
    """Shift multiplies sigma/alpha: t/(1-t) becomes shift t/(1-t)."""
    moved = float(Schedule.flow(shift=shift).shifted(t))
    assert moved * (1 - t) == pytest.approx(shift * t * (1 - moved), abs=1e-12)


# ------------------------------------------------------------------ diffusers' configurations


def test_from_diffusers_tables_match_the_schedulers():
    from diffusers import DDIMScheduler

    for options in (
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 200},
        {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"trained_betas": [0.1, 0.2, 0.3]},
    ):
        theirs = DDIMScheduler(**options)
        for given_as in (theirs, theirs.config, dict(theirs.config)):
            mine = Schedule.from_diffusers(given_as)
            expected = theirs.alphas_cumprod.double().numpy()
            assert mine.alphas_cumprod == pytest.approx(expected, rel=2e-4, abs=1e-7)  # their product is float32


@pytest.mark.parametrize(
    ("config", "shift"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, 3.0),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True}, 1.0),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, 1.0),
        ({"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 5.0}, 5.0),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0}, 3.0),
    ],
)
def test_from_diffusers_flow(config, shift):
    schedule = Schedule.from_diffusers(config)
    assert schedule.family == "flow" and schedule.shift == shift


def test_from_diffusers_others():
    edm = Schedule.from_diffusers({"_class_name": "EDMEulerScheduler", "sigma_min": 0.01, "sigma_max": 50, "rho": 5})
    assert (edm.family, edm.sigma_min, edm.sigma_max, edm.rho) == ("edm", 0.01, 50, 5)
    plain = Schedule.from_diffusers({"_class_name": "UniPCMultistepScheduler", "flow_shift": 1.0})
    assert plain.family == "vp"  # flow_shift stands in every UniPC config
    with pytest.raises(ValueError, match="Unknown beta_schedule 'sigmoid'"):
        Schedule.from_diffusers({"beta_schedule": "sigmoid"})


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SD.alpha(1000), "Time 1000 is outside this vp schedule"),
        (lambda: SD.alpha(-0.5), "-1 \\(clean\\) or in 0 ... 999"),
        (lambda: SD.alpha(math.nan), "outside"),
        (lambda: FAMILIES["flow"].alpha([0.5, 1.5]), "Time 1.5 is outside this flow schedule"),
        (lambda: FAMILIES["edm"].alpha(-1), "at least 0"),
        (lambda: SD.timesteps(0), "at least 1, not 0"),
        (lambda: SD.timesteps(2.5), "whole number"),
        (lambda: SD.timesteps(1001), "exceeds the 1000"),
        (lambda: SD.timesteps(4, "even"), "Unknown timestep_spacing 'even'"),
        (lambda: SD.timesteps(4, "leading", steps_offset=300), "past the last timestep"),
        (lambda: FAMILIES["flow"].timesteps(4, "leading"), "no flow form"),
        (lambda: SD.lcm_timesteps(51), "exceeds original_inference_steps 50"),
        (lambda: SD.lcm_timesteps(4, variant="v2"), "Unknown LCM grid 'v2'"),
        (lambda: SD.training_grid(2000), "exceeds the 1000"),
        (lambda: SD.phase_edges(0), "num_phases"),
        (lambda: SD.phase_edges(51), "num_phases"),
        (lambda: FAMILIES["flow"].karras(4), "vp or edm"),
        (lambda: FAMILIES["zero_snr"].karras(4), "finite noise ratio"),
        (lambda: Schedule.edm(sigma_min=0), "0 < sigma_min < sigma_max"),
        (lambda: Schedule.flow(shift=0), "shift must be positive"),
        (lambda: Schedule.from_betas([0.1]), "at least two"),
        (lambda: Schedule.from_betas([0.1, 1.2]), "in \\[0, 1\\]"),
        (lambda: Schedule("vp", alphas_cumprod=[0.5, 0.9]), "decreasing"),
        (lambda: Schedule("ve"), "Unknown schedule family 've'"),
    ],
)
def test_errors_are_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_repr_names_the_family():
    assert repr(SD) == "Schedule(vp, T=1000)" and "shift=3" in repr(FAMILIES["flow3"])


def test_from_diffusers_scheduler_objects_know_their_class():
    assert Schedule.from_diffusers(diffusers.EDMEulerScheduler(sigma_max=50.0)).sigma_max == 50.0
    for scheduler in (diffusers.CMStochasticIterativeScheduler(), diffusers.IPNDMScheduler()):
        with pytest.raises(ValueError, match=f"noise schedule of this {type(scheduler).__name__} is not known"):
            Schedule.from_diffusers(scheduler)
