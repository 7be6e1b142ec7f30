"""What a safetensors file says of itself: modelspec 1.0.1, kohya's keys where readers look for them, and ours."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.data.files import replace_tensors
from fewstep.models.lora_files import network_of
from fewstep.students.student import Card

_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # the two that the specification knows
_KOHYA_BASES = {"stable-diffusion-v1": "sd_v1", "stable-diffusion-xl-v1-base": "sdxl_base_v1-0"}


def architecture(pipeline: Any) -> str:
    """The name that the specification gives a pipeline's network; the network's class where it gives none."""
    network = network_of(pipeline)[1]
    name, config = type(network).__name__, dict(network.config)  # type: ignore[arg-type]
    if name == "UNet2DConditionModel" and tuple(config["block_out_channels"])[:3] == (320, 640, 1280):
        if config.get("addition_embed_type") == "text_time":
            return "stable-diffusion-xl-v1-base"
        known = {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2-512"}.get(config["cross_attention_dim"])
        wide = (config.get("sample_size") or 64) > 64
        return "stable-diffusion-v2-768-v" if wide and known == "stable-diffusion-v2-512" else known or name
    if name == "FluxTransformer2DModel":
        return "flux-1-dev" if config.get("guidance_embeds") else "flux-1-schnell"
    return {"SD3Transformer2DModel": "stable-diffusion-3-medium"}.get(name, name)


def modelspec(
    card: Card, pipeline: Any, title: str, size: int, prediction: str, hint: str, licence: str, lora: bool
) -> dict[str, str]:
    """Header keys of modelspec 1.0.1, all that it demands and what tells people how to use the file.

    Args:
        size: side of the pictures in pixels. hint: settings in words, which programs are asked to show.
    """
    name = architecture(pipeline)
    said = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{name}/lora" if lora else name,
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.description": f"{card.num_inference_steps}-step student of {card.teacher}, method {card.method}",
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.usage_hint": hint,
        "modelspec.license": licence,
        "modelspec.tags": f"few-step, {card.method}",
        "format": "pt",
        "fewstep": json.dumps(asdict(card)),
    }
    if prediction in _PREDICTIONS:
        said["modelspec.prediction_type"] = _PREDICTIONS[prediction]
    if lora and name in _KOHYA_BASES:
        said["ss_base_model_version"] = _KOHYA_BASES[name]
    return said


def write(path: Path, tensors: dict[str, Tensor], header: Mapping[str, str]) -> None:
    """A safetensors file with ``modelspec.hash_sha256`` of its tensors' bytes, which a header does not change."""
    replace_tensors(path, tensors, dict(header))
    replace_tensors(path, tensors, {**header, "modelspec.hash_sha256": tensor_hash(path)})


def tensor_hash(path: Path) -> str:
    """``0x`` and the SHA-256 of all that comes after a safetensors file's header."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(1 << 20):
            digest.update(block)
    return f"0x{digest.hexdigest()}"
