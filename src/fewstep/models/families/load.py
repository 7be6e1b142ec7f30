"""Teachers by name: a shipped model, a diffusers folder, a hub name, a single file; with LoRAs, ``model+lora+lora``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fewstep.models.families.family import CLIP_TOKENS
from fewstep.models.families.folder import INDEX, downloaded, load_folder
from fewstep.models.families.registry import find_family, parts
from fewstep.models.families.single_file import is_single_file, load_single_file
from fewstep.models.families.teacher import Teacher, as_teacher
from fewstep.models.hub import ModelError, check_device, quiet, short_error
from fewstep.models.lora_files import add_loras, check_lora
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
    later: bool = False,
) -> Teacher:
    """A teacher from ``scenes-64`` (shipped), a diffusers folder, a hub name, or a .safetensors file.

    Args:
        name: as above, or the name of another `Teacher`.
        config: folder with the configs of a single file's model; it becomes part of the name, ``file@folder``.
        loras: LoRA files, their folders or hub names, that are merged into its weights.
        size, guidance_embed: as in `as_teacher`.
        quantization: "int8" or "nf4", how the frozen network is held under LoRA (`fewstep.models.quantize`).
        later: the network will be spread over processes (`fewstep.models.roles.Roles.shard`): where it can be, its
            weights stay in their files until then, and none of its outputs is looked at here.
        vae_tiling: decode and encode large images in tiles, to save memory.

    Raises:
        ValueError: one sentence when there is no such model or its family is not supported.
    """
    check_device(device)
    name, config, loras = parts_of(name, config, loras)
    single = is_single_file(name)
    if config is not None and not single:
        raise ValueError(f"teacher.config goes with a single .safetensors file, which {name} is not.")
    source = str(shipped(name) or expanded(name))
    folder = None if single else local_folder(source, INDEX)
    for lora in loras:  # before the model, which may be large
        with _as_teachers(lora):
            check_lora(lora)
    try:
        with quiet():
            if single:
                pipeline = load_single_file(Path(source), config, dtype)
            else:
                later = later and not loras and quantization is None
                pipeline = load_folder(folder or downloaded(source), dtype, torch.device(device) if later else None)
    except ModelError:
        raise
    except Exception as error:  # three libraries read these files, each with its own errors
        raise ValueError(f"The teacher '{name}' cannot be loaded: {short_error(error)}") from error
    for lora in loras:
        with _as_teachers(lora):
            add_loras(find_family(pipeline).lora_parts, [(lora, 1.0)])
    if quantization is not None:
        quantize(find_family(pipeline).base, quantization)
    if vae_tiling:
        pipeline.vae.enable_tiling()
    whole_name = "+".join([name if config is None else f"{name}@{config}", *loras])
    with quiet():  # diffusers warns of float16 on a CPU, which PyTorch can do
        if later:  # the others alone: what is on the meta device cannot be moved
            for part in pipeline.components.values():
                if isinstance(part, torch.nn.Module) and not hasattr(part, "waits"):
                    part.to(device)
        else:
            pipeline = pipeline.to(device)
    teacher = as_teacher(pipeline, whole_name, size=size, guidance_embed=guidance_embed)
    try:
        _try(teacher)
    except ModelError:
        raise
    except Exception as error:
        raise ValueError(f"The teacher '{name}' is loaded but does not work: {short_error(error)}") from error
    return teacher


def local_folder(name: str, *indexes: str) -> Path | None:
    """The folder of that name, which must hold one of the files ``indexes``; None for what may be a hub name.

    Raises:
        ValueError: one sentence when it is neither.
    """
    folder = expanded(name)
    if folder.is_dir() and not any((folder / index).is_file() for index in indexes):
        raise ValueError(_no_pipeline(folder))
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise ValueError(
            f"There is no teacher '{name}': give scenes-64, a diffusers folder, a .safetensors file, or a hub name."
        )
    return folder if folder.is_dir() else None


def expanded(name: str) -> Path:
    """The path of that name, ~ being the user's folder."""
    return Path(os.path.expanduser(name))


