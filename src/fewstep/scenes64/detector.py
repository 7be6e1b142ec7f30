"""What a picture of scenes-64 shows, and whether that is what its caption states.

The reader is a small network trained on rendered scenes (`fewstep.scenes64.train_detector`). It measures prompt
accuracy, and its features serve for distances between sets of pictures; it must never stand in a loss. Its own
ceilings, on renders and on renders that passed the teacher's autoencoder, belong beside every figure it gives:

    python -m fewstep.scenes64.detector --scenes 2000 --teacher scenes-64
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewstep.data.random import Rng
from fewstep.models.detector import CELLS, DetectorNetwork
from fewstep.scenes64.scenes import ATTRIBUTES, Mention, Scene, Scenes, place_of
from fewstep.scenes64.train_detector import as_unit, autoencoder, through_vae

ASSET = Path(__file__).parent.parent / "assets" / "reader.safetensors"
THRESHOLD = 0.45
"""A centre is where the network is at least so sure; a centre between four cells is worth 0.78 to each."""
APART = 0.4
"""Of two things whose centres are nearer than this part of their radii's sum, the less sure one is not counted."""
SLACK = 0.025
"""How far a place is given the benefit of the doubt, in sides, 1.6 pixels; no two words can then hold at once."""

JUDGED = ("number", *ATTRIBUTES, "place")
"""What captions state."""

_BATCH = 64


@dataclass(frozen=True)
class Found:
    """One thing seen in a picture.

    Attributes:
        shape, colour, fill, size: names, as of `fewstep.scenes64.scenes.Thing`.
        x, y, radius: in sides of the picture.
        score: how sure the reader is that something is there, 0 ... 1.
    """

    shape: str
    colour: str
    fill: str
    size: str
    x: float
    y: float
    radius: float
    score: float = 1.0

    def lies(self, place: str) -> bool:
        """Whether the word ``place`` holds here or at most SLACK away."""
        steps = (-SLACK, 0.0, SLACK)
        return any(place_of(self.x + dx, self.y + dy) == place for dx in steps for dy in steps)


class Detector:
    """A trained network and what it says of pictures."""

    def __init__(self, network: DetectorNetwork) -> None:
        self.network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def read(self, images: Tensor) -> list[list[Found]]:
        """What each of the pictures [N, 3, 64, 64] in [0, 1] shows, the surest first.

        Raises:
            ValueError: when the pictures have another shape.
        """
        found: list[list[Found]] = []
        for batch in self._batches(images):
            found += [_things(one) for one in _rows(self.network(batch))]
        return found

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """float32 [N, 64] for pictures [N, 3, 64, 64] in [0, 1]: the network's last hidden layer, averaged over cells.

        Raises:
            ValueError: when the pictures have another shape.
        """
        return torch.cat([self.network.features(batch) for batch in self._batches(images)]).cpu()

    def _batches(self, images: Tensor) -> Iterable[Tensor]:
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, 64, 64):
            raise ValueError(f"The reader reads pictures [N, 3, 64, 64] in [0, 1], not {list(images.shape)}.")
        first = next(self.network.parameters())
        return (batch.to(first.device, first.dtype) for batch in images.split(_BATCH))


def load_detector(path: Path = ASSET, device: str = "cpu") -> Detector:
    """The reader that ships with fewstep, or another one of its shape.

    Raises:
        ValueError: one sentence when the file is missing, damaged or of another shape.
    """
    network = DetectorNetwork({name: len(values) for name, values in ATTRIBUTES.items()})
    remedy = "train one by 'python -m fewstep.scenes64.train_detector --export FILE'"
    if not path.is_file():
        raise ValueError(f"The reader's weights {path} are missing: {remedy}.")
    try:
        network.load_state_dict({name: t.float() for name, t in load_file(path).items()})
    except (SafetensorError, RuntimeError):
        raise ValueError(f"The file {path} does not hold a reader's weights: {remedy}.") from None
    return Detector(network.to(device, memory_format=torch.channels_last))  # type: ignore[call-overload]


# ---------------------------------------------------------------- from cells to things


