"""Rendered scenes as training data: rendered and encoded once, then kept on disk like any other images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from fewstep.data.cache import Advance, Encoding, Row, Share
from fewstep.data.sources import LatentSource
from fewstep.models.families import Teacher
from fewstep.scenes64.scenes import Scenes
from fewstep.scenes64.scenes.content import FORM

_BATCH = 32


def scene_latents(
    path: Path,
    teacher: Teacher,
    size: int,
    seed: int,
    advance: Advance | None = None,
    share: Share = Share(),
    live: bool = False,
) -> LatentSource:
    """Scenes 0 ... size - 1 of set ``seed`` as latents with prompt embeddings, from ``path`` if it holds just these.

    Latents are kept as their posterior's mean and standard deviation, in float16, and sampled anew at every visit.

    Args:
        share, live: as in `fewstep.data.cache.image_latents`.
    """
    scenes = Scenes(seed, size=teacher.image_size)

    def read(rows: range) -> Iterator[Row]:
        for first in range(rows.start, rows.stop, _BATCH):
            rendered = scenes.render(range(first, min(first + _BATCH, rows.stop)))
            yield from zip(torch.from_numpy(rendered.images).permute(0, 3, 1, 2), rendered.captions, strict=True)

    found = Encoding(path, teacher, f"scenes of form {FORM}: {seed} {size}", size, read, live=live).load(advance, share)
    assert isinstance(found, LatentSource)
    return found
