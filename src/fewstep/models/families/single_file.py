"""Checkpoints in a single file, as many models are handed around: SD 1.x and SDXL, safetensors alone.

diffusers reads the weights. The networks' configs come with this package; the tokenizers' words do not, so they are
taken from the hub once, or from a folder: ``teacher.config``. Other models than the two base ones want such a folder
for everything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_MARKS = {  # a name that only this kind of file has, and where its tokenizers are
    "conditioner.embedders.1.model.": ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0"),
    "cond_stage_model.transformer.": ("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
}
_NETWORK = "model.diffusion_model."


def is_single_file(name: str) -> bool:
    """Whether a teacher's name is a file's.

    Raises:
        ValueError: it is one that may hold a program.
    """
    path = Path(name)
    if path.suffix.lower() in _PICKLES and path.is_file():
        raise ValueError(f"{name} is a pickle, which may run any program when it is read: get it as .safetensors.")
    return path.suffix.lower() == ".safetensors" and path.is_file()


def config_of(path: Path, config: str | None = None) -> Path:
    """The folder of configs for a file: ``config``, or a shipped one by the names of its tensors. No weight is read.

    Raises:
        ValueError: one sentence when the file is damaged or of another kind.
    """
    kind, _ = _kind(path, config)
    return Path(config) if config is not None else Path(__file__).parent.parent.parent / "assets" / "configs" / kind


def load_single_file(path: Path, config: str | None, dtype: torch.dtype) -> Any:
    """The pipeline in a file.

    Args:
        config: a folder with the configs and tokenizers of its model; None takes the shipped ones.

    Raises:
        ValueError: one sentence when the file is of another kind, or lacks a part.
    """
    import diffusers

    folder, more = config_of(path, config), dict[str, Any]()
    if config is None:
        from transformers import CLIPTokenizer

        _, hub = _kind(path, None)
        more = {part: CLIPTokenizer.from_pretrained(hub, subfolder=part) for part in _tokenizers(folder)}
    cls = getattr(diffusers, diffusers.DiffusionPipeline.load_config(folder)["_class_name"])
    return cls.from_single_file(str(path), config=str(folder), local_files_only=True, torch_dtype=dtype, **more)


def _tokenizers(folder: Path) -> list[str]:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return [part for part in index if part.startswith("tokenizer")]


def _kind(path: Path, config: str | None) -> tuple[str, str]:
    """(what the file holds, the hub's name of that model); nothing where ``config`` says it."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"The file {path} is damaged, or no safetensors file: {error}.") from None
    if not any(name.startswith(_NETWORK) for name in names):
        raise ValueError(
            f"The file {path} holds no whole model ({_NETWORK}... is missing): a LoRA, or a network alone?"
        )
    if config is not None:
        if not (Path(config) / "model_index.json").is_file():
            raise ValueError(f"teacher.config: the folder {config} holds no configs (model_index.json is missing).")
        return "", ""
    found = next((kind for mark, kind in _MARKS.items() if any(name.startswith(mark) for name in names)), None)
    if found is None:
        raise ValueError(
            f"The file {path} is neither SD 1.x nor SDXL: give the folder of its configs as teacher.config."
        )
    return found
