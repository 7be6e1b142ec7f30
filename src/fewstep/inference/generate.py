"""`fewstep sample`: images of a model, written to a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fewstep.data.files import replacing
from fewstep.evaluation.grids import enlargement, image_grid
from fewstep.inference.load import load_model
from fewstep.inference.model import Model

__all__ = ["check_out", "generate", "load_model", "scaled_loras"]


def generate(
    model: Model,
    prompts: Sequence[str],
    sampler: str | None,
    options: Mapping[str, Any],
    guidance_scale: float | None,
    seed: int,
    out: Path,
    **more: Any,
) -> str:
    """Write one row of images to ``out``; returns a description of how they were made.

    Args:
        options, more: further arguments of `Model.generate`.

    Raises:
        ValueError: as `Model.sample`, and for a file name that is not an image's.
    """
    check_out(out)
    found = model.generate(prompts, sampler=sampler, guidance_scale=guidance_scale, seed=seed, **options, **more)
    out.parent.mkdir(parents=True, exist_ok=True)
    captions = [*prompts, *[""] * (len(found.images) - len(prompts))]  # one prompt may have several images
    grid = image_grid([found.images], [f"seed {seed}"], captions, scale=enlargement(found.images))
    with replacing(out) as part:
        grid.save(part, Image.registered_extensions()[out.suffix.lower()])
    return found.description


def check_out(out: Path) -> None:
    """Before any work is done: can an image be written to ``out``?

    Raises:
        ValueError: its name is not an image's, it is a folder or a device, or nothing can be written where it would be.
    """
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out must be a .png, .jpg or .webp file, not '{out}'.")
    if out.exists() and not out.is_file():
        raise ValueError(f"--out {out} is {'a folder' if out.is_dir() else 'no ordinary file'}: choose another name.")
    there = next(folder for folder in out.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out {out} cannot be written: {there} is {_obstacle(there)}.")


def _obstacle(place: Path) -> str:
    return "a folder in which you may not write" if place.is_dir() else "no folder"


def scaled_loras(given: Sequence[str]) -> list[tuple[str, float]]:
    """Style LoRAs and their scales, from FILE or FILE:SCALE of the command line."""
    found = []
    for text in given:
        file, _, scale = text.rpartition(":")
        try:
            found.append((file, float(scale)) if file else (text, 1.0))
        except ValueError:
            found.append((text, 1.0))
    return found
