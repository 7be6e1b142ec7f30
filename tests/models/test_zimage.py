"""What only Z-Image has: guidance from 0, image tokens before the text's, a list of prompts that is written into."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from fewstep.models.families import as_teacher
from fewstep.models.families.zimage import ZImage
from fewstep.models.lora_files import read_lora
from fewstep.models.quantize import quantizable
from tests.models.pipelines import PROMPTS, SIZE, build


@pytest.fixture(scope="module")
def teacher():
    return as_teacher(build("z_image"), size=SIZE)


def test_texts_keep_their_own_lengths_and_the_prompts_stay(teacher):
    given = list(PROMPTS)
    found = teacher.family.encode(given)
    lengths = found["prompt_length"].tolist()
    assert lengths[0] < lengths[1] == found["prompt_embeds"].shape[1] and lengths[0] % 32
    assert given == PROMPTS


def test_guidance_counts_from_0_in_its_pipeline(teacher):
    """And is on above 0 there: our 1 is its 0."""
    assert teacher.family.guidance_arguments(1.0, None) == {"guidance_scale": 0.0}
    assert teacher.family.guidance_arguments(5.0, None) == {"guidance_scale": 4.0}
    assert teacher.guidance_scale == 5.0 and teacher.guidance_embed is None


@torch.no_grad()
def test_the_images_tokens_are_the_first(teacher):
    """A tap, row by row of the image, against what its block returns: 256 tokens of the image need no padding."""
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    cond, t, network, seen = teacher.encode_prompts(PROMPTS), torch.tensor([0.9, 0.3]), teacher.denoiser.network, []
    tap = list(network.tap_channels)[-1]
    block = network.transformer.layers[int(tap.removeprefix("block"))]
    handle = block.register_forward_hook(lambda _, __, out: seen.append(out))
    (found,) = network.features(noise, t, cond, [tap])
    handle.remove()
    rows, columns = (side // 2 for side in noise.shape[-2:])
    assert found.shape == (2, network.width, rows, columns) and seen[0].shape[1] > rows * columns
    for row in range(rows):
        assert torch.equal(found[:, :, row].transpose(1, 2), seen[0][:, row * columns : (row + 1) * columns])


@pytest.mark.parametrize("prefix, joint", [
    ("lora_unet__", "_"), ("lora_unet_", "_"), ("diffusion_model.", "."), ("transformer.", "."),
])  # fmt: skip
def test_published_loras_are_read_by_any_of_their_names(prefix, joint, teacher, tmp_path):
    """Two underscores: those of Z-Image-Fun-Lora-Distill, by VideoX-Fun's trainer."""
    layers = ["layers.0.attention.to_q", "context_refiner.0.feed_forward.w1", "noise_refiner.0.attention.to_k"]
    down, up = ("lora_down", "lora_up") if joint == "_" else ("lora_A", "lora_B")
    file = {}
    for layer in layers:
        out, into = teacher.family.base.get_submodule(layer).weight.shape
        name = prefix + layer.replace(".", joint)
        file |= {f"{name}.{down}.weight": torch.ones(2, into), f"{name}.{up}.weight": torch.ones(out, 2)}
    save_file(file, tmp_path / "lora.safetensors")
    found = read_lora(teacher.family.lora_parts, tmp_path / "lora.safetensors")
    assert {name.split(".lora_")[0] for name in found} == set(layers)


def test_networks_that_take_images_too_are_refused(teacher):
    network = SimpleNamespace(config=SimpleNamespace(**{**teacher.family.base.config, "siglip_feat_dim": 1152}))
    parts = {**teacher.pipeline.components, "transformer": network}
    with pytest.raises(ValueError, match=r"take images beside the prompt \(Omni, Edit\) are not supported"):
        ZImage(SimpleNamespace(**parts), SIZE)


def test_every_layer_of_its_blocks_can_be_quantised(teacher):
    """`layers` and both refiners; 6 layers stand outside."""
    base = teacher.family.base
    linear = [name for name, m in base.named_modules() if isinstance(m, torch.nn.Linear)]
    assert len(list(quantizable(base))) == len(linear) - 6
