"""Image-to-image and inpainting: the latents of diffusers' own pipelines where they do the same."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

import fewstep
from fewstep.export import publish
from fewstep.export.pipeline import close_guidance
from fewstep.inference.images import as_masks, cells
from fewstep.inference.model import Model
from fewstep.models.families import as_teacher
from fewstep.students.card import Card
from tests.export.test_publish import finished, gap
from tests.models.pipelines import PROMPTS, SIZE, build

SIGMAS = [1.0, 0.75, 0.5, 0.25]
TRAILING = dict(timestep_spacing="trailing")
DDIM = dict(**TRAILING, set_alpha_to_one=True, clip_sample=False)


def photo(size=SIZE):
    rows, columns = np.mgrid[0:size, 0:size] / size
    return Image.fromarray((255 * np.stack([rows, columns, (rows + columns) % 1], -1)).astype(np.uint8))


def mask(size=SIZE):
    """The lower right quarter, as far as cells of eight pixels go."""
    image = Image.new("L", (size, size), 0)
    image.paste(255, (size // 2, size // 2, size, size))
    return image


def model_of(name, sampler):
    teacher = as_teacher(build(name), size=SIZE)
    return Model(teacher, teacher.denoiser, Card("", sampler, 4, "full", ""), 1.0)


def latents_of(pipeline):
    """The image as diffusers encodes it, the middle of its posterior."""
    vae = pipeline.vae
    mean = vae.encode(pipeline.image_processor.preprocess(photo())).latent_dist.mode()
    return (mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def theirs(kind, name, scheduler=None, seed=0, **call):
    """Latents of diffusers' pipeline of that kind from a tiny pipeline's parts."""
    import diffusers

    pipeline = build(name)
    if kind.startswith("LatentConsistency"):
        pipeline = copy.deepcopy(pipeline)
        close_guidance(as_teacher(pipeline, size=SIZE))
    parts = dict(pipeline.components)
    if scheduler is not None:
        cls, settings = scheduler
        parts["scheduler"] = getattr(diffusers, cls).from_config(pipeline.scheduler.config, **settings)
    more = {"requires_safety_checker": False} if name == "sd15" else {}
    pipe = getattr(diffusers, kind)(**parts, **more)
    pipe.set_progress_bar_config(disable=True)
    call = {"guidance_scale": 1.0, "num_inference_steps": 4, **call}
    generator = torch.Generator().manual_seed(seed)
    drawn = pipe(list(PROMPTS), generator=generator, output_type="latent", **call).images
    return pipe._unpack_latents(drawn, SIZE, SIZE, pipe.vae_scale_factor) if drawn.ndim == 3 else drawn


IMG2IMG = {
    "sd15": ("StableDiffusionImg2ImgPipeline", ("DDIMScheduler", DDIM), {}, "ddim"),
    "sdxl": ("StableDiffusionXLImg2ImgPipeline", ("EulerDiscreteScheduler", TRAILING), {}, "euler"),
    "sd3": ("StableDiffusion3Img2ImgPipeline", None, {"sigmas": SIGMAS}, "euler"),
    "flux": ("FluxImg2ImgPipeline", None, {"height": SIZE, "width": SIZE, "guidance_scale": 3.5}, "euler"),
    "z_image": ("ZImageImg2ImgPipeline", None, {"height": SIZE, "width": SIZE, "guidance_scale": 0.0}, "euler"),
}


@pytest.mark.parametrize("name, strength", [
    ("sd15", 0.6), ("sd15", 1.0), ("sdxl", 0.75), ("sd3", 0.6), ("flux", 0.75),
    ("z_image", 0.75), ("z_image", 0.6),
])  # fmt: skip
def test_img2img_is_diffusers_own(name, strength):
    kind, scheduler, call, sampler = IMG2IMG[name]
    expected = theirs(kind, name, scheduler, image=latents_of(build(name)), strength=strength, **call)
    mine = model_of(name, sampler).img2img(PROMPTS, photo(), strength, output_type="latent")
    assert gap(mine, expected) <= 1e-5


@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
def test_img2img_with_lcm_is_its_own_pipelines(strength):
    """All four steps below the strength; the general pipeline would have left one or two of them."""
    call = dict(image=latents_of(build("sd15")), strength=strength, original_inference_steps=50)
    expected = theirs("LatentConsistencyModelImg2ImgPipeline", "sd15", ("LCMScheduler", {}), **call)
    drawn = model_of("sd15", "lcm").generate(PROMPTS, image=photo(), strength=strength)
    assert gap(drawn.latents, expected) <= 1e-5
    assert drawn.description.count(",") == 4 and f"strength {strength:g}" in drawn.description


def test_img2img_with_guidance_and_a_negative_prompt():
    kind, scheduler, _, sampler = IMG2IMG["sd15"]
    options = dict(guidance_scale=2.5, negative_prompt=["blue"] * 2)
    expected = theirs(kind, "sd15", scheduler, image=latents_of(build("sd15")), strength=0.75, **options)
    mine = model_of("sd15", sampler).img2img(PROMPTS, photo(), 0.75, output_type="latent", **options)
    assert gap(mine, expected) <= 1e-4


@pytest.mark.parametrize("name, sampler, strength", [
    ("sd15", "ddim", 1.0), ("sd15", "ddim", 0.5), ("sd15", "lcm", 1.0), ("flux", "euler", 0.75),
])  # fmt: skip
def test_inpainting_is_diffusers_own(name, sampler, strength):
    scheduler = {"ddim": ("DDIMScheduler", DDIM), "lcm": ("LCMScheduler", {}), "euler": None}[sampler]
    kind = {"sd15": "StableDiffusionInpaintPipeline", "flux": "FluxInpaintPipeline"}[name]
    latents = latents_of(build(name))
    call = dict(image=latents, mask_image=mask(), strength=strength, height=SIZE, width=SIZE)
    if name == "flux":  # it encodes what it will not use
        call |= dict(masked_image_latents=build(name).image_processor.preprocess(photo()), guidance_scale=3.5)
    expected = theirs(kind, name, scheduler, **{"masked_image_latents": latents, **call})
    model = model_of(name, sampler)
    mine = model.inpaint(PROMPTS, photo(), mask(), strength, output_type="latent")
    assert gap(mine, expected) <= 1e-5
    side = SIZE // 8
    assert torch.allclose(mine[:, :, :side], latents[:, :, :side], atol=1e-6)


def test_pixels_outside_the_mask_are_those_of_the_image():
    """Also where a mask cuts through a cell, which is generated anew as a whole."""
    thin = Image.new("L", (SIZE, SIZE), 0)
    thin.paste(255, (13, 0, 15, SIZE))
    before = np.asarray(photo())
    touched = cells(as_masks(thin, photo(), (SIZE, SIZE)), 4)[0, 0]
    assert touched[:, 3].all() and touched.sum() == SIZE // 4
    drawn = np.asarray(model_of("sd15", "lcm").inpaint("a red circle", photo(), thin)[0])
    assert drawn.shape == before.shape
    outside = np.asarray(thin) == 0
    assert np.abs(drawn.astype(int) - before)[outside].max() <= 1 < np.abs(drawn.astype(int) - before)[~outside].max()


def test_images_of_any_size_and_number(tmp_path):
    model = model_of("sd15", "lcm")
    wide = Image.new("RGB", (200, 100), "red")
    wide.paste("blue", (40, 0, 160, 100))  # the middle square, which is what is left
    wide.save(tmp_path / "wide.png")
    square = Image.new("RGB", (SIZE, SIZE), "blue")
    one, other = (model.img2img("a", p, output_type="latent") for p in (tmp_path / "wide.png", square))
    assert torch.equal(one, other)
    both = model.img2img("a", [str(tmp_path / "wide.png"), photo()], output_type="latent")
    assert len(both) == 2 and not torch.equal(both[0], both[1])
    assert len(model.img2img(["a", "b"], square)) == 2


@pytest.mark.parametrize("options, match", [
    (dict(image="nothing.png"), "There is no image nothing.png"),
    (dict(image=__file__), "cannot be read as an image"),
    (dict(image=[]), "nothing to generate"),
    (dict(image=[photo()] * 3), "one for each of 2 prompts, not 3"),
    (dict(image=photo(), strength=0.0), "strength must be above 0"),
    (dict(image=photo(), strength=0.05), "use at least 0.08"),
    (dict(image=photo(), mask=Image.new("L", (8, 8), 255)), "mask is 8 x 8 pixels and its image 64 x 64"),
    (dict(image=photo(), mask=Image.new("L", (SIZE, SIZE), 9)), "The mask is empty"),
    (dict(image=photo(), mask=[mask()] * 3), "one for each of 2 images, not 3"),
    (dict(mask=mask()), "needs an image"),
    (dict(strength=0.5), "need an image"),
])  # fmt: skip
def test_invalid_options_are_one_sentence(options, match):
    with pytest.raises(ValueError, match=match):
        model_of("sd15", "lcm").generate(PROMPTS, **options)


def test_img2img_of_an_exported_folder_is_that_of_diffusers(tmp_path, monkeypatch):
    """LCM's own image-to-image pipeline on the folder that `fewstep export` wrote."""
    from diffusers import LatentConsistencyModelImg2ImgPipeline

    build("sd15").save_pretrained(tmp_path / "base")
    run = finished(tmp_path / "run", tmp_path / "base")
    monkeypatch.setattr(publish, "check_round_trip", lambda _, __, layers: publish.RoundTrip(0.0, layers))
    publish.export(run, "diffusers", tmp_path / "out")
    pipe = LatentConsistencyModelImg2ImgPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    call = dict(image=latents_of(pipe), strength=0.5, num_inference_steps=4, output_type="latent")
    expected = pipe(PROMPTS, generator=torch.Generator().manual_seed(0), **call).images
    for path in (run, tmp_path / "out"):
        mine = fewstep.load(path).img2img(PROMPTS, photo(), 0.5, output_type="latent")
        assert gap(mine, expected) <= 1e-5
