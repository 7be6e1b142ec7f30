"""ComfyUI's settings as they are printed, run by ComfyUI's own formulas: its states are our sampler's."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fewstep.diffusion.schedule import Schedule
from fewstep.export.comfyui import comfyui, hint, usage_hint
from fewstep.models.denoiser import Denoiser
from fewstep.models.families.chroma import Chroma
from fewstep.models.families.flux import Flux
from fewstep.models.families.flux2 import Flux2, Klein
from fewstep.models.families.krea2 import Krea2
from fewstep.models.families.pixart import PixArt
from fewstep.models.families.qwen import QwenImage, QwenNetwork
from fewstep.models.families.qwen21 import QwenImage21
from fewstep.models.families.sana import Sana
from fewstep.models.families.sd3 import StableDiffusion3
from fewstep.models.families.unet import StableDiffusion, StableDiffusionXL
from fewstep.models.families.zimage import ZImage
from fewstep.recipe.chain import Chain, load
from fewstep.recipe.shipped import shipped_recipes
from fewstep.runs.fit import foreseen_card
from fewstep.sampling import SAMPLERS, sample
from fewstep.sampling.samplers import make_sampler
from fewstep.students.card import Card, sampler_of
from tests.export import comfy_sampling
from tests.sampling.conftest import toy

FLUX_SCHEDULER = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
SD_TABLE = Schedule.scaled_linear()
FAMILIES = {  # class, schedule, the scheduler's config, side of the images, ComfyUI's kind of model
    "sd15": (StableDiffusion, SD_TABLE, {}, 512, "sd"),
    "sdxl": (StableDiffusionXL, SD_TABLE, {}, 1024, "sd"),
    "sd3": (StableDiffusion3, Schedule.flow(3.0), {"shift": 3.0}, 1024, "sd3"),
    "flux": (Flux, Schedule.flow(Schedule.shift_of_size(FLUX_SCHEDULER, 4096)), FLUX_SCHEDULER, 1024, "flux"),
    "qwen21": (QwenImage21, Schedule.flow(2.0008, terminal=0.02), {"use_dynamic_shifting": True}, 1024, "sd3"),
    "qwen": (QwenImage, Schedule.flow(2.0008, terminal=0.02), {"use_dynamic_shifting": True}, 1024, "sd3"),
    "chroma": (Chroma, Schedule.flow(Schedule.shift_of_size(FLUX_SCHEDULER, 4096)), FLUX_SCHEDULER, 1024, "flux"),
    "klein": (Klein, Schedule.flow(Klein.shift({}, 4096, {})), FLUX_SCHEDULER, 1024, "flux"),
    "flux2": (Flux2, Schedule.flow(Flux2.shift({}, 4096, {})), FLUX_SCHEDULER, 1024, "flux"),
    "pixart": (PixArt, Schedule.from_betas(np.linspace(0.0001, 0.02, 1000)), {}, 512, "pixart"),
    "zimage": (ZImage, Schedule.flow(6.0), {"shift": 6.0}, 1024, "sd3"),
    "krea2": (Krea2, Schedule.flow(2.475), {"use_dynamic_shifting": True}, 1024, "sd3"),
}


def kind_of(family):
    return "flow" if FAMILIES[family][1].family == "flow" else "epsilon"


def setting(sampler, family, prediction=None, guidance=1.0, **other):
    """The printed line for a sampler on a family; ``other`` replaces schedule, scheduler or size."""
    cls, schedule, scheduler, size, _ = FAMILIES[family]
    schedule, scheduler, size = (
        other.get(k, v) for k, v in dict(schedule=schedule, scheduler=scheduler, size=size).items()
    )
    kind = prediction or kind_of(family)
    found = comfyui(sampler, schedule, kind, cls, scheduler, size)
    return hint(len(sampler.times(schedule)) - 1, guidance, found) if found.settings else found.remark


@functools.cache
def draws():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(60, 2, 3, 4, 4, generator=generator, dtype=torch.float64)


def gaps(sampler, family, line, prediction=None, schedule=None):
    """Largest difference of ComfyUI's states and ours, as a part of ours: before the last state, and of the last."""
    schedule = schedule or FAMILIES[family][1]
    kind = prediction or kind_of(family)
    noise, *noises = draws()
    ours = sample(Denoiser(toy, schedule, kind), sampler, noise, noises=noises).states
    theirs, sigmas = comfy_sampling.run(line, FAMILIES[family][4], toy, noise, noises)
    assert len(theirs) == len(ours)
    if schedule.family == "vp":
        theirs = [x / np.sqrt(1 + s**2) for x, s in zip(theirs, sigmas, strict=True)]
    found = [float((a - b).abs().max() / max(1, b.abs().max())) for a, b in zip(theirs, ours, strict=True)]
    return max(found[:-1]), found[-1]


