"""Flow grids whose shift depends on the number of steps, and grids stretched to a lowest level."""

import copy
import math
import pickle
from functools import partial

import diffusers
import numpy as np
import pytest

from fewstep.diffusion.schedule import Schedule
from fewstep.export.scheduler import build_scheduler, plan_scheduler
from fewstep.methods.lightning import _grid
from fewstep.models.families.flux import Flux
from fewstep.models.families.sd3 import StableDiffusion3
from fewstep.sampling import EulerSampler


def few_are_noisier(gain, n):
    """Some shift that falls with the number of steps."""
    return 1 + gain / n


FALLING = Schedule.flow(partial(few_are_noisier, 20.0))
STRETCHED = Schedule.flow(2.0, terminal=0.02)


def bent(n, shift):
    t = np.arange(n, 0, -1) / n
    return shift * t / (1 + (shift - 1) * t)


@pytest.mark.parametrize("n", [1, 4, 50])
def test_every_grid_has_the_shift_of_its_own_number_of_steps(n):
    np.testing.assert_allclose(FALLING.timesteps(n), bent(n, 1 + 20 / n), rtol=1e-14)
    np.testing.assert_allclose(FALLING.training_grid(n)[:0:-1], bent(n, 1 + 20 / n), rtol=1e-14)
    assert FALLING.shift_at(n) == 1 + 20 / n and Schedule.flow(3.0).shift_at(n) == 3.0


def test_without_a_number_of_steps_it_is_that_of_fifty():
    assert FALLING.shift == 1.4 and FALLING.shifted(0.5) == pytest.approx(1.4 / 2.4)
    fixed = FALLING.for_steps(4)
    np.testing.assert_allclose(fixed.timesteps(50), bent(50, 6.0), rtol=1e-14)
    assert Schedule.flow(2.0).for_steps(4).shift == 2.0


def test_copies_keep_the_function():
    for twin in (copy.deepcopy(FALLING), pickle.loads(pickle.dumps(FALLING))):
        assert twin.shift_at(4) == 6.0


@pytest.mark.parametrize("n", [2, 4, 50])
def test_a_stretched_grid_is_that_of_diffusers(n):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0, shift_terminal=0.02)
    scheduler.set_timesteps(sigmas=(np.arange(n, 0, -1) / n).tolist())
    np.testing.assert_allclose(STRETCHED.timesteps(n), scheduler.sigmas[:-1], atol=1e-6)
    assert STRETCHED.timesteps(n)[-1].item() == pytest.approx(0.02, abs=1e-15)


def test_one_step_is_not_stretched_and_a_level_out_of_range_is_refused():
    assert STRETCHED.timesteps(1).tolist() == [1.0]
    assert repr(STRETCHED) == "Schedule(flow, shift=2, terminal=0.02)"
    with pytest.raises(ValueError, match="terminal must be at least 0 and below 1, not 1"):
        Schedule.flow(2.0, terminal=1)


@pytest.mark.parametrize("schedule", [FALLING, STRETCHED], ids=["shift of n", "stretched"])
@pytest.mark.parametrize("family", [Flux, StableDiffusion3], ids=lambda family: family.names[0])
def test_an_exported_scheduler_makes_the_students_levels(schedule, family):
    sampler = EulerSampler(num_inference_steps=4)
    plan = plan_scheduler(sampler, schedule, {}, "flow", family)
    scheduler = build_scheduler(plan)
    if family.passes_sigmas:
        scheduler.set_timesteps(sigmas=plan.call.get("sigmas", [1.0, 0.75, 0.5, 0.25]), mu=math.nan)
    elif plan.call:
        scheduler.set_timesteps(sigmas=plan.call["sigmas"])
    else:
        scheduler.set_timesteps(4)
    np.testing.assert_allclose(scheduler.sigmas, sampler.times(schedule), atol=2e-6)


@pytest.mark.parametrize("schedule", [FALLING, STRETCHED], ids=["shift of n", "stretched"])
def test_the_stages_of_lightning_share_the_students_times(schedule):
    grid = _grid(schedule, [32, 8, 4]).numpy()
    np.testing.assert_allclose(grid[:32:8], schedule.timesteps(4), rtol=1e-12)
    assert len(grid) == 33 and grid[-1] == 0 and (np.diff(grid) < 0).all()
