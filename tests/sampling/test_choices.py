"""Where this library chooses otherwise than the public code: our value, and theirs from their own code."""

from __future__ import annotations

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler

from fewstep.diffusion.schedule import Schedule
from fewstep.sampling import LCMSampler


@pytest.mark.parametrize(("grid", "strength", "ours", "theirs"), [
    (50, 0.58, 579, 559), (100, 0.29, 289, 279), (100, 0.57, 569, 559), (100, 0.58, 579, 569), (50, 0.57, 559, 559),
])  # fmt: skip
def test_lcms_strength_counts_training_times_exactly(grid, strength, ours, theirs):
    """diffusers truncates 50 * 0.58 = 28.999999999999996 to 28; docs/sampling.md says so."""
    sampler = LCMSampler(num_inference_steps=4, original_inference_steps=grid, strength=strength)
    assert sampler.times(Schedule.scaled_linear())[0] == ours
    scheduler = LCMScheduler()
    scheduler.set_timesteps(4, original_inference_steps=grid, strength=strength)
    assert scheduler.timesteps[0] == theirs


def test_lcms_strength_agrees_at_all_other_strengths():
    scheduler, schedule, differ = LCMScheduler(), Schedule.scaled_linear(), []
    for grid in (50, 100):
        for percent in range(2, 100):
            scheduler.set_timesteps(1, original_inference_steps=grid, strength=percent / 100)
            mine = schedule.lcm_timesteps(1, grid, strength=percent / 100)
            differ += [(grid, percent)] if mine.tolist() != scheduler.timesteps.tolist() else []
    assert differ == [(50, 58), (100, 29), (100, 57), (100, 58)]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_pcms_lowest_edge_on_flow_is_clean_data(shift):
    """The released SD3 script takes its edges from the scheduler's levels, whose lowest is 1/1000 shifted."""
    schedule = Schedule.flow(shift)
    edges = schedule.phase_edges(4, 50)
    assert edges[0] == 0 == schedule.alpha_sigma(edges[0])[1]
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift).sigma_min
    assert theirs == pytest.approx(float(schedule.shifted(0.001)), rel=1e-6)
