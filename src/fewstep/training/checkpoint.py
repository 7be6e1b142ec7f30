"""Checkpoints: safetensors plus one JSON, written aside, flushed to disk, then renamed into place.

Whatever moment the process dies at, a checkpoint folder is either complete or absent.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewstep.data.files import save_tensors, sync_folder, write_text

_FORMAT = 1
_PREFIX = "step-"


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int = 2) -> Path:
    """Write ``folder/step-<step>`` and drop all but the newest ``keep`` checkpoints; returns its path.

    Raises:
        OSError: one sentence when it cannot be written; what was there before is untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{_PREFIX}{step:07d}"
    part = folder / f".part-{step:07d}-{os.getpid()}"
    for stale in folder.glob(".part-*"):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        _write(part, step, tensors, state)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)  # half a checkpoint must not fill the disk
        safe = latest(folder)
        kept = f"the last one, {safe}, is intact" if safe else "there is no earlier one"
        raise OSError(
            f"The checkpoint of step {step} could not be written ({error}); {kept}: make room or allow writing in "
            f"{folder}, then go on with --resume."
        ) from None
    aside = folder / f".part-{step:07d}-before"
    if final.exists():  # half deleted it would still look complete
        os.rename(final, aside)
    os.rename(part, final)
    sync_folder(folder)
    shutil.rmtree(aside, ignore_errors=True)
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write(part: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    part.mkdir()
    packed = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    save_tensors(part / "tensors.safetensors", packed)
    known = {"format": _FORMAT, "step": step, "checksum": _checksum(part / "tensors.safetensors"), **state}
    write_text(part / "state.json", json.dumps(known, indent=1))
    sync_folder(part)


def _checksum(path: Path) -> int:
    """CRC-32 of a file's bytes: safetensors itself would not notice a flipped bit."""
    total = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            total = zlib.crc32(block, total)
    return total


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of one checkpoint.

    Raises:
        ValueError: one sentence when it is no fewstep checkpoint or is damaged.
    """
    try:
        state, tensors = _state(path), path / "tensors.safetensors"
        if state.get("checksum") not in (None, _checksum(tensors)):
            raise ValueError("its tensors are not those that were saved")
        return load_file(tensors), state
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"The checkpoint {path} cannot be read ({error}): delete it to use an older one.") from None


def _state(path: Path) -> dict[str, Any]:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if not isinstance(state, dict) or state.get("format") != _FORMAT or not _is_step(state.get("step")):
        raise ValueError("not a fewstep checkpoint")
    return state


def check_random(path: Path, version: int, state: dict[str, Any] | None = None) -> None:
    """Refuse to go on from a checkpoint whose run drew other random numbers than those of ``version``.

    Args:
        state: of the checkpoint, where it has been read.

    Raises:
        ValueError: one sentence that says what to do; what cannot be read is left to `load`.
    """
    try:
        before = (_state(path) if state is None else state).get("random", 1)  # version 1 was not recorded
    except (OSError, ValueError):
        return
    if before != version:
        raise ValueError(
            f"{path.parent.parent} was begun with random numbers of version {before} and this fewstep draws those of "
            f"version {version}, so it cannot be continued exactly: finish it with the fewstep that began it, or start "
            "it anew in another --out."
        )


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def complete(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first; copies under other names do not count."""
    steps = {p: p.name.removeprefix(_PREFIX) for p in folder.glob(f"{_PREFIX}*") if (p / "state.json").is_file()}
    return sorted((p for p, step in steps.items() if step.isdecimal()), key=lambda p: int(steps[p]))


def latest(folder: Path) -> Path | None:
    """The newest finished checkpoint, or None."""
    found = complete(folder)
    return found[-1] if found else None


def split(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under ``prefix/``, without it."""
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors agree bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
