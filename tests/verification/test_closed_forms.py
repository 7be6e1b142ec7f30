"""Closed forms that built-in methods and their parts must agree with: every row holds, on all schedules."""

import math
from itertools import pairwise

import numpy as np
import pytest

from fewstep.diffusion.schedule import Schedule
from fewstep.methods.hyper import Hyper
from fewstep.verification.verify import verify
from tests.verification.closed_forms import cm, dmd, dmd2, feedback, gan, hyper, lightning
from tests.verification.closed_forms.dmd2 import ANGLES, GUIDED, Game

SCHEDULES = [Schedule.scaled_linear(), Schedule.edm(), Schedule.flow(shift=3.0)]


def held(rows):
    """The rows by their quantity, all of which hold."""
    named = {row.quantity: row for row in rows}
    assert [row for row in rows if not row.passed] == [] and len(named) == len(rows) > 0
    return named


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.family)
def test_every_row_of_the_line_holds(schedule):
    rows = list(verify("dmd2", schedule=schedule, steps=0))
    assert sum(row.quantity.startswith("with a discriminator: ") for row in rows) == 8
    rows += dmd2.matching_rows(schedule)
    assert len(held(rows)) == 43 + 6 * 8 + 8  # six switches' contracts, and what each must compute
    left = [row for row in rows if row.quantity.startswith("bias")]
    assert left[1].truth > 0.1 and abs(left[0].measured) < 1e-12


def test_gans_against_closed_forms():
    """The best discriminators of two Gaussians, their losses and slopes, and R1 of a linear head."""
    assert len(held(gan.rows())) == 8


@pytest.mark.slow
def test_lightning_against_closed_forms():
    """Halvings of one Gaussian, where a mean square error is measured, and what ideal discriminators ask for."""
    rows = held(lightning.rows())
    assert len(rows) == 10
    assert rows["slope of the one-step student"].measured == pytest.approx(0.7593262378804, abs=1e-12)
    assert rows["the same, to the product of 64 DDIM steps"].limit == 1e-12
    assert rows["conditional, from the mirrored map: where it ends, over the teacher's"].truth == 1.0
    assert rows["unconditional, from 1.5 times that: where it ends, over the teacher's"].truth == -1.0


def test_a_reward_beside_matching_moves_the_mean_alone():
    rows = held(feedback.rows())
    tilted = rows["linear reward beside matching, 60 angles: mean"]
    assert tilted.truth == pytest.approx(1.40966, abs=5e-6) and tilted.measured == pytest.approx(1.40966, abs=5e-6)
    assert rows["linear reward beside matching, clean data: mean"].truth == pytest.approx(1.18)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.family)
def test_samples_that_move_freely_stop_at_a_rewards_threshold(schedule):
    assert len(held(feedback.threshold_rows(schedule))) == 4


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.family)
def test_guided_dmd_ends_where_the_closed_form_says(schedule):
    assert len(held(dmd.rows(schedule))) == 2


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.family)
def test_conditional_means_of_a_gaussian_are_eulers(schedule):
    assert len(held(cm.rows(schedule))) == 2


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.family)
def test_segments_of_a_gaussian_compose_to_all_solver_steps(schedule):
    rows = held([hyper.gaussian_row(Hyper(schedule, **Hyper.truth_settings, segments=k)) for k in (8, 4, 2, 1)])
    assert all(row.limit == 1e-12 for row in rows.values())


@pytest.mark.parametrize("scale", GUIDED)
def test_guided_fixed_points_in_closed_form(scale):
    """Data N(1, 0.3), without condition N(0, 1.3); the variance by bisection."""
    alpha2, sigma2 = np.cos(ANGLES) ** 2, np.sin(ANGLES) ** 2
    of_class, of_all = scale / (alpha2 * 0.3 + sigma2), (1 - scale) / (alpha2 * 1.3 + sigma2)
    mean = (alpha2 * of_class).sum() / (alpha2 * (of_class + of_all)).sum()
    low, high = 1e-6, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        pull = (alpha2 * (of_class + of_all - 1 / (alpha2 * middle + sigma2))).sum()
        low, high = (middle, high) if pull < 0 else (low, middle)
    assert (mean, low) == pytest.approx(GUIDED[scale], abs=5e-4)


def test_a_game_swings_with_its_period_and_dies_out():
    """Counted from many rounds, not from four: 5 critic steps a round at g = 0.5."""
    game = Game(SCHEDULES[0], 0.5, 0.15, 5)
    errors = game.play(60)
    crossings = [i + a / (a - b) for i, (a, b) in enumerate(pairwise(errors)) if a * b < 0]
    halves = [b - a for a, b in pairwise(crossings)]
    assert 2 * sum(halves) / len(halves) == pytest.approx(2 * math.pi / game.roots[1], rel=0.02)
    assert abs(errors[50]) < abs(errors[0]) * game.roots[0] ** 45
