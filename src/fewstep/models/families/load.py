"""Teachers by name: a shipped model, a diffusers folder, a hub name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.models.families.teacher import Teacher, as_teacher, find_family, first_sentence, quiet


def load_teacher(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    loras: Sequence[str] = (),
    size: int | None = None,
    guidance_embed: float | None = None,
    vae_tiling: bool = False,
) -> Teacher:
    """A teacher from ``scenes-64`` (shipped), a diffusers folder, or a hub name.

    Args:
        loras: LoRA files or hub names that become part of it, by diffusers' own loader.
        size, guidance_embed: as in `as_teacher`.
        vae_tiling: decode and encode large pictures in tiles, in little memory.

    Raises:
        ValueError: one sentence when there is no such model or its family is not supported.
    """
    from diffusers import DiffusionPipeline

    source = str(shipped(name) or name)
    if not Path(source).is_dir() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        raise ValueError(f"There is no teacher '{name}': give scenes-64, a diffusers folder, or a hub name.")
    if Path(source).is_dir() and not (Path(source) / "model_index.json").is_file():
        raise ValueError(f"The folder {name} holds no diffusers pipeline (model_index.json is missing).")
    try:
        with quiet():
            pipeline = DiffusionPipeline.from_pretrained(source, torch_dtype=dtype, use_safetensors=True)
    except Exception as error:  # three libraries read these files, each with errors of its own
        raise ValueError(f"The teacher '{name}' cannot be loaded: {first_sentence(error)}") from error
    for lora in loras:
        _fuse(pipeline, lora)
    if vae_tiling:
        pipeline.vae.enable_tiling()
    teacher = as_teacher(
        pipeline.to(device), "+".join([name, *loras]), size=size, guidance_embed=guidance_embed
    )  # fmt: skip
    try:
        _try(teacher)
    except Exception as error:
        raise ValueError(f"The teacher '{name}' is loaded but does not work: {first_sentence(error)}") from error
    return teacher


@torch.no_grad()
def _try(teacher: Teacher) -> None:
    """Ask every part once, at a small size: configs can be wrong in ways that only show when they are used."""
    family = find_family(teacher.pipeline)
    side = min(*teacher.latent_shape[1:], family.smallest)
    like = next(family.base.parameters())
    x = torch.zeros(1, teacher.latent_shape[0], side, side, device=like.device, dtype=like.dtype)
    teacher.denoiser.network(x, torch.full((1,), 1.0, device=like.device), teacher.encode_prompts(["a"]))
    teacher.decode(x)


def _fuse(pipeline: Any, lora: str) -> None:
    """Merge a LoRA into the pipeline's weights."""
    base = find_family(pipeline).base
    before = _weight_sum(base)
    try:
        with quiet():
            pipeline.load_lora_weights(lora, use_safetensors=True)
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
    except Exception as error:
        raise ValueError(f"The teacher's LoRA '{lora}' cannot be loaded: {first_sentence(error)}") from error
    if _weight_sum(base) == before:
        raise ValueError(f"The teacher's LoRA '{lora}' changes nothing in this teacher: it is of another model.")


def _weight_sum(network: nn.Module) -> float:
    return sum(float(p.detach().double().sum()) for p in network.parameters())


def shipped(name: str) -> Path | None:
    """The folder of a model that comes with the package, or None."""
    folder = Path(__file__).parent.parent.parent / "assets" / name
    return folder if name and "/" not in name and ".." not in name and folder.is_dir() else None
