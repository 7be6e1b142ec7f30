"""One LoRA file as a whole: every layer of it, checked against the network before anything is changed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fewstep.models.hub import Remark
from fewstep.models.lora_files.files import lora_file, read_tensors, tensor_names
from fewstep.models.lora_files.formats import lacking, rank_of
from fewstep.models.lora_files.keys import Key, Layers, Parts, of_text_encoder, take_apart
from fewstep.models.lora_files.layer import Layer
from fewstep.models.lora_files.refusals import refuse_layers, refuse_shapes, refuse_unknown
from fewstep.models.lora_files.scale import Settings, checked_scale, peft_scale, peft_settings

_EMBEDDING = "bundle_emb."
"""How names of embeddings begin that OneTrainer writes beside a LoRA."""


class NotLowRank(ValueError):
    """A file's change is not of the form B A: a DoRA, LoHa, LoKr, or with changes of biases and norms."""


def is_lora(path: Path) -> bool:
    """Whether a safetensors file holds a LoRA of any form and layout, and no embeddings of extra inputs beside it."""
    names = tensor_names(path)
    found = any((key := take_apart(name)) is not None and key.kind != "alpha" for name in names)
    return found and not any(name.startswith("extras.") for name in names)


def check_lora(name: Path | str) -> None:
    """Refuse a LoRA by its name and those of its tensors alone, before a large model is loaded for it.

    Raises:
        ValueError: as `add_loras`, for what can be known so early.
    """
    path = lora_file(name)
    _known(path, [key for key in tensor_names(path) if not key.startswith(_EMBEDDING)])


def add_loras(parts: Parts, loras: Iterable[tuple[Path | str, float]]) -> None:
    """Add LoRA files, each at its scale, to a pipeline's network and text encoders, in place.

    ``W + scale * change``, one file after the other. Where a file is refused, nothing of any has been added.

    Args:
        loras: (file, folder of one, or hub name; scale).

    Warns:
        Remark: what of a file has no effect here, or an alpha that some of its layers lack.

    Raises:
        ValueError: one sentence: it is no LoRA, of another model, damaged or not supported, or the scale not finite.
    """
    found: list[tuple[Layer, float]] = []
    for name, scale in loras:
        path = lora_file(name)
        if not math.isfinite(scale):
            raise ValueError(f"The LoRA {path} cannot be added at the scale {scale}.")
        found += [(layer, scale) for layer in read_layers(parts, path)]
    for layer, scale in found:
        layer.add_to(parts[layer.part], scale)


def read_lora(parts: Parts, name: Path | str) -> dict[str, Tensor]:
    """``<layer>.lora_A.weight`` and ``.lora_B.weight`` of a LoRA file for the network, alpha folded into B.

    Layers have the network's own names; the network is left unchanged.

    Raises:
        NotLowRank: it is more than pairs of A and B.
        ValueError: as `add_loras`, or it adapts text encoders too.
    """
    path, network = lora_file(name), next(iter(parts))
    of_words = [of_text_encoder(key) for key in tensor_names(path)]
    if any(of_words):
        too = "" if all(of_words) else " too"
        raise ValueError(f"The LoRA {path} adapts the text encoder{too}, which is not supported here.")
    found: dict[str, Tensor] = {}
    for layer in read_layers(parts, path):
        pairs = layer.pairs(parts[network])
        if pairs is None:
            raise NotLowRank(f"The LoRA {path} is more than products of two matrices ({layer.key})")
        found |= pairs
    return found


def read_layers(parts: Parts, path: Path, without: Collection[str] = (), alpha: float | None = None) -> list[Layer]:
    """All layers of a LoRA file, each with its place in ``parts``; every shape and number is checked.

    Args:
        without: names of tensors that are none of the LoRA's.
        alpha: of the network's layers for which the file has none.

    Raises:
        ValueError: as `add_loras`.
    """
    tensors, metadata = read_tensors(path)
    words = sorted({name.split(".")[1] for name in tensors if name.startswith(_EMBEDDING)})
    names = [name for name in tensors if not name.startswith(_EMBEDDING) and name not in without]
    layers = _located(Layers(parts), _known(path, names), tensors, path)
    settings = peft_settings(path, names, metadata, parts)
    if alpha is not None:
        settings = {next(iter(parts)): {"lora_alpha": alpha}, **settings}
    for layer in layers:
        _fill(layer, tensors, path)
        _fits(layer, parts, path)
    without = [layer.key for layer in layers if not _set_scale(layer, tensors, settings, path)]
    if words:
        _say(f"The embeddings in {path} ({', '.join(words)}) are left out: only its LoRA is used.")
    if without and any("alpha" in layer.keys for layer in layers):
        some = f"{len(without)} of {len(layers)} layers"
        _say(f"{some} of {path} have no alpha, such as {without[0]}: their scale is 1.")
    return layers


def _say(words: str) -> None:
    warnings.warn(words, Remark, stacklevel=5)


def _known(path: Path, names: list[str]) -> list[Key]:
    """All names of tensors taken apart."""
    keys = {name: take_apart(name) for name in names}
    unknown = [name for name, key in keys.items() if key is None]
    found = [key for key in keys.values() if key is not None]
    if not found and not unknown:
        raise ValueError(f"The file {path} holds no LoRA: it holds no tensors of one.")
    if unknown:
        refuse_unknown(path, names, unknown, bool(found))
    return found


