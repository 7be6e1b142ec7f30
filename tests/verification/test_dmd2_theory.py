"""DMD2 on a line: every row of its verification holds, on all schedules, and the games are what they are said to be."""

import math
from itertools import pairwise

import numpy as np
import pytest

from fewstep.diffusion.schedule import Schedule
from fewstep.verification.dmd2_theory import ANGLES, GUIDED, Game
from fewstep.verification.verify import verify

SCHEDULES = [Schedule.scaled_linear(), Schedule.edm(), Schedule.flow(shift=3.0)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.family)
def test_every_row_of_the_line_holds(schedule):
    rows = list(verify("dmd2", schedule=schedule, steps=0))
    assert [row.quantity for row in rows if not row.passed] == []
    assert len(rows) == 43 and len({row.quantity for row in rows}) == 43
    assert sum(row.quantity.startswith("with a discriminator: ") for row in rows) == 8
    left = [row for row in rows if row.quantity.startswith("bias")]
    assert left[1].truth > 0.1 and abs(left[0].measured) < 1e-12


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
