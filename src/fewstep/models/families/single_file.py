"""Checkpoints in a single .safetensors file, as many models are published: SD 1.x and SDXL.

diffusers reads the weights. The networks' configs come with this package. The tokenizers' vocabularies do not: they
are downloaded once, or read from a folder, ``teacher.config``. Models of other shapes need such a folder for all of
their configs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fewstep.models.families import registry
from fewstep.models.families.family import SingleFile

_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_NETWORK = "model.diffusion_model."


def is_single_file(name: str) -> bool:
    """Whether a teacher's name is a file's.

    Raises:
        ValueError: it is a pickle, which can run code when it is read.
    """
    path = Path(name)
    if path.suffix.lower() in _PICKLES and path.is_file():
        raise ValueError(f"{name} is a pickle, which may run any program when it is read: get it as .safetensors.")
    return path.suffix.lower() == ".safetensors" and path.is_file()


def config_of(path: Path, config: str | None = None) -> Path:
    """The folder of configs for a file: ``config``, or a shipped one by the names of its tensors; reads no weights.

    Raises:
        ValueError: one sentence when the file is damaged or of another kind.
    """
    found = _kind(path, config)
    return Path(str(config)) if found is None else Path(__file__).parents[2] / "assets" / "configs" / found.configs


def load_single_file(path: Path, config: str | None, dtype: torch.dtype) -> Any:
    """The pipeline in a file.

    Args:
        config: a folder with the configs and tokenizers of its model; None takes the shipped ones.

    Raises:
        ValueError: one sentence when the file is of another kind, or lacks a part.
    """
    import diffusers

    folder, found, more = config_of(path, config), _kind(path, config), dict[str, Any]()
    if found is not None:
        from transformers import CLIPTokenizer

        more = {part: CLIPTokenizer.from_pretrained(found.hub, subfolder=part) for part in _tokenizers(folder)}
    cls = getattr(diffusers, diffusers.DiffusionPipeline.load_config(folder)["_class_name"])
    return cls.from_single_file(str(path), config=str(folder), local_files_only=True, torch_dtype=dtype, **more)


def _tokenizers(folder: Path) -> list[str]:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return [part for part in index if part.startswith("tokenizer")]


def _kind(path: Path, config: str | None) -> SingleFile | None:
    """The kind of a file by its tensors' names; None where ``config`` takes its place."""
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
        return None
    kinds = [cls.single_file for cls in registry.FAMILIES if cls.single_file is not None]
    found = next((kind for kind in kinds if any(name.startswith(kind.prefix) for name in names)), None)
    if found is None:
        titles = " nor ".join(kind.title for kind in kinds)
        raise ValueError(f"The file {path} is neither {titles}: give the folder of its configs as teacher.config.")
    return found