def _located(layers: Layers, keys: list[Key], tensors: Mapping[str, Tensor], path: Path) -> list[Layer]:
    """The layers that the tensors belong to, one after the other."""
    found: dict[object, Layer] = {}
    wrong: dict[str, str] = {}
    layouts: dict[str, Key] = {}
    for key in keys:
        place = layers.find(key.layer)
        if place is None:
            lacks = layers.missing_part(key.layer)
            if lacks:
                raise ValueError(f"The LoRA {path} adapts the {lacks}, which this model lacks: {key.name}.")
            wrong[key.layer] = key.name if key.kind != "alpha" else wrong.get(key.layer, key.name)
            continue
        layer = found.setdefault(place, Layer(*place))
        if key.kind in layer.keys:
            raise ValueError(f"The LoRA {path} holds one layer twice: {layer.keys[key.kind].name} and {key.name}.")
        layer.keys[key.kind] = key
        first = layouts.setdefault(place[0], key) if key.layout else key
        if first.layout != key.layout:
            raise ValueError(
                f"The LoRA {path} mixes {first.layout} ({first.name}) and {key.layout} ({key.name}), of which loaders "
                "read a part: convert it to one layout."
            )
    if wrong:
        shapes = {key.layer: tensors[key.name] for key in keys if key.kind == "down"}
        network = "model" if any(map(of_text_encoder, wrong)) else type(layers.parts[layers.network]).__name__
        refuse_layers(path, network, sorted({key.layer for key in keys}), wrong, shapes)
    return list(found.values())


def _fill(layer: Layer, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give a layer its tensors, which must be all of one form's, and numbers."""
    for kind, key in layer.keys.items():
        t = tensors[key.name]
        if kind == "alpha" and t.numel() == 1:
            continue
        if kind == "alpha":
            raise ValueError(f"The LoRA {path} is damaged: {key.name} is no single number.")
        check_numbers(t, key.name, path)
        layer.tensors[kind] = t
    problem = lacking(layer.tensors)
    if problem:
        raise ValueError(f"The LoRA {path} is damaged: the layer of {layer.key} {problem}.")


def check_numbers(t: Tensor, name: str, path: Path) -> None:
    """Refuse a tensor of a file that is none of finite real numbers, or has no dimension.

    Raises:
        ValueError: one sentence.
    """
    if not t.is_floating_point() or not t.numel():
        what = str(t.dtype).removeprefix("torch.") if t.numel() else "nothing"
        raise ValueError(f"The LoRA {path} is damaged: {name} holds {what}, where real numbers should be.")
    if not t.ndim:
        raise ValueError(f"The LoRA {path} is damaged: {name} is a single number, where a matrix should be.")
    try:
        finite = bool(t.to(torch.float32).isfinite().all())
    except NotImplementedError:
        what = str(t.dtype).removeprefix("torch.")
        raise ValueError(f"The LoRA {path} cannot be read: {name} holds {what}, which is not supported.") from None
    if not finite:
        raise ValueError(f"The LoRA {path} is damaged: {name} is not finite.")


def _set_scale(layer: Layer, tensors: Mapping[str, Tensor], settings: Mapping[str, Settings], path: Path) -> bool:
    """Set a layer's scale by its alpha, or peft's settings; False where neither has one, and it stays 1.

    Raises:
        ValueError: one sentence: alpha is not one finite number, or a DoRA lacks its magnitudes.
    """
    rank, own = rank_of(layer.tensors), layer.keys.get("alpha")
    try:
        if own is not None and rank is not None:
            layer.scale = checked_scale(float(tensors[own.name].to(torch.float32)) / rank)
        elif layer.part in settings and not layer.tensors.keys() & {"diff", "diff_b"}:
            if settings[layer.part].get("use_dora") and layer.tensors.keys() & {"down", "magnitude"} == {"down"}:
                raise ValueError("its settings say that it is a DoRA, but a layer has no lora_magnitude_vector")
            layer.scale = peft_scale(settings[layer.part], layer.place.layers[0], rank)
        return own is not None or layer.part in settings or rank is None
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"The LoRA {path} cannot be read: {error} ({layer.key}).") from None


def _fits(layer: Layer, parts: Parts, path: Path) -> None:
    """Raise ValueError where a layer's change does not fit the network's; nothing is computed but shapes."""
    network, name, shape = parts[layer.part], layer.place.layers[0], layer.shape(parts[layer.part])
    alike = replace(layer, tensors={kind: t.to("meta") for kind, t in layer.tensors.items()})
    try:
        rows = alike.change(torch.empty(shape, device="meta")).get("bias")
        if rows is not None and not layer.has(network, "bias"):
            raise ValueError(f"The LoRA {path} changes the bias of {name}, which has none ({layer.key}).") from None
        if rows is not None and tuple(rows.shape) != shape[:1]:
            raise IndexError
    except (RuntimeError, IndexError):
        shapes = {layer.keys[kind].name: tuple(t.shape) for kind, t in layer.tensors.items()}
        down = {layer.keys["down"].layer: layer.tensors["down"]} if "down" in layer.tensors else {}
        refuse_shapes(path, type(network).__name__, name, shape, shapes, down)
