"""Teachers by name: a shipped model, a diffusers folder, a hub name, a single file; with LoRAs, ``model+lora+lora``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fewstep.models.families.registry import find_family
from fewstep.models.families.single_file import is_single_file, load_single_file
from fewstep.models.families.teacher import Teacher, as_teacher
from fewstep.models.hub import quiet, short_error
from fewstep.models.lora_files import add_loras
from fewstep.models.quantize import Kind, quantize


def load_teacher(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    loras: Sequence[str] = (),
    size: int | None = None,
    guidance_embed: float | None = None,
    vae_tiling: bool = False,
    config: str | None = None,
    quantization: Kind | None = None,
) -> Teacher:
    """A teacher from ``scenes-64`` (shipped), a diffusers folder, a hub name, or a .safetensors file.

    Args:
        name: as above, or the name of another `Teacher`.
        config: folder with the configs of a single file's model; it becomes part of the name, ``file@folder``.
        loras: LoRA files, their folders or hub names, that are merged into its weights.
        size, guidance_embed: as in `as_teacher`.
        quantization: "int8" or "nf4", how the frozen network is held under LoRA (`fewstep.models.quantize`).
        vae_tiling: decode and encode large images in tiles, to save memory.

    Raises:
        ValueError: one sentence when there is no such model or its family is not supported.
    """
    from diffusers import DiffusionPipeline

    name, config, loras = parts_of(name, config, loras)
    single = is_single_file(name)
    if config is not None and not single:
        raise ValueError(f"teacher.config goes with a single .safetensors file, which {name} is not.")
    source = str(shipped(name) or name)
    if not single:
        local_folder(source, "model_index.json")
    try:
        with quiet():
            if single:
                pipeline = load_single_file(Path(source), config, dtype)
            else:
                pipeline = DiffusionPipeline.from_pretrained(source, torch_dtype=dtype, use_safetensors=True)
    except Exception as error:  # three libraries read these files, each with its own errors
        raise ValueError(f"The teacher '{name}' cannot be loaded: {short_error(error)}") from error
    for lora in loras:
        _fuse(pipeline, lora)
    if quantization is not None:
        quantize(find_family(pipeline).base, quantization)
    if vae_tiling:
        pipeline.vae.enable_tiling()
    whole_name = "+".join([name if config is None else f"{name}@{config}", *loras])
    teacher = as_teacher(pipeline.to(device), whole_name, size=size, guidance_embed=guidance_embed)
    try:
        _try(teacher)
    except Exception as error:
        raise ValueError(f"The teacher '{name}' is loaded but does not work: {short_error(error)}") from error
    return teacher


def local_folder(name: str, *indexes: str) -> Path | None:
    """The folder of that name, which must hold one of the files ``indexes``; None for what may be a hub name.

    Raises:
        ValueError: one sentence when it is neither.
    """
    folder = Path(name)
    if folder.is_dir() and not any((folder / index).is_file() for index in indexes):
        raise ValueError(f"The folder {name} holds no diffusers pipeline (model_index.json is missing).")
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise ValueError(
            f"There is no teacher '{name}': give scenes-64, a diffusers folder, a .safetensors file, or a hub name."
        )
    return folder if folder.is_dir() else None


def parts_of(
    name: str, config: str | None = None, loras: Sequence[str] = ()
) -> tuple[str, str | None, tuple[str, ...]]:
    """(model, folder of its configs, all LoRAs) of a name such as ``file@folder+lora``."""
    if Path(name).exists():
        return name, config, tuple(loras)
    first, *more = name.split("+")
    file, at, folder = first.partition("@")
    if at and Path(file).is_file():
        first, config = file, config or folder
    return first, config, (*more, *loras)


def is_ours(name: str) -> bool:
    """Whether only fewstep can load a teacher by this name: a single file, or a model with LoRAs."""
    first, config, loras = parts_of(name)
    return bool(loras) or config is not None or is_single_file(first)


@torch.no_grad()
def _try(teacher: Teacher) -> None:
    """Call every part once, at a small size: some errors in configs only show in a call."""
    family = teacher.family
    side = min(*teacher.latent_shape[1:], family.smallest)
    like = next(family.base.parameters())
    x = torch.zeros(1, teacher.latent_shape[0], side, side, device=like.device, dtype=like.dtype)
    teacher.denoiser.network(x, torch.full((1,), 1.0, device=like.device), teacher.encode_prompts(["a"]))
    teacher.decode(x)


def _fuse(pipeline: Any, lora: str) -> None:
    """Merge a LoRA into the pipeline's weights."""
    try:
        add_loras(find_family(pipeline).lora_parts, [(lora, 1.0)])
    except ValueError as error:
        raise ValueError(f"The teacher's LoRA '{lora}' cannot be loaded: {error}") from None


def shipped(name: str) -> Path | None:
    """The folder of a model that comes with the package, or None."""
    folder = Path(__file__).parent.parent.parent / "assets" / name
    return folder if name and "/" not in name and ".." not in name and folder.is_dir() else None
