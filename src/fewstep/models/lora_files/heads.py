"""LoRA files that hold a last layer for each step beside the LoRA (PDD's, as VideoX-Fun has them).

    transformer_blocks.0.attn.to_q.lora_down ...       the LoRA, in any layout
    proj_out.weight [steps, out, in]                   the network's last layer, one a step; proj_out.bias [steps, out]
    proj_out.set_weight [steps out, in]                the same stacked, as converters for ComfyUI write it
    transformer_blocks.0.attn.norm_q.weight            further weights that were trained whole: norms

Names may begin as those of any LoRA do: ``transformer.``, ``diffusion_model.``, or with the layer itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.schedule import Schedule
from fewstep.models.bank import LayerBank
from fewstep.models.lora_files.files import read_tensors
from fewstep.models.lora_files.keys import Parts, take_apart
from fewstep.models.lora_files.read import read_layers

_AROUND = re.compile(r"^(?:base_model\.model\.)?(?:transformer\.|unet\.|diffusion_model\.)?")
_ENDING = re.compile(r"\.(?:set_)?(weight|bias)$")


@torch.no_grad()
def add_heads_file(
    parts: Parts, network: Any, schedule: Schedule, path: Path, times: Sequence[float], scale: float = 1.0
) -> LayerBank:
    """Add a file's LoRA and other weights to a pipeline's parts, in place; returns its last layers as a bank.

    Where the file is refused, nothing has been added.

    Args:
        parts: see `Parts`. network: the pipeline's network as a teacher has it, with a ``last_layer``.
        times: where each of its steps begins, and the last one ends: native times, decreasing.
        scale: of the LoRA.

    Raises:
        ValueError: one sentence: it holds no last layers, or is of another model or number of steps.
    """
    tensors, _ = read_tensors(path)
    own = [name for name in tensors if take_apart(name) is None and _ENDING.search(name)]
    base, steps = parts[next(iter(parts))], len(times) - 1
    part, _, last = network.last_layer.partition(".")
    named = dict(base.named_parameters())
    heads: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name in own:
        place = _ENDING.sub(r".\1", _AROUND.sub("", name))
        if place not in named:
            raise ValueError(f"The file {path} is of another model: {type(base).__name__} has no {place} ({name}).")
        (heads if place.rpartition(".")[0] == last else others)[place] = tensors[name]
    if f"{last}.weight" not in heads:
        raise ValueError(f"The file {path} holds no last layer for each step: {last}.weight is not in it.")
    shaped = {place: _by_step(tensor, named[place], steps, path, place) for place, tensor in heads.items()}
    for place, tensor in others.items():
        if tensor.shape != named[place].shape:
            raise ValueError(f"The file {path} is of another model: {place} has shape {tuple(tensor.shape)}.")
    layers = read_layers(parts, path, without=own)
    for layer in layers:
        layer.add_to(parts[layer.part], scale)
    for place, tensor in others.items():
        named[place].copy_(tensor)
    bank = LayerBank(network.get_submodule(f"{part}.{last}"), schedule, times).requires_grad_(False)
    for place, tensor in shaped.items():
        kind = place.rpartition(".")[2]
        getattr(bank, kind).copy_(tensor.to(bank.weight) - named[place].to(bank.weight.dtype))
    return bank


def _by_step(tensor: Tensor, own: Tensor, steps: int, path: Path, place: str) -> Tensor:
    """A last layer's weight or bias as [steps, *its own shape], however the file stacks it.

    Raises:
        ValueError: it is of another number of steps, or of another layer, or not finite.
    """
    if tuple(tensor.shape) not in ((steps, *own.shape), (steps * own.shape[0], *own.shape[1:])):
        raise ValueError(
            f"The file {path} does not hold {steps} last layers: {place} has shape {tuple(tensor.shape)}, of which "
            f"{steps} times {tuple(own.shape)} are wanted."
        )
    if not bool(tensor.float().isfinite().all()):
        raise ValueError(f"The file {path} is damaged: {place} is not finite.")
    return tensor.reshape(steps, *own.shape)
