"""A student as ordinary weights: its network alone, or a whole pipeline that draws right with nothing set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.extras import EMBED_WIDTH, sinusoid
from fewstep.models.families import Teacher
from fewstep.models.hub import quiet
from fewstep.models.lora import merge
from fewstep.models.lora_files import network_of
from fewstep.students.student import Card

_W = "extras.project.guidance_embed.weight"
_CLOSED = 4  # width of the embedding that closes guidance; diffusers divides by half of it less one


@torch.no_grad()
def put_student(teacher: Teacher, card: Card, tensors: dict[str, Tensor]) -> nn.Module:
    """The student's weights into the teacher's own network, in place; returns the pipeline's network.

    A student that is told its guidance scale gets it for good: what the scale adds to the time embedding's input
    passes one linear layer, whose bias can hold it.

    Raises:
        ValueError: the student is told its target time, which no weights can hold.
    """
    refuse_end(card)
    network = network_of(teacher.pipeline)[1]
    own: Any = teacher.denoiser.network
    mine = dict(own.named_parameters())
    if card.weights == "lora":
        merge(mine, {name: t for name, t in tensors.items() if ".lora_" in name})
    else:
        for name, weight in mine.items():
            weight.copy_(tensors[name])
    if card.guidance_embed is not None and _W in tensors:
        named: Any = network
        embedding = getattr(named, "time_embedding", None) or named.time_text_embed.timestep_embedder
        first: Any = embedding.linear_1
        told = sinusoid(torch.tensor([1000 * (card.guidance_embed - 1)]), EMBED_WIDTH)
        first.bias += first.weight @ (tensors[_W] @ told[0])
    return network


def refuse_end(card: Card) -> None:
    """One sentence for a student that no other program can sample from.

    Raises:
        ValueError: it is told its target time.
    """
    if "end" in card.extra_inputs:
        raise ValueError(
            "This student is told its target time at every step, which no other program can do: draw with "
            "fewstep sample, or train one with tell_end off."
        )


def close_guidance(network: nn.Module) -> None:
    """A UNet that draws without classifier-free guidance whatever a pipeline is told; its output is the same.

    diffusers' pipelines leave guidance to a UNet that is told the scale. Such a UNet has one layer more, and this one's
    is zero: the scale of 7.5 that a pipeline has by default then changes nothing.
    """
    embedding: Any = network.time_embedding
    like = embedding.linear_1.weight
    layer = nn.Linear(_CLOSED, like.shape[1], bias=False, device=like.device, dtype=like.dtype)
    nn.init.zeros_(layer.weight)
    embedding.cond_proj = layer.requires_grad_(False)
    _config(network, time_cond_proj_dim=_CLOSED)


def save_pipeline(pipeline: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a diffusers folder that is read as float32 by default, whatever its files hold."""
    with quiet():
        pipeline.to(dtype)
        pipeline.save_pretrained(folder, safe_serialization=True)
    for config in folder.glob("*/config.json"):
        said = json.loads(config.read_text(encoding="utf-8"))
        if said.keys() & {"dtype", "torch_dtype"}:  # transformers' own; diffusers reads float32 anyway
            said = {key: value for key, value in said.items() if key != "torch_dtype"} | {"dtype": "float32"}
            config.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


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
