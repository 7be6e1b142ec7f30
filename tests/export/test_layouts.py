"""LoRA keys of full-size networks: every layer that a student adapts is found by diffusers and by ComfyUI."""

from __future__ import annotations

import json
from functools import cache
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import save_file

from fewstep.export.header import modelspec, tensor_hash, write
from fewstep.export.lora import ADAPTER_METADATA, kohya_layout, layers, peft_layout
from fewstep.models.families import UNET_LORA_TARGETS
from fewstep.models.families.chroma import ChromaNetwork
from fewstep.models.families.flux import FluxNetwork
from fewstep.models.families.flux2 import Flux2Network
from fewstep.models.families.krea2 import Krea2Network
from fewstep.models.families.qwen import QwenNetwork
from fewstep.models.families.qwen21 import Qwen21Network
from fewstep.models.families.registry import FAMILIES
from fewstep.models.families.sd3 import SD3Network
from fewstep.models.families.unet import StableDiffusion, StableDiffusionXL
from fewstep.models.families.zimage import ZImageNetwork
from fewstep.models.lora import matching
from fewstep.students.card import Card
from tests.export.comfy import (
    SD15,
    SDXL,
    chroma_names,
    flux2_names,
    flux_names,
    krea2_names,
    qwen21_names,
    qwen_names,
    sd3_names,
    unet_names,
    zimage_names,
)  # fmt: skip

CONFIGS = {  # of the published models, as far as they shape the network
    "SD1.5": dict(
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), cross_attention_dim=768,
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, block_out_channels=(320, 640, 1280, 1280),
        attention_head_dim=8,
    ),
    "SDXL": dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=2048,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    ),
    "SD3": dict(
        sample_size=128, num_layers=24, num_attention_heads=24, attention_head_dim=64, joint_attention_dim=4096,
        caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=192,
    ),
    "FLUX": dict(guidance_embeds=True),
    "Qwen-Image": {},
    "Qwen-Image-2.1": {},
    "Z-Image": {},
    "Chroma": {},
    "klein": dict(
        num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False,
    ),
    "Krea 2": {},
}  # fmt: skip
CLASSES = {
    "SD3": diffusers.SD3Transformer2DModel, "FLUX": diffusers.FluxTransformer2DModel,
    "Qwen-Image": diffusers.QwenImageTransformer2DModel,
    "Qwen-Image-2.1": diffusers.QwenImage21Transformer2DModel,
    "Z-Image": diffusers.ZImageTransformer2DModel,
    "klein": diffusers.Flux2Transformer2DModel,
    "Krea 2": diffusers.Krea2Transformer2DModel,
    "Chroma": diffusers.ChromaTransformer2DModel,
}  # fmt: skip
TARGETS = {
    "SD3": SD3Network.lora_targets, "FLUX": FluxNetwork.lora_targets,
    "Qwen-Image": QwenNetwork.lora_targets,
    "Qwen-Image-2.1": Qwen21Network.lora_targets,
    "Z-Image": ZImageNetwork.lora_targets,
    "klein": Flux2Network.lora_targets,
    "Krea 2": Krea2Network.lora_targets,
    "Chroma": ChromaNetwork.lora_targets,
}  # fmt: skip
PIPELINES = {
    "SD1.5": diffusers.StableDiffusionPipeline, "SDXL": diffusers.StableDiffusionXLPipeline,
    "SD3": diffusers.StableDiffusion3Pipeline, "FLUX": diffusers.FluxPipeline,
    "Qwen-Image": diffusers.QwenImagePipeline,
    "Qwen-Image-2.1": diffusers.QwenImage21Pipeline,
    "Z-Image": diffusers.ZImagePipeline,
    "klein": diffusers.Flux2KleinPipeline,
    "Krea 2": diffusers.Krea2Pipeline,
    "Chroma": diffusers.ChromaPipeline,
}  # fmt: skip
PREFIX = StableDiffusion.kohya_prefix
COUNT = {
    "SD1.5": 278, "SDXL": 788, "SD3": 340, "FLUX": 504,
    "Qwen-Image": 846,
    "Qwen-Image-2.1": 232,
    "Z-Image": 276,
    "klein": 104,
    "Krea 2": 263,
    "Chroma": 421,
}  # fmt: skip
COMFY = {
    "SD1.5": lambda: unet_names(**SD15), "SDXL": lambda: unet_names(**SDXL), "SD3": sd3_names, "FLUX": flux_names,
    "Qwen-Image": qwen_names,
    "Qwen-Image-2.1": qwen21_names,
    "Z-Image": zimage_names,
    "klein": flux2_names,
    "Krea 2": krea2_names,
    "Chroma": chroma_names,
}  # fmt: skip


