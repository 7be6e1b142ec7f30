"""`fewstep.load`: a model to sample from, by its name, file or folder."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from fewstep.checkpoints.copies import copy_of
from fewstep.checkpoints.load import load_checkpoint, load_heads
from fewstep.checkpoints.registry import Checkpoint, checkpoints, find_checkpoint
from fewstep.checkpoints.sampling import sampler_class
from fewstep.inference.model import Model
from fewstep.models.families import Teacher, load_teacher, parts_of, shipped
from fewstep.models.families.load import expanded
from fewstep.models.families.wrong_base import refuse_wrong_base
from fewstep.models.hub import DTYPES, check_device, dtype_word
from fewstep.models.lora_files import add_loras, check_lora, is_lora, lora_file
from fewstep.sampling import LCMSampler, TCDSampler
from fewstep.students.card import CARD_FILE, Card, load_card
from fewstep.students.exported import find_export, open_export, read_whole
from fewstep.students.lineage import first_teacher, is_pipeline, student_folder, teacher_of
from fewstep.students.student import load_student, weights_file
from fewstep.training.run_files import RunFiles, refuse_missing_run

Loras: TypeAlias = "Sequence[str | Path | tuple[str | Path, float]]"
TEACHER = Card(method="", sampler="ddim", num_inference_steps=50, weights="full", teacher="")


def load(
    name: str | Path,
    *,
    base: str | None = None,
    file: str | Path | None = None,
    loras: Loras = (),
    size: int | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
) -> Model:
    """A model to sample from: ``fewstep.load("runs/mine").sample("a red star")``.

    Args:
        name: a run; what `fewstep export` wrote, a folder or LoRA file; a published checkpoint (`fewstep checkpoints`);
            or a teacher: scenes-64, a diffusers folder, a hub name, a single .safetensors file (with the
            folder of its configs: ``file@folder``).
        base: the model that a LoRA or a published file is put on, its own if None. A LoRA without a card needs one, and
            its sampler and number of steps with every call.
        file: a published checkpoint's file, if it is on this machine.
        loras: style LoRAs on top: files of any form and layout, their folders or hub names; (file, scale) where the
            scale is not 1.
        size: side of the images in pixels, the model's own if None.
        device, dtype: of the networks' weights (fp32, fp16, bf16).

    Warns:
        UserWarning: the licence of a published file.

    Raises:
        ValueError: it is none of these, or does not fit.
    """
    model = load_model(name, base, file, loras, size=size, device=device, dtype=dtype)
    if model.licence:
        warnings.warn(model.licence, stacklevel=2)
    return model


def load_model(
    name: str | Path,
    base: str | None = None,
    file: str | Path | None = None,
    loras: Loras = (),
    *,
    published: bool = False,
    size: int | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
) -> Model:
    """As `load`, without the warning. ``published``: the name can only be a published checkpoint's."""
    check_device(device)  # before files of gigabytes are read, or downloaded
    how: dict[str, Any] = {"device": device, "dtype": DTYPES[dtype_word(dtype, "dtype")]}
    how |= {} if size is None else {"size": size}
    name = expanded(str(name))
    refuse_missing_run(name)
    if base is not None:
        refuse_missing_run(base)
    styles, path = [_scaled(lora) for lora in loras], name
    for lora, _ in styles:  # before the model, which may be large
        check_lora(lora)
    known = not path.exists() and str(name) in checkpoints()
    if published or known:
        return _with(
            styles, load_published(find_checkpoint(str(name)), base, expanded(str(file)) if file else None, **how)
        )
    if file is not None:
        raise ValueError("A file goes with the name of a published checkpoint: `fewstep checkpoints` lists them.")
    written = find_export(path)
    if written is not None:
        teacher, student = open_export(written, base, **how)
        card = written.card
        model = Model(teacher, student, card, card.guidance_scale, base=base or written.base)
        return _with(styles, model)
    folder = student_folder(path.parent if _is_lora_of_a_run(path) else path)
    if folder is not None:
        return _student(folder, base, styles, how)
    if base is not None:
        return _with(styles, _without_card(name, base, how))
    return _with(styles, _whole(str(name), how))


def load_published(entry: Checkpoint, base: str | None = None, file: Path | None = None, **how: Any) -> Model:
    """An entry of the registry on its base model, as `fewstep.checkpoints.load.load_checkpoint` has it."""
    heads = entry.kind == "lora-heads"
    teacher, student = (
        load_heads(entry, base, file, **how) if heads else (load_checkpoint(entry, base, file, **how), None)
    )
    scale = 1.0 if entry.guidance == "embedded" else entry.guidance_scale or 1.0
    embed = entry.guidance_scale if entry.guidance == "embedded" else None
    card = Card(entry.method, "", entry.default_steps, "full", base or entry.base, guidance_embed=embed)
    if heads and entry.sigmas is not None:  # other samplers take its times too
        card = replace(card, sampler="euler", bank=(*entry.sigmas, 0.0), bank_steps=(len(entry.sigmas),))
    return Model(teacher, student or teacher.denoiser, card, scale, entry, base or entry.base or entry.repo)


