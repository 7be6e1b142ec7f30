"""What a family says of its pipeline, against diffusers' own classes; and what only other programs know, as numbers."""

from __future__ import annotations

import inspect
from typing import get_type_hints

import diffusers
import pytest

from fewstep.models.families.chroma import Chroma
from fewstep.models.families.flux import Flux
from fewstep.models.families.flux2 import Flux2, Klein
from fewstep.models.families.krea2 import Krea2
from fewstep.models.families.pixart import PixArt
from fewstep.models.families.qwen import QwenImage
from fewstep.models.families.qwen21 import QwenImage21
from fewstep.models.families.registry import FAMILIES
from fewstep.models.families.sana import Sana, SanaSprint
from fewstep.models.families.sd3 import StableDiffusion3
from fewstep.models.families.unet import StableDiffusion, StableDiffusionXL
from fewstep.models.families.zimage import ZImage

PIPELINES = {
    StableDiffusion: diffusers.StableDiffusionPipeline,
    StableDiffusionXL: diffusers.StableDiffusionXLPipeline,
    StableDiffusion3: diffusers.StableDiffusion3Pipeline,
    Flux: diffusers.FluxPipeline,
    PixArt: diffusers.PixArtAlphaPipeline,
    Sana: diffusers.SanaPipeline,
    SanaSprint: diffusers.SanaSprintPipeline,
    QwenImage: diffusers.QwenImagePipeline,
    ZImage: diffusers.ZImagePipeline,
    Klein: diffusers.Flux2KleinPipeline,
    Flux2: diffusers.Flux2Pipeline,
    Krea2: diffusers.Krea2Pipeline,
    Chroma: diffusers.ChromaPipeline,
    QwenImage21: diffusers.QwenImage21Pipeline,
}
# Betas that ComfyUI takes for a model without a scheduler's config: those of latent diffusion, and of PixArt's DiT.
BETAS = {
    StableDiffusion: ("scaled_linear", 0.00085, 0.012), StableDiffusionXL: ("scaled_linear", 0.00085, 0.012),
    StableDiffusion3: None, Flux: None, PixArt: ("linear", 0.0001, 0.02), Sana: None, SanaSprint: None,
    QwenImage: None,
    ZImage: None,
    Klein: None, Flux2: None,
    Krea2: None,
    Chroma: None,
    QwenImage21: None,
}  # fmt: skip
# Guidance of a teacher's samples: where it is not ours, the default of diffusers' pipeline, or the one of the model's
# card, in our convention.
GUIDANCE = {
    Sana: 4.5, SanaSprint: 4.5,
    QwenImage: 4.0,
    ZImage: 1 + 4.0,
    Klein: 4.0, Flux2: 4.0,
    Krea2: 1 + 3.5,
    Chroma: 5.0,
    QwenImage21: 1.0,
}  # fmt: skip
# Side in pixels of one token, where it is not two latents of eight pixels.
TOKEN = {Sana: 32, SanaSprint: 32}
# Prefix of a UNet's layers in files by kohya's trainer, which A1111 and ComfyUI look for; its name for the base.
KOHYA = {StableDiffusion: ("lora_unet_", "sd_v1"), StableDiffusionXL: ("lora_unet_", "sdxl_base_v1-0")}


def test_every_family_is_here():
    assert set(FAMILIES) == set(PIPELINES) == set(BETAS)


@pytest.mark.parametrize("family", PIPELINES, ids=lambda family: family.names[0])
def test_its_parts_are_those_of_its_pipeline(family):
    hints = get_type_hints(PIPELINES[family].__init__)
    named = (name for name in hints if name.startswith("text_encoder") and not name.endswith("_layers"))
    assert family.text_encoders == tuple(named)
    assert family.part in hints and hints[family.part].__name__ == family.network_class
    assert set(family.optional_encoders) <= set(family.text_encoders)


@pytest.mark.parametrize("family", PIPELINES, ids=lambda family: family.names[0])
def test_whether_its_pipeline_hands_over_levels_of_its_own(family):
    """FLUX's lays 1, (n - 1) / n, ..., 1 / n itself; the others leave it to the scheduler."""
    source = inspect.getsource(PIPELINES[family].__call__)
    laid = "np.linspace(1.0, 1 / num_inference_steps" in source or "get_default_z_image_sigmas" in source
    assert family.passes_sigmas == laid


@pytest.mark.parametrize("family", PIPELINES, ids=lambda family: family.names[0])
def test_what_other_programs_know_of_it(family):
    assert family.comfyui_betas == BETAS[family]
    prefix, base = KOHYA.get(family, ("", ""))
    assert family.kohya_prefix == prefix and set(family.kohya_bases.values()) == ({base} if base else set())
    assert family.guidance_scale == GUIDANCE.get(family, 3.0)  # ours, unless the network embeds the scale
    assert family.pixels_per_token == TOKEN.get(family, 16) ** 2
