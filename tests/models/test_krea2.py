"""What only Krea 2 has: states of many layers for every token, padding in the middle, a shift by what the model is."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.export.comfyui import forms_for_comfyui
from fewstep.models.families import as_teacher
from fewstep.models.families.krea2 import Krea2
from fewstep.models.quantize import quantizable
from fewstep.students.card import Card
from tests.models.pipelines import PROMPTS, SIZE, build


@pytest.fixture(scope="module")
def teacher():
    return as_teacher(build("krea2"), size=SIZE)


@torch.no_grad()
def test_real_tokens_alone_are_kept_and_say_what_all_did(teacher):
    """Against the pipeline's own 512 tokens with their mask, whose padding lies before the template's end."""
    embeds, masks = build("krea2").encode_prompt(list(PROMPTS))
    cond = teacher.encode_prompts(PROMPTS)
    lengths = cond["prompt_length"].tolist()
    assert embeds.shape[1] == 512 and lengths == masks.sum(dim=1).tolist() and lengths[0] < lengths[1]
    assert cond["prompt_embeds"].shape == (2, lengths[1], 3, 16) and not masks[:, lengths[1]].any()
    assert masks[:, -5:].all()
    for kept, text, mask, length in zip(cond["prompt_embeds"], embeds, masks, lengths, strict=True):
        assert torch.equal(kept[:length], text[mask])


def test_guidance_counts_from_0_in_its_pipeline(teacher):
    assert teacher.family.guidance_arguments(1.0, None) == {"guidance_scale": 0.0}
    assert teacher.family.guidance_arguments(4.5, None) == {"guidance_scale": 3.5}


def test_what_is_distilled_says_so():
    """Shifts by the pipelines' formulas: 2.475 for 4,096 tokens, and e^1.15 where the index says is_distilled."""
    raw, turbo = (as_teacher(build(name)) for name in ("krea2", "krea2_turbo"))
    mu = 0.5 + 0.65 * (raw.family.tokens - 256) / (6400 - 256)
    assert raw.denoiser.schedule.shift_at(4) == pytest.approx(math.exp(mu), rel=1e-12)
    assert raw.family.shift(dict(raw.pipeline.scheduler.config), 4096, {}) == pytest.approx(2.475, abs=5e-4)
    for size in (SIZE, None):
        schedule = as_teacher(build("krea2_turbo"), size=size).denoiser.schedule
        assert schedule.shift_at(8) == pytest.approx(math.exp(1.15), rel=1e-12)
    assert (raw.family.few_steps, raw.guidance_scale) == (None, 4.5)
    assert (turbo.family.few_steps, turbo.guidance_scale) == (8, 1.0)  # which its folder is sampled by


@torch.no_grad()
def test_the_images_tokens_are_the_last(teacher):
    """A tap, row by row of the image, against what its block returns."""
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    cond, t, network, seen = teacher.encode_prompts(PROMPTS), torch.tensor([0.9, 0.3]), teacher.denoiser.network, []
    tap = list(network.tap_channels)[-1]
    block = network.transformer.transformer_blocks[int(tap.removeprefix("block"))]
    handle = block.register_forward_hook(lambda _, __, out: seen.append(out))
    (found,) = network.features(noise, t, cond, [tap])
    handle.remove()
    rows, columns = (side // 2 for side in noise.shape[-2:])
    text = seen[0].shape[1] - rows * columns
    assert found.shape == (2, network.width, rows, columns) and text == int(cond["prompt_length"].max())
    for row in range(rows):
        mine = found[:, :, row].transpose(1, 2)
        assert torch.equal(mine, seen[0][:, text + row * columns : text + (row + 1) * columns])


def test_a_prompt_of_507_tokens_is_read_and_one_more_is_not(teacher):
    """512 are kept, of which the template's end takes 5; the tokenizer has a token for each word."""
    for words, all_read in ((507, True), (508, False)):
        prompt = " ".join(["red"] * words)
        _, masks = build("krea2").encode_prompt([prompt])
        assert int(masks.sum()) == 512
        assert (teacher.family.cut_off([prompt]) == "") == all_read


def test_comfyui_reads_its_loras_and_no_whole_network_under_diffusers_names(teacher):
    """It converts networks of AuraFlow, PixArt, Z-Image, FLUX and SD3, known by names that this one lacks."""
    marks = [
        "joint_transformer_blocks.0.attn.add_k_proj", "pos_embed.proj", "noise_refiner.0.attention.norm_k",
        "x_embedder", "transformer_blocks.0.attn.add_q_proj",
    ]  # fmt: skip
    names = {name for name, _ in teacher.family.base.named_modules()}
    assert names.isdisjoint(marks) and not Krea2.comfyui_networks
    card = Card("lcm", "lcm", 4, "lora", "krea2", rank=2)
    for to in ("merged", "diffusers"):
        assert forms_for_comfyui(to, card, teacher.family) == " (ComfyUI reads --to lora, not this one)"
    assert forms_for_comfyui("lora", card, teacher.family) == ""


def test_every_layer_of_its_blocks_can_be_quantised(teacher):
    base = teacher.family.base
    linear = [name for name, m in base.named_modules() if isinstance(m, torch.nn.Linear)]
    assert len(list(quantizable(base))) == len(linear) - 8