def _rows(answers: dict[str, Tensor]) -> Iterable[dict[str, Tensor]]:
    answers = {name: t.float().cpu() for name, t in answers.items()}
    answers["near"] = _peaks(answers["near"].sigmoid())
    return ({name: t[i] for name, t in answers.items()} for i in range(len(answers["near"])))


def _peaks(near: Tensor) -> Tensor:
    """``near`` [N, 16, 16] where it is the highest of its 3x3 neighbourhood, else 0."""
    highest = F.max_pool2d(near[:, None], 3, stride=1, padding=1)[:, 0]
    return torch.where(near == highest, near, 0.0)


def _things(answers: dict[str, Tensor]) -> list[Found]:
    """The things that one picture's cells tell of; of two claims to the same thing the surer one counts."""
    things: list[Found] = []
    rows, columns = (answers["near"] >= THRESHOLD).nonzero(as_tuple=True)
    order = answers["near"][rows, columns].argsort(descending=True, stable=True)
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        thing = _thing({name: t[row, column] for name, t in answers.items()}, row, column)
        if all(_far(thing, other) for other in things):
            things.append(thing)
    return things


def _thing(cell: dict[str, Tensor], row: int, column: int) -> Found:
    right, low, log_radius = cell["geometry"].tolist()
    names = {name: values[int(cell[name].argmax())] for name, values in ATTRIBUTES.items()}
    x, y = (column + 0.5 + right) / CELLS, (row + 0.5 + low) / CELLS
    return Found(**names, x=x, y=y, radius=math.exp(log_radius), score=float(cell["near"]))


def _far(a: Found, b: Found) -> bool:
    return (a.x - b.x) ** 2 + (a.y - b.y) ** 2 > (APART * (a.radius + b.radius)) ** 2


# ---------------------------------------------------------------- against the caption


@dataclass(frozen=True)
class Judgement:
    """How one picture agrees with its caption.

    Attributes:
        counts: per attribute of JUDGED that is stated: (how often right, how often stated).
        all_right: whether everything stated holds, and every thing mentioned is there.
        stated: whether the caption states anything.
    """

    counts: dict[str, tuple[int, int]]
    all_right: bool
    stated: bool


def judge(found: Sequence[Found], scene: Scene) -> Judgement:
    """Hold what was found against what ``scene``'s caption states.

    Each thing mentioned, two for "two red triangles", is given a found thing of its own, so that as many statements
    as possible are right; among such assignments shapes are kept rather than colours, colours rather than fills, and
    so on. What is stated of a thing that got none is wrong.
    """
    slots = [mention for mention in scene.mentions for _ in mention.things]
    partners = _assign(slots, found)
    counts: dict[str, tuple[int, int]] = {}
    if scene.count is not None:
        counts["number"] = (int(len(found) == scene.count), 1)
    for mention, partner in zip(slots, partners, strict=True):
        for name, right in _verdicts(mention, partner).items():
            old = counts.get(name, (0, 0))
            counts[name] = (old[0] + right, old[1] + 1)
    everything = all(right == stated for right, stated in counts.values()) and None not in partners
    return Judgement(counts, everything, bool(counts or slots))


def _verdicts(mention: Mention, thing: Found | None) -> dict[str, bool]:
    """For each attribute that ``mention`` states, whether it holds of ``thing``."""
    said = {name: value for name in (*ATTRIBUTES, "place") if (value := getattr(mention, name)) is not None}
    if thing is None:
        return dict.fromkeys(said, False)
    return {n: thing.lies(value) if n == "place" else getattr(thing, n) == value for n, value in said.items()}


