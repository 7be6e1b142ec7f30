"""Checkpoints: safetensors plus one JSON, written aside, flushed to disk, then renamed into place.

Whatever moment the process dies at, a checkpoint folder is either complete or absent.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_FORMAT = 1
_PREFIX = "step-"


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int = 2) -> Path:
    """Write ``folder/step-<step>`` and drop all but the newest ``keep`` checkpoints; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{_PREFIX}{step:07d}"
    part = folder / f".part-{step:07d}-{os.getpid()}"
    for stale in folder.glob(".part-*"):
        shutil.rmtree(stale, ignore_errors=True)
    part.mkdir()
    packed = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    save_tensors(part / "tensors.safetensors", packed)
    write_text(part / "state.json", json.dumps({"format": _FORMAT, "step": step, **state}, indent=1))
    sync_folder(part)
    if final.exists():
        shutil.rmtree(final)
    os.rename(part, final)
    sync_folder(folder)
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of one checkpoint.

    Raises:
        ValueError: one sentence when it is no checkpoint of ours or is damaged.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        if not isinstance(state, dict) or state.get("format") != _FORMAT or not isinstance(state.get("step"), int):
            raise ValueError("not a fewstep checkpoint")
        return load_file(path / "tensors.safetensors"), state
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"The checkpoint {path} cannot be read ({error}): delete it to use an older one.") from None


def complete(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(p for p in folder.glob(f"{_PREFIX}*") if (p / "state.json").is_file())


def latest(folder: Path) -> Path | None:
    """The newest finished checkpoint, or None."""
    found = complete(folder)
    return found[-1] if found else None


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions any other file would get, and flush it to disk."""
    save_file(tensors, path, metadata=metadata)
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)  # safetensors itself writes 0600
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def replace_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file so that readers see the old or the new one, never half of it."""
    part = path.with_name(f".{path.name}.part")
    save_tensors(part, tensors, metadata)
    os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file and flush it to disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that readers see the old or the new one, never half of it."""
    part = path.with_name(f".{path.name}.part")
    write_text(part, text)
    os.replace(part, path)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def split(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under ``prefix/``, without it."""
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors agree bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
