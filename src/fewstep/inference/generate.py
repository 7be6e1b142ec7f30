"""`fewstep sample`: images of a model, written to a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.evaluation.grids import image_grid
from fewstep.inference.load import load_model
from fewstep.inference.model import Model

__all__ = ["generate", "load_model", "scaled_loras"]
_SMALL = 192  # pixels: smaller images are enlarged


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
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out must be a .png, .jpg or .webp file, not '{out}'.")
    found = model.generate(prompts, sampler=sampler, guidance_scale=guidance_scale, seed=seed, **options, **more)
    out.parent.mkdir(parents=True, exist_ok=True)
    captions = [*prompts, *[""] * (len(found.images) - len(prompts))]  # one prompt may have several images
    scale = max(1, _SMALL // found.images.shape[-1])
    image_grid([found.images], [f"seed {seed}"], captions, scale=scale).save(out)
    return found.description


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
