"""Prediction kinds into each other, and the jump."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.diffusion.prediction import PREDICTION_TYPES, Prediction, check_prediction_type
from fewstep.diffusion.schedule import Schedule

SCHEDULES = {
    "vp": (Schedule.scaled_linear(), [0, 19, 500.5, 999]),
    "edm": (Schedule.edm(), [0.002, 0.5, 3.0, 80.0]),
    "flow": (Schedule.flow(), [0.01, 0.4, 0.6, 0.99]),
}
READ = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v", "flow": "flow"}


def example(name, dtype=torch.float64, shape=(4, 3, 2)):
    schedule, times = SCHEDULES[name]
    torch.manual_seed(0)
    x0, eps = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    t = torch.tensor(times, dtype=torch.float64)
    return schedule, t, x0, eps, schedule.add_noise(x0, eps, t)


def truth(kind, schedule, t, x0, eps):
    a, s = (c.reshape(-1, 1, 1) for c in (schedule.alpha(t), schedule.sigma(t)))
    return {"epsilon": eps, "sample": x0, "v_prediction": a * eps - s * x0, "flow": eps - x0}[kind]


def close(mine, theirs, gain=1.0):
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12 * gain)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("other", PREDICTION_TYPES)
def test_every_kind_into_every_other_and_back(name, kind, other):
    schedule, t, x0, eps, x = example(name)
    said = Prediction(x, truth(kind, schedule, t, x0, eps), t, schedule, kind)
    converted = getattr(said, READ[other])
    gain = float((1 / schedule.sigma(t).clamp(max=1)).max() * x.abs().max())  # x0 -> epsilon divides by sigma
    close(converted, truth(other, schedule, t, x0, eps), gain)
    # back: what was lost on the way there is at most rounding times the condition of both conversions
    again = getattr(Prediction(x, converted, t, schedule, other), READ[kind])
    close(again, said.output, gain)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_own_kind_is_the_output_itself(name, kind):
    schedule, t, x0, _, x = example(name)
    output = torch.randn_like(x0)
    assert torch.equal(getattr(Prediction(x, output, t, schedule, kind), READ[kind]), output)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_jump_is_alpha_x0_plus_sigma_eps(name, kind):
    schedule, t, x0, eps, x = example(name)
    said = Prediction(x, truth(kind, schedule, t, x0, eps), t, schedule, kind)
    s = torch.tensor([schedule.clean, SCHEDULES[name][1][1], SCHEDULES[name][1][2], schedule.clean])
    close(said.at(s), schedule.add_noise(x0, eps, s), float(x.abs().max()) * 35)
    close(said.at(schedule.clean), x0, float(x.abs().max()) * 35)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jump_to_the_own_time_is_the_state_bit_for_bit(name, kind, dtype):
    schedule, t, _, _, x = example(name, dtype)
    said = Prediction(x, torch.randn_like(x), t, schedule, kind)
    assert torch.equal(said.at(t), x)
    mixed = t.clone()
    mixed[1] = schedule.end
    jumped = said.at(mixed)
    assert torch.equal(jumped[[0, 2, 3]], x[[0, 2, 3]]) and not torch.equal(jumped[1], x[1])


@given(st.floats(0, 999), st.floats(0, 999), st.sampled_from(PREDICTION_TYPES))
def test_jumps_compose(t, s, kind):
    """Along one prediction (fixed x0, eps), jumping over s is the same as jumping at once."""
    schedule = SCHEDULES["vp"][0]
    x, output = torch.tensor([[0.7, -1.3]], dtype=torch.float64), torch.tensor([[0.2, 0.9]], dtype=torch.float64)
    said = Prediction(x, output, t, schedule, kind)
    halfway = said.at(s)
    then = Prediction(halfway, said.epsilon, s, schedule, "epsilon")
    torch.testing.assert_close(then.at(0), said.at(0), rtol=1e-10, atol=1e-9)


def test_euler_of_edm_and_flow_are_the_jump():
    schedule, t, _, _, x = example("edm")
    d = torch.randn_like(x)
    s = 0.001
    step = x + (s - t).reshape(-1, 1, 1) * (x - d) / t.reshape(-1, 1, 1)
    close(Prediction(x, d, t, schedule, "sample").at(s), step, 200)
    schedule, t, _, _, x = example("flow")
    close(Prediction(x, d, t, schedule, "flow").at(0.005), x + (0.005 - t).reshape(-1, 1, 1) * d, 10)


def test_general_v_with_alpha_squared_plus_sigma_squared_not_one():
    schedule, t, x0, eps, x = example("edm")
    v = truth("v_prediction", schedule, t, x0, eps)
    s = schedule.sigma(t).reshape(-1, 1, 1)
    close(Prediction(x, v, t, schedule, "v_prediction").x0, (x - s * v) / (1 + s**2), 100)


def test_combine_is_linear():
    schedule, t, x0, eps, x = example("vp")
    said = Prediction(x, truth("v_prediction", schedule, t, x0, eps), t, schedule, "v_prediction")
    close(said.combine(2.0, -3.0), 2 * x0 - 3 * eps, 40)
    rows = schedule.alpha_sigma(t)
    close(said.combine(*rows), x, 40)
    close(said.combine(rows[0], 0.0), schedule.alpha(t).reshape(-1, 1, 1) * x0, 40)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_epsilon_of_clean_data_is_refused(name, kind):
    schedule = SCHEDULES[name][0]
    x = torch.randn(2, 3)
    said = Prediction(x, x, torch.tensor([float(schedule.start), float(schedule.clean)]), schedule, kind)
    with pytest.raises(ValueError, match="Epsilon is undefined where sigma is 0"):
        _ = said.epsilon


def test_clean_data_says_itself():
    schedule, x = SCHEDULES["flow"][0], torch.randn(2, 3)
    for kind in ("epsilon", "sample", "v_prediction", "flow"):
        said = Prediction(x, x if kind == "sample" else torch.randn(2, 3), 0.0, schedule, kind)
        assert torch.equal(said.x0, x) and torch.equal(said.at(0.0), x)
    with pytest.raises(ValueError, match="predicts sample cannot be converted where sigma is 0"):
        Prediction(x, x, 0.0, schedule, "sample").at(0.5)


def test_pure_noise_and_epsilon():
    for schedule in (Schedule.flow(), Schedule.scaled_linear().zero_terminal_snr()):
        x, output = torch.randn(2, 3), torch.randn(2, 3)
        said = Prediction(x, output, schedule.start, schedule, "epsilon")
        assert torch.equal(said.epsilon, output) and torch.equal(said.at(schedule.start), x)
        readable = Prediction(x, output, schedule.start, schedule, "flow")
        assert torch.equal(readable.x0, x - output) and readable.at(0.0).isfinite().all()
        with pytest.raises(ValueError, match="predicts epsilon cannot be converted where alpha is 0"):
            _ = said.x0
    # a row that stays may be singular; the other is computed
    half = Prediction(x, output, torch.tensor([999.0, 500.0]), schedule, "epsilon").at(torch.tensor([999.0, 400.0]))
    assert torch.equal(half[0], x[0]) and half.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_promoted_first(dtype):
    schedule, t, _, eps, x = example("vp", torch.float32)
    output = eps.to(dtype)
    said = Prediction(x, output, t, schedule, "epsilon")
    assert said.x0.dtype == said.at(0).dtype == torch.float32
    assert torch.equal(said.x0, Prediction(x, output.float(), t, schedule, "epsilon").x0)
    assert Prediction(x.to(dtype), output, t, schedule, "epsilon").x0.dtype == torch.float32
    assert Prediction(x.double(), output, t, schedule, "epsilon").x0.dtype == torch.float64


def test_gradients_pass():
    schedule, t, _, _, x = example("vp")
    output = torch.randn_like(x, requires_grad=True)
    Prediction(x, output, t, schedule, "epsilon").at(0).sum().backward()
    s, a, s0, a0 = schedule.sigma(t), schedule.alpha(t), float(schedule.sigma(0)), float(schedule.alpha(0))
    expected = (s0 - s * a0 / a).reshape(-1, 1, 1).expand_as(x).clone()
    expected[0] = 0  # that row stays where it is
    close(output.grad, expected, 10)


def test_names():
    assert check_prediction_type("flow_prediction") == "flow"
    with pytest.raises(ValueError, match="Unknown prediction_type 'x0': use epsilon, v_prediction, sample, flow"):
        check_prediction_type("x0")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_solver_step_is_straight_in_the_schedules_own_variable(name, kind):
    """The mean slope over a jump is the prediction's own: the flow in t, or the noise in sigma/alpha."""
    schedule, t, x0, eps, x = example(name)
    prediction = Prediction(x, truth(kind, schedule, t, x0, eps), t, schedule, kind)
    u = torch.full((4,), SCHEDULES[name][1][1] * 1.01).double()
    wanted = eps - x0 if name == "flow" else eps
    torch.testing.assert_close(schedule.mean_slope(x, t, prediction.at(u), u), wanted, rtol=1e-9, atol=1e-9)
    close(prediction.slope, wanted, 20.0)
    assert schedule.solver_level(schedule.clean) == 0 and schedule.solver_scale(schedule.clean) == 1
