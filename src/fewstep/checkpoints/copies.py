"""Folders and hub names that are whole published few-step pipelines: they are sampled and taught as such."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fewstep.checkpoints.registry import Checkpoint, checkpoints
from fewstep.models.families.registry import family_in, family_named

_CACHED = re.compile(r"models--([^/]+?)--([^/]+)")  # the hub's cache: models--OWNER--NAME/snapshots/HASH


def copy_of(name: str | Path) -> Checkpoint | None:
    """The published pipeline that ``name`` is, or of which it is a copy; None for all other models.

    A folder is one by its place in the hub's cache, by the origin that diffusers wrote into its index, by that of git,
    or by its own name, and where its network is of that family.
    """
    whole = [entry for entry in checkpoints().values() if entry.kind == "pipeline"]
    path = Path(os.path.expanduser(name))
    if not path.is_dir():
        return next((entry for entry in whole if entry.repo.lower() == str(name).lower()), None)
    if not (path / "model_index.json").is_file():
        return None
    by_repo = {entry.repo.lower(): entry for entry in whole}
    found = next((by_repo[origin] for origin in _origins(path) if origin in by_repo), None)
    found = found or {entry.repo.lower().split("/")[1]: entry for entry in whole}.get(path.resolve().name.lower())
    return found if found is not None and family_in(path) is family_named(found.family) else None


def _origins(path: Path) -> Iterator[str]:
    """The repositories that a folder may be a copy of, in lower case."""
    for part in path.resolve().parts:
        cached = _CACHED.fullmatch(part)
        if cached:
            yield f"{cached[1]}/{cached[2]}".lower()
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        yield str(json.loads((path / "model_index.json").read_text(encoding="utf-8")).get("_name_or_path", "")).lower()
    git = path / ".git" / "config"
    if git.is_file():
        for url in re.findall(r"url\s*=\s*(\S+)", git.read_text(encoding="utf-8", errors="replace")):
            yield "/".join(url.removesuffix(".git").rstrip("/").split("/")[-2:]).lower()
