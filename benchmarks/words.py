"""Which words of a caption a teacher uses: how much worse it denoises scenes if one kind of word is wrong.

    OMP_NUM_THREADS=1 python benchmarks/words.py scenes-64

The error of x0 on scenes of one object, captioned in full ("a small red striped heart on the left"), is compared with
that under captions in which the words of one kind are wrong. The bound is what a perfect denoiser loses at pure noise
if it does not know on which side an object of known colour and size is: its prediction is the mean of all such scenes.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.models.families import Teacher, load_teacher
from fewstep.scenes64.scenes import ATTRIBUTES, Scene, Scenes
from fewstep.scenes64.scenes.render import render

SEED = 77
"""Of the scenes; those of the shipped model's training and of the unseen prompts have others."""
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
KINDS = (*ATTRIBUTES, "side", "middle")
"""Kinds of words. An attribute's word becomes the next of its kind; ``side`` exchanges left with right and top with
bottom, and ``middle`` says "in the middle" instead of any side."""
LEVELS = (-5.3, -3.0, -1.0)
"""Noise levels, as the logarithm of alpha^2 / sigma^2; scenes-64's noisiest is -5.4."""
_BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("teacher", nargs="?", default="scenes-64", help="scenes-64, or a folder of its architecture")
    parser.add_argument("--count", type=int, default=256, help="number of scenes (default 256)")
    parser.add_argument("--bound", type=int, default=3000, help="scenes of the bound; 0: none (default 3000)")
    options = parser.parse_args()
    teacher = load_teacher(options.teacher)
    found: dict[str, Any] = {"logSNR": LEVELS, "rise": rises(teacher, options.count)}
    if options.bound:
        found["bound_of_side"] = bound_of_side(teacher, options.bound)
    print(json.dumps(found))
    for name, values in found["rise"].items():
        print(f"A wrong {name} raises the error by " + ", ".join(f"{100 * value:.1f} %" for value in values) + ".")


def placed_scenes(count: int) -> list[Scene]:
    """The first scenes of one object on one of the four sides, as one word gives it."""
    scenes, found, index = Scenes(SEED, numbers=(1, 0, 0, 0)), list[Scene](), 0
    while len(found) < count:
        scene = scenes.scene(index)
        found += [scene] if scene.things[0].place not in (None, "middle") else []
        index += 1
    return found


def caption(scene: Scene, wrong: str | None = None) -> str:
    """Everything about the scene's object; a word of the kind ``wrong`` is another one."""
    thing = scene.things[0]
    said = {name: getattr(thing, name) for name in (*ATTRIBUTES, "place")}
    if wrong in ATTRIBUTES:
        values = tuple(ATTRIBUTES[wrong])
        said[wrong] = values[(values.index(said[wrong]) + 1) % len(values)]
    elif wrong is not None:
        said["place"] = OPPOSITE[said["place"]] if wrong == "side" else "middle"
    words = " ".join(said[name] for name in ("size", "colour", "fill", "shape"))
    preposition = {"left": "on", "right": "on", "middle": "in"}.get(said["place"], "at")
    return f"a {words} {preposition} the {said['place']}"


@torch.no_grad()
def rises(teacher: Teacher, count: int) -> dict[str, list[float]]:
    """Relative rise of the mean squared error of x0 at each of `LEVELS`, by the kind of word that is exchanged."""
    scenes = placed_scenes(count)
    latents = latents_of(teacher, scenes)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    schedule = teacher.denoiser.schedule
    ratios = [2 * math.log(float(schedule.alpha(t)) / float(schedule.sigma(t))) for t in range(1000)]
    times = [int(np.abs(np.array(ratios) - level).argmin()) for level in LEVELS]

    def error(captions: list[str], time: int) -> float:
        total = 0.0
        for first in range(0, count, _BATCH):
            rows = slice(first, first + _BATCH)
            x = schedule.add_noise(latents[rows], noise[rows], time)
            x0 = teacher.denoiser(x, time, teacher.encode_prompts(captions[rows])).x0
            total += float((x0 - latents[rows]).square().mean(dim=(1, 2, 3)).sum())
        return total / count

    true = [error([caption(scene) for scene in scenes], time) for time in times]
    return {
        name: [
            error([caption(scene, name) for scene in scenes], time) / right - 1
            for time, right in zip(times, true, strict=True)
        ]
        for name in KINDS
    }


def bound_of_side(teacher: Teacher, count: int) -> dict[str, float]:
    """Relative rise of the error at pure noise if one of the four sides is not known beside colour and size.

    Errors are variances within groups of scenes that agree in what is known, unbiased for groups of any size.
    """
    scenes = placed_scenes(count)
    latents = latents_of(teacher, scenes).flatten(1)

    def within(*known: str) -> float:
        groups: dict[tuple[str, ...], list[int]] = {}
        for i, scene in enumerate(scenes):
            groups.setdefault(tuple(getattr(scene.things[0], name) for name in known), []).append(i)
        shares = [(len(rows), latents[rows].var(dim=0).mean()) for rows in groups.values() if len(rows) > 1]
        return float(sum(n * v for n, v in shares) / sum(n for n, _ in shares))

    return {
        "/".join(known): within(*known) / within(*known, "place") - 1 for known in (("colour",), ("colour", "size"))
    }


def latents_of(teacher: Teacher, scenes: list[Scene]) -> Tensor:
    """[n, 16, 8, 8]."""
    images = torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.cat([teacher.encode_images(part)[0] for part in images.split(_BATCH)])


if __name__ == "__main__":
    main()
