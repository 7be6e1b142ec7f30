"""`fewstep verify dmd`: what must hold holds, and what is wrong is seen."""

import pytest

from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.dmd import DMD
from fewstep.methods.parts import score_pair
from fewstep.verification.verify import verify
from tests.verification.closed_forms.dmd import guided_fixed_point

SCHEDULES = {"vp": Schedule.scaled_linear(), "edm": Schedule.edm(), "flow": Schedule.flow()}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_training_everything_holds(schedule):
    report = verify("dmd", schedule=SCHEDULES[schedule], steps=0)
    assert report.passed, str(report)


def test_the_solver_is_a_fixed_point_of_both_terms():
    report = verify("dmd", steps=0)
    assert report["loss of a student that is the pairs' solver, the teacher its fake score"].measured == 0.0
    assert report["its gradient"].measured == 0.0


def test_guidance_moves_mean_and_variance_as_the_closed_form_says():
    """Figures of the specification, at 60 even angles: w = 1, 2, 4, 8; the method itself is held to one of them."""
    import numpy as np

    flow = Schedule.flow()
    times = flow.time_at(np.tan(np.linspace(0.05, 1.5, 60)))
    figures = {1: (1.0, 0.3), 2: (1.216, 0.136), 4: (1.364, 0.049), 8: (1.452, 0.013)}
    for scale, wanted in figures.items():
        found = guided_fixed_point(flow, times, scale, (1.0, 0.3), (0.0, 1.3))
        assert found == pytest.approx(wanted, abs=6e-4)
    assert guided_fixed_point(flow, times, 3.0, (1.0, 0.5), (0.2, 0.5)) == pytest.approx((2.6, 0.5))


class Wrong(DMD):
    """Matches the wrong way round."""

    def student(self, roles, batch, draws, shared):
        loss = super().student(roles, batch, draws, shared)
        loss.total = loss.total - 2 * score_pair.matching_loss(shared.x0_student, shared.x0_student.detach() * 0 + 1)
        return loss


def test_a_pull_of_another_kind_is_seen():
    report = verify(Wrong, steps=0)
    assert not report.passed and not report["its gradient"].passed


def test_a_student_that_has_learnt_nothing_is_seen():
    report = verify("dmd", steps=1)
    one, pairs = (
        report["one step: sliced W2 to the data"],
        report["one step from the pairs' noise: rms distance to the pairs"],
    )
    assert not one.passed and one.measured > 2 * one.limit > 4 * one.floor
    assert not pairs.passed and not report["worst mode: its share of the samples, off by"].passed


def test_guided_pairs_need_classes():
    ring = GaussianMixture.ring(num_classes=4)
    assert verify("dmd", ring, steps=0, guidance_scale=2.0).passed
    with pytest.raises(ValueError, match="Guidance needs a mixture with class_weights"):
        verify("dmd", steps=0, guidance_scale=2.0)
