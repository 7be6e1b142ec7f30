"""The first time of few-step students, from the schedule's own numbers alone."""

import numpy as np
import pytest
import torch

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedule import Schedule
from fewstep.diffusion.well_posed import first_time, student_times
from fewstep.models.denoiser import Denoiser

DDPM = np.linspace(1e-4, 0.02, 1000)


def ratios(betas):
    """sigma / alpha of a table, from its betas."""
    bar = np.cumprod(1 - np.asarray(betas))
    return np.sqrt(1 / bar - 1)


@pytest.mark.parametrize("betas", [DDPM, np.linspace(0.05, 0.9, 10), np.linspace(0.00085**0.5, 0.014**0.5, 1100) ** 2])
def test_a_student_starts_at_the_noisiest_index_where_an_error_weighs_15_at_most(betas):
    first = first_time(Schedule.from_betas(betas))
    weights = ratios(betas)
    assert weights[int(first)] <= 15 < weights[int(first) + 1]


@pytest.mark.parametrize(
    "schedule",
    [Schedule.scaled_linear(), Schedule.scaled_linear().zero_terminal_snr(), Schedule.flow(), Schedule.flow(shift=3.0),
     Schedule.edm()],
)  # fmt: skip
def test_other_schedules_keep_their_start(schedule):
    assert first_time(schedule) == schedule.start
    assert student_times(schedule, 4) == ()


@pytest.mark.parametrize("kind", ["v_prediction", "sample", "flow"])
def test_students_that_do_not_predict_noise_keep_their_start(kind):
    """An error of theirs weighs at most as much as clean data themselves, on any table: no time is ill-posed."""
    for schedule in (Schedule.from_betas(DDPM), Schedule.cosine()):
        assert first_time(schedule) < schedule.start  # of noise, the default
        network = Denoiser(lambda x, t, cond: x, schedule, kind)
        assert first_time(network.schedule) == schedule.start and student_times(network.schedule, 4) == ()
        times = np.arange(1000.0)
        nothing = torch.zeros(1000)
        assert Prediction(nothing, nothing, times, schedule, kind).gain().max() <= 1 + 1e-9
        assert schedule.prediction_type == "epsilon"  # that of others is left as it is


def test_the_times_are_the_trailing_grid_of_the_table_that_ends_there():
    whole = Schedule.from_betas(DDPM)
    shorter = Schedule.from_betas(DDPM[: int(first_time(whole)) + 1])
    for steps in (1, 2, 4, 8):
        assert student_times(whole, steps) == tuple(shorter.timesteps(steps).tolist())


def test_a_table_with_fewer_usable_indices_than_steps_is_left_as_it_is():
    schedule = Schedule.from_betas([0.1, 0.2, 0.999, 0.9])
    assert first_time(schedule) == 1
    assert student_times(schedule, 2) == (1.0, 0.0)
    assert student_times(schedule, 3) == ()
    assert first_time(Schedule.from_betas([0.999, 0.5])) == 1  # no index is well-posed
