"""The finished student as files: a LoRA in the layout that diffusers reads, or a whole UNet; `publish` has the others.

    student/
      pytorch_lora_weights.safetensors   unet.<layer>.lora_A/B.weight, scale folded in (alpha = rank)
      few_step.json                      method, sampler, steps, guidance: how to sample from it

A student with extra inputs (a target time, a guidance scale) needs its embeddings too; no other program reads them,
so it goes to ``fewstep_student.safetensors`` and never under the name that others would load.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewstep.data.files import replace_tensors, replace_text
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import Teacher
from fewstep.models.lora import adapter_scale
from fewstep.models.roles import RoleNetwork, Roles, Weights
from fewstep.models.sharding import whole
from fewstep.sampling import SAMPLERS, Sampler, make_sampler
from fewstep.training import distributed

LORA_FILE = "pytorch_lora_weights.safetensors"
OWN_FILE = "fewstep_student.safetensors"
CARD_FILE = "few_step.json"
SAMPLES_FILE = "samples.png"


@dataclass(frozen=True)
class Card:
    """How to sample from a student.

    Attributes:
        method: what trained it. sampler: the sampler that its method wants.
        num_inference_steps, eta, original_inference_steps: of that sampler.
        timesteps: where that sampler asks, if not on a grid of its own.
        weights: "lora" or "full". rank: of the LoRA.
        teacher: the model it was distilled from; ``../../<stage>/student`` is an earlier stage of the same run.
        guidance_scale: classifier-free guidance it wants; 1 (off) where the teacher's is built in.
        prediction_type: what it predicts; empty: what its teacher does. Other programs must be told where it differs.
        extra_inputs: what it must be told: "end", "guidance_embed".
        guidance_embed: the scale it is told, when it is.
        image_size: side of its pictures in pixels; None is its teacher's own.
        steps: training steps behind it. forward_equivalents: what they cost, the runs it builds on included.
        costs: the parts of that, by a mark of each run's recipe: a run that two others begin with counts once.
    """

    method: str
    sampler: str
    num_inference_steps: int
    weights: Literal["lora", "full"]
    teacher: str
    eta: float = 0.0
    original_inference_steps: int = 50
    rank: int = 0
    guidance_scale: float = 1.0
    timesteps: tuple[float, ...] = ()
    prediction_type: str = ""
    extra_inputs: tuple[str, ...] = ()
    guidance_embed: float | None = None
    image_size: int | None = None
    steps: int = 0
    forward_equivalents: float = 0.0
    costs: dict[str, float] = field(default_factory=dict)
    format: int = 1


def save_student(folder: Path, roles: Roles, card: Card, role: str = "student") -> Path:
    """Write a role's weights and its card; each file appears whole or not at all. Returns the weights' path.

    Of several processes all must call this, and the first writes.
    """
    tensors = _folded(roles, role) if card.weights == "lora" else roles.tensors_of(role)
    shareable = card.weights == "lora" and not any(name.startswith("extras.") for name in tensors)
    path = folder / (LORA_FILE if shareable else OWN_FILE)
    plain = {n: whole(t.detach()).to("cpu", torch.float32).contiguous().clone() for n, t in tensors.items()}
    if distributed.first():
        folder.mkdir(parents=True, exist_ok=True)
        replace_tensors(path, plain, {"format": "pt", "fewstep": json.dumps(asdict(card))})
        replace_text(folder / CARD_FILE, json.dumps(asdict(card), indent=1) + "\n")
    return path


def load_card(folder: Path) -> Card:
    """The card of a student folder.

    Raises:
        ValueError: one sentence when the folder holds no student of ours.
    """
    try:
        data = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != 1:
            raise ValueError("unknown format")
        return TypeAdapter(Card).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"The card {folder / CARD_FILE} is damaged: {key}: {first['msg']}.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no student: {CARD_FILE} is missing or damaged ({error}).") from None


def sampler_of(card: Card, name: str | None = None, **options: Any) -> Sampler:
    """The sampler that a card asks for; ``name`` and ``options`` (None: not given) override it."""
    given = {key: value for key, value in options.items() if value is not None}
    own = name in (None, card.sampler) and not given.keys() & {"timesteps", "sigmas", "timestep_spacing"}
    if own and card.timesteps and given.get("num_inference_steps") in (None, len(card.timesteps)):
        given = {**given, "num_inference_steps": None, "timesteps": card.timesteps}
    if not given.keys() & {"num_inference_steps", "timesteps", "sigmas"}:
        given["num_inference_steps"] = card.num_inference_steps
    if name in (None, card.sampler) and card.sampler in SAMPLERS:
        for key in {"eta", "original_inference_steps"} & {f.name for f in fields(SAMPLERS[card.sampler])}:
            given.setdefault(key, getattr(card, key))
    return make_sampler(name or card.sampler, **given)


def load_student(teacher: Teacher, folder: Path, card: Card | None = None) -> Denoiser:
    """The student of a folder on its teacher, ready to sample from.

    Raises:
        ValueError: one sentence when the weights are missing, foreign, or those of another teacher.
    """
    card = card or load_card(folder)
    tensors = load_weights(folder)
    roles = Roles(teacher.denoiser)
    view = roles.add(
        "student", _weights(card, tensors), extra_inputs=card.extra_inputs, prediction_type=card.prediction_type or None
    )
    try:
        roles.load_tensors({f"student/{name}": t for name, t in tensors.items()})
    except ValueError:
        raise ValueError(
            f"The student in {folder} is of another model than {teacher.name}: its weights differ in name or shape."
        ) from None
    if isinstance(view.network, RoleNetwork) and view.network.extras is not None:
        view.network.extras.requires_grad_(False)
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
    """A LoRA whose scale is part of B: readers that know no alpha then get it right."""
    network: Any = getattr(roles, role).network
    scale = adapter_scale(network.network, network.adapters[0])
    return {name: t * scale if ".lora_B" in name else t for name, t in roles.tensors_of(role).items()}
