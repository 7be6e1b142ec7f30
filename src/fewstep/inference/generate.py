"""`fewstep sample`: a row of pictures from whatever can be loaded, in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.evaluation.grids import image_grid
from fewstep.inference.load import load_model
from fewstep.inference.model import Model

__all__ = ["draw", "load_model", "scaled_loras"]
_SMALL = 192  # pixels: smaller pictures are enlarged


def draw(
    model: Model,
    prompts: Sequence[str],
    sampler: str | None,
    options: Mapping[str, Any],
    guidance_scale: float | None,
    seed: int,
    out: Path,
    **more: Any,
) -> str:
    """Write one row of pictures to ``out``; returns in words how they were made.

    Args:
        options, more: other arguments of `Model.draw`.

    Raises:
        ValueError: one sentence, as `Model.sample` does, and for a file that is no picture's.
    """
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out must be a .png, .jpg or .webp file, not '{out}'.")
    drawn = model.draw(prompts, sampler=sampler, guidance_scale=guidance_scale, seed=seed, **options, **more)
    out.parent.mkdir(parents=True, exist_ok=True)
    captions = list(prompts) if len(prompts) == len(drawn.pictures) else [*prompts, *[""] * (len(drawn.pictures) - 1)]
    scale = max(1, _SMALL // drawn.pictures.shape[-1])
    image_grid([drawn.pictures], [f"seed {seed}"], captions, scale=scale).save(out)
    return drawn.words


def scaled_loras(given: Sequence[str]) -> list[tuple[str, float]]:
    """FILE or FILE:SCALE, as the command line has them."""
    found = []
    for text in given:
        file, _, scale = text.rpartition(":")
        try:
            found.append((file, float(scale)) if file else (text, 1.0))
        except ValueError:
            found.append((text, 1.0))
    return found