def students():
    """(recipe and stage, family, card) of every shipped recipe of a published model."""
    for name in shipped_recipes():
        family = name.split("-")[0]
        if family not in FAMILIES:
            continue
        recipe = load(name)
        for stage, one in recipe.on_first_teacher().items() if isinstance(recipe, Chain) else [("", recipe)]:
            schedule = FAMILIES[family][1]
            card = foreseen_card(one, one.method_class()(schedule, one.method_settings()), kind_of(family))
            yield pytest.param(family, card, id=f"{name} {stage}".strip())


@pytest.mark.parametrize("family, card", students())
def test_what_is_printed_for_every_shipped_recipe_samples_like_its_student(family, card):
    """To 1e-6; where ComfyUI cannot end or begin as the student does, the line says so and all else is equal."""
    sampler = sampler_of(card)
    prediction = card.prediction_type or None
    line = setting(sampler, family, prediction)
    before, last = gaps(sampler, family, line, prediction)
    if "initial noise" in line:
        assert before > 1e-6
        return
    assert before <= 1e-6
    if "ends at clean data" in line:
        assert 1e-4 < last < 0.1
        ends_clean = make_sampler(sampler.name, timesteps=sampler.times(FAMILIES[family][1])[:-1], final="clean")
        assert max(gaps(ends_clean, family, line, prediction)) <= 1e-6
    else:
        assert last <= 1e-6 and "Not equal" not in line


SWEPT = [
    (name, dict(num_inference_steps=n, **eta, **grid))
    for name, cls in SAMPLERS.items()
    for n in (1, 2, 3, 4, 6, 8, 16)
    for eta in ([{"eta": x} for x in (0.0, 0.3, 1.0)] if "eta" in cls.options() else [{}])
    for grid in (
        [{"original_inference_steps": x} for x in (50, 40)] if "original_inference_steps" in cls.options() else [{}]
    )
]


@pytest.mark.slow
@pytest.mark.parametrize("family, prediction", [
    *((f, kind) for f in ("sd15", "pixart") for kind in ("epsilon", "v_prediction", "sample")),
    ("sd3", None), ("flux", None),
])  # fmt: skip
def test_every_sampler_at_any_number_of_steps(family, prediction):
    """A line is printed where ComfyUI can, and then its states are ours; a sentence where it cannot."""
    equal, near, none = 0, 0, 0
    for name, options in SWEPT:
        sampler = make_sampler(name, **options)
        line = setting(sampler, family, prediction)
        if not line[0].isdigit():
            none += line.startswith(f"No setting of ComfyUI samples like '{name}' here: ") and line.endswith(".")
            continue
        before, last = gaps(sampler, family, line, prediction)
        assert before <= 1e-6, (name, options, line)
        assert last <= 1e-6 or "ends at clean data" in line, (name, options, line)
        equal, near = equal + (last <= 1e-6), near + (last > 1e-6)
    assert equal + near + none == len(SWEPT) and equal >= 60 and none >= 30
    assert (near > 0) == (FAMILIES[family][1].family == "vp")


@pytest.mark.parametrize("family, name, line", [
    ("sd15", "dmd2", "4 steps, cfg 1, sampler lcm, scheduler simple"),
    ("sd15", "lcm", "4 steps, cfg 1, sampler lcm, scheduler simple, ModelSamplingDiscrete lcm"),
    ("flux", "dmd2", "4 steps, cfg 1, sampler lcm, scheduler simple, "
                     "ModelSamplingFlux max_shift 1.15 base_shift 0.5 width 1024 height 1024"),
    ("sd3", "lcm", "4 steps, cfg 1, sampler lcm, sigmas 1 0.9047619 0.75 0.51315789 0, ModelSamplingSD3 shift 3"),
    ("sdxl", "turbo", "2 steps, cfg 1, sampler euler_ancestral, scheduler simple"),
])  # fmt: skip
def test_the_settings_are_these(family, name, line):
    recipe = load(f"{family}-{name}")
    schedule = FAMILIES[family][1]
    card = foreseen_card(recipe, recipe.method_class()(schedule, recipe.method_settings()), kind_of(family))
    assert setting(sampler_of(card), family) == line


