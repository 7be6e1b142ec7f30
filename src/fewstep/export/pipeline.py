"""A student as ordinary weights: its network alone, or a whole pipeline that needs no settings but the steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.export.fold import Fold
from fewstep.export.heads import put_last_layer
from fewstep.models.extras import EMBED_WIDTH, sinusoid
from fewstep.models.families import Teacher
from fewstep.models.families.unet import CLOSED_WIDTH as _CLOSED
from fewstep.models.hub import quiet
from fewstep.models.lora import merge
from fewstep.students.card import Card

_W = "extras.project.guidance_embed.weight"


@torch.no_grad()
def put_student(teacher: Teacher, card: Card, tensors: dict[str, Tensor], fold: Fold | None = None) -> None:
    """Put the student's weights into the teacher's own network, in place.

    A guidance-scale embedding is fixed at the card's scale: it is added to the time embedding's input, which passes
    one linear layer, whose bias can hold it. With ``fold`` that layer's weight holds it, and the target times.

    Raises:
        ValueError: the student is conditioned on its guidance scale, and the time embedding has no bias; its target
            times do not fit into the weight; it has a last layer for each of several steps.
    """
    network: Any = teacher.denoiser.network
    in_bias = card.guidance_embed is not None and _W in tensors and fold is None
    layers = network.time_embedder.modules() if in_bias else ()
    first: Any = next((layer for layer in layers if isinstance(layer, nn.Linear)), None)
    if first is not None and first.bias is None:
        raise ValueError(
            "This student's guidance-scale embedding cannot be fixed in its weights, for the time embedding of "
            f"{type(teacher.family.base).__name__} has no bias: sample it with fewstep sample, or train it without "
            "method.guidance_embed."
        )
    mine = dict(network.named_parameters())
    if card.weights == "lora":
        merge(mine, {name: t for name, t in tensors.items() if ".lora_" in name})
    else:
        for name in mine.keys() & tensors.keys():
            mine[name].copy_(tensors[name])
    if card.bank:
        put_last_layer(teacher, card, tensors)
    if card.guidance_embed is not None and first is not None:
        embedded = sinusoid(torch.tensor([1000 * (card.guidance_embed - 1)]), EMBED_WIDTH)
        first.bias += first.weight @ (tensors[_W] @ embedded[0])
    if fold is not None:
        weight = fold.weight_of(network)
        weight.copy_(fold.folded(weight))


def close_guidance(teacher: Teacher) -> None:
    """Make the pipeline sample without guidance at any guidance_scale; the network's output stays the same.

    diffusers' pipelines leave guidance to a UNet that has a guidance-scale embedding. This adds one whose weights are
    zero: the scale of 7.5 that a pipeline has by default then changes nothing.
    """
    network, embedder = teacher.family.base, teacher.denoiser.network.time_embedder  # type: ignore[attr-defined]
    like = embedder.linear_1.weight
    layer = nn.Linear(_CLOSED, like.shape[1], bias=False, device=like.device, dtype=like.dtype)
    nn.init.zeros_(layer.weight)
    embedder.cond_proj = layer.requires_grad_(False)
    _config(network, time_cond_proj_dim=_CLOSED)


def save_pipeline(pipeline: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a diffusers folder that is read as float32 by default, whatever its files hold."""
    with quiet():
        pipeline.to(dtype)
        pipeline.save_pretrained(folder, safe_serialization=True)
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.keys() & {"dtype", "torch_dtype"}:  # transformers' own; diffusers reads float32 anyway
            config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": "float32"}
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_network(network: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write the network's folder: config.json and its weights, for ``from_pretrained``."""
    with quiet():
        network.to(dtype).save_pretrained(folder, safe_serialization=True)


def _config(network: Any, **changed: Any) -> None:
    network.register_to_config(**changed)
    kept = network.config.get("_use_default_values")
    if kept is not None:  # names that diffusers would set back to their defaults when it reads the file
        network._internal_dict = type(network.config)({**network.config, "_use_default_values": [
            name for name in kept if name not in changed]})  # fmt: skip
