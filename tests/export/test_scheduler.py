"""The scheduler saved with an export: diffusers, given it and the call's arguments, makes our sampler's states."""

from __future__ import annotations

import inspect
import json
import sys

import diffusers
import numpy as np
import pytest

from fewstep.diffusion.schedule import Schedule
from fewstep.export.scheduler import build_scheduler, few_step_shift, plan_scheduler
from fewstep.models.denoiser import Denoiser
from fewstep.models.families.flux import Flux
from fewstep.models.families.sd3 import StableDiffusion3
from fewstep.models.families.unet import StableDiffusion
from fewstep.sampling import (
    CTMSampler,
    DDIMSampler,
    EulerAncestralSampler,
    EulerSampler,
    LCMSampler,
    PhasedSampler,
    RenoiseSampler,
    TCDSampler,
    sample,
)
from tests.sampling.conftest import noise, noises, toy  # noqa: F401

BASE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)
VP, FLOW = Schedule.scaled_linear(), Schedule.flow(shift=3.0)
SD, SD3, FLUX = StableDiffusion, StableDiffusion3, Flux

# sampler, what the call must say beside the number of steps
CASES = {
    "lcm 4": (LCMSampler(num_inference_steps=4), {}),
    "lcm 3": (LCMSampler(num_inference_steps=3), {}),
    "lcm of 40": (LCMSampler(num_inference_steps=4, original_inference_steps=40), {}),
    "lcm trailing, as DMD2": (LCMSampler(num_inference_steps=4, timestep_spacing="trailing"), {}),
    "lcm from 799": (LCMSampler(timesteps=[799, 399]), {"timesteps": [799, 399]}),
    "lcm in one step, as Hyper-SD": (LCMSampler(timesteps=[800]), {"timesteps": [800]}),
    "dmd2": (RenoiseSampler(num_inference_steps=4), {}),
    "tcd": (TCDSampler(num_inference_steps=4, eta=0.3), {"eta": 0.3}),
    "tcd 1": (TCDSampler(num_inference_steps=1, eta=1.0), {"eta": 1.0}),
    "tcd 0": (TCDSampler(num_inference_steps=3, eta=0.0), {}),
    "phased 2": (PhasedSampler(num_inference_steps=2), {}),
    "phased 4": (PhasedSampler(num_inference_steps=4), {"timesteps": [999, 739, 499, 239]}),
    "ctm 3": (CTMSampler(num_inference_steps=3), {}),
    "ddim 4": (DDIMSampler(num_inference_steps=4), {}),
    "ddim 3": (DDIMSampler(num_inference_steps=3), {}),
    "ddim half": (DDIMSampler(num_inference_steps=4, eta=0.5), {"eta": 0.5}),
    "euler 8": (EulerSampler(num_inference_steps=8), {}),
    "ancestral 3": (EulerAncestralSampler(num_inference_steps=3), {}),
    "turbo": (EulerAncestralSampler(num_inference_steps=1), {}),
}


def run_diffusers(plan, n, noise, noises, monkeypatch, flow=False):  # noqa: F811
    """diffusers' states as a pipeline would make them, in float32; the last is what it returns."""
    cls = getattr(diffusers, plan.scheduler)
    scheduler = cls.from_config(json.loads(json.dumps(plan.config)))  # as it comes back from a file
    left = iter(noises)
    module = sys.modules[cls.__module__]
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(left).float())
    told = {key: plan.call[key] for key in plan.call.keys() & {"timesteps", "sigmas"}}
    scheduler.set_timesteps(**(told or {"num_inference_steps": n}))
    takes = "eta" in inspect.signature(cls.step).parameters  # every pipeline hands over an eta, 0 by default
    x, states, eta = noise.float(), [], {"eta": plan.call.get("eta", 0.0)} if takes else {}
    for t in scheduler.timesteps:
        states.append(x)
        step = scheduler.step(toy(x, t / 1000 if flow else t), t, x, **eta)
        x = step.prev_sample
    return [*states, getattr(step, "denoised", x) if plan.scheduler == "LCMScheduler" else x], scheduler.timesteps


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_steps_like_us(name, kind, noise, noises, monkeypatch):  # noqa: F811
    sampler, call = CASES[name]
    plan = plan_scheduler(sampler, VP, BASE, kind, SD)
    assert plan.call == call
    n = len(sampler.times(VP)) - 1
    expected, times = run_diffusers(plan, n, noise, noises, monkeypatch)
    got = sample(Denoiser(toy, VP, kind), sampler, noise.float(), noises=[z.float() for z in noises])
    assert got.timesteps.tolist() == [float(t) for t in times]
    for mine, theirs in zip(got.states, expected, strict=True):
        assert (mine - theirs).abs().max() <= 3e-5 * max(1, float(theirs.abs().max()))


