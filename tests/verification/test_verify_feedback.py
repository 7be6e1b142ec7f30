"""Human feedback's verification: its rows hold on all schedules, and see a student that has learnt nothing."""

import pytest

from fewstep.diffusion.schedule import Schedule
from fewstep.verification.verify import verify

SCHEDULES = [Schedule.scaled_linear(), Schedule.edm(), Schedule.flow(shift=3.0)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.family)
def test_every_untrained_row_holds(schedule):
    report = verify("feedback", schedule=schedule, steps=0)
    assert [row.quantity for row in report if not row.passed] == [] and len(report.rows) == 5


def test_a_student_that_was_not_trained_fails():
    report = verify("feedback", steps=3)
    assert [row.passed for row in report.rows[-3:]] == [False, False, False] and not report.passed
