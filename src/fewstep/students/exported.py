"""What `fewstep export` wrote, as a model again: few_step.json beside the weights says how to sample and of what base.

Whole pipelines are models like any other, but for the shift of a flow model, which their scheduler may not say plainly.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fewstep.diffusion.schedule import Schedule
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import Teacher, load_teacher
from fewstep.models.lora import merge
from fewstep.models.lora_files import network_of, put_weights, read_lora, read_tensors
from fewstep.students.student import CARD_FILE, LORA_FILE, Card, load_card

_NETWORK = "diffusion_pytorch_model*.safetensors"
_FILES = {"lora": LORA_FILE, "kohya": "*.safetensors", "merged": _NETWORK}


@dataclass(frozen=True)
class Written:
    """An export.

    Attributes:
        files: its weights, one but for large networks. to: its form. base: the model it was made for.
    """

    files: tuple[Path, ...]
    to: str
    base: str
    card: Card


def find_export(path: Path) -> Written | None:
    """The LoRA or network that was exported to ``path``, a folder or a LoRA file in one; None for anything else.

    Only files of the folder itself are ever named, whatever its files say.

    Raises:
        ValueError: one sentence: its card is damaged, or its weights are missing.
    """
    folder = path.parent if path.is_file() else path
    if not (folder / CARD_FILE).is_file():
        return None
    card, said = load_card(folder), _said(folder)
    to = str(said.get("export"))
    if to not in _FILES:
        return None
    if not said["base"]:
        raise ValueError(f"The card {folder / CARD_FILE} is damaged: base must name the model it was made for.")
    files = (path,) if path.is_file() else tuple(sorted(folder.glob(_FILES[to])))
    if not files or (to != "merged" and len(files) > 1):
        raise ValueError(f"The folder {folder} holds {len(files) or 'no'} files of weights ({_FILES[to]}): name one.")
    return Written(files, to, said["base"], card)


def read_whole(folder: Path, **how: Any) -> tuple[Teacher, Card, str]:
    """An exported pipeline, its schedule put right; its card, and its base's name.

    Args:
        how: arguments of `load_teacher`.

    Raises:
        ValueError: one sentence: its card is damaged, or `load_teacher` cannot load it.
    """
    card, said = load_card(folder), _said(folder)
    teacher = load_teacher(str(folder), **{"size": card.image_size, **how})
    shift, schedule = said.get("shift"), teacher.denoiser.schedule
    if shift is not None and schedule.family == "flow":
        schedule = Schedule.flow(shift, schedule.num_train_timesteps)
    denoiser = Denoiser(teacher.denoiser.network, schedule, teacher.denoiser.prediction_type)
    return replace(teacher, denoiser=denoiser), card, said["base"]


def _said(folder: Path) -> dict[str, Any]:
    """What a card says beyond how to sample; its ``base`` is a name, or empty.

    Raises:
        ValueError: one sentence for values that are none.
    """
    said: dict[str, Any] = {"base": "", **json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))}
    shift = said.get("shift")
    if not isinstance(said["base"], str):
        raise ValueError(f"The card {folder / CARD_FILE} is damaged: base must be a model's name.")
    if shift is not None and not (isinstance(shift, int | float) and 0 < shift < 1e4):
        raise ValueError(f"The card {folder / CARD_FILE} is damaged: shift must be a positive number.")
    return said


@torch.no_grad()
def open_export(written: Written, base: str | None = None, **how: Any) -> Teacher:
    """The export on its base, or on ``base``, its weights merged in and its prediction kind in force.

    Args:
        how: other arguments of `load_teacher`.

    Raises:
        ValueError: one sentence: there is no such base, or the export is of another model.
    """
    card = written.card
    told = None if "guidance_embed" in card.extra_inputs else card.guidance_embed
    teacher = load_teacher(base or written.base, **{"size": card.image_size, "guidance_embed": told, **how})
    network = network_of(teacher.pipeline)[1]
    if written.to == "merged":
        tensors = {name: t for file in written.files for name, t in read_tensors(file)[0].items()}
        put_weights(network, tensors, written.files[0])
    else:
        merge(dict(network.named_parameters()), read_lora(teacher.pipeline, written.files[0]))
    kind = card.prediction_type or teacher.denoiser.prediction_type
    return replace(teacher, denoiser=Denoiser(teacher.denoiser.network, teacher.denoiser.schedule, kind))
