"""The weights of a finished student as files; `fewstep.export` writes those for other programs.

    student/
      pytorch_lora_weights.safetensors   unet.<layer>.lora_A/B.weight, scale folded in (alpha = rank)
      few_step.json                      its card: method, sampler, steps, guidance

A student with extra inputs (a target time, a guidance scale) needs its embeddings too, one with a bank of last layers
these (their differences from the teacher's), and one of full weights a whole network. No other program reads those:
they are in ``fewstep_student.safetensors``, not under the name that others load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewstep.data.files import replace_tensors, replacing
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import Teacher
from fewstep.models.lora import adapter_scale
from fewstep.models.roles import Roles, Weights
from fewstep.models.sharding import is_sharded, pieces, whole
from fewstep.models.tensor_files import write_pieces
from fewstep.students.card import Card, load_card
from fewstep.training import distributed

LORA_FILE = "pytorch_lora_weights.safetensors"
OWN_FILE = "fewstep_student.safetensors"
SAMPLES_FILE = "samples.png"


def save_student(folder: Path, roles: Roles, card: Card, role: str = "student") -> Path:
    """Write a role's weights and its card; each file appears whole or not at all. Returns the weights' path.

    All of several processes must call this; the first one writes. It receives sharded weights piece by piece.
    """
    tensors = _folded(roles, role)
    if any(is_sharded(t) for t in tensors.values()):
        return _write_in_pieces(folder, tensors, card)
    held = {n: whole(t.detach()).to("cpu", torch.float32).contiguous().clone() for n, t in tensors.items()}
    return write_student(folder, held, card)


def write_student(folder: Path, tensors: Mapping[str, Tensor], card: Card) -> Path:
    """`save_student` of plain tensors, float32 on the host; LoRAs with their scale folded in."""
    shareable = card.weights == "lora" and not any(name.startswith(("extras.", "bank.")) for name in tensors)
    path = folder / (LORA_FILE if shareable else OWN_FILE)
    if distributed.first():
        folder.mkdir(parents=True, exist_ok=True)
        replace_tensors(path, dict(tensors), _metadata(card))
        card.save(folder)
    return path


def _metadata(card: Card) -> dict[str, str]:
    return {"format": "pt", "fewstep": card.as_json()}


def _write_in_pieces(folder: Path, tensors: Mapping[str, Tensor], card: Card) -> Path:
    """`write_student` of full weights of which each process has its rows."""
    path, about = folder / OWN_FILE, {name: (torch.float32, t.shape) for name, t in tensors.items()}
    if distributed.first():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            write_pieces(part, about, lambda name: pieces(tensors[name]), _metadata(card))
        card.save(folder)
    else:
        for tensor in tensors.values():
            for _ in pieces(tensor):
                pass
    return path


def load_student(teacher: Teacher, folder: Path, card: Card | None = None) -> Denoiser:
    """The student of a folder on its teacher, ready to sample from.

    Raises:
        ValueError: one sentence when the weights are missing, or belong to another teacher.
    """
    card = card or load_card(folder)
    tensors = load_weights(folder)
    roles = Roles(teacher.denoiser)
    view = roles.add(
        "student", _weights(card, tensors), extra_inputs=card.extra_inputs,
        prediction_type=card.prediction_type or None, bank=card.bank,
    )  # fmt: skip
    role: Any = view.network
    try:
        roles.load_tensors({f"student/{name}": t for name, t in tensors.items()})
    except ValueError:
        raise ValueError(
            f"The student in {folder} is of another model than {teacher.name}: its weights differ in name or shape."
        ) from None
    if role.bank is not None:
        role.bank.rate = 1.0  # it is in the file already
    for own in (role.extras, role.bank):
        if own is not None:
            own.requires_grad_(False)
    return view


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a student's folder, or of one safetensors file.

    Raises:
        ValueError: one sentence when there are none.
    """
    file = path if path.is_file() else weights_file(path)
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"The file {file} is no safetensors file ({error}).") from None


def weights_file(folder: Path) -> Path:
    """The file of weights in a student's folder.

    Raises:
        ValueError: when there is none.
    """
    path = next((folder / name for name in (LORA_FILE, OWN_FILE) if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"The folder {folder} holds no student weights.")
    return path


def _weights(card: Card, tensors: dict[str, Tensor]) -> Weights:
    if card.weights == "full":
        return Weights("full")
    return Weights("lora", rank=card.rank, targets=tuple(_layers(tensors)))


def _layers(names: Iterable[str]) -> list[str]:
    return sorted({name.split(".lora_")[0] for name in names if ".lora_" in name})


def _folded(roles: Roles, role: str) -> dict[str, Tensor]:
    """A role's tensors, with a LoRA's scale folded into B, for programs that ignore alpha, and a bank's rate."""
    network: Any = getattr(roles, role).network
    found = roles.tensors_of(role)
    if network.adapters:
        scale = adapter_scale(network.network, network.adapters[0])
        found = {name: t * scale if ".lora_B" in name else t for name, t in found.items()}
    if network.bank is not None:
        found = {name: t * network.bank.rate if name.startswith("bank.") else t for name, t in found.items()}
    return found
