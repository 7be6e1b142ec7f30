"""Which damage each figure of `fewstep.evaluation` sees: images damaged more and more, measured against undamaged ones.

    OMP_NUM_THREADS=1 python benchmarks/damage.py imagenet detector

64 prompts of scenes-64 with four images each stand for the images of a perfect model, 256 others of the same prompts
are the reference, and the undamaged images are the teacher's. A figure *sees* a damage if it becomes worse with every
strength, and if a bootstrap tells the strongest from no damage (95 %); if only the latter holds, it sees strong damage.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.data.files import replace_text
from fewstep.evaluation.figures import FIGURES
from fewstep.evaluation.measured import Measured, Reference, resamplings
from fewstep.evaluation.metrics import centred_interval, spreads
from fewstep.evaluation.prompt_set import PromptSet
from fewstep.models.imagenet import BATCH_SIZE, apart, load_imagenet_encoder
from fewstep.scenes64.detector import judge_of, load_detector
from fewstep.scenes64.scenes import Scene, Scenes
from fewstep.scenes64.scenes.content import draw_like
from fewstep.scenes64.scenes.raters import WARM
from fewstep.scenes64.scenes.render import render

RESULTS = Path(__file__).parent / "results" / "damage.json"
PER_PROMPT = 4
SEED = 17
"""Of the scenes; no model was trained on this set."""
COMMON = ("detail FD", "accuracy", "to teacher")
"""Figures that no network of features takes part in."""


MARKS = {"every strength": "**{}**", "strong damage": "{}", "nothing": "({})"}
"""How a table's cell shows what a figure sees."""


# ---------------------------------------------------------------- the images


@dataclass
class Scenery:
    """``prompts`` captions with `PER_PROMPT` scenes each, side by side; images are [N, 3, 64, 64] in [0, 1]."""

    prompts: int = 64

    @cached_property
    def scenes(self) -> list[Scene]:
        return self._like("images")

    @cached_property
    def images(self) -> Tensor:
        return rendered(self.scenes)

    @cached_property
    def reference(self) -> Tensor:
        """Other images of the same prompts."""
        return rendered(self._like("reference"))

    def _like(self, name: str) -> list[Scene]:
        told = [Scenes(SEED).scene(i) for i in range(self.prompts)]
        return [draw_like(scene, Random(f"{name} {i} {k}")) for i, scene in enumerate(told) for k in range(PER_PROMPT)]

    @cached_property
    def cold(self) -> Tensor:
        """The images, with a scene without `WARM` colours in the place of each that has one.

        It is another scene of the same prompt, or, if the prompt states such a colour, one of another prompt.
        """
        images = self.images.clone()
        for i, scene in enumerate(self.scenes):
            if warm(scene):
                rng = Random(f"cold {i}")
                likes = (draw_like(self.scenes[i if n < 50 else rng.randrange(len(images))], rng) for n in range(999))
                images[i] = rendered([next(other for other in likes if not warm(other))])[0]
        return images


def warm(scene: Scene) -> bool:
    return any(thing.colour in WARM for thing in scene.things)


def rendered(scenes: Sequence[Scene]) -> Tensor:
    """[N, 3, 64, 64] in [0, 1]."""
    return torch.from_numpy(np.stack([render(scene, 64) for scene in scenes])).permute(0, 3, 1, 2).float() / 255


# ---------------------------------------------------------------- the damage


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of ``sigma`` pixels."""
    i = torch.arange(-6, 7, dtype=images.dtype)
    kernel = (-0.5 * (i / sigma).square()).exp()
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 13)
    images = F.conv2d(F.pad(images, (6, 6, 6, 6), mode="replicate"), kernel, groups=3)
    return F.conv2d(images, kernel.transpose(2, 3), groups=3).clamp(0, 1)


def noisy(images: Tensor, deviation: float) -> Tensor:
    """Gaussian noise, the same for every strength."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + deviation * noise).clamp(0, 1)


def paler(images: Tensor, share: float) -> Tensor:
    """``share`` of the distance to the grey image."""
    return images.lerp(images.mean(dim=1, keepdim=True), share)


def repeated(images: Tensor, distinct: int) -> Tensor:
    """Of every prompt so many distinct images, each copied into the places of others."""
    by_prompt = images.unflatten(0, (-1, PER_PROMPT))
    return by_prompt[:, torch.arange(PER_PROMPT) % distinct].flatten(0, 1)


