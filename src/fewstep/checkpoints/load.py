"""A published file on its base model, ready to be sampled from or to start a student."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.checkpoints.registry import Checkpoint
from fewstep.checkpoints.sampling import SAMPLERS, schedule_of
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.extras import sinusoid
from fewstep.models.families import Teacher, load_teacher
from fewstep.models.hub import short_error
from fewstep.models.lora import merge
from fewstep.models.lora_files import network_of, put_weights, read_lora, read_tensors, tensor_names

FAMILIES = ("sd1", "sd2", "sdxl", "sd3", "flux", "pixart")
"""What the networks of published files are here; files of other families are explained only."""

_FAMILIES = {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux", "PixArtTransformer2DModel": "pixart"}


def load_checkpoint(
    entry: Checkpoint, base: str | None = None, file: Path | None = None, device: str = "cpu", **how: Any
) -> Teacher:
    """The entry as a model of ours, its weights in place, its schedule and prediction kind in force.

    Args:
        base: model it stands on, a folder or hub name; the entry's own if None. For a pipeline: the pipeline itself.
        file: its weights on this machine; taken from the hub if None. how: other arguments of `load_teacher`.

    Raises:
        ValueError: one sentence, and nothing is loaded: not on the hub, a pickle, of another model.
    """
    if entry.scheduler not in SAMPLERS or entry.family not in FAMILIES:  # before anything is downloaded
        why = f"{entry.family} networks are" if entry.scheduler in SAMPLERS else "its sampler is"
        raise ValueError(
            f"{entry.id} cannot be sampled here, {why} not built in: `fewstep checkpoints {entry.id} --code` prints "
            "the lines for diffusers."
        )
    if entry.kind == "pipeline":
        if file is not None:
            raise ValueError(f"{entry.id} is a whole pipeline: give its folder as --base, not a --file.")
        return _as_wanted(entry, load_teacher(base or entry.repo, device=device, **how))
    path = file or download(entry)
    tensor_names(path)  # before the large base model: a wrong file should be a quick answer
    teacher = load_teacher(base or entry.base, device=device, **how)
    network = network_of(teacher.pipeline)[1]
    if entry.is_lora:
        lora = read_lora(teacher.pipeline, path)
        merge(dict(network.named_parameters()), lora, entry.lora_scale or 1.0)
    else:
        put_weights(network, read_tensors(path)[0], path)
        network.requires_grad_(False)
    return _as_wanted(entry, teacher)


def start_weights(
    entry: Checkpoint, teacher: Teacher, weights: Literal["lora", "full"], rank: int, file: Path | None = None
) -> dict[str, Tensor]:
    """What a student of ``teacher`` starts from when a recipe's ``init`` names the entry.

    Args:
        weights, rank: what the student holds.

    Raises:
        ValueError: one sentence: another form or rank than the student's, or of another model.
    """
    if entry.is_lora:
        return lora_start(entry.id, file or download(entry), teacher, weights, rank, entry.lora_scale or 1.0)
    if weights == "lora":
        raise ValueError(f"init: {entry.id} is a whole network and cannot start a LoRA: set student.weights=full.")
    network: Any = network_of(
        load_checkpoint(entry, None if entry.kind == "pipeline" else teacher.name, file).pipeline
    )[1]
    mine: Any = network_of(teacher.pipeline)[1]
    if getattr(network.config, "time_cond_proj_dim", None) and not mine.config.time_cond_proj_dim:
        raise ValueError(
            f"init: {entry.id} is told its guidance scale, by a layer that {teacher.name} lacks: let it be the "
            "teacher, or start from its LoRA."
        )
    return {f"{_place(teacher)}.{name}": p.detach() for name, p in network.named_parameters()}


def lora_start(
    name: str, path: Path, teacher: Teacher, weights: Literal["lora", "full"], rank: int, scale: float = 1.0
) -> dict[str, Tensor]:
    """A LoRA file of any layout as what a student starts from; arguments and errors as in `start_weights`."""
    lora = read_lora(teacher.pipeline, path)
    has = {t.shape[0] for key, t in lora.items() if ".lora_A" in key}
    if weights == "lora" and has != {rank}:
        raise ValueError(f"init: {name} has rank {', '.join(map(str, sorted(has)))}: set student.rank to that.")
    place = _place(teacher)
    return {f"{place}.{key}": t * scale if ".lora_B" in key else t for key, t in lora.items()}


def download(entry: Checkpoint) -> Path:
    """The entry's file from the hub, or from its cache on this machine.

    Raises:
        ValueError: one sentence when it cannot be had.
    """
    from huggingface_hub import hf_hub_download

    if not entry.file:
        raise ValueError(f"The name of {entry.id}'s file in {entry.repo} is not known here: download it, give --file.")
    try:
        return Path(hf_hub_download(entry.repo, entry.file))
    except Exception as error:
        raise ValueError(f"{entry.id} cannot be had from the hub ({short_error(error)}): give --file.") from error


def family_of(pipeline: Any) -> str:
    """Family of a pipeline's network as the registry calls it; empty if it is none of those it knows."""
    network: Any = network_of(pipeline)[1]
    if type(network).__name__ == "UNet2DConditionModel":
        if network.config.get("addition_embed_type") == "text_time":
            return "sdxl"
        return {768: "sd1", 1024: "sd2"}.get(network.config.cross_attention_dim, "")
    return _FAMILIES.get(type(network).__name__, "")


class Told:
    """A network that is told its guidance scale as the published LCM models are: 1,000 (w - 1) in sinusoids."""

    accepts = frozenset({"guidance_embed"})

    def __init__(self, network: Any, width: int) -> None:
        self.network, self.width = network, width

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.network.dtype
        return dtype

    def __call__(self, x: Tensor, t: Tensor, cond: Cond | None, *, guidance_embed: Tensor | None = None) -> Tensor:
        extra = None if guidance_embed is None else sinusoid(1000 * (guidance_embed - 1), self.width).to(x.dtype)
        output: Tensor = self.network(x, t, cond, extra=extra)
        return output


def _as_wanted(entry: Checkpoint, teacher: Teacher) -> Teacher:
    """The teacher with the entry's noise schedule, prediction kind and way of being told the guidance."""
    schedule = schedule_of(entry, dict(teacher.pipeline.scheduler.config))
    kind = entry.scheduler_overrides.get("prediction_type", teacher.denoiser.prediction_type)
    network: Any = teacher.denoiser.network
    width = getattr(network_of(teacher.pipeline)[1].config, "time_cond_proj_dim", None)
    if entry.guidance == "embedded" and width and "guidance_embed" not in getattr(network, "accepts", ()):
        network = Told(network, width)
    return replace(teacher, denoiser=Denoiser(network, schedule, kind), name=entry.id)


def _place(teacher: Teacher) -> str:
    """Where the pipeline's network stands in our own: what its layers' names begin with."""
    wanted = network_of(teacher.pipeline)[1]
    assert isinstance(teacher.denoiser.network, nn.Module)
    return next(name for name, module in teacher.denoiser.network.named_modules() if module is wanted)
