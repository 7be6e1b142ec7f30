"""Students as the start of other runs: as a teacher, as first weights, or merged into full weights."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.checkpoints.copies import copy_of
from fewstep.checkpoints.load import load_checkpoint
from fewstep.data.files import replacing
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import Teacher, load_teacher
from fewstep.models.lora import merge, scaled
from fewstep.models.quantize import quantize
from fewstep.models.roles import Roles, Weights
from fewstep.students.card import CARD_FILE, Card, load_card
from fewstep.students.exported import find_export, is_export
from fewstep.students.student import load_weights, save_student, weights_file, write_student
from fewstep.training import distributed
from fewstep.training.run_files import RunFiles, refuse_missing_run

_EARLIER_STAGE = re.compile(r"\.\./\.\./[A-Za-z0-9][\w-]*/student")


def student_folder(path: Path) -> Path | None:
    """The folder of the student of a run, of a run of several stages, or of itself; None if there is none."""
    stages = RunFiles(path).stages()
    if stages and RunFiles(path).recipe.is_file():
        path = stages[-1]
    if is_pipeline(path):  # an exported one has a card too, but is a model like any other
        return None
    return next((folder for folder in (path, RunFiles(path).student) if (folder / CARD_FILE).is_file()), None)


def is_pipeline(path: Path) -> bool:
    """Whether this folder is a diffusers pipeline."""
    return (path / "model_index.json").is_file()


def teacher_of(folder: Path, card: Card, device: str = "cpu", **options: Any) -> Teacher:
    """The teacher that the student in ``folder`` stands on, a model or another student; arguments as `open_teacher`."""
    return open_teacher(teacher_name(folder, card), device=device, **{"size": card.image_size, **options})


def first_teacher(folder: Path) -> str:
    """Name of the model that the student in ``folder`` was distilled from, past all students in between."""
    return model_behind(teacher_name(folder, load_card(folder)))


def model_behind(name: str) -> str:
    """The model that ``name`` was distilled from, past all students in between; a model's own name.

    Raises:
        ValueError: ``name`` is that of a run, which is not there.
    """
    refuse_missing_run(name)
    student = student_folder(Path(name))
    return name if student is None else first_teacher(student)


def origin_of(name: str) -> Denoiser | None:
    """The model that the finished run ``name`` was distilled from, past all students in between; None for a model."""
    folder = student_folder(Path(name))
    return None if folder is None else load_teacher(first_teacher(folder)).denoiser


def teacher_name(folder: Path, card: Card) -> str:
    """Name or folder of a card's teacher; an earlier stage of the same run is beside it, wherever the run is now."""
    return str(Path(folder, card.teacher).resolve()) if _EARLIER_STAGE.fullmatch(card.teacher) else card.teacher


def open_teacher(name: str, loras: tuple[str, ...] = (), device: str = "cpu", **options: Any) -> Teacher:
    """A teacher by name or folder; a finished run's student becomes one, its LoRA merged into its own teacher.

    Args:
        loras: LoRA files or hub names that are merged too.
        options: other arguments of `load_teacher`.

    Raises:
        ValueError: one sentence when there is none, or it needs inputs that a teacher is not given.
    """
    refuse_missing_run(name)
    folder, later = student_folder(Path(name)), options.pop("later", False)
    if folder is None:
        _refuse_export(Path(name))
        entry = copy_of(name)
        if entry is None:
            return load_teacher(name, device=device, loras=loras, later=later, **options)
        published = load_checkpoint(entry, name, device=device, loras=loras, **options)
        return published.with_denoiser(name=published.origin)  # a card calls it by its place
    if loras:
        raise ValueError(f"teacher.loras go with a model, not with a finished run such as {name}.")
    _refuse_export(folder)
    card = load_card(folder)
    if card.beside_weights:
        raise ValueError(
            f"The student in {folder} has {card.beside_weights} and cannot be a teacher: train it without "
            "them, or let it be the init of the next run."
        )
    own = {"size": card.image_size, "guidance_embed": card.guidance_embed}
    options |= {key: value for key, value in own.items() if options.get(key) is None}
    quantization = options.pop("quantization", None)  # only once the student's weights are in
    teacher = open_teacher(teacher_name(folder, card), device=device, **options)
    network: Any = teacher.denoiser.network
    _load_into(dict(network.named_parameters()), load_weights(folder), folder)
    if quantization is not None:
        quantize(network, quantization)
    return teacher.with_denoiser(name=name, kind=card.prediction_type)


def _refuse_export(path: Path) -> None:
    """Refuse an export that is right at the times of its own steps alone."""
    card = load_card(path) if is_export(path) else None
    if card is not None and (card.target_times or (card.bank_steps and find_export(path))):
        holds = "the target times" if card.target_times else "the last layers"
        raise ValueError(
            f"The weights of the export {path} hold {holds} of its own steps, so it cannot be a teacher: take a model, "
            "or the run itself as the init of the next run."
        )