def swapped(images: Tensor, share: float) -> Tensor:
    """Of ``share`` of the prompts, each gets the images of another."""
    by_prompt, chosen = images.unflatten(0, (-1, PER_PROMPT)), part(len(images) // PER_PROMPT, share)
    wrong = by_prompt.clone()
    wrong[chosen] = by_prompt[chosen.roll(1)]
    return wrong.flatten(0, 1)


def replaced(images: Tensor, others: Tensor, share: float) -> Tensor:
    """``share`` of the images from ``others``."""
    chosen = part(len(images), share)
    mixed = images.clone()
    mixed[chosen] = others[chosen]
    return mixed


def part(count: int, share: float) -> Tensor:
    """``share`` of the numbers below ``count``; a larger share holds all of a smaller one."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[: round(share * count)]


Damage = dict[str, Callable[[Scenery], Tensor]]


DAMAGES: dict[str, Damage] = {
    "blur": {f"{s:g} pixels": lambda x, s=s: blurred(x.images, s) for s in (0.5, 1, 1.5, 2.5)},
    "noise": {f"{100 * s:g}%": lambda x, s=s: noisy(x.images, s) for s in (0.04, 0.08, 0.16, 0.32)},
    "lost colour": {f"{100 * s:g}%": lambda x, s=s: paler(x.images, s) for s in (0.25, 0.5, 0.75, 1)},
    "duplicates": {f"{n} of 4 distinct": lambda x, n=n: repeated(x.images, n) for n in (3, 2, 1)},
    "wrong captions": {f"{100 * s:g}%": lambda x, s=s: swapped(x.images, s) for s in (0.125, 0.25, 0.5, 1)},
    "missing modes": {f"{100 * s:g}%": lambda x, s=s: replaced(x.images, x.cold, s) for s in (0.25, 0.5, 0.75, 1)},
}  # fmt: skip
"""Kinds of damage -> strengths in words, rising -> the damaged images."""


# ---------------------------------------------------------------- the figures


class Once:
    """A feature network that sees each different image once: most kinds of damage leave some as they were."""

    def __init__(self, features: Callable[[Tensor], Tensor]) -> None:
        self.features, self.known = features, dict[bytes, Tensor]()

    def __call__(self, images: Tensor) -> Tensor:
        names = [digest(image) for image in images]
        new = {one: i for i, one in enumerate(names) if one not in self.known}
        if new:
            self.known |= dict(zip(new, self.features(images[list(new.values())]), strict=True))
        return torch.stack([self.known[one] for one in names])


class ImageNet:
    """Features, and perceptual distances to the undamaged images, from one pass of each image that is damaged."""

    def __init__(self, undamaged: Tensor) -> None:
        self.encoder = load_imagenet_encoder()
        self.places = {digest(image): i for i, image in enumerate(undamaged)}
        parts = [self.encoder.stages(part) for part in undamaged.split(BATCH_SIZE)]
        self.undamaged = [torch.cat(stage) for stage in zip(*parts, strict=True)]
        self.apart = Tensor()

    def __call__(self, images: Tensor) -> Tensor:
        features, distances = [], []
        for first in range(0, len(images), BATCH_SIZE):
            rows = slice(first, first + BATCH_SIZE)
            stages, others = self.stages(images[rows]), [stage[rows] for stage in self.undamaged]
            features.append(stages[-1].mean(dim=(2, 3)))
            distances.append(apart(stages, others))
        self.apart = torch.cat(distances)
        return torch.cat(features)

    def stages(self, images: Tensor) -> list[Tensor]:
        """Those of undamaged images are known, wherever these stand now."""
        known = [self.places.get(digest(image), -1) for image in images]
        found = [stage[known] for stage in self.undamaged]
        new = [i for i, place in enumerate(known) if place < 0]
        if new:
            for stage, values in zip(found, self.encoder.stages(images[new]), strict=True):
                stage[new] = values
        return found

    def distance(self, images: Tensor, undamaged: Tensor) -> Tensor:
        """Of the images whose features were asked for last."""
        return self.apart


def digest(image: Tensor) -> bytes:
    """The same for equal images."""
    return sha256(image.numpy().tobytes()).digest()


def prompt_set(scenery: Scenery, backbone: str) -> PromptSet:
    """The undamaged images as the teacher's, others of the same prompts as the reference."""
    detector, scenes = load_detector(), scenery.scenes
    encoder = ImageNet(scenery.images) if backbone == "imagenet" else None
    features = Once(detector.features) if encoder is None else encoder
    found = PromptSet(
        [scene.caption for scene in scenes], features, Reference.of(scenery.reference, features),
        judge_of(detector, scenes), teacher=scenery.images, perceptual=encoder and encoder.distance,
    )  # fmt: skip
    _ = found._teacher_features  # of the undamaged images, before those of others
    return found


@dataclass
class Figures:
    """Every figure of one set of images, and its resamplings."""

    measured: Measured
    real: Reference

    @cached_property
    def plain(self) -> dict[str, float]:
        found = {name: value for name, value in self.measured.figures(self.real).items() if name in FIGURES}
        return {**found, "spread": float(self._spreads.mean())}

    @cached_property
    def resampled(self) -> dict[str, Tensor]:
        values = self._spreads
        found = self.measured.resampled(self.real)
        return {**found, "spread": resamplings(len(values)) @ values / len(values)}

    @cached_property
    def _spreads(self) -> Tensor:
        return spreads(self.measured.features, PER_PROMPT)


def worse(name: str, before: float, after: float) -> bool:
    """Whether a figure says that what came after is worse; density, of which neither is good, falls with damage."""
    return after > before if FIGURES[name].better == "lower" else after < before


def rows(clean: Figures, damaged: Sequence[Figures]) -> dict[str, Any]:
    """Per figure: its values from no damage to the strongest, the interval of the whole change, and what it sees."""
    found = {}
    for name in clean.plain:
        values = [each.plain[name] for each in (clean, *damaged)]
        change = centred_interval(damaged[-1].resampled[name] - clean.resampled[name], values[-1] - values[0])
        told = worse(name, values[0], values[-1]) and change[0] * change[1] > 0
        everywhere = all(worse(name, a, b) for a, b in pairwise(values))
        sees = ("every strength" if everywhere else "strong damage") if told else "nothing"
        found[name] = {"values": values, "change": change, "sees": sees}
    return found


def measure(scenery: Scenery, backbone: str, kinds: Iterable[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """(damage, its strengths and the rows of all figures) of one network of features, for all kinds by default."""
    prompts = prompt_set(scenery, backbone)
    assert prompts.reference is not None
    clean = Figures(prompts.measure(scenery.images), prompts.reference)
    for kind in kinds or DAMAGES:
        found = [Figures(prompts.measure(make(scenery)), prompts.reference) for make in DAMAGES[kind].values()]
        yield kind, {"strengths": list(DAMAGES[kind]), "figures": rows(clean, found)}


# ---------------------------------------------------------------- the table


def tables(found: dict[str, Any]) -> str:
    """Markdown: a table for each network of features, one for the figures without, and one of the strengths."""
    backbones = found["backbones"]
    strengths = ["| damage | strengths |", "|---|---|"]
    strengths += [f"| {kind} | {', '.join(row['strengths'])} |" for kind, row in next(iter(backbones.values())).items()]
    parts = ["\n".join(strengths)]
    for backbone, kinds in backbones.items():
        names = next(iter(kinds.values()))["figures"]
        parts.append(_table(f"{backbone} features", kinds, [n for n in FIGURES if n in names and n not in COMMON]))
    return "\n\n".join([*parts, _table("without features", next(iter(backbones.values())), COMMON)]) + "\n"


def _table(title: str, kinds: dict[str, Any], names: Sequence[str]) -> str:
    lines = [f"| {title} | none | {' | '.join(kinds)} |", "|---" * (2 + len(kinds)) + "|"]
    for name in names:
        cells = []
        for row in (kind["figures"][name] for kind in kinds.values()):
            weakest, strongest = in_words(row["values"][1]), in_words(row["values"][-1])
            cells.append(MARKS[row["sees"]].format(f"{weakest} … {strongest}"))
        none = in_words(next(iter(kinds.values()))["figures"][name]["values"][0])
        lines.append(f"| {name} | {none} | {' | '.join(cells)} |")
    return "\n".join(lines)


def in_words(value: float) -> str:
    """Three digits, and no -0."""
    return f"{value if abs(value) >= 5e-6 else 0.0:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbones", nargs="*", default=["imagenet", "detector"], help="imagenet, detector or both")
    parser.add_argument("--prompts", type=int, default=64, help="number of prompts, of four images each")
    parser.add_argument("--damage", nargs="*", default=list(DAMAGES), help="kinds of damage; all by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON; what else it holds stays")
    options = parser.parse_args()
    scenery = Scenery(options.prompts)
    about = {"images": len(scenery.images), "prompts": options.prompts, "torch": torch.__version__}
    before = json.loads(options.out.read_text()) if options.out.is_file() else {}
    backbones = before.get("backbones", {}) if before.get("images") == about["images"] else {}
    for backbone in options.backbones:
        rows_of = backbones.setdefault(backbone, {})
        for kind, row in measure(scenery, backbone, options.damage):
            rows_of[kind] = row
            backbones[backbone] = {kind: rows_of[kind] for kind in DAMAGES if kind in rows_of}
            rounded = json.dumps({**about, "backbones": backbones})  # to six digits, which other machines share
            replace_text(options.out, json.dumps(json.loads(rounded, parse_float=_six_digits), indent=1) + "\n")
            seen = [name for name, each in row["figures"].items() if each["sees"] != "nothing"]
            print(json.dumps({"backbone": backbone, "damage": kind, "seen by": seen}), flush=True)
    print(tables(json.loads(options.out.read_text())))


def _six_digits(number: str) -> float:
    return float(f"{float(number):.6g}")


if __name__ == "__main__":
    main()
