"""`fewstep verify pdd`, in a shortened form."""

import pytest

from fewstep import verify


@pytest.mark.slow
def test_a_student_of_blocks_learns_the_teachers_solver_steps():
    """Two fifths of the command's steps: twice its limit, half of what DDIM of four steps is off; the rest as there."""
    report = verify("pdd", seed=1, steps=1000)
    trained = [row for row in report if "of the teacher" in row.quantity]
    assert len(trained) == 1 and trained[0].measured < 2 * trained[0].limit, report
    assert all(row.passed for row in report if row not in trained), report
    assert sum("loss at the exact fixed point" in row.quantity for row in report) == 4
