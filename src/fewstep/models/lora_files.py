"""LoRA files of any layout, converted to this library's by diffusers' own converters, from the tensors alone.

Nothing in a header is trusted but a LoRA's alpha: a rank of a billion there would be allocated.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.models.families import Family, find_family
from fewstep.models.hub import quiet, short_error
from fewstep.models.lora import merge

_PEFT = "base_model.model."  # peft's own files have this before every name
_ALPHAS = ("lora_alpha", "alpha_pattern")
_UP = re.compile(r"(lora_up|lora_B|lora\.up|_lora\.up|lora_linear_layer\.up)\.weight$")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, opened; no other format is.

    Raises:
        ValueError: one sentence, for pickles and damaged files.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is no safetensors file: other formats can run code when they are read; convert it first."
        )
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"The file {path} is no safetensors file ({error}).") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; raises as `tensor_names`."""
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def tensor_names(path: Path) -> list[str]:
    """The names of a safetensors file's tensors; reads the header only.

    Raises:
        ValueError: one sentence, for pickles and damaged files.
    """
    with _opened(path) as file:
        return list(file.keys())


def is_lora(path: Path) -> bool:
    """Whether a safetensors file holds a LoRA in any layout, and no embeddings of extra inputs beside it."""
    names = tensor_names(path)
    return any(map(_UP.search, names)) and not any(name.startswith("extras.") for name in names)


def read_lora(pipeline: Any, path: Path) -> dict[str, Tensor]:
    """``<layer>.lora_A.weight`` and ``.lora_B.weight`` of a LoRA file for this pipeline's network, alpha folded into B.

    Layers have the network's own names; the pipeline is left unchanged.

    Raises:
        ValueError: one sentence: the file is no LoRA, is made for another model, is damaged, or adapts more than the
            network.
    """
    if any(name.startswith(("text_encoder", "lora_te")) for name in tensor_names(path)):
        raise ValueError(f"The LoRA {path} adapts the text encoder too, which is not supported here.")
    family = find_family(pipeline)
    return read_parts(family, path)[family.part]


@torch.no_grad()
def add_loras(pipeline: Any, loras: Iterable[tuple[Path, float]], network: nn.Module | None = None) -> None:
    """Merge LoRA files of any layout, each at its scale, into a pipeline's network and text encoders, in place.

    Args:
        network: a network of the same layers in the place of the pipeline's own.

    Raises:
        ValueError: as `read_lora`, but a LoRA may adapt text encoders; a scale that is not finite.
    """
    family = find_family(pipeline)
    for path, scale in loras:
        if not math.isfinite(scale):
            raise ValueError(f"The LoRA {path} cannot be added at the scale {scale}.")
        for part, layers in read_parts(family, path).items():
            module = network if part == family.part and network is not None else getattr(pipeline, part)
            merge(dict(module.named_parameters()), layers, scale)


