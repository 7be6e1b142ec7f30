"""Drawing anew from a picture: where the steps begin, and what becomes of a picture under an exact Gaussian teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, TCDScheduler

from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.models.denoiser import Denoiser
from fewstep.sampling import (
    DDIMSampler,
    DPMSolverPP2MSampler,
    EulerSampler,
    LCMSampler,
    PhasedSampler,
    RenoiseSampler,
    TCDSampler,
    sample,
)

VP, FLOW, EDM = Schedule.scaled_linear(), Schedule.flow(3.0), Schedule.edm()
MEAN, STD = np.array([0.5, -1.0, 0.2, 2.0]), np.array([0.3, 1.0, 0.7, 0.5])
TEACHER = GaussianMixture([1.0], MEAN[None], stds=STD[None])
IMAGE = torch.tensor([[1.0, 0.0, -2.0, 0.5]], dtype=torch.float64)
NOISE = torch.tensor([[0.7, -0.3, 1.1, -1.9]], dtype=torch.float64)
NOISES = [torch.tensor([[0.1, 0.2, -0.6, 1.5]], dtype=torch.float64), torch.full((1, 4), -0.8, dtype=torch.float64)]


def exact(schedule):
    """A teacher that knows the one Gaussian that the data are; its coordinates know nothing of each other."""
    return Denoiser(TEACHER.network(schedule, "sample"), schedule, "sample")


def posterior_mean(schedule, x, t):
    """E[x0 | x_t] of every coordinate, from Bayes' rule."""
    alpha, sigma = (float(c) for c in schedule.alpha_sigma(t))
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    return MEAN + gain * (np.asarray(x) - alpha * MEAN)


@pytest.mark.parametrize("cls, theirs", [(LCMSampler, LCMScheduler), (TCDSampler, TCDScheduler)])
@pytest.mark.parametrize("n, strength, grid", [
    (4, 0.5, 50), (4, 0.3, 50), (3, 0.84, 50), (8, 0.999, 50), (2, 0.28, 100),
])  # fmt: skip
def test_lcms_times_are_built_from_the_strength(cls, theirs, n, strength, grid):
    scheduler = theirs(original_inference_steps=grid)
    scheduler.set_timesteps(n, strength=strength)
    mine = cls(num_inference_steps=n, original_inference_steps=grid, strength=strength).times(VP)[:-1]
    assert mine.tolist() == scheduler.timesteps.tolist() and len(mine) == n


@pytest.mark.parametrize("sampler, schedule, expected", [
    (RenoiseSampler(timesteps=[999, 749, 499, 249], strength=0.5), VP, [499, 249]),
    (LCMSampler(timesteps=[999, 749, 499, 249], strength=0.5), VP, [499, 249]),
    (LCMSampler(num_inference_steps=4, timestep_spacing="trailing", strength=0.5), VP, [499, 249]),
    (EulerSampler(num_inference_steps=4, strength=0.6), VP, [499, 249]),
    (DDIMSampler(num_inference_steps=100, strength=0.29), VP, list(range(289, 0, -10))),
    (PhasedSampler(num_inference_steps=4, strength=0.75), VP, [739, 499, 239]),
    (EulerSampler(sigmas=[1.0, 0.9, 0.75, 0.5], strength=0.5), FLOW, [0.75, 0.5]),
    (EulerSampler(num_inference_steps=4, strength=0.3), FLOW, [0.75, 0.5]),
    (EulerSampler(num_inference_steps=4, strength=1.0), VP, [999, 749, 499, 249]),
])  # fmt: skip
def test_other_grids_are_cut(sampler, schedule, expected):
    np.testing.assert_allclose(sampler.times(schedule)[:-1], expected, rtol=1e-12)


def test_lcm_on_flow_keeps_its_steps_too():
    times = LCMSampler(num_inference_steps=4, strength=0.5).times(FLOW)
    np.testing.assert_allclose(times[:-1], FLOW.shifted(np.array([0.5, 0.38, 0.26, 0.14])), rtol=1e-12)


