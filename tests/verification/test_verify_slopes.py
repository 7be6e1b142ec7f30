"""`fewstep verify` of the methods that learn slopes, in a shortened form."""

import pytest

from fewstep import verify


@pytest.mark.slow
def test_a_flow_map_learns_the_exact_one():
    """A fifth of the command's steps, its limits doubled; everything else is held to the command's own."""
    report = verify("flowmap", seed=1, steps=1000)
    errors = [row for row in report if "rms distance to the exact flow map" in row.quantity]
    assert len(errors) == 3 and all(row.measured < 2 * row.limit for row in errors), report
    assert all(row.passed for row in report if row not in errors), report


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"windows": 4, "solver_steps": 2}], ids=["pairs", "windows"])
def test_reflow_learns_straight_trajectories(settings):
    report = verify("reflow", seed=1, steps=800, **settings)
    errors = [row for row in report if "rms distance to the exact flow map" in row.quantity]
    assert len(errors) == (1 if settings else 3) and all(row.measured < 3 * row.limit for row in errors), report
    assert all(row.passed for row in report if row not in errors), report


@pytest.mark.slow
def test_scm_learns_the_exact_map_to_clean_data():
    report = verify("scm", seed=1, steps=2000)
    (error,) = (row for row in report if "rms distance to the exact flow map" in row.quantity)
    assert error.measured < 1.5 * error.limit, report
    assert all(row.passed for row in report if row is not error and "4 steps" not in row.quantity), report
