"""The model that ships: an ordinary diffusers folder, small, without pickles, and it knows what it was taught."""

from __future__ import annotations

import pytest
import torch

from fewstep import DDIMSampler, load_teacher, sample
from fewstep.models.families import shipped
from fewstep.scenes64.scenes import Scenes
from fewstep.scenes64.scenes.content import COLOURS

FOLDER = shipped("scenes-64")


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("scenes-64")


def test_it_is_small_and_holds_nothing_but_json_and_safetensors():
    files = [p for p in FOLDER.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 10_000_000
    assert {p.suffix for p in files} == {".json", ".safetensors"}


def test_diffusers_loads_and_draws_it_unchanged(teacher):
    """Its own scheduler at 10 steps against our DDIM, which ends at table index 0 as its config says."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a large blue heart", "two shapes"]
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    theirs = pipe(prompts, num_inference_steps=10, guidance_scale=3.0, latents=noise, output_type="latent").images
    cond = teacher.encode_prompts(prompts)
    ours = sample(teacher.denoiser, DDIMSampler(num_inference_steps=10, final="end"), noise, cond, 3.0).x0
    assert torch.allclose(ours, theirs, atol=1e-3 * float(theirs.abs().max()))


def test_captions_help_it_to_denoise(teacher):
    """Scenes of one thing at high noise: the true caption beats none, and none beats a wrong colour or size."""
    scenes = Scenes(3, numbers=(1, 0, 0, 0)).render(range(64))
    things = [scene.things[0] for scene in scenes.scenes]
    colours = list(COLOURS)
    captions = {
        "true": [f"a {t.size} {t.colour} {t.shape}" for t in things],
        "none": [""] * len(things),
        "colour": [f"a {t.size} {colours[(colours.index(t.colour) + 3) % len(colours)]} {t.shape}" for t in things],
        "size": [f"a {'small' if t.size == 'large' else 'large'} {t.colour} {t.shape}" for t in things],
    }
    images = torch.from_numpy(scenes.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    mean, _ = teacher.encode_images(images)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    x = teacher.denoiser.schedule.add_noise(mean, noise, 800)
    with torch.no_grad():
        errors = {
            name: float((teacher.denoiser(x, 800, teacher.encode_prompts(texts)).x0 - mean).square().mean())
            for name, texts in captions.items()
        }
    assert errors["true"] < 0.95 * errors["none"]
    assert errors["none"] < min(errors["colour"], errors["size"])


def test_its_autoencoder_keeps_what_is_drawn(teacher):
    images = torch.from_numpy(Scenes(4).render(range(32)).images).permute(0, 3, 1, 2).float() / 255
    mean, _ = teacher.encode_images(images * 2 - 1)
    assert (teacher.decode(mean) - images).abs().mean() < 0.03
    assert 0.8 < mean.std() < 1.2
