"""The names that networks had before diffusers renamed their layers, by which trainers and ComfyUI still name them.

=========================  =======================================================================================
network                    first published in
=========================  =======================================================================================
UNet2DConditionModel       CompVis/latent-diffusion and Stability-AI/generative-models (``input_blocks.4.1...``)
SD3Transformer2DModel      Stability-AI/sd3-ref (``joint_blocks.0.x_block...``)
FluxTransformer2DModel     black-forest-labs/flux (``double_blocks.0.img_attn...``)
PixArtTransformer2DModel   PixArt-alpha/PixArt-alpha (``blocks.0.cross_attn...``)
=========================  =======================================================================================

Where those codes hold one layer for query, key and value, diffusers holds one for each: rows of the one are the rows of
the others, one below the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Place:
    """The layers of a network that one layer of a file stands for.

    Attributes:
        layers: their names; several have their rows (outputs) one below the other in the file.
        swapped: shift and scale of a last modulation, the two halves of its rows, are in the other order.
    """

    layers: tuple[str, ...]
    swapped: bool = False


_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET = {
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
}  # fmt: skip
_QKV, _ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_FLUX = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    **{f"{old}.{a}_layer": f"time_text_embed.{new}.linear_{b}"
       for old, new in (("time_in", "timestep_embedder"), ("vector_in", "text_embedder"),
                        ("guidance_in", "guidance_embedder"))
       for a, b in (("in", 1), ("out", 2))},
}  # fmt: skip
_FLUX_DOUBLE: dict[str, tuple[str, ...]] = {
    "img_attn.qkv": _QKV, "img_attn.proj": ("attn.to_out.0",), "txt_attn.qkv": _ADDED,
    "txt_attn.proj": ("attn.to_add_out",), "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",), "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "qkv_lora1": _QKV, "qkv_lora2": _ADDED, "proj_lora1": ("attn.to_out.0",), "proj_lora2": ("attn.to_add_out",),
}  # fmt: skip
"""The last four are XLabs's."""
_FLUX_SINGLE: dict[str, tuple[str, ...]] = {
    "linear1": (*_QKV, "proj_mlp"), "linear2": ("proj_out",), "modulation.lin": ("norm.linear",), "qkv": _QKV,
    "proj": ("proj_out",),
}  # fmt: skip
"""The last two are XLabs's."""
_SD3 = {
    "context_embedder": "context_embedder", "x_embedder.proj": "pos_embed.proj", "final_layer.linear": "proj_out",
    **{f"{old}.mlp.{a}": f"time_text_embed.{new}.linear_{b}"
       for old, new in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder"))
       for a, b in ((0, 1), (2, 2))},
}  # fmt: skip
_SD3_BLOCK: dict[str, tuple[str, ...]] = {
    "x_block.attn.qkv": _QKV, "x_block.attn.proj": ("attn.to_out.0",), "context_block.attn.qkv": _ADDED,
    "context_block.attn.proj": ("attn.to_add_out",), "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",), "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",), "x_block.adaLN_modulation.1": ("norm1.linear",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "x_block.attn2.proj": ("attn2.to_out.0",),
}  # fmt: skip
_PIXART = {
    "x_embedder.proj": "pos_embed.proj", "t_block.1": "adaln_single.linear", "final_layer.linear": "proj_out",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1", "y_embedder.y_proj.fc2": "caption_projection.linear_2",
}  # fmt: skip
_PIXART_BLOCK: dict[str, tuple[str, ...]] = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",), "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",), "mlp.fc1": ("ff.net.0.proj",), "mlp.fc2": ("ff.net.2",),
}  # fmt: skip


def original_names(network: nn.Module) -> Iterator[tuple[str, Place]]:
    """(original name of a layer, its place in diffusers' network), where the network is one of the table above."""
    names = {name for name, _ in network.named_modules()}
    table = _TABLES.get(type(network).__name__)
    for name, place in table(network) if table is not None else ():
        if names.issuperset(place.layers):
            yield name, place


