"""Every entry: our sampler against diffusers' scheduler, built as a user would and given the entry's settings."""

from __future__ import annotations

import importlib
from functools import cache

import numpy as np
import pytest

from fewstep.checkpoints.registry import checkpoints
from fewstep.checkpoints.sampling import sampler_class, sampler_of, schedule_of, start_of
from fewstep.models.denoiser import Denoiser
from fewstep.sampling import sample
from tests.sampling.conftest import in_float64, toy

# What the base models' own scheduler_config.json say (SD 1.5: PNDM, SDXL: Euler), as far as it matters.
SD = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False, "trained_betas": None,
}  # fmt: skip
SDXL = {**SD, "timestep_spacing": "leading", "prediction_type": "epsilon", "interpolation_type": "linear"}
FLUX = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15,
        "base_image_seq_len": 256, "max_image_seq_len": 4096, "num_train_timesteps": 1000}  # fmt: skip
QWEN = {"shift": 1.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256,
        "max_image_seq_len": 8192, "shift_terminal": 0.02, "time_shift_type": "exponential"}  # fmt: skip
FLOW = {"shift": 3.0, "num_train_timesteps": 1000}
BASES = {"sd1": SD, "sd2": {**SD, "prediction_type": "epsilon"}, "sdxl": SDXL, "pixart": SD, "flux": FLUX}
BASES |= {"qwen": QWEN, "qwen21": QWEN}
BASES |= {"klein": FLUX, "flux2": FLUX}  # of whose schedulers the pipelines use use_dynamic_shifting alone
BASES |= {"krea2": {**FLUX, "max_image_seq_len": 6400}}
SANA = checkpoints()["sana-sprint-1.6b"]
RUNNABLE = {n: e for n, e in checkpoints().items() if sampler_class(e.scheduler) and e.scheduler != SANA.scheduler}


def mu_of(entry, config, n):
    """mu as diffusers' pipeline gives it to the scheduler of ``config``, for an image of the entry's size."""
    tokens = (entry.resolution // 16) ** 2
    if entry.family in ("klein", "flux2"):
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(tokens, n)
    if entry.family == "krea2":  # of distilled ones, at every size
        return 1.15
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (tokens - config.base_image_seq_len)


def base_of(entry):
    return BASES.get(entry.family, FLOW)


@cache
def module_of(name):
    diffusers = importlib.import_module("diffusers")
    return importlib.import_module(getattr(diffusers, name).__module__)


def run_diffusers(entry, n, noise, noises):
    """The states of diffusers' own scheduler, in our coordinates, and its timesteps. Written from its documentation."""
    module = module_of(entry.scheduler)
    with in_float64(module):
        cls = getattr(module, entry.scheduler)
        scheduler = cls.from_config({**base_of(entry), **entry.scheduler_overrides})
        given = {}
        if entry.flow:
            own = entry.sigmas is not None and len(entry.sigmas) == n
            given["sigmas"] = list(entry.sigmas) if own else np.linspace(1, 1 / n, n).tolist()
            if scheduler.config.use_dynamic_shifting:
                given["mu"] = mu_of(entry, scheduler.config, n)
        elif entry.timesteps is not None:
            given["timesteps"] = list(entry.timesteps)
        else:
            given["num_inference_steps"] = n
        if entry.scheduler in ("LCMScheduler", "TCDScheduler") and "timesteps" in given:
            given["original_inference_steps"] = 50
        scheduler.set_timesteps(**given)
        left, real = iter(noises), module.randn_tensor if hasattr(module, "randn_tensor") else None
        if real is not None:
            module.randn_tensor = lambda *args, **kwargs: next(left).to(noise.dtype)
        try:
            x, states = noise * getattr(scheduler, "init_noise_sigma", 1.0), []
            for t in scheduler.timesteps:
                scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
                states.append(scaled)
                told = t / scheduler.config.num_train_timesteps if entry.flow else t
                step = scheduler.step(
                    toy(scaled, told), t, x, **({"eta": entry.eta} if entry.scheduler == "TCDScheduler" else {})
                )
                x = step.prev_sample
            last = getattr(step, "denoised", x) if entry.scheduler == "LCMScheduler" else x
            return [*states, last], scheduler.timesteps
        finally:
            if real is not None:
                module.randn_tensor = real


@pytest.mark.parametrize("name", RUNNABLE)
def test_an_entry_samples_as_diffusers_does(name, noise, noises):
    """The same timesteps, and on injected noise the same states, at every number of steps the entry names."""
    entry = RUNNABLE[name]
    schedule = schedule_of(entry, base_of(entry))
    kind = "flow" if entry.flow else entry.scheduler_overrides.get("prediction_type", "epsilon")
    noises = noises + [z.flip(0) for z in noises]
    for n in entry.steps:
        expected, times = run_diffusers(entry, n, noise, noises)
        sampler = sampler_of(entry, base_of(entry), num_inference_steps=n)
        got = sample(Denoiser(toy, schedule, kind), sampler, noise, noises=noises, start=start_of(entry))
        scale = 1000 if entry.flow else 1
        assert (got.timesteps * scale - times.double()).abs().max() <= 1e-9, (n, got.timesteps, times)
        assert len(got.states) == len(expected) == n + 1
        for mine, theirs in zip(got.states, expected, strict=True):
            assert (mine - theirs).abs().max() <= 1e-9 * max(1, float(theirs.abs().max())), n


@pytest.mark.parametrize("n", SANA.steps)
def test_sana_sprint_samples_as_its_scheduler_does(n, noise, noises):
    """SCMScheduler turns angles; the network is told flow's time and state, as its pipeline has it.

    To 1e-4 only: diffusers writes 1.57080 for pi/2 in float32.
    """
    module, data = module_of("SCMScheduler"), 0.5
    scheduler = module.SCMScheduler(**SANA.scheduler_overrides)
    scheduler.set_timesteps(n, **({} if n == 2 else {"intermediate_timesteps": None}))
    left, real = iter(noises), module.randn_tensor
    module.randn_tensor = lambda *_, **__: next(left).float()
    x, states, told = noise.float() * data, [], []
    try:
        for angle in scheduler.timesteps[:-1]:
            s = angle.sin() / (angle.cos() + angle.sin())
            root = (s**2 + (1 - s) ** 2).sqrt()
            scaled = x / data * root
            states.append(scaled)
            told.append(float(s))
            flow = ((1 - 2 * s) * scaled + (1 - 2 * s + 2 * s**2) * toy(scaled, s)) / root * data
            x, x0 = scheduler.step(flow, angle, x, return_dict=False)
    finally:
        module.randn_tensor = real
    run = sample(Denoiser(toy, schedule_of(SANA, {}), "flow"), sampler_of(SANA, {}, num_inference_steps=n), noise,
                 noises=noises)  # fmt: skip
    np.testing.assert_allclose(run.timesteps, told, atol=1e-5)
    for mine, theirs in zip(run.states, [*states, x0 / data], strict=True):
        assert (mine - theirs).abs().max() <= 1e-4
