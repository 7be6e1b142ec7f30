"""diffusers' DDIM and TCD at every number of steps, not only at those that published files name: where a run ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.schedulers import scheduling_ddim, scheduling_tcd

from fewstep.checkpoints.registry import checkpoints
from fewstep.checkpoints.sampling import sampler_of, schedule_of
from fewstep.models.denoiser import Denoiser
from fewstep.sampling import sample
from tests.sampling.conftest import in_float64, toy

TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
DRAW = torch.Generator().manual_seed(0)
START, *NOISES = (torch.randn(1, 1, 2, 2, generator=DRAW, dtype=torch.float64) for _ in range(1001))
GRIDS = [("trailing", 0), ("leading", 0), ("leading", 1), ("leading", 7), ("linspace", 0), ("linspace", 1)]
DDIM, TCD = checkpoints()["hyper-sdxl-4step"], checkpoints()["hyper-sdxl-unified"]


def theirs(module, name, n, eta, config):
    """States and timesteps of diffusers' scheduler in float64, on noises that are given."""
    with in_float64(module):
        scheduler = getattr(module, name)(**config)
        scheduler.set_timesteps(n)
        left, real = iter(NOISES), module.randn_tensor
        module.randn_tensor = lambda *_, **__: next(left)
        try:
            states = [START]
            for t in scheduler.timesteps:
                x = states[-1]
                states.append(scheduler.step(toy(x, t), t, x, eta=eta).prev_sample)
        finally:
            module.randn_tensor = real
    return states, scheduler.timesteps.tolist()


def gap(entry, module, n, eta, **config):
    """Largest difference of any state from diffusers' own; the network must be called at the same times."""
    config = {**TABLE, **config}
    expected, times = theirs(module, entry.scheduler, n, eta, config)
    entry = replace(entry, scheduler_overrides=config)
    network = Denoiser(toy, schedule_of(entry, {}), "epsilon")
    run = sample(network, sampler_of(entry, {}, num_inference_steps=n, eta=eta), START, noises=NOISES)
    assert run.timesteps.tolist() == times, (n, config)
    return max(float((a - b).abs().max()) for a, b in zip(run.states, expected, strict=True))


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize(("spacing", "offset"), GRIDS)
@pytest.mark.parametrize(
    "counts", [(1, 6, 7, 12, 15), pytest.param((*range(1, 51), 333, 1000), marks=pytest.mark.slow)]
)
def test_ddim_ends_where_that_of_diffusers_ends(counts, spacing, offset, clean):
    """7 trailing steps of 1,000 end at index 0, not at clean data: the last stride of 142 leads from 142 to 0."""
    for n in counts:
        if spacing == "leading" and (n - 1) * (1000 // n) + offset > 999:
            continue  # diffusers begins past its table and fails; ours refuses the offset
        for eta in (0.0, 0.6) if n < 20 else (0.6,):
            config = {"timestep_spacing": spacing, "steps_offset": offset, "set_alpha_to_one": clean}
            assert gap(DDIM, scheduling_ddim, n, eta, **config) <= 1e-9, (n, eta)


def test_a_trailing_grid_has_the_steps_that_were_asked_for():
    """At 61 steps a rounding gives diffusers a 62nd call at time -1, its noisiest row; that is not copied."""
    _, times = theirs(scheduling_ddim, "DDIMScheduler", 61, 0.0, {**TABLE, "timestep_spacing": "trailing"})
    assert len(times) == 62 and times[-1] == -1
    entry = replace(DDIM, scheduler_overrides={**TABLE, "timestep_spacing": "trailing"})
    own = sampler_of(entry, {}, num_inference_steps=61).times(schedule_of(entry, {}))
    assert own[:-1].tolist() == times[:-1]


@pytest.mark.parametrize("clean", [{}, {"set_alpha_to_one": True}, {"set_alpha_to_one": False}])
def test_tcd_ends_at_index_0_whatever_its_config_says(clean):
    for n in (1, 4, 7):
        assert gap(TCD, scheduling_tcd, n, 0.3, **clean) <= 1e-9, n


def test_a_strength_keeps_the_stride_of_the_whole_run():
    """As diffusers' image-to-image pipelines have it: the last steps of the scheduler's own grid."""
    config = {**TABLE, "timestep_spacing": "trailing"}
    entry = replace(DDIM, scheduler_overrides=config)
    whole = sampler_of(entry, {}, num_inference_steps=7).times(schedule_of(entry, {}))
    part = sampler_of(entry, {}, num_inference_steps=7, strength=0.5)
    assert part.times(schedule_of(entry, {})).tolist() == whole[-4:].tolist() == [428.0, 285.0, 142.0, -1.0]
    run = sample(Denoiser(toy, schedule_of(entry, {}), "epsilon"), part, START, image=NOISES[0])
    x = run.states[0]
    with in_float64(scheduling_ddim):
        scheduler = scheduling_ddim.DDIMScheduler(**config)
        scheduler.set_timesteps(7)
        for t in scheduler.timesteps[4:]:
            x = scheduler.step(toy(x, t), t, x).prev_sample
    assert (run.x0 - x).abs().max() <= 1e-9