@pytest.mark.parametrize("sampler", [PhasedSampler(num_inference_steps=4, eta=0.5), LCMSampler(timesteps=[799.5, 300])])
def test_what_diffusers_cannot_do_is_refused(sampler):
    with pytest.raises(ValueError, match="diffusers has no scheduler that steps like"):
        plan_scheduler(sampler, VP, BASE, "epsilon", SD)


def test_the_bases_own_defaults_do_not_come_back():
    """A config remembers which settings were defaults of its own class; another class has other defaults."""
    base = dict(diffusers.DDIMScheduler(clip_sample=False).config)  # beta_start 0.0001, linear
    assert base["_use_default_values"]
    schedule = Schedule.from_diffusers(diffusers.DDIMScheduler(clip_sample=False))
    built = build_scheduler(plan_scheduler(LCMSampler(num_inference_steps=4), schedule, base, "epsilon", SD))
    np.testing.assert_allclose(built.alphas_cumprod.numpy(), schedule.alphas_cumprod, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 6.0])
def test_flow_levels_are_the_shifted_fractions(shift, n):
    """By themselves four steps at shift 3 would be 1, 0.858, 0.602, 0.009."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**few_step_shift(shift, n))
    scheduler.set_timesteps(n)
    k = np.arange(n, 0, -1) / n
    expected = shift * k / (1 + (shift - 1) * k)
    np.testing.assert_allclose(scheduler.sigmas.numpy(), [*expected, 0], atol=2e-7)


@pytest.mark.parametrize(
    "sampler, call",
    [
        (EulerSampler(num_inference_steps=4), {}),
        (LCMSampler(num_inference_steps=4, timestep_spacing="trailing"), {}),
        (EulerSampler(sigmas=[1.0, 0.9, 0.2]), {"sigmas": [1.0, 0.9, 0.2]}),
        (DDIMSampler(num_inference_steps=1), {}),
        (RenoiseSampler(num_inference_steps=4), {}),
        (PhasedSampler(num_inference_steps=4, original_inference_steps=40), {}),
    ],
)
def test_flow_samplers_step_like_us(sampler, call, noise, noises, monkeypatch):  # noqa: F811
    plan = plan_scheduler(sampler, FLOW, {"shift": 3.0, "num_train_timesteps": 1000}, "flow", SD3)
    assert plan.call == call
    n = len(sampler.times(FLOW)) - 1
    expected, times = run_diffusers(plan, n, noise, noises, monkeypatch, flow=True)
    got = sample(Denoiser(toy, FLOW, "flow"), sampler, noise.float(), noises=[z.float() for z in noises])
    np.testing.assert_allclose(got.timesteps, times / 1000, atol=1e-6)
    for mine, theirs in zip(got.states, expected, strict=True):
        assert (mine - theirs).abs().max() <= 3e-5 * max(1, float(theirs.abs().max()))


def test_flux_lays_the_fractions_itself():
    """Its pipeline hands over 1, 3/4, 1/2, 1/4: the scheduler must shift them, once and by a fixed shift."""
    plan = plan_scheduler(EulerSampler(num_inference_steps=4), FLOW, {"use_dynamic_shifting": True}, "flow", FLUX)
    scheduler = build_scheduler(plan)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4))
    np.testing.assert_allclose(scheduler.sigmas.numpy(), [1, 0.9, 0.75, 0.5, 0], atol=1e-6)


@pytest.mark.parametrize("schedule, pipeline, match", [
    (FLOW, SD, "no few-step scheduler for a flow model"), (Schedule.edm(), SD, "EDM"),
])  # fmt: skip
def test_models_without_a_pipeline_are_refused(schedule, pipeline, match):
    with pytest.raises(ValueError, match=match):
        plan_scheduler(EulerSampler(num_inference_steps=4), schedule, {}, "epsilon", pipeline)
