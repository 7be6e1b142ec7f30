"""Safetensors files, found by a path, a folder or a hub name, opened and read. No other format is opened."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.models.hub import asking_hub, short_error

ADAPTER_CONFIG = "adapter_config.json"
_HUB_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<file>.+\.safetensors))?")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, opened; no other format is.

    Raises:
        ValueError: one sentence, for pickles and damaged files.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    if path.suffix.lower() != ".safetensors":
        raise ValueError(
            f"{path} is no safetensors file: other formats can run code when they are read; convert it first."
        )
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"The file {path} is no safetensors file ({error}).") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; raises as `tensor_names`."""
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def tensor_names(path: Path) -> list[str]:
    """The names of a safetensors file's tensors; reads the header only.

    Raises:
        ValueError: one sentence, for pickles and damaged files.
    """
    with _opened(path) as file:
        return list(file.keys())


def lora_file(name: str | Path) -> Path:
    """The LoRA file that a path, the folder of one LoRA, or a hub name (``owner/name``, ``owner/name/file``) means.

    Raises:
        ValueError: one sentence when there is none, or a folder has several.
    """
    path, hub = Path(name).expanduser(), _HUB_NAME.fullmatch(str(name))
    if path.is_dir():
        return path / _only([file.name for file in path.iterdir()], f"The folder {path}")
    if path.exists() or hub is None or (hub["file"] is None and path.suffix):
        return path  # whoever opens it names what is wrong with it
    return _downloaded(hub["repo"], hub["file"])


def _usual_names() -> tuple[str, str]:
    """What diffusers and peft call a LoRA's file."""
    from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    return LORA_WEIGHT_NAME_SAFE, SAFETENSORS_WEIGHTS_NAME


def _only(names: list[str], where: str) -> str:
    """The name of the one LoRA file among ``names``: what diffusers or peft calls it, or the only safetensors file."""
    files = sorted(name for name in names if name.lower().endswith(".safetensors"))
    usual = [name for name in _usual_names() if name in files]
    if not usual and len(files) != 1:
        pickle = next((name for name in sorted(names) if name.lower().endswith((".bin", ".pt", ".ckpt"))), "")
        found = "holds several LoRA files: name one" if files else "holds no LoRA file (.safetensors)"
        more = f", but {pickle}, which may run any program when it is read: convert it" if pickle and not files else ""
        raise ValueError(f"{where} {found}{more}.")
    return usual[0] if usual else files[0]


def _downloaded(repo: str, file: str | None) -> Path:
    """A LoRA file from the hub, or from the hub's cache; peft's config comes with its file.

    Raises:
        ValueError: one sentence when it cannot be downloaded.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    usual = _usual_names()
    cached = next((name for name in usual if isinstance(try_to_load_from_cache(repo, name), str)), None)
    try:
        with asking_hub(repo, cached=cached is not None):
            name = file or cached or _only(HfApi().list_repo_files(repo), f"The hub's {repo}")
            folder, _, last = name.rpartition("/")
            if last == usual[1]:
                hf_hub_download(repo, f"{folder}/{ADAPTER_CONFIG}".lstrip("/"))
            return Path(hf_hub_download(repo, name))
    except ValueError:
        raise
    except Exception as error:  # the hub's client has many errors for no network and no such file
        raise ValueError(
            f"There is no file {repo}, and the hub has no such LoRA, or is out of reach ({short_error(error)})."
        ) from error


@torch.no_grad()
def put_weights(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy all weights of a file into a network of the same architecture.

    A published UNet with a guidance-scale embedding has one more layer (``time_embedding.cond_proj``): it is added.

    Raises:
        ValueError: one sentence when names or shapes differ.
    """
    projection = tensors.get("time_embedding.cond_proj.weight")
    embedding: Any = getattr(network, "time_embedding", None)
    if projection is not None and embedding is not None and getattr(embedding.cond_proj, "weight", None) is None:
        width, inputs = projection.shape
        embedding.cond_proj = nn.Linear(inputs, width, bias=False, dtype=torch.float32)
        network.register_to_config(time_cond_proj_dim=inputs)  # type: ignore[operator]
    mine = network.state_dict()
    for wrong in sorted(mine.keys() ^ tensors.keys()):
        there = "lacks" if wrong in mine else "has another model's"
        raise ValueError(f"The file {path} is of another network: it {there} {wrong}.")
    for key, value in tensors.items():
        if value.shape != mine[key].shape:
            raise ValueError(f"The file {path} is of another network: {key} has shape {tuple(value.shape)}.")
    network.load_state_dict(tensors)
