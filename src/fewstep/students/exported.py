"""Exports read back as models: few_step.json beside the weights holds the sampler and the base model.

Whole pipelines load like any other model, except for the shift of a flow model, which their scheduler may hold in
another form.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.diffusion.schedule import Schedule
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import Teacher, load_teacher
from fewstep.models.families.wrong_base import refuse_wrong_base
from fewstep.models.lora import merge
from fewstep.models.lora_files import add_heads_file, put_weights, read_lora, read_tensors
from fewstep.students.card import CARD_FILE, Card, load_card
from fewstep.students.student import LORA_FILE

_NETWORK = "diffusion_pytorch_model*.safetensors"
_FILES = {"lora": LORA_FILE, "kohya": "*.safetensors", "merged": _NETWORK, "heads": LORA_FILE}


@dataclass(frozen=True)
class Exported:
    """A LoRA or network that was exported.

    Attributes:
        files: its weights, one file but for large networks.
        to: its form, a key of `_FILES`.
        base: the model it was made for.
    """

    files: tuple[Path, ...]
    to: str
    base: str
    card: Card


def is_export(path: Path) -> bool:
    """Whether `fewstep export` wrote this folder, in any form, or the file of weights in it."""
    card = (path.parent if path.is_file() else path) / CARD_FILE
    try:
        return bool(json.loads(card.read_text(encoding="utf-8")).get("export"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def find_export(path: Path) -> Exported | None:
    """The LoRA or network that was exported to ``path``, a folder or a LoRA file in one; None for anything else.

    Only files of the folder itself are ever named, whatever its card holds.

    Raises:
        ValueError: one sentence: its card is damaged, or its weights are missing.
    """
    folder = path.parent if path.is_file() else path
    if not (folder / CARD_FILE).is_file():
        return None
    card, base, _, to = _read(folder)
    if to not in _FILES:
        return None
    if not base:
        raise ValueError(f"The card {folder / CARD_FILE} is damaged: base must name the model it was made for.")
    files = (path,) if path.is_file() else tuple(sorted(folder.glob(_FILES[to])))
    if not files or (to != "merged" and len(files) > 1):
        raise ValueError(f"The folder {folder} holds {len(files) or 'no'} files of weights ({_FILES[to]}): name one.")
    return Exported(files, to, base, card)


def read_whole(folder: Path, **options: Any) -> tuple[Teacher, Card, str]:
    """(an exported pipeline with its schedule corrected, its card, the name of its base).

    Args:
        options: arguments of `load_teacher`.

    Raises:
        ValueError: one sentence: its card is damaged, or `load_teacher` cannot load it.
    """
    card, base, (shift, terminal), _ = _read(folder)
    teacher = load_teacher(str(folder), **{"size": card.image_size, **options})
    schedule = teacher.denoiser.schedule
    if shift is not None and schedule.family == "flow":
        schedule = Schedule.flow(shift, schedule.num_train_timesteps, terminal)
    return teacher.with_denoiser(schedule=schedule), card, base


def _read(folder: Path) -> tuple[Card, str, tuple[float | None, float], str]:
    """(card, base, (shift, terminal level), form) of an export; an empty base or form where the card has none.

    Raises:
        ValueError: one sentence for values of the wrong kind.
    """
    card, data = load_card(folder), json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
    base, shift = data.get("base", ""), data.get("shift")
    if not isinstance(base, str):
        raise ValueError(f"The card {folder / CARD_FILE} is damaged: base must be a model's name.")
    if shift is not None and not (isinstance(shift, int | float) and 0 < shift < 1e4):
        raise ValueError(f"The card {folder / CARD_FILE} is damaged: shift must be a positive number.")
    terminal = data.get("terminal", 0.0)
    if not (isinstance(terminal, int | float) and 0 <= terminal < 1):
        raise ValueError(f"The card {folder / CARD_FILE} is damaged: terminal must be at least 0 and below 1.")
    return card, base, (shift, terminal), str(data.get("export", ""))


@torch.no_grad()
def open_export(export: Exported, base: str | None = None, **options: Any) -> tuple[Teacher, Denoiser]:
    """The export on its base, or on ``base``, with its weights merged in and its prediction kind; what is sampled.

    The second is the first one's network, but for an export with a last layer for each step.

    Args:
        options: other arguments of `load_teacher`.

    Raises:
        ValueError: one sentence: there is no such base, or the export is of another model.
    """
    card = export.card
    embedded = None if "guidance_embed" in card.extra_inputs else card.guidance_embed
    if base is not None:
        refuse_wrong_base(f"The export {export.files[0].parent}", export.files[0], base)
    teacher = load_teacher(base or export.base, **{"size": card.image_size, "guidance_embed": embedded, **options})
    teacher, network = teacher.with_denoiser(kind=card.prediction_type), teacher.family.base
    if export.to == "heads":
        return teacher, add_heads_file(teacher.family.lora_parts, teacher.denoiser, export.files[0], card.bank)
    if export.to == "merged":
        tensors = {name: t for file in export.files for name, t in read_tensors(file)[0].items()}
        put_weights(network, tensors, export.files[0])
    else:
        merge(dict(network.named_parameters()), read_lora(teacher.family.lora_parts, export.files[0]))
    return teacher, teacher.denoiser
