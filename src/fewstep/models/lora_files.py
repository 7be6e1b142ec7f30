"""LoRA files of any layout, read as ours: by diffusers' own converters, from tensors alone.

A header's metadata is not believed: a rank of a billion there would be allocated. Only a LoRA's alpha is taken from it.
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

from fewstep.models.hub import quiet, short_error
from fewstep.models.lora import merge

NETWORKS = ("unet", "transformer")
"""Where a pipeline keeps its diffusion network."""
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""Where it keeps what a LoRA may adapt beside that."""

_PEFT = "base_model.model."  # what peft itself puts before every name
_ALPHAS = ("lora_alpha", "alpha_pattern")
_UP = re.compile(r"(lora_up|lora_B|lora\.up|_lora\.up|lora_linear_layer\.up)\.weight$")


def network_of(pipeline: Any) -> tuple[str, nn.Module]:
    """Name and module of a pipeline's diffusion network.

    Raises:
        ValueError: it has none.
    """
    for name in NETWORKS:
        if isinstance(getattr(pipeline, name, None), nn.Module):
            return name, getattr(pipeline, name)
    raise ValueError(f"{type(pipeline).__name__} has no diffusion network ({' or '.join(NETWORKS)}).")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; nothing else is ever opened.

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
    """Tensors and metadata of a safetensors file. Raises as `tensor_names` does."""
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def tensor_names(path: Path) -> list[str]:
    """The names in a safetensors file, of which only the header is read.

    Raises:
        ValueError: one sentence, for pickles and damaged files.
    """
    with _opened(path) as file:
        return list(file.keys())


def is_lora(path: Path) -> bool:
    """Whether a safetensors file is a LoRA and nothing more, in any layout; our own may hold extra inputs too."""
    names = tensor_names(path)
    return any(map(_UP.search, names)) and not any(name.startswith("extras.") for name in names)


def read_lora(pipeline: Any, path: Path) -> dict[str, Tensor]:
    """``<layer>.lora_A.weight`` and ``.lora_B.weight`` of a LoRA file for this pipeline's network, alpha folded into B.

    Layers are named as the network names them; the pipeline is as before afterwards.

    Raises:
        ValueError: one sentence: no LoRA, of another model, damaged, or with parts that are not of the network.
    """
    if any(name.startswith(("text_encoder", "lora_te")) for name in tensor_names(path)):
        raise ValueError(f"The LoRA {path} adapts the text encoder too, which is not supported here.")
    return read_parts(pipeline, path)[network_of(pipeline)[0]]


@torch.no_grad()
def add_loras(pipeline: Any, loras: Iterable[tuple[Path, float]], network: nn.Module | None = None) -> None:
    """Merge LoRA files of any layout, each at its scale, into a pipeline's network and text encoders, for good.

    Args:
        network: what stands in for the pipeline's own diffusion network.

    Raises:
        ValueError: as `read_lora`, but for parts of text encoders; a scale that is none.
    """
    for path, scale in loras:
        if not math.isfinite(scale):
            raise ValueError(f"The LoRA {path} cannot be added at the scale {scale}.")
        for part, layers in read_parts(pipeline, path).items():
            module = network if part in NETWORKS and network is not None else getattr(pipeline, part)
            merge(dict(module.named_parameters()), layers, scale)