@cache
def network(name):
    with torch.device("meta"):
        return CLASSES.get(name, diffusers.UNet2DConditionModel)(**CONFIGS[name])


@cache
def lora(name):
    """Rank 1 on every layer that a student of this family adapts, as a run saves it."""
    place, made, found = "transformer" if name in CLASSES else "unet", network(name), {}
    for layer in matching(made, TARGETS.get(name, UNET_LORA_TARGETS)):
        out, into, *kernel = made.get_submodule(layer).weight.shape
        found[f"{place}.{layer}.lora_A.weight"] = torch.zeros(1, into, *kernel)
        found[f"{place}.{layer}.lora_B.weight"] = torch.ones(out, 1, *[1] * len(kernel))
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_comfyui_finds_every_layer(name):
    keys, _ = kohya_layout(lora(name), PREFIX) if name in ("SD1.5", "SDXL") else peft_layout(lora(name))
    known = COMFY[name]()
    mine = {key.removesuffix(".alpha").split(".lora_")[0] for key in keys}
    assert len(mine) == COUNT[name] == len(layers(lora(name)))
    assert mine <= known.keys()
    assert len({known[key] for key in mine}) == COUNT[name]  # no two change the same weight


TIME = {
    "SD1.5": "time_embedding.linear_1", "SDXL": "time_embedding.linear_1", "Z-Image": "t_embedder.mlp.0",
    "Krea 2": "time_embed.linear_1", "klein": "time_guidance_embed.timestep_embedder.linear_1",
    "Chroma": "distilled_guidance_layer.in_proj",
}  # fmt: skip
"""The layer that holds the target times of an exported student."""


@pytest.mark.parametrize("name", CONFIGS)
def test_where_comfyui_finds_the_layer_of_the_target_times(name):
    """Its family says so: of FLUX.2 and Chroma it finds none."""
    layer, made = TIME.get(name, "time_text_embed.timestep_embedder.linear_1"), network(name)
    out, into = made.get_submodule(layer).weight.shape
    place = "transformer" if name in CLASSES else "unet"
    one = {f"{place}.{layer}.lora_A.weight": torch.zeros(1, into), f"{place}.{layer}.lora_B.weight": torch.ones(out, 1)}
    keys, _ = kohya_layout(one, PREFIX) if name in ("SD1.5", "SDXL") else peft_layout(one)
    family = next(cls for cls in FAMILIES if cls.network_class == type(made).__name__)
    found = {key.removesuffix(".alpha").split(".lora_")[0] for key in keys} <= COMFY[name]().keys()
    assert found == family.comfyui_time_lora


@pytest.mark.parametrize("layout", ["lora", "kohya"])
@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_finds_every_layer(name, layout):
    """What diffusers' loader makes of the file's keys, name by name, and of the scale that goes with them."""
    if layout == "kohya" and name in CLASSES:
        with pytest.raises(ValueError, match="one of UNets"):
            kohya_layout(lora(name), "")
        return
    keys, _ = peft_layout(lora(name)) if layout == "lora" else kohya_layout(lora(name), PREFIX)
    place = "transformer" if name in CLASSES else "unet"
    told = {"unet_config": network(name).config} if name == "SDXL" else {}
    found, alphas = PIPELINES[name].lora_state_dict(dict(keys), **told), {}
    if isinstance(found, tuple):
        found, alphas = found[:2]
    found = {key.removeprefix(f"{place}."): t for key, t in found.items()}
    if "lora_A" not in next(iter(found)):  # what its loader does with layouts that are not PEFT's
        found = convert_unet_state_dict_to_peft(found)
    modules = {n for n, _ in network(name).named_modules()}
    mine = {key.rsplit(".lora_", 1)[0] for key in found}
    assert len(mine) == COUNT[name] and mine <= modules
    assert all(float(alpha) == 1.0 for alpha in (alphas or {}).values())


def test_the_header_says_rank_as_alpha():
    from peft import LoraConfig

    two = {k: torch.cat([t, t], dim=0 if "lora_A" in k else 1) for k, t in lora("SD1.5").items() if "mid_block" in k}
    config = json.loads(peft_layout(lora("SD1.5") | two)[1][ADAPTER_METADATA])
    made = LoraConfig(**{key.removeprefix("unet."): value for key, value in config.items()})
    assert (made.r, made.lora_alpha) == (1, 1) and len(made.target_modules) == COUNT["SD1.5"]
    assert made.rank_pattern == made.alpha_pattern and set(made.rank_pattern.values()) == {2}
    assert all("mid_block" in name for name in made.rank_pattern)