def _of_unet(network: Any) -> Iterator[tuple[str, Place]]:
    yield from _plain(_UNET)
    first = 1  # input_blocks.0 is conv_in
    for i, block in enumerate(network.down_blocks):
        yield from _of_unet_block(block, f"down_blocks.{i}", "input_blocks", first)
        first += len(block.resnets)
        if getattr(block, "downsamplers", None):
            yield f"input_blocks.{first}.0.op", Place((f"down_blocks.{i}.downsamplers.0.conv",))
            first += 1
    for name, _ in network.named_modules():
        kind, _, rest = name.removeprefix("mid_block.").partition(".")
        number, _, rest = rest.partition(".")
        if name.startswith("mid_block.") and rest and kind in ("resnets", "attentions"):
            place = 2 * int(number) + (kind == "attentions")  # resnet, attention, resnet, ...
            yield f"middle_block.{place}.{_RESNET.get(rest, rest)}", Place((name,))
    first = 0
    for i, block in enumerate(network.up_blocks):
        yield from _of_unet_block(block, f"up_blocks.{i}", "output_blocks", first)
        first += len(block.resnets)
        if getattr(block, "upsamplers", None):
            place = 2 if getattr(block, "attentions", None) else 1
            yield f"output_blocks.{first - 1}.{place}.conv", Place((f"up_blocks.{i}.upsamplers.0.conv",))


def _of_unet_block(block: Any, name: str, old: str, first: int) -> Iterator[tuple[str, Place]]:
    """The resnets and attentions of one down or up block, which begin at ``<old>.<first>``."""
    for place, kind in enumerate(("resnets", "attentions")):
        for j, part in enumerate(getattr(block, kind, None) or ()):
            for layer, _ in part.named_modules():
                yield f"{old}.{first + j}.{place}.{_RESNET.get(layer, layer)}", Place((f"{name}.{kind}.{j}.{layer}",))


def _of_flux(network: Any) -> Iterator[tuple[str, Place]]:
    yield from _plain(_FLUX)
    yield "final_layer.adaLN_modulation.1", Place(("norm_out.linear",), swapped=True)
    yield from _blocks("double_blocks", "transformer_blocks", network.transformer_blocks, _FLUX_DOUBLE)
    yield from _blocks("single_blocks", "single_transformer_blocks", network.single_transformer_blocks, _FLUX_SINGLE)


def _of_sd3(network: Any) -> Iterator[tuple[str, Place]]:
    yield from _plain(_SD3)
    yield "final_layer.adaLN_modulation.1", Place(("norm_out.linear",), swapped=True)
    yield from _blocks("joint_blocks", "transformer_blocks", network.transformer_blocks, _SD3_BLOCK)
    for i, block in enumerate(network.transformer_blocks):
        last = bool(getattr(block, "context_pre_only", False))
        place = Place((f"transformer_blocks.{i}.norm1_context.linear",), swapped=last)
        yield f"joint_blocks.{i}.context_block.adaLN_modulation.1", place


def _of_pixart(network: Any) -> Iterator[tuple[str, Place]]:
    yield from _plain(_PIXART)
    yield from _blocks("blocks", "transformer_blocks", network.transformer_blocks, _PIXART_BLOCK)


def _plain(table: Mapping[str, str]) -> Iterator[tuple[str, Place]]:
    for old, new in table.items():
        yield old, Place((new,))


def _blocks(old: str, new: str, blocks: Any, table: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, Place]]:
    for i in range(len(blocks)):
        for name, layers in table.items():
            yield f"{old}.{i}.{name}", Place(tuple(f"{new}.{i}.{layer}" for layer in layers))


_TABLES: dict[str, Callable[[Any], Iterator[tuple[str, Place]]]] = {
    "UNet2DConditionModel": _of_unet,
    "SD3Transformer2DModel": _of_sd3,
    "FluxTransformer2DModel": _of_flux,
    "PixArtTransformer2DModel": _of_pixart,
}