@pytest.mark.parametrize("schedule", [VP, FLOW, EDM])
def test_steps_of_lcm_are_posterior_means_and_the_last_adds_no_noise(schedule):
    """Two steps by hand: noise to the first time, the mean, noise to the second, the mean."""
    sampler = LCMSampler(num_inference_steps=2, strength=0.6)
    first, second, _ = sampler.times(schedule).tolist()
    run = sample(exact(schedule), sampler, NOISE, noises=NOISES, image=IMAGE)
    if schedule.family == "edm":  # an exact posterior mean is no consistency function near sigma_min: x0 says enough
        assert torch.equal(run.states[0], IMAGE + first * NOISE)
        return
    (alpha, sigma), (alpha2, sigma2) = (schedule.alpha_sigma(t) for t in (first, second))
    x0 = posterior_mean(schedule, float(alpha) * IMAGE + float(sigma) * NOISE, first)
    x0 = posterior_mean(schedule, float(alpha2) * x0 + float(sigma2) * NOISES[0].numpy(), second)
    np.testing.assert_allclose(run.x0, x0, atol=2e-5)  # LCM's c_skip is 1e-6 there
    assert len(run.states) == 3


@pytest.mark.parametrize("schedule", [VP, FLOW])
def test_many_small_steps_follow_the_flow_from_the_noised_picture(schedule):
    """The probability flow of a Gaussian is linear: x0 = m + s / sqrt(alpha^2 s^2 + sigma^2) (x_t - alpha m)."""
    sampler = DPMSolverPP2MSampler(num_inference_steps=1000, strength=0.4)
    start = float(sampler.times(schedule)[0])
    alpha, sigma = (float(c) for c in schedule.alpha_sigma(start))
    noised = alpha * IMAGE + sigma * NOISE
    expected = MEAN + STD / np.sqrt((alpha * STD) ** 2 + sigma**2) * (noised.numpy() - alpha * MEAN)
    run = sample(exact(schedule), sampler, NOISE, image=IMAGE)
    np.testing.assert_allclose(run.x0, expected, atol=5e-3)
    assert len(run.timesteps) == 400


@pytest.mark.parametrize("sampler", [
    LCMSampler(num_inference_steps=4), TCDSampler(num_inference_steps=4, eta=0.3), EulerSampler(num_inference_steps=4),
])  # fmt: skip
@pytest.mark.parametrize("schedule", [VP, FLOW])
def test_inpainting_keeps_the_picture_and_draws_the_rest_as_if_alone(sampler, schedule):
    """Coordinates that know nothing of each other: the masked ones end where they end without a picture at all."""
    mask, noises = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64), NOISES * 2
    free = sample(exact(schedule), sampler, NOISE, noises=noises)
    run = sample(exact(schedule), sampler, NOISE, noises=noises, image=IMAGE, mask=mask)
    assert torch.equal(run.x0[0, 1::2], IMAGE[0, 1::2])
    torch.testing.assert_close(run.x0[0, ::2], free.x0[0, ::2], rtol=0, atol=1e-12)
    for state, time in zip(run.states[1:-1], run.timesteps.tolist()[1:], strict=True):  # kept at every noise level
        alpha, sigma = (float(c) for c in schedule.alpha_sigma(time))
        torch.testing.assert_close(state[0, 1::2], (alpha * IMAGE + sigma * NOISE)[0, 1::2], rtol=0, atol=1e-12)


def test_inpainting_below_strength_1_starts_from_the_picture():
    sampler, mask = EulerSampler(num_inference_steps=4, strength=0.5), torch.ones(1, 4, dtype=torch.float64)
    run = sample(exact(VP), sampler, NOISE, image=IMAGE, mask=mask)
    torch.testing.assert_close(run.x0, sample(exact(VP), sampler, NOISE, image=IMAGE).x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "build, match",
    [
        (
            lambda: EulerSampler(num_inference_steps=4, strength=0.2).times(VP),
            r"leaves none of 4 steps: use at least 0\.25",
        ),
        (
            lambda: LCMSampler(num_inference_steps=4, strength=0.05).times(VP),
            r"exceeds the 2 of 50 .* use at least 0\.08",
        ),
        (lambda: LCMSampler(num_inference_steps=4, strength=0.0), "strength must be above 0"),
        (lambda: LCMSampler(num_inference_steps=4, strength=float("nan")), "strength must be above 0"),
        (lambda: sample(exact(VP), LCMSampler(num_inference_steps=4, strength=0.5), NOISE), "need an image"),
        (lambda: sample(exact(VP), LCMSampler(num_inference_steps=4), NOISE, mask=NOISE), "need an image"),
    ],
)
def test_errors_say_what_to_do(build, match):
    with pytest.raises(ValueError, match=match):
        build()
