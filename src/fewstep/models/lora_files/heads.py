"""LoRA files that hold a last layer for each step beside the LoRA (PDD's, as VideoX-Fun publishes them).

    transformer_blocks.0.attn.to_q.lora_down ...       the LoRA, in any layout
    proj_out.weight [N, out, in]                       the network's last layer, N of them; proj_out.bias [N, out]
    transformer_blocks.0.attn.norm_q.weight            further weights that were trained whole: norms
    pdd_config.json                                    beside the file, or in its header: lora_alpha, pdd_sigmas

Rows may be stacked, [N out, in]; a name may end in ``set_weight``, as converters for ComfyUI write it. Each layer is
that of one interval between N + 1 times: where a file holds a finer grid's, give all times of that grid. Layers may be
called by any name that a LoRA's layers have.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.models.bank import LayerBank
from fewstep.models.denoiser import Denoiser
from fewstep.models.lora_files.files import read_tensors
from fewstep.models.lora_files.keys import Layers, Parts, take_apart
from fewstep.models.lora_files.read import check_numbers, read_layers
from fewstep.models.roles import RoleNetwork

CONFIG_FILE = "pdd_config.json"
SETTINGS = ("pdd_num_steps", "pdd_block_size", "pdd_sigmas", "lora_rank", "lora_alpha", "lora_targets")
"""Keys of that file, which may stand in the header of the weights too."""
_ENDING = re.compile(r"\.(?:set_)?(weight|bias)$")
_SAME = 1e-5  # two levels that differ by less are one


@torch.no_grad()
def add_heads_file(
    parts: Parts, denoiser: Denoiser, path: Path, times: Sequence[float], scale: float = 1.0
) -> Denoiser:
    """Add a file's LoRA and other weights to a pipeline's parts, in place; returns the student with its last layers.

    Where the file is refused, nothing has been added.

    Args:
        parts: see `Parts`. denoiser: of the pipeline's network as a teacher has it, with a ``last_layer``.
        times: where each of its steps begins, and the last one ends: native times, decreasing.
        scale: of the LoRA.

    Raises:
        ValueError: one sentence: it holds no last layers, is damaged, or of another model, number of steps or levels.
    """
    network: Any = denoiser.network
    tensors, metadata = read_tensors(path)
    own = [name for name in sorted(tensors) if _ENDING.search(name) and not (take_apart(name) or ".lora_" in name)]
    base, steps = parts[next(iter(parts))], len(times) - 1
    last = network.last_layer.partition(".")[2]
    named, placed = dict(base.named_parameters()), _placed(parts, own, path)
    if f"{last}.weight" not in placed:
        raise ValueError(f"The file {path} holds no last layer for each step: {last}.weight is not in it.")
    heads: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for place, name in placed.items():
        check_numbers(tensors[name], name, path)
        if place.rpartition(".")[0] == last:
            heads[place] = _by_step(tensors[name], named[place], steps, path, place)
        elif tensors[name].shape == named[place].shape:
            others[place] = tensors[name]
        else:
            raise ValueError(f"The file {path} is of another model: {place} has shape {tuple(tensors[name].shape)}.")
    alpha = _alpha(path, metadata, times if denoiser.schedule.family == "flow" else ())
    layers = read_layers(parts, path, without=own, alpha=alpha)
    for layer in layers:
        twice = next((name for name in layer.place.layers if f"{name}.weight" in placed), None)
        if twice is not None and parts[layer.part] is base:
            raise ValueError(f"The file {path} holds {twice} twice, whole and as a LoRA ({layer.key}).")
    bank = LayerBank(network.get_submodule(network.last_layer), denoiser.schedule, times).requires_grad_(False)
    for layer in layers:
        layer.add_to(parts[layer.part], scale)
    for place, tensor in others.items():
        named[place].copy_(tensor)
    for place, tensor in heads.items():
        kind = place.rpartition(".")[2]
        getattr(bank, kind).copy_(tensor.to(bank.weight) - named[place].to(bank.weight.dtype))
    return Denoiser(RoleNetwork(network, bank=bank), denoiser.schedule, denoiser.prediction_type)


def _placed(parts: Parts, names: Sequence[str], path: Path) -> dict[str, str]:
    """The network's parameter -> the name in the file of the tensor that stands for the whole of it.

    Raises:
        ValueError: the network has no such parameter, or one is there twice.
    """
    layers, found = Layers(parts), dict[str, str]()
    base = parts[layers.network]
    named = dict(base.named_parameters())
    for name in names:
        place = layers.find(_ENDING.sub("", name))
        single = place is not None and place[0] == layers.network and len(place[1].layers) == 1 and not place[1].swapped
        kind = name.rpartition(".")[2].removeprefix("set_")
        parameter = f"{place[1].layers[0]}.{kind}" if place is not None and single else ""
        if parameter not in named:
            raise ValueError(f"The file {path} is of another model: {type(base).__name__} has no {name}.")
        if parameter in found:
            raise ValueError(f"The file {path} holds {parameter} twice: {found[parameter]} and {name}.")
        found[parameter] = name
    return found


def _by_step(tensor: Tensor, own: Tensor, steps: int, path: Path, place: str) -> Tensor:
    """A last layer's weight or bias as [steps, *its own shape], however the file stacks it.

    Raises:
        ValueError: it is of another number of steps, or of another layer.
    """
    if tuple(tensor.shape) not in ((steps, *own.shape), (steps * own.shape[0], *own.shape[1:])):
        raise ValueError(
            f"The file {path} does not hold {steps} last layers: {place} has shape {tuple(tensor.shape)}, of which "
            f"{steps} times {tuple(own.shape)} are wanted."
        )
    return tensor.reshape(steps, *own.shape)


def _alpha(path: Path, metadata: Mapping[str, str], times: Sequence[float]) -> float | None:
    """The LoRA's alpha by the file's settings, in its header or beside it; None where they have none.

    Args:
        times: the levels that the file must be for; empty on schedules whose times are no levels.

    Raises:
        ValueError: one sentence: the settings are damaged, or of other levels.
    """
    beside = path.with_name(CONFIG_FILE)
    try:
        saved = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        settings = {**saved, **{key: metadata[key] for key in SETTINGS if key in metadata}}
        alpha, levels = settings.get("lora_alpha", settings.get("network_alpha")), settings.get("pdd_sigmas")
        levels = json.loads(levels) if isinstance(levels, str) else levels
        sigmas = None if levels is None else np.asarray(levels, dtype=np.float64)
        found = None if alpha is None else float(alpha)
    except (OSError, ValueError, TypeError, RecursionError):
        raise ValueError(f"The settings of {path}, in its header or in {CONFIG_FILE} beside it, are damaged.") from None
    if len(times) and sigmas is not None and not (
        sigmas.shape == (len(times),) and np.allclose(sigmas, times, rtol=0, atol=_SAME)
    ):  # fmt: skip
        raise ValueError(
            f"The settings of {path}, in its header or in {CONFIG_FILE} beside it, are for the levels "
            f"{', '.join(f'{t:g}' for t in sigmas.flatten())}, not {', '.join(f'{t:g}' for t in times)}."
        )
    return found
