"""Headers of safetensors files: modelspec 1.0.1, kohya's keys for programs that look for them, and our own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fewstep.data.files import replace_tensors
from fewstep.export.hub_card import licence_words, one_line, shown
from fewstep.models.families import Family
from fewstep.students.card import Card

_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # the two that the specification knows


def modelspec(
    card: Card, family: Family, title: str, size: int, prediction: str, hint: str, base: str, lora: bool
) -> dict[str, str]:
    """Header keys of modelspec 1.0.1: all that it requires, and how to use the file.

    A date is none of them: two exports of one student are equal to the byte.

    Args:
        size: side of the images in pixels. hint: settings in words, for programs to show.
        base: the model that the student was distilled from.
    """
    name, heads = family.architecture, lora and bool(card.bank)
    header = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{name}/lora" if lora else name,
        "modelspec.implementation": "fewstep" if heads else "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.description": one_line(
            f"{card.num_inference_steps}-step student of {shown(base)}, method {card.method}{only_for(card)}"
        ),
        "modelspec.usage_hint": hint,
        "modelspec.license": licence_words(base),
        "modelspec.tags": one_line(f"few-step, {card.method}"),
        "format": "pt",
        "fewstep": card.as_json(),
    }
    if prediction in _PREDICTIONS:
        header["modelspec.prediction_type"] = _PREDICTIONS[prediction]
    if lora and name in family.kohya_bases:
        header["ss_base_model_version"] = family.kohya_bases[name]
    return header


def only_for(card: Card) -> str:
    """That a file is right for its own number of steps alone, as the end of a list; empty where it is not so."""
    return ", right for that number of steps alone" if card.target_times else ""


def write(path: Path, tensors: dict[str, Tensor], header: Mapping[str, str]) -> None:
    """A safetensors file with ``modelspec.hash_sha256`` of its tensors' bytes, which a header does not change."""
    replace_tensors(path, tensors, dict(header))
    replace_tensors(path, tensors, {**header, "modelspec.hash_sha256": tensor_hash(path)})


def tensor_hash(path: Path) -> str:
    """``0x`` and the SHA-256 of everything after a safetensors file's header."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(1 << 20):
            digest.update(block)
    return f"0x{digest.hexdigest()}"
