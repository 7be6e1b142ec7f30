"""FLUX.2's own: the shift of n steps, whitened squares, features behind the text, few-step models."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from fewstep.export.pipeline import put_student
from fewstep.inference.load import _few_step
from fewstep.models.families import as_teacher, folder, load_teacher
from fewstep.models.families.flux2 import Flux2, Klein
from fewstep.students.card import Card
from tests.models.pipelines import PROMPTS, SIZE, build


@pytest.mark.parametrize("cls", [Flux2, Klein])
def test_the_shift_is_that_of_the_pipelines_at_any_size_and_number_of_steps(cls):
    for size in (256, 512, 1024, 1056, 2048):
        tokens = (size // 16) ** 2
        shift = cls.shift({}, tokens, {})
        for n in (1, 4, 8, 50, 200):
            assert shift(n) == pytest.approx(np.exp(compute_empirical_mu(tokens, n)), rel=1e-12)
    assert Klein.shift({}, 4096, {})(4) == pytest.approx(9.887, abs=5e-4)  # at 50 steps it is 7.564
    assert Klein.shift({}, 4096, {})(50) == pytest.approx(7.564, abs=5e-4)


def test_a_schedule_of_its_own_is_kept():
    """A student's export has a fixed shift."""
    pipeline = copy.copy(build("klein_base"))
    told = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": False, "shift": 3.0}
    pipeline = SimpleNamespace(**pipeline.components, scheduler_=None, config={})
    pipeline.scheduler = SimpleNamespace(config=told)
    schedule = Klein(pipeline, SIZE).schedule()
    assert (schedule.shift_at(4), schedule.shift_at(50)) == (3.0, 3.0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["klein_base", "flux2_dev"])
def test_images_are_encoded_as_in_the_pipeline(name):
    pipeline, images = build(name), torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).tanh()
    teacher = as_teacher(pipeline, size=SIZE)
    mean, std = teacher.encode_images(images)
    theirs = pipeline._encode_vae_image(images, torch.Generator().manual_seed(1))
    assert mean.shape == (2, *teacher.latent_shape) and not std.any()
    torch.testing.assert_close(mean, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_pipelines_latents_are_those_of_the_family():
    """klein's are what its autoencoder decodes, dev's are tokens."""
    for name in ("klein", "flux2_dev"):
        teacher = as_teacher(build(name), size=SIZE)
        found = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
        call = {"num_inference_steps": 1, "height": SIZE, "width": SIZE, "output_type": "latent", "latents": found}
        theirs = build(name)(prompt=PROMPTS[0], **call).images
        cond = teacher.encode_prompts(PROMPTS[:1])
        mine = found - teacher.denoiser(found, 1.0, cond).output
        torch.testing.assert_close(teacher.family.output_latents(mine), theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_features_of_single_blocks_are_the_images_tokens():
    teacher = as_teacher(build("klein_base"), size=SIZE)
    network, cond = teacher.denoiser.network, teacher.encode_prompts(PROMPTS)
    x, t = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0)), torch.full((2,), 0.5)
    block, seen = network.transformer.single_transformer_blocks[0], []
    handle = block.register_forward_hook(lambda _, args, output: seen.append(output))
    try:
        network(x, t, cond)
        with pytest.MonkeyPatch.context() as patch:  # a deeper network, whose first half reaches a single block
            patch.setattr(type(network), "tap_channels", {"block0": 32, "block2": 32})
            first, last = network.features(x, t, cond, ["block0", "block2"])
    finally:
        handle.remove()
    height, width = x.shape[-2:]
    wanted = seen[0][:, cond["prompt_embeds"].shape[1] :].transpose(1, 2).unflatten(2, (height, width))
    assert torch.equal(last, wanted) and first.shape == last.shape and len(seen) == 2


def test_a_distilled_klein_is_sampled_in_four_steps_without_guidance():
    teacher, base = (as_teacher(build(name), size=SIZE) for name in ("klein", "klein_base"))
    card = _few_step(teacher)
    assert (card.num_inference_steps, card.sampler, teacher.guidance_scale) == (4, "ddim", 1.0)
    assert (_few_step(base).num_inference_steps, base.guidance_scale) == (50, 4.0)
    dev = as_teacher(build("flux2_dev"), size=SIZE, guidance_embed=2.5)
    assert (dev.guidance_embed, dev.guidance_scale) == (2.5, 1.0)


def test_another_models_autoencoder_is_refused():
    parts = SimpleNamespace(**{**build("klein_base").components, "vae": build("sd3").vae})
    with pytest.raises(ValueError, match="squares of 4 channels, but its autoencoder makes 8"):
        Klein(parts, SIZE)


def test_a_guidance_scale_embedding_that_no_weights_can_hold_is_refused():
    card = Card("lcm", "lcm", 4, "lora", "", rank=2, extra_inputs=("guidance_embed",), guidance_embed=4.0)
    with pytest.raises(ValueError, match=r"of Flux2Transformer2DModel has no bias: .*method.guidance_embed\.$"):
        put_student(as_teacher(build("klein_base"), size=SIZE), card, {"extras.project.guidance_embed.weight": None})


@pytest.mark.parametrize("there", [False, True])
def test_dev_says_in_one_sentence_that_it_needs_torchvision(there, tmp_path, monkeypatch):
    parts = {"tokenizer": ["transformers", "PixtralProcessor"], "text_encoder": ["transformers", "T5EncoderModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Flux2Pipeline", **parts}))
    monkeypatch.setattr(folder, "find_spec", lambda name: there or None)
    with pytest.raises(ValueError) as error:
        load_teacher(str(tmp_path))
    assert ("needs torchvision, which is not installed" in str(error.value)) != there
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_a_long_prompt_is_measured_by_the_tokenizer_in_a_processor():
    parts = {**build("flux2_dev").components, "tokenizer": SimpleNamespace(tokenizer=build("flux2_dev").tokenizer)}
    family = Flux2(SimpleNamespace(**parts), SIZE)
    assert not family.cut_off(PROMPTS)
    assert "longer than the 512 tokens" in family.cut_off(["a red circle " * 300])
