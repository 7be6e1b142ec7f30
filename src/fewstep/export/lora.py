"""LoRA layouts that other programs read: PEFT's for diffusers and DiTs, kohya's for UNets everywhere else.

A student's tensors are ``unet.<layer>.lora_A.weight`` or ``transformer.<layer>...`` with the scale folded into B, so
alpha is the rank in every layout: programs that ignore alpha and programs that divide by the rank agree.

    lora     unet.down_blocks.0.attentions.0.proj_in.lora_A.weight         diffusers; ComfyUI too for transformers
    kohya    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight ComfyUI, A1111/Forge, InvokeAI, diffusers

No layout of a UNet works everywhere: ComfyUI finds 228 of SDXL's 788 layers in PEFT's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fewstep.models.families.registry import parts

ADAPTER_METADATA = "lora_adapter_metadata"
PARTS = {"lora_A": "lora_down", "lora_B": "lora_up"}


def layers(names: Iterable[str]) -> list[str]:
    """The adapted layers, sorted, with the network's part of the pipeline in front."""
    return sorted({name.rsplit(".lora_", 1)[0] for name in names if ".lora_" in name})


def network_name(names: Iterable[str]) -> str:
    """The pipeline's part that the layers are of: ``unet`` or ``transformer``.

    Raises:
        ValueError: the layers are not those of a diffusers pipeline.
    """
    found = {layer.split(".", 1)[0] for layer in layers(names)}
    if len(found) != 1 or not found <= set(parts()):
        raise ValueError(
            f"This student's network is none of a diffusers pipeline ({', '.join(parts())}): its LoRA has no layout "
            "that another program reads."
        )
    return found.pop()


def peft_layout(lora: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header) as diffusers' ``save_lora_weights`` writes them, LoraConfig in the header."""
    network = network_name(lora)
    ranks = {name: _rank(lora, name) for name in layers(lora)}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    other = {name.removeprefix(f"{network}."): r for name, r in ranks.items() if r != usual}
    config = {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": [name.removeprefix(f"{network}.") for name in ranks],
    }
    settings = {f"{network}.{key}": value for key, value in config.items()}
    return dict(lora), {ADAPTER_METADATA: json.dumps(settings, sort_keys=True)}


def kohya_layout(lora: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header) as kohya's trainer writes them, with diffusers' names of a UNet's layers.

    Args:
        prefix: how the names begin, the family's `kohya_prefix`.

    Raises:
        ValueError: the family has no such layout, or two layers get the same name.
    """
    part = f"{network_name(lora)}."
    if not prefix:
        raise ValueError("kohya's layout is one of UNets; ComfyUI and diffusers read a transformer's LoRA --to lora.")
    found: dict[str, Tensor] = {}
    for layer in layers(lora):
        key = f"{prefix}{layer.removeprefix(part).replace('.', '_')}"
        if f"{key}.alpha" in found:
            raise ValueError(f"kohya's layout has one name, {key}, for two layers of this network: export --to lora.")
        found |= {f"{key}.{name}.weight": lora[f"{layer}.{part}.weight"] for part, name in PARTS.items()}
        found[f"{key}.alpha"] = torch.tensor(float(_rank(lora, layer)), dtype=torch.float32)
    rank = str(max(_rank(lora, layer) for layer in layers(lora)))
    return found, {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}


def rounded(found: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A layout's tensors in ``dtype``, but for alpha: a rank above 256 is no number of 8 bits."""
    return {key: (t if key.endswith(".alpha") else t.to(dtype)).contiguous() for key, t in found.items()}


def _rank(lora: Mapping[str, Tensor], layer: str) -> int:
    return int(lora[f"{layer}.lora_A.weight"].shape[0])
