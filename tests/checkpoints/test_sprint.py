"""Sana-Sprint by its name and by its folder: the images of its own pipeline, at two and at four steps."""

from __future__ import annotations

import pytest
import torch

import fewstep
from tests.models.pipelines import PROMPTS, SIZE, build


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("sprint") / "model"
    build("sana_sprint").save_pretrained(place)
    return place


def theirs(steps, **more):
    call = dict(num_inference_steps=steps, height=SIZE, width=SIZE, use_resolution_binning=False, output_type="latent")
    call |= {} if steps == 2 else {"intermediate_timesteps": None}
    return build("sana_sprint")(PROMPTS, generator=torch.Generator().manual_seed(3), **call, **more).images


@pytest.mark.slow
@pytest.mark.parametrize("steps, scale", [(2, None), (4, None), (4, 7.0)])
def test_the_published_file_samples_as_its_pipeline(steps, scale, folder):
    """To 1e-4: diffusers writes 1.57080 for pi / 2 in float32."""
    with pytest.warns(UserWarning, match="Licence of sana-sprint-1.6b: NSCL v2-custom"):
        model = fewstep.load("sana-sprint-1.6b", base=str(folder), size=SIZE)
    mine = model.sample(
        PROMPTS, steps, generator=torch.Generator().manual_seed(3), output_type="latent", guidance_scale=scale
    )
    wanted = theirs(steps, **({} if scale is None else {"guidance_scale": scale}))
    assert (mine - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.slow
def test_its_folder_is_a_few_step_model_too(folder):
    model = fewstep.load(folder, size=SIZE)
    assert (model.card.sampler, model.card.num_inference_steps, model.guidance_scale) == ("renoise", 2, 1.0)
    mine = model.sample(PROMPTS, generator=torch.Generator().manual_seed(3), output_type="latent")
    assert (mine - theirs(2)).abs().max() <= 1e-4 * mine.abs().max()
