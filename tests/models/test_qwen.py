"""What is Qwen-Image's own: guidance that keeps lengths, texts of unequal length, latents by mean and deviation."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from fewstep.models.families import as_teacher
from fewstep.models.families.qwen import QwenImage, QwenNetwork, true_guidance
from fewstep.models.meta_pipeline import allocate
from fewstep.planning.estimate import fill
from tests.models.pipelines import SIZE, build


@pytest.fixture(scope="module")
def teacher():
    return as_teacher(build("qwen_image"), size=SIZE)


def test_guidance_gives_every_square_the_length_that_it_has_with_the_prompt(teacher):
    """By loops over the squares: classifier-free guidance, and then the length of the conditional flow."""
    draw = np.random.default_rng(0)
    with_, without = draw.normal(size=(2, 3, 4, 6)), draw.normal(size=(2, 3, 4, 6))
    scales = np.array([4.0, 1.5])
    guided = without + scales[:, None, None, None] * (with_ - without)
    for row, top, left in np.ndindex(2, 2, 3):
        square = (row, slice(None), slice(2 * top, 2 * top + 2), slice(2 * left, 2 * left + 2))
        guided[square] *= np.linalg.norm(with_[square]) / np.linalg.norm(guided[square])
    given = [torch.from_numpy(x) for x in (with_, without)]
    network = teacher.denoiser.network
    found = network.guide(*given, torch.from_numpy(scales).reshape(2, 1, 1, 1))
    np.testing.assert_allclose(found.numpy(), guided, rtol=1e-12)
    np.testing.assert_allclose(network.guide(*given, 1.0).numpy(), with_, rtol=1e-12, atol=1e-12)
    assert not network.guide(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), 4.0).any()  # and no NaN


@torch.no_grad()
def test_a_short_prompt_beside_a_long_one_is_predicted_as_alone(teacher):
    """Its padding is masked; where no prompt is padded there is no mask, as in the pipeline."""
    prompts = ["a red circle", "a blue square on green grass"]
    both = teacher.encode_prompts(prompts)
    assert both["prompt_length"].tolist() == sorted(both["prompt_length"].tolist())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *teacher.latent_shape, generator=generator)
    masks = []
    handle = teacher.family.base.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["encoder_hidden_states_mask"]), with_kwargs=True
    )
    together = teacher.denoiser(x, 0.7, both).output
    alone = [teacher.denoiser(x[i : i + 1], 0.7, teacher.encode_prompts([p])).output for i, p in enumerate(prompts)]
    handle.remove()
    assert (together - torch.cat(alone)).abs().max() <= 2.5e-6
    assert masks[0].sum(dim=1).tolist() == both["prompt_length"].tolist() and masks[1:] == [None, None]


@torch.no_grad()
def test_a_network_without_weights_is_given_tables_too(teacher):
    """Its rotary embedding keeps angles as plain attributes, which PyTorch's to_empty leaves on the meta device."""
    with torch.device("meta"):
        network = QwenNetwork(type(teacher.family.base).from_config(teacher.family.base.config))
    fill(allocate(network, "cpu"))
    x, cond = torch.zeros(1, *teacher.latent_shape), teacher.encode_prompts(["a red circle"])
    assert network(x, torch.ones(1), cond).isfinite().all()


@torch.no_grad()
def test_images_are_encoded_as_the_pipeline_for_images_encodes_them(teacher):
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pipeline = diffusers.QwenImageImg2ImgPipeline(**teacher.pipeline.components)
    mean, std = teacher.encode_images(images)
    generator, draws = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    theirs = pipeline._encode_vae_image(images.unsqueeze(2), generator)[:, :, 0]
    noise = torch.randn(theirs.shape, generator=draws)
    torch.testing.assert_close(mean + std * noise, theirs, rtol=1e-5, atol=1e-5)


def test_no_prompt_is_a_space_and_long_prompts_end_where_the_pipelines_call_ends_them(teacher):
    asked = []
    family = QwenImage(SimpleNamespace(**teacher.pipeline.components), SIZE)
    states = torch.ones(1, 3, 16)
    family.pipeline.encode_prompt = lambda prompts, **more: asked.append((prompts, more)) or (states, None)
    assert family.null()["prompt_length"].tolist() == [3] and asked[0][0] == [" "]
    assert asked[0][1]["max_sequence_length"] == 512  # encode_prompt alone: 1024
    assert family.guidance_arguments(1.0, None) == {"true_cfg_scale": 1.0}
    assert true_guidance(3.0) == {"true_cfg_scale": 3.0, "negative_prompt": " "}
    assert isinstance(teacher.denoiser.network, QwenNetwork)


@pytest.mark.parametrize("name, more", [
    ("QwenImageEditPlusPipeline", {}), ("QwenImagePipeline", {"zero_cond_t": True}),
    ("QwenImageLayeredPipeline", {"use_layer3d_rope": True}),
])  # fmt: skip
def test_models_that_take_an_image_beside_the_prompt_are_refused(name, more, teacher):
    config = SimpleNamespace(**{**teacher.family.base.config, **more})
    base = SimpleNamespace(config=config)
    with pytest.raises(ValueError, match=r"take an image beside the prompt .* use Qwen-Image itself"):
        QwenImage(SimpleNamespace(transformer=base, name=name))
