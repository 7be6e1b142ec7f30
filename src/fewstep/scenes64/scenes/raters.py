"""Simulated raters for scenes-64: a stated rule of taste, and noise, instead of human choices. No person was asked.

The rule: a thing is liked for a warm colour (1.5), for being large (1), for a plain fill (0.5), and an image as the
mean of its things. Of two images that fit one caption, raters choose the first with Bradley and Terry's probability
``1 / (1 + exp(-SHARPNESS (taste of the first - taste of the second)))``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Protocol

import numpy as np
from PIL import Image

from fewstep.data.files import replace_text
from fewstep.data.random import stream_key
from fewstep.scenes64.scenes.content import Scene, draw_like
from fewstep.scenes64.scenes.render import Bytes, render
from fewstep.scenes64.scenes.source import Scenes

WARM = ("red", "orange", "yellow", "pink")
WARMTH, SIZE, CALM = 1.5, 1.0, 0.5
SHARPNESS = 2.0
RULE = "simulated raters, no people: warm colour +1.5, large +1, plain fill +0.5, mean over things; noisy choices"
_BATCH = 64


class Tasted(Protocol):
    """The input of the rule: `fewstep.scenes64.scenes.Thing`, or a thing that the detector found."""

    @property
    def colour(self) -> str: ...
    @property
    def size(self) -> str: ...
    @property
    def fill(self) -> str: ...


def taste(things: Sequence[Tasted]) -> float:
    """The raters' taste for an image of these things, rendered or detected; 0 without any."""
    each = [WARMTH * (t.colour in WARM) + SIZE * (t.size == "large") + CALM * (t.fill == "plain") for t in things]
    return sum(each) / max(len(each), 1)


def pair_of(seed: int, index: int) -> tuple[Scene, Scene, float, bool]:
    """Pair number ``index``: (chosen, rejected, the probability of that choice, whether a decoder has seen them)."""
    rng = Random(stream_key(seed, "pair", index))
    first = Scenes(seed).scene(index)
    second = draw_like(first, rng)
    probability = 1 / (1 + math.exp(-SHARPNESS * (taste(first.things) - taste(second.things))))
    decoded = rng.random() < 0.5
    if rng.random() < probability:
        return first, second, probability, decoded
    return second, first, 1 - probability, decoded


def write_preferences(
    folder: Path,
    seed: int,
    count: int,
    decode: Callable[[Bytes, int], Bytes] | None = None,
    advance: Callable[[int], None] | None = None,
) -> float:
    """Pairs 0 ... count - 1 as images and ``preferences.jsonl``, which is written last; returns their noise ceiling.

    The ceiling is the mean of the more probable choice: no judge agrees with the raters more often, in the mean.

    Args:
        decode: passes uint8 images [n, 64, 64, 3] through a teacher's autoencoder, with noise of their number; half of
            the pairs go through it, so that a reward model knows its decoder.
        advance: called with the number of pairs written.
    """
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    lines, ceiling = [], 0.0
    for start in range(0, count, _BATCH):
        pairs = [pair_of(seed, i) for i in range(start, min(start + _BATCH, count))]
        images = np.stack([render(scene, 64) for pair in pairs for scene in pair[:2]])
        if decode is not None:
            rows = np.flatnonzero(np.repeat([pair[3] for pair in pairs], 2))
            images[rows] = decode(images[rows], start)
        for i, (chosen, _, probability, _) in enumerate(pairs):
            names = [f"pictures/{start + i:06d}-{which}.png" for which in ("chosen", "rejected")]
            for name, image in zip(names, images[2 * i : 2 * i + 2], strict=True):
                Image.fromarray(image).save(folder / name)
            ceiling += max(probability, 1 - probability)
            entry = {"prompt": chosen.caption, "chosen": names[0], "rejected": names[1], "probability": probability}
            lines.append(json.dumps({**entry, "raters": "simulated"}))
        if advance is not None:
            advance(len(lines))
    replace_text(folder / "raters.json", json.dumps({"raters": RULE, "seed": seed, "pairs": count}, indent=1) + "\n")
    replace_text(folder / "preferences.jsonl", "\n".join(lines) + "\n")
    return ceiling / count
