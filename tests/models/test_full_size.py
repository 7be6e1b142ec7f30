"""Networks at full size on the meta device: layers, LoRAs and parameters, counted apart from the code."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from fewstep.models.families import find_family
from fewstep.models.lora import matching


@dataclass(frozen=True)
class Full:
    """A published network.

    Attributes:
        network: its class in diffusers. config: what differs from that class's defaults.
        linear: linear layers, of which so many are outside of the blocks: (all, outside).
        adapted: layers that our LoRA adapts by default.
        rank64: parameters of a LoRA of rank 64 of every linear layer, in millions.
        parameters: of the network, in billions. taps: of a discriminator, and their channels.
    """

    network: str
    linear: tuple[int, int]
    adapted: int
    rank64: float
    parameters: float
    taps: tuple[tuple[int, ...], int]
    config: dict[str, Any] = field(default_factory=dict)


_SMALL_SANA = {
    "num_layers": 28, "num_attention_heads": 36, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}  # fmt: skip
_KLEIN = {
    "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
    "guidance_embeds": False,
}  # fmt: skip
_KLEIN_9B = {
    **_KLEIN,
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}
NETWORKS = {  # of ../families.md's tables, from diffusers' classes
    "sana 1.6b": Full("SanaTransformer2DModel", (166, 6), 206, 48, 1.60, ((1, 4, 6, 9), 2240)),
    "sana 0.6b": Full("SanaTransformer2DModel", (230, 6), 286, 34, 0.59, ((2, 6, 9, 13), 1152), _SMALL_SANA),
    "klein 4b": Full("Flux2Transformer2DModel", (109, 9), 104, 102, 3.88, ((2, 5, 8, 11), 3072), _KLEIN),
    "klein 9b": Full("Flux2Transformer2DModel", (153, 9), 148, 182, 9.08, ((3, 7, 11, 15), 4096), _KLEIN_9B),
    "flux.2-dev": Full("Flux2Transformer2DModel", (203, 11), 196, 415.5, 32.22, ((6, 13, 20, 27), 6144)),
    "chroma": Full("ChromaTransformer2DModel", (433, 5), 421, 270, 8.90, ((6, 13, 20, 27), 3072)),
    "sana 4.8b": Full("SanaTransformer2DModel", (486, 6), 606, 140, 4.72, ((6, 14, 21, 29), 2240), {"num_layers": 60}),
    "qwen-image 2.1": Full("QwenImage21Transformer2DModel", (232, 8), 232, 172, 7.12, ((3, 7, 11, 15), 4096)),
    "qwen-image": Full("QwenImageTransformer2DModel", (846, 6), 846, 592, 20.43, ((6, 14, 21, 29), 3072)),
    "z-image": Full("ZImageTransformer2DModel", (276, 6), 276, 192, 6.155, ((2, 6, 10, 14), 3840)),
    "krea 2": Full("Krea2Transformer2DModel", (264, 8), 263, 235, 12.82, ((2, 6, 9, 13), 6144)),
}


def rank64(layer: nn.Module) -> int:
    """Parameters of its LoRA of rank 64."""
    return 64 * sum(layer.weight.shape)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_full_size_is_counted(name):
    wanted = NETWORKS[name]
    with torch.device("meta"):
        base = getattr(diffusers, wanted.network)(**wanted.config)
    scheduler = SimpleNamespace(config={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    network = find_family(SimpleNamespace(transformer=base, scheduler=scheduler)).network()
    linear = {path: m for path, m in base.named_modules() if isinstance(m, nn.Linear)}
    lists = tuple(f"{path}." for path, m in base.named_modules() if isinstance(m, nn.ModuleList))
    assert (len(linear), sum(not path.startswith(lists) for path in linear)) == wanted.linear
    adapted = matching(network, network.lora_targets)
    assert len(adapted) == wanted.adapted
    assert sum(map(rank64, linear.values())) / 1e6 == pytest.approx(wanted.rank64, abs=0.5)
    assert sum(p.numel() for p in base.parameters()) / 1e9 == pytest.approx(wanted.parameters, abs=0.006)
    blocks, width = wanted.taps
    assert network.tap_channels == {f"block{block}": width for block in blocks}
