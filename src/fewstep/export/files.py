"""The files of an export, in each layout: what `fewstep.export.publish` reads back afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.data.files import give_usual_permissions
from fewstep.export.fold import Fold
from fewstep.export.header import write
from fewstep.export.heads import card_of_heads, write_heads
from fewstep.export.lora import kohya_layout, layers, peft_layout, rounded
from fewstep.export.pipeline import close_guidance, put_student, save_network, save_pipeline
from fewstep.export.scheduler import build_scheduler
from fewstep.models.families import Teacher
from fewstep.sampling.diffusers_schedulers import SchedulerPlan
from fewstep.students.card import Card
from fewstep.students.student import LORA_FILE

LORAS = ("lora", "kohya", "heads")


@dataclass(frozen=True)
class Content:
    """What goes into the files of an export.

    Attributes:
        card, tensors: of the student. fold: its target times, if it is told them.
        plan: of its scheduler. closed: whether its pipeline samples without guidance at any scale.
        title: in the name of a file. header: of safetensors files. dtype: of the weights.
    """

    card: Card
    tensors: dict[str, Tensor]
    fold: Fold | None
    plan: SchedulerPlan
    closed: bool
    title: str
    header: dict[str, str]
    dtype: torch.dtype


@dataclass(frozen=True)
class Written:
    """The files that were written.

    Attributes:
        card: of the export. file: a LoRA's, None for other layouts; layers: how many diffusers has to find in it.
        parts: where each part of a `round_trip.Request` is.
    """

    card: Card
    file: Path | None
    layers: int
    parts: dict[str, Any]


def write_files(part: Path, to: str, teacher: Teacher, content: Content) -> Written:
    """Write them into the folder ``part``, whose layout is ``to``; the teacher's network is changed by some."""
    card, file, found = content.card, None, 0
    parts: dict[str, Any] = {}
    if to == "heads":
        file = write_heads(part, teacher, card, content.tensors, content.header, content.dtype)
        card = card_of_heads(card)
    elif to in LORAS:
        file, found = _lora(part, to, teacher, content)
        parts["lora"] = str(file)
    else:
        put_student(teacher, card, content.tensors, content.fold)
        if content.closed:
            close_guidance(teacher)
        parts |= _network(part, teacher, content) if to == "merged" else _pipeline(part, teacher, content)
    if to != "diffusers":
        build_scheduler(content.plan).save_pretrained(part / "scheduler")
        parts |= {"scheduler": str(part / "scheduler"), "scheduler_class": content.plan.scheduler}
    for path in part.rglob("*.safetensors"):
        give_usual_permissions(path)
    return Written(card, file, found, parts)


def _lora(part: Path, to: str, teacher: Teacher, content: Content) -> tuple[Path, int]:
    """A LoRA's one file, and how many layers it has; target times are more ranks of it."""
    tensors, fold = content.tensors, content.fold
    if fold is not None:
        tensors = fold.as_ranks(tensors, fold.weight_of(teacher.denoiser.network))
    found, more = peft_layout(tensors) if to == "lora" else kohya_layout(tensors, teacher.family.kohya_prefix)
    file = part / (LORA_FILE if to == "lora" else f"{content.title}_comfy.safetensors")
    write(file, rounded(found, content.dtype), {**content.header, **more})
    return file, len(layers(tensors))


def _network(part: Path, teacher: Teacher, content: Content) -> dict[str, str]:
    save_network(teacher.family.base, part, content.dtype)
    _write_header(part, content.header)
    return {"network": str(part)}


def _pipeline(part: Path, teacher: Teacher, content: Content) -> dict[str, str]:
    pipeline: Any = teacher.pipeline
    pipeline.scheduler = build_scheduler(content.plan)
    save_pipeline(pipeline, part, content.dtype)
    _write_header(part / teacher.family.part, content.header)
    return {"pipeline": str(part)}


def _write_header(folder: Path, header: dict[str, str]) -> None:
    """The header for a network that is one file; the parts of a large one share their index instead."""
    files = list(folder.glob("*.safetensors"))
    if len(files) == 1:
        write(files[0], load_file(files[0]), header)
