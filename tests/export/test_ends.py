"""DDIM's share of fresh noise and where it ends, in what is saved for diffusers: all four together."""

from __future__ import annotations

import pytest

from fewstep.export.scheduler import plan_scheduler
from fewstep.models.denoiser import Denoiser
from fewstep.sampling import DDIMSampler, EulerAncestralSampler, sample
from tests.export.test_scheduler import BASE, SD, VP, run_diffusers
from tests.sampling.conftest import noise, noises, toy  # noqa: F401


@pytest.mark.parametrize("n", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("final", ["clean", "end"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_ends_there_with_any_noise(eta, final, n, noise, noises, monkeypatch):  # noqa: F811
    sampler = DDIMSampler(num_inference_steps=n, eta=eta, final=final)
    plan = plan_scheduler(sampler, VP, BASE, "epsilon", SD)
    expected, _ = run_diffusers(plan, n, noise, noises, monkeypatch)
    got = sample(Denoiser(toy, VP, "epsilon"), sampler, noise.float(), noises=[z.float() for z in noises])
    for mine, theirs in zip(got.states, expected, strict=True):
        assert (mine - theirs).abs().max() <= 3e-5 * max(1, float(theirs.abs().max()))
    last = VP.clean if final == "clean" else VP.end
    alpha, sigma = map(float, VP.alpha_sigma(float(last)))
    assert float(sigma) == pytest.approx(0 if final == "clean" else 0.02915, abs=1e-4)  # sqrt(0.00085), table index 0
    # the last state by DDIM's formula, in float64 and from the state before
    x, t = got.states[-2].double(), float(got.timesteps[-1])
    eps, (before, level) = toy(x, t), map(float, VP.alpha_sigma(t))
    x0 = (x - level * eps) / before
    spread = eta * sigma * max(1 - (sigma * before / (alpha * level)) ** 2, 0) ** 0.5
    fresh = noises[n - 1].double() if eta and final == "end" else 0
    wanted = alpha * x0 + (sigma**2 - spread**2) ** 0.5 * eps + spread * fresh
    assert (got.x0 - wanted).abs().max() <= 2e-5 * max(1, float(wanted.abs().max()))


def test_ancestral_noise_that_ends_at_the_tables_end_has_no_scheduler():
    with pytest.raises(ValueError, match="diffusers has no scheduler that steps like"):
        plan_scheduler(EulerAncestralSampler(num_inference_steps=4, final="end"), VP, BASE, "epsilon", SD)