@pytest.mark.parametrize("sampler, family, wrong, least", [
    ("renoise", "sd15", "4 steps, cfg 1, sampler euler, scheduler sgm_uniform", 0.1),
    ("renoise", "flux", "4 steps, cfg 1, sampler euler, scheduler sgm_uniform", 0.1),
    ("lcm", "sd3", "4 steps, cfg 1, sampler lcm, scheduler sgm_uniform, ModelSamplingSD3 shift 3", 1e-3),
    ("ddim", "sd15", "4 steps, cfg 1, sampler euler, scheduler sgm_uniform", 1e-4),
    ("ddim", "sd15", "4 steps, cfg 1, sampler euler, scheduler normal", 1e-2),
    ("ddim", "sd15", "4 steps, cfg 1, sampler euler, scheduler simple, ModelSamplingDiscrete v_prediction", 1e-2),
    ("ddim", "sd3", "4 steps, cfg 1, sampler ddim, scheduler normal, ModelSamplingSD3 shift 3", 1e-3),
    ("ddim", "flux", "4 steps, cfg 1, sampler euler, scheduler simple, "
                     "ModelSamplingFlux max_shift 1.15 base_shift 0.5 width 512 height 512", 1e-2),
])  # fmt: skip
def test_other_settings_sample_something_else(sampler, family, wrong, least):
    """What was printed once, and what people try: the formulas can tell."""
    assert max(gaps(make_sampler(sampler, num_inference_steps=4), family, wrong)) > least


def test_a_model_with_zero_terminal_snr():
    """ComfyUI's table for it ends at sigma 4519: it is off by 1 / 4519, and the line says so."""
    schedule, sampler = SD_TABLE.zero_terminal_snr(), make_sampler("ddim", num_inference_steps=4)
    line = setting(sampler, "sd15", "v_prediction", schedule=schedule)
    assert line == (
        "4 steps, cfg 1, sampler euler, scheduler simple, ModelSamplingDiscrete v_prediction zsnr. "
        "Not equal: ComfyUI begins at sigma 4519, this student at pure noise."
    )
    assert 1e-6 < max(gaps(sampler, "sd15", line, "v_prediction", schedule)) < 1e-3
    without = setting(sampler, "sd15", "v_prediction").replace(" zsnr", "")
    assert max(gaps(sampler, "sd15", without, "v_prediction", schedule)) > 1e-2


@pytest.mark.parametrize("family, other, match", [
    ("sd15", {"schedule": Schedule.cosine()}, "no setting for the noise schedule of this Stable Diffusion 1.x"),
    ("sd15", {"schedule": Schedule.scaled_linear(num_train_timesteps=500)}, "no setting for the noise schedule"),
    ("sd15", {"schedule": Schedule.edm()}, "no setting for the noise schedule"),
    ("pixart", {"schedule": Schedule.flow(3.0)}, "no setting for the noise schedule of this PixArt model"),
    ("sd3", {"schedule": Schedule.flow(3.0, num_train_timesteps=500)}, "no setting for the noise schedule"),
])  # fmt: skip
def test_a_model_that_comfyui_does_not_know_as_it_is(family, other, match):
    assert match in setting(make_sampler("euler", num_inference_steps=4), family, "epsilon", **other)
    assert "no conversion of flow" in setting(make_sampler("euler", num_inference_steps=4), "sd15", "flow")


def test_a_family_whose_settings_are_not_known_has_a_sentence():
    found = comfyui(make_sampler("euler", num_inference_steps=4), Schedule.flow(3.0), "flow", Sana, {}, 1024)
    assert not found.settings and found.remark == "No setting of ComfyUI is known here for Sana."


