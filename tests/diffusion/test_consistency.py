"""The consistency function: boundary scalings by family."""

import math

import pytest
import torch

from fewstep.diffusion.consistency import boundary_scalings, consistency
from fewstep.diffusion.prediction import PREDICTION_TYPES, Prediction
from fewstep.diffusion.schedule import Schedule

VP, EDM, FLOW = Schedule.scaled_linear(), Schedule.edm(), Schedule.flow()


def predictions(schedule, times, kind="sample"):
    torch.manual_seed(0)
    x, output = torch.randn(2, len(times), 5, dtype=torch.float64)
    return Prediction(x, output, torch.tensor(times, dtype=torch.float64), schedule, kind)


def test_lcm_scalings_by_formula_and_figure():
    for t in (0, 1, 19, 500, 999):
        skip, out = boundary_scalings(t)
        q = t / 0.1
        assert skip == pytest.approx(0.25 / (q**2 + 0.25), rel=1e-14)
        assert out == pytest.approx(q / math.sqrt(q**2 + 0.25), rel=1e-14)
    assert boundary_scalings(0) == (1, 0)
    skip, out = boundary_scalings(19)
    assert skip == pytest.approx(6.9e-6, rel=0.01) and out == pytest.approx(0.9999965, abs=5e-8)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_vp_is_lcm(kind):
    said = predictions(VP, [0, 19, 999], kind)
    t = said.t.reshape(-1, 1)
    q = torch.from_numpy(10 * t)
    expected = 0.25 / (q**2 + 0.25) * said.x + q / (q**2 + 0.25).sqrt() * said.x0
    torch.testing.assert_close(consistency(said), expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(consistency(said)[0], said.x[0])


def test_edm_is_consistency_models():
    """c_skip x + c_out F with the time shifted by sigma_min, F the teacher network behind D (CM, appendix C)."""
    said = predictions(EDM, [0.002, 0.01, 1.0, 80.0])
    t = torch.from_numpy(said.t).reshape(-1, 1)
    d, low = 0.5, 0.002
    f = (said.x0 - d**2 / (t**2 + d**2) * said.x) / (t * d / (t**2 + d**2).sqrt())
    expected = d**2 / ((t - low) ** 2 + d**2) * said.x + (t - low) * d / (t**2 + d**2).sqrt() * f
    torch.testing.assert_close(consistency(said), expected, rtol=1e-12, atol=1e-12)


def test_flow_is_x0():
    said = predictions(FLOW, [0.0, 0.3, 1.0], "flow")
    expected = said.x - torch.from_numpy(said.t).reshape(-1, 1) * said.output
    torch.testing.assert_close(consistency(said), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("schedule", [VP, EDM, FLOW], ids=lambda s: s.family)
def test_identity_at_the_end_and_at_clean_data(schedule):
    kind = "flow"
    said = predictions(schedule, [float(schedule.end), float(schedule.clean), float(schedule.start)], kind)
    answer = consistency(said)
    assert torch.equal(answer[:2], said.x[:2]) and answer.isfinite().all()
    assert not torch.equal(answer[2], said.x[2])