def read_parts(pipeline: Any, path: Path) -> dict[str, dict[str, Tensor]]:
    """What a LoRA file holds for each part of a pipeline, its network first; else as `read_lora`.

    Raises:
        ValueError: as `read_lora`, but for parts of text encoders.
    """
    tensors, metadata = read_tensors(path)
    name, network = network_of(pipeline)
    if any(key.startswith(_PEFT) for key in tensors):
        tensors = {f"{name}.{key.removeprefix(_PEFT)}": t for key, t in tensors.items()}
        metadata = _beside(path, name)
    count = sum(bool(_UP.search(key)) for key in tensors)
    if not count:
        raise ValueError(f"The file {path} holds no LoRA.")
    bad = next((key for key, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())), None)
    if bad is not None:
        raise ValueError(f"The LoRA {path} is damaged: {bad} is not finite.")
    if not hasattr(pipeline, "load_lora_weights"):  # PixArt's
        return {name: _as_it_stands(_scaled(tensors, metadata, name), name, network, path)}
    try:
        with quiet():
            pipeline.load_lora_weights(_scaled(tensors, metadata, name), adapter_name="foreign")
        parts = {part: _layers(getattr(pipeline, part, None)) for part in (name, *ENCODERS)}
    except Exception as error:  # diffusers and peft have many errors for a LoRA of another model
        said = "its layers have other shapes" if "size mismatch" in str(error) else short_error(error)
        raise ValueError(f"The LoRA {path} does not fit {type(network).__name__}: {said.rstrip('.')}.") from error
    finally:
        if any(hasattr(getattr(pipeline, part, None), "peft_config") for part in (name, *ENCODERS)):
            pipeline.unload_lora_weights()
    found = sum(len(part) // 2 for part in parts.values())
    if found < count:
        raise ValueError(f"The LoRA {path} is of another model: only {found} of its {count} layers are here.")
    return {part: layers for part, layers in parts.items() if layers or part == name}


def _as_it_stands(tensors: dict[str, Tensor], part: str, network: nn.Module, path: Path) -> dict[str, Tensor]:
    """peft's layout, for pipelines without a loader of their own."""
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
    """What peft's adapter_config.json says of alpha, as diffusers says it in a header."""
    try:
        said = json.loads(path.with_name("adapter_config.json").read_text(encoding="utf-8"))
        return {"lora_adapter_metadata": json.dumps({f"{network}.{k}": said.get(k) for k in _ALPHAS})}
    except (OSError, ValueError, AttributeError, RecursionError):
        raise ValueError(
            f"The LoRA {path} is one of peft's: adapter_config.json, which knows its scale, is not beside it."
        ) from None


def _layers(network: nn.Module | None) -> dict[str, Tensor]:
    found = {}
    for layer, module in [] if network is None else network.named_modules():
        if hasattr(module, "lora_A") and "foreign" in module.lora_A:
            a, b = (getattr(module, part)["foreign"].weight.detach() for part in ("lora_A", "lora_B"))
            found[f"{layer}.lora_A.weight"] = a.float().clone()
            found[f"{layer}.lora_B.weight"] = b.float() * float(module.scaling["foreign"])
    return found


def _scaled(tensors: dict[str, Tensor], metadata: dict[str, str], network: str) -> dict[str, Tensor]:
    """The tensors with alpha / rank in B, where only the metadata knows alpha."""
    said = metadata.get("lora_adapter_metadata")
    if said is None or any(key.endswith(".alpha") for key in tensors):
        return dict(tensors)
    try:
        settings = json.loads(said)
        alphas = {key: _alpha(settings, key, network) for key in tensors}
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


def _alpha(settings: Any, key: str, network: str) -> Any:
    """What the settings say of the alpha of one tensor."""
    part = next((p for p in ENCODERS if key.startswith(f"{p}.")), network)
    alpha, pattern = settings.get(f"{part}.lora_alpha"), settings.get(f"{part}.alpha_pattern") or {}
    return pattern.get(key.removeprefix(f"{part}.").removesuffix(".lora_B.weight"), alpha)


@torch.no_grad()
def put_weights(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """All weights of a file into a network of the same architecture.

    A published network that is told its guidance scale has a layer more (``time_embedding.cond_proj``); it gets one.

    Raises:
        ValueError: one sentence when names or shapes differ.
    """
    told = tensors.get("time_embedding.cond_proj.weight")
    embedding: Any = getattr(network, "time_embedding", None)
    if told is not None and embedding is not None and getattr(embedding.cond_proj, "weight", None) is None:
        embedding.cond_proj = nn.Linear(told.shape[1], told.shape[0], bias=False, dtype=torch.float32)
        network.register_to_config(time_cond_proj_dim=told.shape[1])  # type: ignore[operator]
    mine = network.state_dict()
    for wrong in sorted(mine.keys() ^ tensors.keys()):
        there = "lacks" if wrong in mine else "has another model's"
        raise ValueError(f"The file {path} is of another network: it {there} {wrong}.")
    for key, value in tensors.items():
        if value.shape != mine[key].shape:
            raise ValueError(f"The file {path} is of another network: {key} has shape {tuple(value.shape)}.")
    network.load_state_dict(tensors)