@torch.no_grad()
def _load_into(weights: Mapping[str, Tensor], saved: Mapping[str, Tensor], folder: Path) -> None:
    """Put a student's weights into a network: all of them, or its LoRA merged."""
    if any(".lora_" in name for name in saved):
        merge(weights, saved)
        return
    if saved.keys() != weights.keys() or any(saved[k].shape != weights[k].shape for k in saved):
        raise ValueError(f"The student in {folder} belongs to another teacher: its weights differ in name or shape.")
    for name, weight in weights.items():
        weight.copy_(saved[name])


def load_start(name: str, teacher: str, weights: Literal["lora", "full"]) -> dict[str, Tensor]:
    """The weights that a student starts from (`Roles.start`): of a finished run, a student's folder, or a LoRA file.

    A run's LoRA on another student than ``teacher`` is returned with the weights that it stands on: added to those of
    ``teacher``, which may have it merged in already, it would be another function.

    Args:
        teacher: name or folder of the teacher of the run that starts. weights: of its student.

    Raises:
        ValueError: one sentence when there is no such folder or file, or a LoRA stands on another teacher.
    """
    path = Path(name)
    if path.is_file():
        return load_weights(path)
    folder = student_folder(path)
    if folder is None:
        raise ValueError(f"init: there is no finished run, student's folder or LoRA file '{name}'.")
    saved, card = load_weights(folder), load_card(folder)
    if card.weights == "full" or _same_teacher(teacher_name(folder, card), teacher):
        return saved
    if weights == "lora":
        raise ValueError(
            f"init: the LoRA in {folder} stands on another teacher ({card.teacher}): take that one, or 'weights: full'."
        )
    under = dict(teacher_of(folder, card).denoiser.network.named_parameters())  # type: ignore[attr-defined]
    merge(under, saved)
    return under | {key: t for key, t in saved.items() if ".lora_" not in key}


def same_student(one: str, other: str) -> bool:
    """Whether two names lead to one and the same finished student."""
    return student_folder(Path(one)) is not None and _same_teacher(one, other)


def _same_teacher(one: str, other: str) -> bool:
    """Whether two teachers are the same student, or both models, which may have several names and copies."""
    first, second = (student_folder(Path(name)) for name in (one, other))
    if first is None or second is None:
        return first is second
    return first.resolve() == second.resolve()


def merge_student(source: Path, target: Path, scale: float = 1.0, weights: Literal["full", "lora"] = "full") -> Path:
    """Write a student of full weights to ``target`` from the LoRA in ``source``, unless it is there; return ``target``.

    Args:
        scale: of that LoRA.
        weights: "lora" joins it with the LoRA that it stands on instead, into one LoRA of both ranks on that one's
            teacher: the same function for programs that have only the first teacher.

    Raises:
        ValueError: the student has full weights already, or extra inputs that are no weights of its teacher; or it is
            to be joined and does not stand on a LoRA.
    """
    if distributed.from_first((target / CARD_FILE).is_file()):  # the first process writes it while others may look
        return target
    card = load_card(source)
    if card.weights == "full" or card.beside_weights:
        raise ValueError(f"The student in {source} is no LoRA that could be merged.")
    lora = scaled(load_weights(source), scale)
    if weights == "lora":
        joined, below = _joined(lora, source, card)
        rank = next(t.shape[0] for key, t in joined.items() if ".lora_A" in key)
        name = _as_seen_from(target, below)
        write_student(target, joined, replace(card, rank=rank, teacher=name))
    else:
        roles = Roles(teacher_of(source, card).denoiser)
        roles.add("student", Weights("full"))
        roles.start("student", lora)
        save_student(target, roles, replace(card, weights="full", rank=0))
    distributed.wait()
    return target


def _as_seen_from(target: Path, folder: Path) -> str:
    """Name of the teacher of the student in ``folder`` on a card in ``target``: stages of one run move together."""
    card, run = load_card(folder), folder.parent.parent.resolve()
    return card.teacher if run == target.parent.parent.resolve() else teacher_name(folder, card)


def _joined(lora: Mapping[str, Tensor], source: Path, card: Card) -> tuple[dict[str, Tensor], Path]:
    """(the sum of this LoRA and the one that it stands on, the folder of that one)."""
    under = student_folder(Path(teacher_name(source, card)))
    below = None if under is None else load_card(under)
    if under is None or below is None or below.weights != "lora" or below.beside_weights:
        raise ValueError(f"The LoRA in {source} stands on no other LoRA that it could be joined with.")
    first = load_weights(under)
    if first.keys() != lora.keys():
        raise ValueError(f"The LoRA in {source} adapts other layers than the one that it stands on: merge it instead.")
    return {key: torch.cat([t, lora[key]], dim=0 if ".lora_A" in key else 1) for key, t in first.items()}, under


def copy_student(source: Path, target: Path) -> None:
    """Copy weights and card, the card last: a folder with a card has its weights."""
    target.mkdir(parents=True, exist_ok=True)
    for file in (weights_file(source), source / CARD_FILE):
        with replacing(target / file.name) as part:
            shutil.copyfile(file, part)