def read_parts(family: Family, path: Path) -> dict[str, dict[str, Tensor]]:
    """A LoRA file's layers for each part of a pipeline, its network first; each part as `read_lora` returns it.

    Raises:
        ValueError: as `read_lora`, but a LoRA may adapt text encoders.
    """
    tensors, metadata = read_tensors(path)
    pipeline, name, network, parts = family.pipeline, family.part, family.base, (family.part, *family.text_encoders)
    if any(key.startswith(_PEFT) for key in tensors):
        tensors = {f"{name}.{key.removeprefix(_PEFT)}": t for key, t in tensors.items()}
        metadata = _beside(path, name)
    count = sum(bool(_UP.search(key)) for key in tensors)
    if not count:
        raise ValueError(f"The file {path} holds no LoRA.")
    bad = next((key for key, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())), None)
    if bad is not None:
        raise ValueError(f"The LoRA {path} is damaged: {bad} is not finite.")
    if not hasattr(pipeline, "load_lora_weights"):  # diffusers has no loader for this pipeline (PixArt)
        return {name: _as_it_stands(_scaled(tensors, metadata, family), name, network, path)}
    try:
        with quiet():
            pipeline.load_lora_weights(_scaled(tensors, metadata, family), adapter_name="foreign")
        layers = {part: _layers(getattr(pipeline, part)) for part in parts}
    except Exception as error:  # diffusers and peft have many errors for a LoRA of another model
        why = "its layers have other shapes" if "size mismatch" in str(error) else short_error(error)
        raise ValueError(f"The LoRA {path} does not fit {type(network).__name__}: {why.rstrip('.')}.") from error
    finally:
        if any(hasattr(getattr(pipeline, part), "peft_config") for part in parts):
            pipeline.unload_lora_weights()
    found = sum(len(part) // 2 for part in layers.values())
    if found < count:
        raise ValueError(f"The LoRA {path} is of another model: only {found} of its {count} layers are here.")
    return {part: lora for part, lora in layers.items() if lora or part == name}


def _as_it_stands(tensors: dict[str, Tensor], part: str, network: nn.Module, path: Path) -> dict[str, Tensor]:
    """A LoRA in peft's layout, checked against the network, for pipelines without a loader of their own."""
    found = {key.removeprefix(f"{part}."): t.float() for key, t in tensors.items()}
    weights = {name.removesuffix(".weight"): p for name, p in network.named_parameters()}
    for key in found:
        layer, kind = key.rsplit(".lora_", 1) if ".lora_" in key else (key, "")
        pair = [found.get(f"{layer}.lora_{k}.weight") for k in "AB"]
        if kind not in ("A.weight", "B.weight") or layer not in weights or any(t is None or t.ndim < 2 for t in pair):
            raise ValueError(f"The LoRA {path} does not fit {type(network).__name__}: {key} is unknown or alone.")
        a, b = (t.flatten(1) for t in pair if t is not None)
        if a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != tuple(weights[layer].flatten(1).shape):
            raise ValueError(f"The LoRA {path} does not fit {type(network).__name__}: {key} has another shape.")
    return found


def _beside(path: Path, network: str) -> dict[str, str]:
    """Alpha from peft's adapter_config.json beside the file, as diffusers writes it into a header."""
    try:
        config = json.loads(path.with_name("adapter_config.json").read_text(encoding="utf-8"))
        return {"lora_adapter_metadata": json.dumps({f"{network}.{k}": config.get(k) for k in _ALPHAS})}
    except (OSError, ValueError, AttributeError, RecursionError):
        raise ValueError(
            f"The LoRA {path} is in peft's own layout: adapter_config.json, which holds its scale, is not beside it."
        ) from None


def _layers(network: nn.Module | None) -> dict[str, Tensor]:
    """The LoRA that diffusers has put on a network, its scale folded into B."""
    found = {}
    for layer, module in [] if network is None else network.named_modules():
        if hasattr(module, "lora_A") and "foreign" in module.lora_A:
            a, b = (getattr(module, part)["foreign"].weight.detach() for part in ("lora_A", "lora_B"))
            found[f"{layer}.lora_A.weight"] = a.float().clone()
            found[f"{layer}.lora_B.weight"] = b.float() * float(module.scaling["foreign"])
    return found


def _scaled(tensors: dict[str, Tensor], metadata: dict[str, str], family: Family) -> dict[str, Tensor]:
    """The tensors with alpha / rank folded into B, where alpha is in the metadata only."""
    text = metadata.get("lora_adapter_metadata")
    if text is None or any(key.endswith(".alpha") for key in tensors):
        return dict(tensors)
    try:
        settings = json.loads(text)
        alphas = {key: _alpha(settings, key, family) for key in tensors}
        scales = {
            key: float(alphas[key]) / t.shape[1] if alphas[key] is not None else 1.0
            for key, t in tensors.items()
            if key.endswith(".lora_B.weight")
        }
        if not all(math.isfinite(scale) and abs(scale) < 1e4 for scale in scales.values()):
            raise ValueError("its alpha is absurd")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its metadata is damaged ({error})") from None
    return {key: t * scales[key] if key in scales else t for key, t in tensors.items()}


def _alpha(settings: Any, key: str, family: Family) -> Any:
    """The alpha of one tensor by the settings; None where they have none."""
    part = next((p for p in family.text_encoders if key.startswith(f"{p}.")), family.part)
    alpha, pattern = settings.get(f"{part}.lora_alpha"), settings.get(f"{part}.alpha_pattern") or {}
    return pattern.get(key.removeprefix(f"{part}.").removesuffix(".lora_B.weight"), alpha)


@torch.no_grad()
def put_weights(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy all weights of a file into a network of the same architecture.

    A published UNet with a guidance-scale embedding has one more layer (``time_embedding.cond_proj``): it is added.

    Raises:
        ValueError: one sentence when names or shapes differ.
    """
    projection = tensors.get("time_embedding.cond_proj.weight")
    embedding: Any = getattr(network, "time_embedding", None)
    if projection is not None and embedding is not None and getattr(embedding.cond_proj, "weight", None) is None:
        width, inputs = projection.shape
        embedding.cond_proj = nn.Linear(inputs, width, bias=False, dtype=torch.float32)
        network.register_to_config(time_cond_proj_dim=inputs)  # type: ignore[operator]
    mine = network.state_dict()
    for wrong in sorted(mine.keys() ^ tensors.keys()):
        there = "lacks" if wrong in mine else "has another model's"
        raise ValueError(f"The file {path} is of another network: it {there} {wrong}.")
    for key, value in tensors.items():
        if value.shape != mine[key].shape:
            raise ValueError(f"The file {path} is of another network: {key} has shape {tuple(value.shape)}.")
    network.load_state_dict(tensors)