def test_kohya_names_that_fall_together_are_refused():
    pair = {f"unet.{n}.lora_{k}.weight": torch.zeros(1, 1) for n in ("a.b_c", "a_b.c") for k in "AB"}
    with pytest.raises(ValueError, match="one name, lora_unet_a_b_c"):
        kohya_layout(pair, PREFIX)


def test_a_network_of_no_pipeline_has_no_layout():
    with pytest.raises(ValueError, match="none of a diffusers pipeline"):
        peft_layout({"middle.lora_A.weight": torch.zeros(1, 1), "middle.lora_B.weight": torch.zeros(1, 1)})


def test_the_hash_is_that_of_the_tensors_bytes(tmp_path):
    """As modelspec has it: 0x and the SHA-256 of what follows the header, whatever the header says."""
    import hashlib

    tensors = {"a": torch.arange(4.0), "b": torch.ones(3, dtype=torch.float16)}
    write(tmp_path / "x.safetensors", tensors, {"modelspec.title": "t"})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        said = file.metadata()
    bytes_of = [t.numpy().tobytes() for t in (tensors["a"], tensors["b"])]  # safetensors: widest dtype first
    assert said["modelspec.hash_sha256"] == "0x" + hashlib.sha256(b"".join(bytes_of)).hexdigest()
    save_file(tensors, tmp_path / "y.safetensors", {"other": "header"})
    assert tensor_hash(tmp_path / "y.safetensors") == said["modelspec.hash_sha256"]


def pruned(name, **changed):
    """The family of a full-size UNet on the meta device, with parts of its config changed."""
    with torch.device("meta"):
        made = diffusers.UNet2DConditionModel(**{**CONFIGS[name], **changed})
    return (StableDiffusionXL if name == "SDXL" else StableDiffusion)(SimpleNamespace(unet=made))


@pytest.mark.parametrize("name, changed, wanted", [
    ("SD1.5", {}, "stable-diffusion-v1"),
    ("SD1.5", {"layers_per_block": 1, "mid_block_type": None, "block_out_channels": (320, 640, 1280),  # BK-SDM-Tiny
               "down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3},
     "stable-diffusion-v1"),
    ("SD1.5", {"block_out_channels": (320, 640), "down_block_types": ("CrossAttnDownBlock2D",) * 2,
               "up_block_types": ("CrossAttnUpBlock2D",) * 2}, "stable-diffusion-v1"),
    ("SD1.5", {"block_out_channels": (160, 320, 640, 640), "layers_per_block": 1}, "stable-diffusion-v1"),
    ("SD1.5", {"cross_attention_dim": 1024, "layers_per_block": 1}, "stable-diffusion-v2-512"),
    ("SD1.5", {"cross_attention_dim": 1024, "sample_size": 96, "layers_per_block": 1}, "stable-diffusion-v2-768-v"),
    ("SD1.5", {"cross_attention_dim": 64}, "UNet2DConditionModel"),
    ("SDXL", {}, "stable-diffusion-xl-v1-base"),
    ("SDXL", {"transformer_layers_per_block": (1, 1, 2)}, "stable-diffusion-xl-v1-base"),  # Segmind-Vega
    ("SDXL", {"transformer_layers_per_block": (1, 2, 4)}, "segmind-stable-diffusion-1b"),
    ("SDXL", {"transformer_layers_per_block": [1, [2, 2], [4, 4]],
              "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1]}, "segmind-stable-diffusion-1b"),
    ("SDXL", {"cross_attention_dim": 64}, "UNet2DConditionModel"),
])  # fmt: skip
def test_pruned_models_have_an_architecture_too(name, changed, wanted):
    """One that programs know; SSD-1B's own, by which alone SwarmUI can tell it from SDXL."""
    family = pruned(name, **changed)
    assert family.architecture == wanted
    header = modelspec(Card("lcm", "lcm", 4, "lora", "x"), family, "t", 512, "epsilon", "h", "a/b", True)
    assert header["modelspec.architecture"] == f"{wanted}/lora"
    known = {"stable-diffusion-v1": "sd_v1", "UNet2DConditionModel": None}
    assert header.get("ss_base_model_version") == known.get(wanted, "sdxl_base_v1-0" if name == "SDXL" else None)