def _assign(slots: Sequence[Mention], found: Sequence[Found]) -> list[Found | None]:
    """A different found thing for each slot, or None where they do not suffice.

    Compares how many slots are filled, how many statements are right, then how many shapes, colours, ... .
    """
    order = (*ATTRIBUTES, "place")

    def value(slot: int, thing: int) -> tuple[int, ...]:
        verdicts = _verdicts(slots[slot], found[thing])
        return (1, sum(verdicts.values()), *(int(verdicts.get(name, False)) for name in order))

    values = [[value(i, j) for j in range(len(found))] for i in range(len(slots))]
    nothing = (0,) * (2 + len(order))

    @cache
    def best(slot: int, used: frozenset[int]) -> tuple[tuple[int, ...], tuple[int | None, ...]]:
        if slot == len(slots):
            return nothing, ()
        options = []
        for thing in (*(j for j in range(len(found)) if j not in used), None):
            rest, partners = best(slot + 1, used if thing is None else used | {thing})
            gain = nothing if thing is None else values[slot][thing]
            options.append((tuple(a + b for a, b in zip(gain, rest, strict=True)), (thing, *partners)))
        return max(options, key=lambda option: option[0])

    return [None if j is None else found[j] for j in best(0, frozenset())[1]]


# ---------------------------------------------------------------- over many pictures


@dataclass(frozen=True)
class Accuracy:
    """Prompt accuracy of a set of pictures.

    Attributes:
        counts: per attribute of JUDGED: (how often right, how often stated).
        all_right: (pictures in which everything stated holds, pictures whose caption states something).
        pictures: how many there are.
    """

    counts: dict[str, tuple[int, int]]
    all_right: tuple[int, int]
    pictures: int

    @property
    def share(self) -> dict[str, float]:
        """Right parts of the stated, per attribute, and ``all``; what is never stated is left out."""
        rows = {**self.counts, "all": self.all_right}
        return {name: right / stated for name, (right, stated) in rows.items() if stated}


def prompt_accuracy(reader: Detector, images: Tensor, scenes: Sequence[Scene]) -> Accuracy:
    """Read pictures [N, 3, 64, 64] in [0, 1] and hold each against the caption of its scene.

    Raises:
        ValueError: when there are not as many pictures as scenes.
    """
    if len(images) != len(scenes):
        raise ValueError(f"{len(images)} pictures cannot be held against {len(scenes)} captions.")
    judged = [judge(found, scene) for found, scene in zip(reader.read(images), scenes, strict=True)]
    counts = {}
    for name in JUDGED:
        pairs = [j.counts[name] for j in judged if name in j.counts]
        counts[name] = (sum(right for right, _ in pairs), sum(stated for _, stated in pairs))
    stating = [j for j in judged if j.stated]
    return Accuracy(counts, (sum(j.all_right for j in stating), len(stating)), len(judged))


# ---------------------------------------------------------------- how good the reader itself is

UNSEEN = 990001
"""Seed of the scenes it is tested on."""


def ceilings(reader: Detector, vae: Any = None, number: int = 2000) -> dict[str, Accuracy]:
    """What the reader says of pictures that are right by construction: the most that generated ones can reach.

    Args:
        vae: the teacher's autoencoder; without it only ``renders`` are read, with it ``after the VAE`` too.
        number: of scenes that no training has seen.
    """
    scenes = Scenes(UNSEEN)
    rendered = scenes.render(range(number))
    images = as_unit(rendered.images)
    found = {"renders": prompt_accuracy(reader, images, rendered.scenes)}
    if vae is not None:
        noise = Rng(UNSEEN, 0, number).sample.normal("posterior", (16, 8, 8))
        pairs = zip(images.split(_BATCH), noise.split(_BATCH), strict=True)
        passed = torch.cat([through_vae(vae, *pair) for pair in pairs])
        found["after the VAE"] = prompt_accuracy(reader, passed, rendered.scenes)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fewstep.scenes64.detector", description=__doc__)
    parser.add_argument("--reader", type=Path, default=ASSET, help="weights (default: those shipped)")
    parser.add_argument("--teacher", help="scenes-64, a diffusers folder, or a run directory of the teacher's training")
    parser.add_argument("--scenes", type=int, default=2000)
    given = parser.parse_args(arguments)
    vae = autoencoder(given.teacher) if given.teacher else None
    for name, accuracy in ceilings(load_detector(given.reader), vae, given.scenes).items():
        shares = "  ".join(f"{part} {100 * share:.2f}" for part, share in accuracy.share.items())
        print(f"{name:14s} n = {accuracy.pictures}: {shares} %")


if __name__ == "__main__":
    main()
