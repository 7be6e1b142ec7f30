"""Checkpoints: safetensors plus one JSON, written aside, flushed to disk, then renamed into place.

    step-0000500/
      tensors.safetensors                 what every process holds whole
      rows-00000-of-00004.safetensors     the first process's rows of sharded tensors, and so on for the others
      state.json                          step, checksums of the files, what `Trainer` adds

Whatever moment a process dies at, a checkpoint folder is either complete or absent. Any number of processes can read
what any number has written. Rows may be written while training goes on (`Writing`); the checkpoint gets its name when
all processes have written theirs.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
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
    writing = Writing(folder, step, tensors, state, keep)
    writing.write()
    return writing.finish()


class Writing:
    """A checkpoint that is being written. All processes that have rows of it must make the same calls.

    Args: as of `save`.
        background: copy the rows into host memory and write them in a thread, while training goes on.

    Raises:
        OSError: as `save`: the folder cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        tensors: Mapping[str, Tensor | Part],
        state: dict[str, Any],
        keep: int = 2,
        background: bool = False,
    ) -> None:
        self.folder, self.step, self.state, self.keep = folder, step, state, keep
        rows = {name: t for name, t in tensors.items() if isinstance(t, Part)}
        part = folder / f".part-{step:07d}-{os.getpid()}"
        self._part = distributed.from_first(part) if rows else part
        self._in_rows = bool(rows)
        self._files: dict[str, int] = {}
        self._sum, self._mistake = 0, ""
        self._agree(lambda: _begin(folder, self._part))
        self._rows = {n: replace(t, rows=_on_host(t.rows)) if background else t for n, t in rows.items()}
        whole = {name: t for name, t in tensors.items() if not isinstance(t, Part)} if distributed.first() else {}
        self._whole = {name: _on_host(t) for name, t in whole.items()}
        self._thread = threading.Thread(target=self.write, name="checkpoint", daemon=True) if background else None
        if self._thread is not None:
            self._thread.start()

    @property
    def at_work(self) -> bool:
        """Whether this process is writing its files."""
        return self._thread is not None and self._thread.is_alive()

    def write(self) -> None:
        """Write this process's files; `finish` raises what has gone wrong."""
        try:
            self._files = _write_rows(self._part, self._rows)
            if distributed.first():
                save_tensors(self._part / _TENSORS, self._whole)
                self._sum = _checksum(self._part / _TENSORS)
        except OSError as error:
            self._mistake = str(error) or type(error).__name__
        except Exception as error:
            if self._thread is None:
                raise
            self._mistake = f"{type(error).__name__}: {error}"  # raised in a thread it would be lost
        self._rows, self._whole = {}, {}  # the copies are needed no longer

    def finish(self) -> Path:
        """Wait until all have written, and give the checkpoint its name; returns its path."""
        if self._thread is not None:
            self._thread.join()
        self._refuse([(self._mistake, self._files)])
        self._agree(self._complete)
        final = self.folder / f"{_PREFIX}{self.step:07d}"
        self._agree(lambda: _put(self._part, final, self.keep))
        return final

    def _complete(self) -> None:
        """Write the state, in the first process: it makes the folder a checkpoint."""
        if not distributed.first():
            return
        about = {"format": _IN_ROWS if self._files else _FORMAT, "step": self.step, "checksum": self._sum}
        rows: dict[str, Any] = {"rows": dict(sorted(self._files.items()))} if self._files else {}
        write_text(self._part / "state.json", json.dumps({**about, **rows, **self.state}, indent=1))
        sync_folder(self._part)

    def _agree(self, write: Callable[[], object]) -> None:
        """Do this in every process; where it fails in one of them, all raise."""
        self._refuse([(_attempt(write), {})])

    def _refuse(self, outcomes: list[tuple[str, dict[str, int]]]) -> None:
        """Note every process's files, or raise in all of them when one could not write."""
        if self._in_rows:  # a process that went on alone would wait for the others for ever
            outcomes = distributed.everywhere(outcomes[0])
        mistakes = [mistake for mistake, _ in outcomes if mistake]
        if not mistakes:
            for _, files in outcomes:
                self._files.update(files)
            return
        shutil.rmtree(self._part, ignore_errors=True)  # half a checkpoint must not fill the disk
        safe = latest(self.folder)
        kept = f"the last one, {safe}, is intact" if safe else "there is no earlier one"
        raise OSError(
            f"The checkpoint of step {self.step} could not be written ({mistakes[0]}); {kept}: make "
            f"room or allow writing in {self.folder}, then go on with --resume."
        )


def _on_host(tensor: Tensor) -> Tensor:
    """A copy in host memory: the next update changes the tensor itself."""
    return tensor.detach().to("cpu", copy=True).contiguous()


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


def _put(part: Path, final: Path, keep: int) -> None:
    """Give a whole checkpoint its name, in the first process, and delete the oldest ones."""
    if not distributed.first():
        return
    folder = final.parent
    aside = folder / f"{part.name}-before"
    if final.exists():  # half deleted it would still look complete
        os.rename(final, aside)
    try:
        os.rename(part, final)
    except OSError:
        if aside.exists():  # what was there before stays
            os.rename(aside, final)
        raise
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
