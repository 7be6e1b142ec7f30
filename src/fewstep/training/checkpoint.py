"""Checkpoints: safetensors plus one JSON, written aside, flushed to disk, then renamed into place.

    step-0000500/
      tensors.safetensors                 what every process holds whole
      rows-00000-of-00004.safetensors     the first process's rows of sharded tensors, and so on for the others
      state.json                          step, checksums of the files, what `Trainer` adds

Whatever moment a process dies at, a checkpoint folder is either complete or absent. Any number of processes can read
what any number has written.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewstep.data.files import save_tensors, sync_folder, write_text
from fewstep.models.sharding import Part
from fewstep.models.tensor_files import StoredFiles, write_parts
from fewstep.training import distributed

_FORMAT, _IN_ROWS = 1, 2
_TENSORS = "tensors.safetensors"
_PREFIX = "step-"


def save(folder: Path, step: int, tensors: Mapping[str, Tensor | Part], state: dict[str, Any], keep: int = 2) -> Path:
    """Write ``folder/step-<step>`` and drop all but the newest ``keep`` checkpoints; returns its path.

    Where some tensors are parts, all processes must call this, and each writes its own rows; else the first alone.

    Raises:
        OSError: one sentence when it cannot be written; what was there before is untouched.
    """
    final = folder / f"{_PREFIX}{step:07d}"
    rows = {name: t for name, t in tensors.items() if isinstance(t, Part)}
    part = folder / f".part-{step:07d}-{os.getpid()}"
    if rows:
        part = distributed.from_first(part)
    plain, files = {name: t for name, t in tensors.items() if not isinstance(t, Part)}, dict[str, int]()
    for write in (
        lambda: _begin(folder, part),
        lambda: files.update(_write_rows(part, rows)),
        lambda: _write(part, step, plain, files, state),
    ):
        outcomes = [(_attempt(write), dict(files))]
        if rows:  # a process that went on alone would wait for the others for ever
            outcomes = distributed.everywhere(outcomes[0])
        for _, found in outcomes:
            files.update(found)
        mistakes = [mistake for mistake, _ in outcomes if mistake]
        if mistakes:
            shutil.rmtree(part, ignore_errors=True)  # half a checkpoint must not fill the disk
            safe = latest(folder)
            kept = f"the last one, {safe}, is intact" if safe else "there is no earlier one"
            raise OSError(
                f"The checkpoint of step {step} could not be written ({mistakes[0]}); {kept}: make "
                f"room or allow writing in {folder}, then go on with --resume."
            )
    if distributed.first():
        _put(part, final, keep)
    return final


def _attempt(write: Callable[[], object]) -> str:
    """What went wrong on the disk; nothing, mostly."""
    try:
        write()
    except OSError as error:
        return str(error) or type(error).__name__
    return ""


def _begin(folder: Path, part: Path) -> None:
    """Make the folder that becomes the checkpoint."""
    if not distributed.first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".part-*"):
        shutil.rmtree(stale, ignore_errors=True)
    part.mkdir()


def _write_rows(part: Path, rows: Mapping[str, Part]) -> dict[str, int]:
    """Write this process's rows; returns the checksum of its file."""
    if not rows:
        return {}
    name = f"rows-{distributed.rank():05d}-of-{distributed.count():05d}.safetensors"
    write_parts(part / name, rows)
    return {name: _checksum(part / name)}


def _write(part: Path, step: int, tensors: Mapping[str, Any], files: Mapping[str, int], state: dict[str, Any]) -> None:
    """Write what every process holds whole, and the state, in the first one."""
    if not distributed.first():
        return
    packed = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    save_tensors(part / _TENSORS, packed)
    known: dict[str, Any] = {
        "format": _IN_ROWS if files else _FORMAT,
        "step": step,
        "checksum": _checksum(part / _TENSORS),
    }
    if files:
        known["rows"] = dict(sorted(files.items()))
    write_text(part / "state.json", json.dumps({**known, **state}, indent=1))
    sync_folder(part)


def _put(part: Path, final: Path, keep: int) -> None:
    """Give a whole checkpoint its name, and delete the oldest ones."""
    folder = final.parent
    aside = folder / f"{part.name}-before"
    if final.exists():  # half deleted it would still look complete
        os.rename(final, aside)
    os.rename(part, final)
    sync_folder(folder)
    shutil.rmtree(aside, ignore_errors=True)
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def _checksum(path: Path) -> int:
    """CRC-32 of a file's bytes: safetensors itself would not notice a flipped bit."""
    total = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            total = zlib.crc32(block, total)
    return total


def load(path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Tensors and state of one checkpoint. All processes must call this.

    Tensors in rows, and all where there are several processes, are read from the files when they are asked for.

    Raises:
        ValueError: one sentence when it is no fewstep checkpoint or is damaged.
    """
    state, sums = _together(path, lambda: _checked(path))
    in_pieces = len(sums) > 1 or distributed.count() > 1

    def opened() -> Mapping[str, Tensor]:
        return StoredFiles(path / name for name in sums) if in_pieces else load_file(path / _TENSORS)

    return _together(path, opened), state  # only of sound files: a damaged one ends all processes above


def _together(path: Path, read: Callable[[], Any]) -> Any:
    """What ``read`` returns in this process; where it fails in one of them, all raise the same sentence."""
    found, mistake = None, ""
    try:
        found = read()
    except (OSError, ValueError, SafetensorError) as error:
        mistake = str(error) or type(error).__name__
    mistake = next(filter(None, distributed.everywhere(mistake)), "")
    if mistake:
        raise ValueError(f"The checkpoint {path} cannot be read ({mistake}): delete it to use an older one.")
    return found


def _checked(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of a checkpoint and the checksums of its files, of which each process looks at its share."""
    state = _state(path)
    sums = {_TENSORS: state.get("checksum"), **state.get("rows", {})}
    mine = sorted(sums)[distributed.rank() :: distributed.count()]
    if any(sums[name] not in (None, _checksum(path / name)) for name in mine):
        raise ValueError("its tensors are not those that were saved")
    return state, sums


def _state(path: Path) -> dict[str, Any]:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    known = isinstance(state, dict) and state.get("format") in (_FORMAT, _IN_ROWS) and _is_step(state.get("step"))
    if not known or not isinstance(state.get("rows", {}), dict):
        raise ValueError("not a fewstep checkpoint")
    return dict(state)


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


def split(tensors: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
    """The tensors under ``prefix/``, without it."""
    if isinstance(tensors, StoredFiles):
        return tensors.under(prefix)
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors agree bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