@pytest.mark.parametrize("size, shift, scheduler", [
    (512, None, FLUX_SCHEDULER), (768, None, FLUX_SCHEDULER),
    (1024, 1.0, {"shift": 1.0}), (1024, 3.16, {"shift": 3.16}),
    (512, None, {**FLUX_SCHEDULER, "base_image_seq_len": 128}),
])  # fmt: skip
def test_flux_has_the_students_shift_at_any_size(size, shift, scheduler):
    schedule = Schedule.flow(shift or Schedule.shift_of_size(scheduler, size * size // 256))
    sampler = make_sampler("euler", num_inference_steps=4)
    line = setting(sampler, "flux", schedule=schedule, scheduler=scheduler, size=size)
    assert max(gaps(sampler, "flux", line, schedule=schedule)) <= 1e-6
    assert f"width {size} height {size}" in line


def test_times_between_indices_and_a_late_start():
    line = setting(make_sampler("euler", timesteps=[998.5, 400]), "sd15")
    assert line == "No setting of ComfyUI samples like 'euler' here: ComfyUI rounds the times that a network is given."
    line = setting(make_sampler("lcm", num_inference_steps=50), "sd15", "v_prediction")
    assert line == (
        "No setting of ComfyUI samples like 'lcm' here: below index 100 its boundary scalings need LCM's own levels."
    )
    late = make_sampler("renoise", timesteps=[799, 399])
    line = setting(late, "sd15")
    assert line.endswith("Not equal: ComfyUI multiplies the initial noise by 0.9812 here, fewstep does not.")
    noise = draws()[0]
    theirs, sigmas = comfy_sampling.run(line, "sd", toy, noise, draws()[1:])
    share = float(SD_TABLE.alpha_sigma(799)[1])
    torch.testing.assert_close(theirs[0] / np.sqrt(1 + sigmas[0] ** 2), share * noise, rtol=1e-6, atol=0)
    flow = setting(make_sampler("euler", sigmas=[0.9, 0.4]), "sd3")
    assert "multiplies the initial noise by 0.9 here" in flow


def teacher(family, guidance_embed=None, zeros=False, network=None):
    """As much of a teacher as the line needs."""
    cls, schedule, scheduler, size, _ = FAMILIES[family]
    config = SimpleNamespace(force_zeros_for_empty_prompt=zeros)
    pipeline = SimpleNamespace(scheduler=SimpleNamespace(config=scheduler), config=config)
    return SimpleNamespace(
        pipeline=pipeline, denoiser=SimpleNamespace(schedule=schedule, network=network), family=object.__new__(cls),
        image_size=size, guidance_embed=guidance_embed,
    )  # fmt: skip


def test_guidance_is_said_as_comfyui_takes_it():
    """FLUX's embedded scale by FluxGuidance; SDXL's null condition, which is zeros, by ConditioningZeroOut."""
    card = Card("lightning", "euler", 4, "lora", "x", guidance_embed=2.5)
    line = usage_hint(card, teacher("flux", 3.5), sampler_of(card), "flow")
    assert line.endswith(", FluxGuidance 2.5") and comfy_sampling.read(line).guidance == 2.5
    assert "FluxGuidance" not in usage_hint(card, teacher("flux"), sampler_of(card), "flow")  # schnell has none
    line = usage_hint(card, teacher("sd15", 8.5), sampler_of(card), "epsilon")  # a UNet with an embedding of its own
    assert line == "ComfyUI cannot run this network: it has a guidance-scale embedding."
    card = Card("pcm", "euler", 4, "lora", "x", guidance_scale=2.0)
    line = usage_hint(card, teacher("sdxl", zeros=True), sampler_of(card), "epsilon")
    assert "cfg 2" in line and "ConditioningZeroOut for the negative prompt" in line
    assert setting(sampler_of(card), "sdxl", guidance=0.0) == setting(sampler_of(card), "sdxl", guidance=1.0)
    line = usage_hint(card, teacher("qwen", network=object.__new__(QwenNetwork)), sampler_of(card), "flow")
    assert "cfg 2" in line and line.endswith("Not equal: ComfyUI guides by the plain rule, not by this model's own.")
    for changed in (teacher("sd15"), teacher("sdxl")):
        assert "ZeroOut" not in usage_hint(card, changed, sampler_of(card), "epsilon")
