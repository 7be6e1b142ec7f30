"""A published file on its base model, to sample from or to start a student with."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from fewstep.checkpoints.registry import Checkpoint
from fewstep.checkpoints.sampling import sampler_class, schedule_of
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import Teacher, family_named, load_teacher
from fewstep.models.families.wrong_base import refuse_wrong_base
from fewstep.models.hub import asking_hub, short_error
from fewstep.models.lora import scaled
from fewstep.models.lora_files import (
    NotLowRank,
    add_heads_file,
    add_loras,
    put_weights,
    read_lora,
    read_tensors,
    tensor_names,
)


def load_checkpoint(
    entry: Checkpoint, base: str | None = None, file: Path | None = None, device: str = "cpu", **options: Any
) -> Teacher:
    """The entry as a teacher with its weights, schedule and prediction kind.

    Args:
        base: model it stands on, a folder or hub name; the entry's own if None. For a pipeline: the pipeline itself.
        file: its weights on this machine; downloaded if None. options: other arguments of `load_teacher`.

    Raises:
        ValueError: one sentence, and nothing is loaded: not on the hub, a pickle, of another model.
    """
    known, family = sampler_class(entry.scheduler) is not None, family_named(entry.family)
    if entry.kind == "lora-heads":
        raise ValueError(f"{entry.id} has a last layer for each of its steps: it can be sampled, and is no teacher.")
    if not known or family is None:  # before anything is downloaded
        why = f"{entry.family} networks are" if known else "its sampler is"
        raise ValueError(
            f"{entry.id} cannot be sampled here, {why} not built in: `fewstep checkpoints {entry.id} --code` prints "
            "the lines for diffusers."
        )
    if entry.kind == "pipeline":
        if file is not None:
            raise ValueError(f"{entry.id} is a whole pipeline: give its folder as --base, not a --file.")
        teacher = load_teacher(base or entry.repo, device=device, **options)
        if not isinstance(teacher.family, family):
            raise ValueError(f"{entry.id} is a pipeline of {family.title}, and {base or entry.repo} is none.")
        return _configured(entry, teacher)
    path = file or download(entry)
    tensor_names(path)  # before the large base model: a wrong file, or a wrong base, should be refused at once
    refuse_wrong_base(f"{entry.id} ({path})", path, base or entry.base, family)
    teacher = load_teacher(base or entry.base, device=device, **options)
    network = teacher.family.base
    if entry.is_lora:
        add_loras(teacher.family.lora_parts, [(path, entry.lora_scale or 1.0)])
    else:
        put_weights(network, read_tensors(path)[0], path)
        network.requires_grad_(False)
    return _configured(entry, teacher)


def load_heads(
    entry: Checkpoint, base: str | None = None, file: Path | None = None, device: str = "cpu", **options: Any
) -> tuple[Teacher, Denoiser]:
    """(the base model with the entry's LoRA, its student with a last layer for each step), to sample from.

    Args and errors as in `load_checkpoint`.
    """
    family = family_named(entry.family)
    if family is None or not entry.sigmas:
        raise ValueError(f"{entry.id} cannot be sampled here, {entry.family} networks are not built in.")
    path = file or download(entry)
    refuse_wrong_base(f"{entry.id} ({path})", path, base or entry.base, family)
    teacher = load_teacher(base or entry.base, device=device, **options)
    times, parts = (*entry.sigmas, 0.0), teacher.family.lora_parts
    student = add_heads_file(parts, teacher.denoiser, path, times, entry.lora_scale or 1.0)
    return replace(teacher, name=entry.id), student


def start_weights(
    entry: Checkpoint, teacher: Teacher, weights: Literal["lora", "full"], rank: int, file: Path | None = None
) -> dict[str, Tensor]:
    """The first weights of a student of ``teacher`` when a recipe's ``init`` names the entry.

    Args:
        weights, rank: of the student.

    Raises:
        ValueError: one sentence: another form or rank than the student's, or of another model.
    """
    if entry.kind == "lora-heads":
        raise ValueError(f"init: {entry.id} has a last layer for each of its steps, which no student begins with.")
    if entry.is_lora:
        return lora_start(entry.id, file or download(entry), teacher, weights, rank, entry.lora_scale or 1.0)
    if weights == "lora":
        raise ValueError(f"init: {entry.id} is a whole network and cannot start a LoRA: set student.weights=full.")
    made = load_checkpoint(entry, None if entry.kind == "pipeline" else teacher.name, file)
    if made.guidance_embed is not None and teacher.guidance_embed is None:
        raise ValueError(
            f"init: {entry.id} has a guidance-scale embedding, which {teacher.name} lacks: let it be the teacher, or "
            "start from its LoRA."
        )
    return {f"{_prefix(teacher)}.{name}": p.detach() for name, p in made.family.base.named_parameters()}


def lora_start(
    name: str, path: Path, teacher: Teacher, weights: Literal["lora", "full"], rank: int, scale: float = 1.0
) -> dict[str, Tensor]:
    """A LoRA file of any layout as the first weights of a student; arguments and errors as in `start_weights`."""
    prefix = _prefix(teacher)
    try:
        lora = read_lora(teacher.family.lora_parts, path)
    except NotLowRank as error:
        if weights == "lora":
            raise ValueError(f"init: {error}: it can start full weights only (student.weights=full).") from None
        return {f"{prefix}.{key}": t for key, t in _added(teacher, path, scale).items()}
    has = sorted({t.shape[0] for key, t in lora.items() if ".lora_A" in key})
    if weights == "lora" and len(has) > 1:
        ranks = ", ".join(map(str, has))
        raise ValueError(f"init: {name} has the ranks {ranks}: it can start full weights only (student.weights=full).")
    if weights == "lora" and has != [rank]:
        raise ValueError(f"init: {name} has rank {has[0]}: set student.rank to that.")
    return {f"{prefix}.{key}": t for key, t in scaled(lora, scale).items()}


def _added(teacher: Teacher, path: Path, scale: float) -> dict[str, Tensor]:
    """All weights of the teacher's network with a LoRA file of any form added, in float32."""
    family = teacher.family
    network = copy.deepcopy(family.base).float()
    add_loras({**family.lora_parts, family.part: network}, [(path, scale)])
    return {name: p.detach() for name, p in network.named_parameters()}


def download(entry: Checkpoint) -> Path:
    """The entry's file from the hub, or from the hub's cache on this machine.

    Raises:
        ValueError: one sentence when it cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if not entry.file:
        raise ValueError(f"The name of {entry.id}'s file in {entry.repo} is not known here: download it, give --file.")
    try:
        cached = try_to_load_from_cache(entry.repo, entry.file)
        with asking_hub(entry.repo, isinstance(cached, str)):
            return Path(hf_hub_download(entry.repo, entry.file))
    except Exception as error:
        raise ValueError(
            f"{entry.id} cannot be downloaded from the hub ({short_error(error)}): give --file."
        ) from error


def _configured(entry: Checkpoint, teacher: Teacher) -> Teacher:
    """The teacher with the entry's noise schedule and prediction kind."""
    schedule, kind = schedule_of(entry, dict(teacher.pipeline.scheduler.config)), teacher.denoiser.prediction_type
    if schedule.family != "flow":  # where SCMScheduler's "trigflow" is what it makes of the network's flow
        kind = entry.scheduler_overrides.get("prediction_type", kind)
    return teacher.with_denoiser(name=entry.id, schedule=schedule, kind=kind)


def _prefix(teacher: Teacher) -> str:
    """The pipeline's network in our own: how its layers' names begin."""
    wanted = teacher.family.base
    assert isinstance(teacher.denoiser.network, nn.Module)
    return next(name for name, module in teacher.denoiser.network.named_modules() if module is wanted)
