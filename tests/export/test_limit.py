"""How far an export's latents may be off: float32's rounding of the last prediction, and no more."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from fewstep.diffusion.prediction import Prediction, mix
from fewstep.diffusion.schedule import Schedule
from fewstep.export import publish
from fewstep.export.limit import NUDGE, Limit, carried, growth
from fewstep.export.lora import kohya_layout, rounded
from fewstep.export.publish import export
from fewstep.sampling import make_sampler
from tests.export.test_publish import LCM, finished

VP, FLOW = Schedule.scaled_linear(), Schedule.flow(3.0)
ROUNDING = 2.0**-24


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(
    ("schedule", "kind"),
    [(VP, "epsilon"), (VP, "v_prediction"), (VP, "sample"), (VP, "flow"), (FLOW, "flow"), (FLOW, "v_prediction")],
)
def test_an_error_of_the_last_prediction_grows_as_derived(schedule, kind, steps):
    """Clean data of a prediction whose every number is off by u of its largest one, in float64."""
    draw = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(1, 20_000, generator=draw, dtype=torch.float64) for _ in range(2))
    x0, eps = 1.67 * x0 / x0.abs().max(), 4.5 * eps / eps.abs().max()
    sampler = make_sampler("ddim" if schedule is VP else "euler", num_inference_steps=steps)
    last = float(sampler.times(schedule)[-2])
    alpha, sigma = schedule.alpha_sigma(last)
    p, q = mix(kind, alpha, sigma)
    x, output = float(alpha) * x0 + float(sigma) * eps, float(p) * x0 + float(q) * eps
    off = ROUNDING * output.abs().max() * torch.sign(torch.randn(output.shape, generator=draw, dtype=torch.float64))
    found = Prediction(x, output + off, last, schedule, kind).x0
    gap = float((found - x0).abs().max() / x0.abs().max())
    grown = growth(sampler, schedule, kind, x0)
    assert gap <= 1.001 * ROUNDING * grown
    if kind == "epsilon":  # and not far less: sigma/alpha is 14.6, 1.6 and 0.7 there
        assert gap >= 0.6 * ROUNDING * grown


def test_the_limit_is_above_1e_5_where_float32_holds_no_more():
    latents = torch.tensor([1.67])
    for schedule, kind, steps, most in [
        (VP, "epsilon", 1, 7.7e-5), (VP, "epsilon", 2, 1.03e-5), (VP, "epsilon", 4, 1e-5),
        (VP, "v_prediction", 1, 1e-5), (VP, "sample", 1, 1e-5), (FLOW, "flow", 1, 1e-5), (FLOW, "flow", 4, 1e-5),
    ]:  # fmt: skip
        grown = growth(make_sampler("ddim", num_inference_steps=steps), schedule, kind, latents)
        assert Limit("fp32", grown).most == pytest.approx(most, rel=0.02), (kind, steps)
    assert (Limit("fp16", 2.0).most, Limit("bf16", 2.0).most) == (1e-2, 5e-2)


def test_the_sentence_names_rounded_weights_where_they_explain_the_gap():
    Limit("fp32", 40.0).check(7e-5, "in diffusers")
    for limit, gap, end in [
        (Limit("bf16", 20.0), 0.17, "the gap is 1.7e-01, for the rounding of bf16 weights grows 20 times: "
         "export --dtype fp32."),
        (Limit("bf16", 1.5), 0.17, "the gap is 1.7e-01."),
        (Limit("fp32", 40.0), 8e-5, "the gap is 8.0e-05."),
        (Limit("fp32"), float("nan"), "the gap is nan."),
    ]:  # fmt: skip
        with pytest.raises(ValueError) as caught:
            limit.check(gap, "in diffusers")
        assert str(caught.value) == f"The export's samples in diffusers are not fewstep's: {end}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_alpha_is_the_rank_in_every_precision(dtype):
    """8 bits hold no rank above 256: a fold of one step makes 257 of 256."""
    layer = "unet.time_embedding.linear_1"
    lora = {f"{layer}.lora_A.weight": torch.randn(257, 8), f"{layer}.lora_B.weight": torch.randn(8, 257)}
    found = rounded(kohya_layout({key: t.to(dtype) for key, t in lora.items()}, "lora_unet_")[0], dtype)
    alpha = found.pop("lora_unet_time_embedding_linear_1.alpha")
    assert float(alpha) == 257 and {t.dtype for t in found.values()} == {dtype}


@pytest.mark.slow
def test_a_one_step_student_that_predicts_noise_has_exports(in_this_process, tmp_path):
    """sigma/alpha is 14.6 there: float32 holds 1e-5 of the noise, and not of the image; 8 bits of it are refused."""
    card = replace(LCM, method="dmd2", sampler="ddim", num_inference_steps=1, teacher="scenes-64")
    run = finished(tmp_path / "one", "scenes-64", card, size=0.005)
    assert export(run, "diffusers", tmp_path / "out").round_trip.gap <= 7e-5
    with pytest.raises(ValueError, match=r"for the rounding of bf16 weights grows .* times: export"):
        export(run, "merged", tmp_path / "half", dtype="bf16")


@pytest.mark.parametrize("factor", [0.5, 40.0])
def test_what_a_map_carries_on_is_measured(factor):
    """A linear map of the noise carries a relative error of it on unchanged; one added in a part of it, more."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signs = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).sign()
    nudged = noise * (1 + NUDGE * signs)
    assert carried(factor * noise, factor * nudged) == pytest.approx(1.0, rel=1e-9)
    sharp = [torch.tanh(factor * (n - noise)) + noise for n in (noise, nudged)]  # slope: factor where it is asked
    assert carried(*sharp) == pytest.approx(factor, rel=1e-3)


def test_the_larger_growth_sets_the_limit():
    assert Limit("fp32", 100.0).most == pytest.approx(32 * 2**-24 * 100) and Limit("fp32", 2.0).most == 1e-5


@pytest.mark.parametrize(("gap", "grows", "samplings", "passes"), [
    (9e-6, 40.0, 1, True), (2e-5, 40.0, 2, True), (2e-5, 1.0, 2, False), (8e-5, 40.0, 2, False),
    (float("nan"), 40.0, 1, False),
])  # fmt: skip
def test_a_student_is_sampled_again_only_for_a_gap_above_its_limit(
    gap, grows, samplings, passes, tiny, tmp_path, monkeypatch
):
    """And then only one model is in memory; the student, not what was made of it for the file, is sampled again."""
    run, sampled, held = finished(tmp_path / "run", tiny), [], []
    latents, teacher_of = publish._latents, publish.teacher_of

    def load(*given):
        found = teacher_of(*given)
        held.append(weakref.ref(found.family.base))
        return found

    def sample(teacher, student, *given):
        sampled.append(latents(teacher, student, *given))
        assert sum(one() is not None for one in held) == 1
        return sampled[-1]

    def read_back(_, __, layers):
        assert not [one for one in held if one() is not None]
        return publish.RoundTrip(gap, layers)

    def carried(expected, nudged):
        assert expected is sampled[0] and 0 < (nudged - expected).abs().max() < 0.1 * expected.abs().max()
        return grows

    for name, own in [
        ("teacher_of", load),
        ("_latents", sample),
        ("check_round_trip", read_back),
        ("carried", carried),
    ]:
        monkeypatch.setattr(publish, name, own)
    with nullcontext() if passes else pytest.raises(ValueError, match=f"in diffusers .* the gap is {gap:.1e}"):
        assert export(run, "diffusers", tmp_path / "out").round_trip.gap == gap
    assert len(sampled) == samplings and (tmp_path / "out").exists() == passes
