"""Every sampler that diffusers has too, against diffusers' own scheduler on the same noise."""

from __future__ import annotations

import pytest
import torch

from fewstep.sampling import (
    DDIMSampler,
    DPMSolverPP2MSampler,
    EulerAncestralSampler,
    EulerSampler,
    LCMSampler,
    TCDSampler,
    sample,
)
from tests.sampling.conftest import Reference, toy

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LATENT = SD | {"clip_sample": False}
KINDS = ("epsilon", "v_prediction", "sample")

# name -> (reference, sampler of n steps, start, arguments of the reference's step)
CASES = {
    "lcm": (
        Reference("scheduling_lcm", "LCMScheduler", **LATENT),
        lambda n: LCMSampler(num_inference_steps=n),
        "unit",
        {},
    ),
    "tcd": (
        Reference("scheduling_tcd", "TCDScheduler", **LATENT, set_alpha_to_one=False),
        lambda n: TCDSampler(num_inference_steps=n, eta=0.3),
        "unit",
        {"eta": 0.3},
    ),
    "tcd without noise": (
        Reference("scheduling_tcd", "TCDScheduler", **LATENT, set_alpha_to_one=False),
        lambda n: TCDSampler(num_inference_steps=n, eta=0.0),
        "unit",
        {"eta": 0.0},
    ),
    "ddim": (
        Reference("scheduling_ddim", "DDIMScheduler", **LATENT, timestep_spacing="trailing"),
        lambda n: DDIMSampler(num_inference_steps=n),
        "unit",
        {},
    ),
    "ddim, leading, as Stable Diffusion": (
        Reference("scheduling_ddim", "DDIMScheduler", **LATENT, steps_offset=1, set_alpha_to_one=False),
        lambda n: DDIMSampler(num_inference_steps=n, timestep_spacing="leading", steps_offset=1, final="end"),
        "unit",
        {"eta": 0.7},
    ),
    "euler": (
        Reference("scheduling_euler_discrete", "EulerDiscreteScheduler", **SD, timestep_spacing="trailing"),
        lambda n: EulerSampler(num_inference_steps=n),
        "table",
        {},
    ),
    "euler, linspace": (
        Reference("scheduling_euler_discrete", "EulerDiscreteScheduler", **SD, timestep_spacing="linspace"),
        lambda n: EulerSampler(num_inference_steps=n, timestep_spacing="linspace"),
        "table",
        {},
    ),
    "euler, leading": (
        Reference("scheduling_euler_discrete", "EulerDiscreteScheduler", **SD, timestep_spacing="leading"),
        lambda n: EulerSampler(num_inference_steps=n, timestep_spacing="leading"),
        "unit",
        {},
    ),
    "euler-ancestral": (
        Reference(
            "scheduling_euler_ancestral_discrete", "EulerAncestralDiscreteScheduler", **SD, timestep_spacing="trailing"
        ),
        lambda n: EulerAncestralSampler(num_inference_steps=n),
        "table",
        {},
    ),
    "dpm++ 2M": (
        Reference("scheduling_dpmsolver_multistep", "DPMSolverMultistepScheduler", **SD, timestep_spacing="trailing"),
        lambda n: DPMSolverPP2MSampler(num_inference_steps=n),
        "unit",
        {},
    ),
    "dpm++ 2M, linspace": (
        Reference("scheduling_dpmsolver_multistep", "DPMSolverMultistepScheduler", **SD, timestep_spacing="linspace"),
        lambda n: DPMSolverPP2MSampler(num_inference_steps=n, timestep_spacing="linspace"),
        "unit",
        {},
    ),
    "dpm++ 2M, leading, to sigma_min": (
        Reference(
            "scheduling_dpmsolver_multistep", "DPMSolverMultistepScheduler", **SD, timestep_spacing="leading",
            final_sigmas_type="sigma_min",
        ),
        lambda n: DPMSolverPP2MSampler(num_inference_steps=n, timestep_spacing="leading", final="end"),
        "unit",
        {},
    ),
}  # fmt: skip
ETA = {"ddim, leading, as Stable Diffusion": 0.7}