def _no_pipeline(folder: Path) -> str:
    """What a folder without an index seems to be, in a sentence."""
    start = f"The folder {folder} holds no diffusers pipeline ({INDEX} is missing)"
    if (folder / "config.json").is_file() and (folder.resolve().parent / INDEX).is_file():
        return f"{start}: it is one part of a model, whose folder is {folder.resolve().parent}."
    inside = next((path.parent for path in sorted(folder.glob(f"*/{INDEX}"))), None)
    inside = inside or next((path.parent for path in sorted(folder.glob(f"snapshots/*/{INDEX}"))), None)
    if inside is not None:
        return f"{start}: give a folder in it, {inside}."
    files = [file for file in sorted(folder.glob("*")) if file.suffix.lower() == ".safetensors"]
    if len(files) == 1:
        return f"{start}: give the file in it, {files[0]}."
    if any((folder / part / "config.json").is_file() for part in parts()):
        return f"{start}: download it again, with that file."
    return f"{start}."


def parts_of(
    name: str, config: str | None = None, loras: Sequence[str] = ()
) -> tuple[str, str | None, tuple[str, ...]]:
    """(model, folder of its configs, all LoRAs) of a name such as ``file@folder+lora``."""
    if expanded(name).exists():
        return name, config, tuple(loras)
    first, *more = name.split("+")
    file, at, folder = first.partition("@")
    if at and expanded(file).is_file():
        first, config = file, config or folder
    return first, config, (*more, *loras)


def is_ours(name: str) -> bool:
    """Whether only fewstep can load a teacher by this name: a single file, or a model with LoRAs."""
    first, config, loras = parts_of(name)
    return bool(loras) or config is not None or is_single_file(first)


@torch.no_grad()
def _try(teacher: Teacher) -> None:
    """Call every part once, at a small size: some errors in configs and weights only show in a call.

    Raises:
        ModelError: a part is missing, or what one computes is not finite.
    """
    family, name = teacher.family, teacher.name
    for part in ("vae", *family.text_parts):
        if getattr(teacher.pipeline, part, None) is None and part not in family.optional_encoders:
            raise ModelError(f"The teacher '{name}' has no {part}, which {family.title} needs: get the whole model.")
    for part, tokenizer in vars(teacher.pipeline).items():
        if part.startswith("tokenizer") and hasattr(tokenizer, "get_vocab"):
            _check_words(name, part, tokenizer)
    side = min(*teacher.latent_shape[-2:], family.smallest)
    like = next(family.base.parameters())
    x = torch.zeros(1, *teacher.latent_shape[:-2], side, side, device=family.device(), dtype=like.dtype)
    cond = teacher.encode_prompts(["a"])
    wide, wanted = (shape[-1] for shape in (cond["prompt_embeds"].shape, family.shapes(CLIP_TOKENS)["prompt_embeds"]))
    if wide != wanted:
        raise ModelError(
            f"The text encoder of '{name}' is of another model: its prompts have width {wide}, and the {family.part} "
            f"takes {wanted}."
        )
    found = {"text encoders": cond["prompt_embeds"]}
    if not like.is_meta:
        found[family.part] = teacher.denoiser.network(x, torch.full((1,), 1.0, device=like.device), cond)
    for part, tensor in found.items():
        if not bool(tensor.isfinite().all()):
            raise ModelError(
                f"The teacher '{name}' is loaded but does not work: NaN or infinity comes out of its {part} in "
                f"{str(tensor.dtype).removeprefix('torch.')}: its weights are damaged, or need bf16 or fp32."
            )
    teacher.decode(x)


def _check_words(name: str, part: str, tokenizer: Any) -> None:
    """Refuse a tokenizer that knows nothing but special tokens."""
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ModelError(f"The {part} of '{name}' knows no words: every prompt would be encoded alike; get it again.")


@contextmanager
def _as_teachers(lora: str) -> Iterator[None]:
    """Within this block errors say that the LoRA is the teacher's."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"The teacher's LoRA '{lora}' cannot be loaded: {error}") from None


def shipped(name: str) -> Path | None:
    """The folder of a model that comes with the package, or None."""
    folder = Path(__file__).parent.parent.parent / "assets" / name
    return folder if name and "/" not in name and ".." not in name and folder.is_dir() else None