def _student(folder: Path, base: str | None, styles: list[tuple[Path, float]], how: dict[str, Any]) -> Model:
    """A run's student on its teacher or another one, style LoRAs below it."""
    card = load_card(folder)
    if base is not None and card.weights == "full":
        raise ValueError(f"The student in {folder} has weights of its own: it cannot be put on another base.")
    if base is None:
        teacher = teacher_of(folder, card, **how)
    else:
        refuse_wrong_base(f"The student in {folder}", weights_file(folder), base)
        teacher = load_teacher(base, **{"size": card.image_size, **how})
    if card.weights == "lora":
        add_loras(teacher.family.lora_parts, styles)
    student: Any = load_student(teacher, folder, card)
    if card.weights == "full" and styles:
        family = teacher.family
        add_loras({**family.lora_parts, family.part: getattr(student.network.network, family.part)}, styles)
    return Model(teacher, student, card, card.guidance_scale, base=base or first_teacher(folder))


def _without_card(name: str | Path, base: str, how: dict[str, Any]) -> Model:
    """A LoRA of any form on its base, without guidance; only whoever made it knows its sampler and steps."""
    path = Path(name) if is_pipeline(Path(name)) else lora_file(name)
    if not path.is_file() or not is_lora(path):
        raise ValueError(f"A base goes with a LoRA or a published checkpoint, which {name} is not.")
    refuse_wrong_base(f"The LoRA {path}", path, base)
    teacher = load_teacher(base, **how)
    add_loras(teacher.family.lora_parts, [(path, 1.0)])
    return Model(teacher, teacher.denoiser, replace(TEACHER, sampler=""), 1.0, base=base)


def _whole(name: str, how: dict[str, Any]) -> Model:
    """A whole model: a teacher, or a student that was exported so."""
    path, first = Path(name), parts_of(name)[0]
    if RunFiles(path).recipe.is_file():
        raise ValueError(f"The run {name} has no student yet: finish it with fewstep distill ... --resume.")
    if path.suffix.lower() == ".safetensors" and path.is_file() and is_lora(path):
        raise ValueError(
            f"{name} cannot be sampled from by itself: {CARD_FILE} is not beside it. Give its base model (--base) with "
            "a sampler and steps, a published checkpoint's name with this as its file, or a model with this among its "
            "loras."
        )
    if not Path(first).exists() and "/" not in first and shipped(first) is None:
        near = difflib.get_close_matches(name.lower(), checkpoints(), n=2, cutoff=0.6)
        raise ValueError(
            f"There is no model '{name:.80}': give a run, an exported folder or LoRA file, a published checkpoint, a "
            f"diffusers folder or a hub name{'. Did you mean ' + ' or '.join(near) + '?' if near else '.'}"
        )
    if is_pipeline(path) and (path / CARD_FILE).is_file():
        teacher, card, origin = read_whole(path, **how)
        return Model(teacher, teacher.denoiser, card, card.guidance_scale, base=origin)
    entry = copy_of(first)
    if entry is not None:
        return load_published(entry, name, **how)
    teacher = load_teacher(name, **how)
    card = _few_step(teacher)
    scale = teacher.guidance_scale if card is TEACHER else 1.0
    return Model(teacher, teacher.denoiser, card, scale)


def _few_step(teacher: Teacher) -> Card:
    """The card of a pipeline that is somebody's few-step student; otherwise `TEACHER`.

    That shows in its scheduler, in its guidance-scale embedding, in levels of its own, or in its settings.
    """
    config, own = dict(teacher.pipeline.scheduler.config), teacher.family.own_sigmas()
    sampler = sampler_class(str(config.get("_class_name", "")))
    if own is not None:
        name = sampler.name if sampler else TEACHER.sampler
        return replace(TEACHER, sampler=name, num_inference_steps=len(own), timesteps=own)
    if teacher.family.few_steps is not None:
        return replace(TEACHER, num_inference_steps=teacher.family.few_steps)
    embedded = teacher.guidance_embed if teacher.family.closes_guidance else None  # LCM's, not FLUX.1-dev's
    if sampler not in (LCMSampler, TCDSampler) and embedded is None:
        return TEACHER
    name, eta = ("tcd", 0.3) if sampler is TCDSampler else ("lcm", 0.0)
    original = int(config.get("original_inference_steps") or Card.original_inference_steps)
    return replace(
        TEACHER, method=name, sampler=name, num_inference_steps=4, eta=eta, original_inference_steps=original,
        guidance_embed=embedded,
    )  # fmt: skip


def _with(styles: list[tuple[Path, float]], model: Model) -> Model:
    add_loras(model.teacher.family.lora_parts, styles)
    return model


def _scaled(lora: str | Path | tuple[str | Path, float]) -> tuple[Path, float]:
    file, scale = (lora, 1.0) if isinstance(lora, str | Path) else lora
    return expanded(str(file)), float(scale)


def _is_lora_of_a_run(path: Path) -> bool:
    return path.is_file() and (path.parent / CARD_FILE).is_file()