def compare(name, kind, n, noise, noises, tolerance):
    reference, make, start, per_step = CASES[name]
    if name == "euler-ancestral" and kind == "sample":
        pytest.skip("diffusers' EulerAncestral has no sample prediction; test_truth holds ours to DDIM with eta 1")
    reference = Reference(reference.module.__name__.rpartition(".")[2], reference.name, **reference.config)
    reference.config["prediction_type"] = kind
    expected, times = reference.run(noise, noises, n, per_step=per_step)
    sampler = make(n)
    if name in ETA:
        sampler = DDIMSampler(
            num_inference_steps=n, timestep_spacing="leading", steps_offset=1, final="end", eta=ETA[name]
        )
    got = sample(reference.denoiser(kind), sampler, noise, noises=noises, start=start)
    assert torch.allclose(got.timesteps, times.to(torch.float64), rtol=0, atol=1e-4)
    assert (got.x0 - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_a_sampler_is_that_of_diffusers_in_float64(name, kind, n, noise, noises):
    compare(name, kind, n, noise, noises, 1e-9)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("name", CASES)
def test_a_sampler_is_that_of_diffusers_as_shipped(name, n, noise, noises):
    compare(name, "v_prediction", n, noise.float(), [z.float() for z in noises], 2e-5)


FLOW = {
    "FlowMatchEuler": (
        "scheduling_flow_match_euler_discrete",
        "FlowMatchEulerDiscreteScheduler",
        lambda n: EulerSampler(num_inference_steps=n, timestep_spacing="linspace"),
    ),
    "FlowMatchLCM": (
        "scheduling_flow_match_lcm",
        "FlowMatchLCMScheduler",
        lambda n: LCMSampler(num_inference_steps=n, timestep_spacing="linspace"),
    ),
}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", FLOW)
def test_flow_samplers_are_those_of_diffusers(name, shift, n, dtype, tolerance, noise, noises):
    file, cls, make = FLOW[name]
    reference = Reference(file, cls, shift=shift)
    noise, noises = noise.to(dtype), [z.to(dtype) for z in noises]
    expected, _ = reference.run(noise, noises, n, times_are_flow=True)
    got = sample(reference.denoiser("flow"), make(n), noise, noises=noises)
    assert (got.x0 - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", FLOW)
def test_flow_samplers_take_sigmas_as_pipelines_hand_them_over(name, noise, noises):
    file, cls, _ = FLOW[name]
    sigmas = [1.0, 0.75, 0.5, 0.25]
    expected, _ = Reference(file, cls, shift=1.0).run(noise, noises, times_are_flow=True, sigmas=sigmas)
    sampler = (EulerSampler if name == "FlowMatchEuler" else LCMSampler)(sigmas=[*sigmas, 0.0])
    got = sample(Reference(file, cls, shift=1.0).denoiser("flow"), sampler, noise, noises=noises)
    assert (got.x0 - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize(
    "file, name, sampler, start",
    [
        ("scheduling_lcm", "LCMScheduler", LCMSampler(timesteps=[999, 701, 399, 101]), "unit"),
        ("scheduling_tcd", "TCDScheduler", TCDSampler(timesteps=[999, 701, 399, 101], eta=0.3), "unit"),
        ("scheduling_euler_discrete", "EulerDiscreteScheduler", EulerSampler(timesteps=[999, 701, 399, 101]), "table"),
        (
            "scheduling_dpmsolver_multistep",
            "DPMSolverMultistepScheduler",
            DPMSolverPP2MSampler(timesteps=[999, 701, 399, 101]),
            "unit",
        ),
    ],
)
def test_explicit_timesteps_are_those_of_diffusers(file, name, sampler, start, noise, noises):
    config = LATENT if "Euler" not in name and "DPM" not in name else SD | {"timestep_spacing": "trailing"}
    reference = Reference(file, name, **config)
    extra = {"original_inference_steps": 1000} if name in ("LCMScheduler", "TCDScheduler") else {}
    expected, _ = reference.run(noise, noises, timesteps=[999, 701, 399, 101], **extra,
                                per_step={"eta": 0.3} if name == "TCDScheduler" else {})  # fmt: skip
    got = sample(reference.denoiser(), sampler, noise, noises=noises, start=start)
    assert (got.x0 - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_the_toy_is_sensitive_to_time_and_state():
    """Parity would say little of a network that ignores its inputs."""
    x = torch.ones(1, 2)
    assert (toy(x, torch.tensor(10)) - toy(x, torch.tensor(20))).abs().min() > 1e-3
    assert (toy(x, torch.tensor(10)) - toy(2 * x, torch.tensor(10))).abs().min() > 1e-3
