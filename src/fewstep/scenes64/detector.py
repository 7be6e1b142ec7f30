"""Detection of the things in images of scenes-64, and prompt accuracy: whether they are what the caption states.

The detector is a small network trained on rendered scenes (`fewstep.scenes64.train_detector`). It measures prompt
accuracy, and its features serve for distances between sets of images; it must never stand in a loss. Its own ceilings
(`fewstep teacher ceilings`), on renders and on renders that passed the teacher's autoencoder, belong beside every
figure it gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewstep.evaluation.measured import Judge, Judgement
from fewstep.models.detector import CELLS, DetectorNetwork
from fewstep.scenes64.scenes import ATTRIBUTES, Mention, Scene, place_of

ASSET = Path(__file__).parent.parent / "assets" / "detector.safetensors"
THRESHOLD = 0.45
"""A cell holds a centre where the network is at least this sure; a centre between four cells is worth 0.78 to each."""
APART = 0.4
"""If two detections are closer than this share of the sum of their radii, the less confident one is dropped."""
SLACK = 0.025
"""Tolerance of places, in sides of the image: 1.6 pixels. No two words can then hold at once."""

JUDGED = ("number", *ATTRIBUTES, "place")
"""The attributes that captions state."""

_BATCH = 64


@dataclass(frozen=True)
class Found:
    """A thing that was detected in an image.

    Attributes:
        shape, colour, fill, size: names, as in `fewstep.scenes64.scenes.Thing`.
        x, y, radius: in sides of the image.
        score: the detector's confidence, 0 ... 1.
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
        """Whether the word ``place`` holds here or at most `SLACK` away."""
        steps = (-SLACK, 0.0, SLACK)
        return any(place_of(self.x + dx, self.y + dy) == place for dx in steps for dy in steps)


class Detector:
    """A trained network, applied to images in batches."""

    def __init__(self, network: DetectorNetwork) -> None:
        self.network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[list[Found]]:
        """The things in each of the images [N, 3, 64, 64] in [0, 1], the surest first.

        Raises:
            ValueError: the images have another shape.
        """
        found: list[list[Found]] = []
        for batch in self._batches(images):
            found += [_things(cells) for cells in _rows(self.network(batch))]
        return found

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The network's last hidden layer, averaged over cells: float32 [N, 64] of images [N, 3, 64, 64] in [0, 1].

        Raises:
            ValueError: the images have another shape.
        """
        return torch.cat([self.network.features(batch) for batch in self._batches(images)]).cpu()

    def _batches(self, images: Tensor) -> Iterable[Tensor]:
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, 64, 64):
            raise ValueError(f"The detector takes images [N, 3, 64, 64] in [0, 1], not {list(images.shape)}.")
        first = next(self.network.parameters())
        return (batch.to(first.device, first.dtype) for batch in images.split(_BATCH))


def load_detector(path: Path = ASSET, device: str = "cpu") -> Detector:
    """The detector that ships with fewstep, or another one of its shape.

    Raises:
        ValueError: the file is missing, damaged or of another shape.
    """
    network = DetectorNetwork({name: len(values) for name, values in ATTRIBUTES.items()})
    remedy = "train one by 'fewstep teacher detector --export FILE'"
    if not path.is_file():
        raise ValueError(f"The detector's weights {path} are missing: {remedy}.")
    try:
        network.load_state_dict({name: t.float() for name, t in load_file(path).items()})
    except (SafetensorError, RuntimeError):
        raise ValueError(f"The file {path} does not hold a detector's weights: {remedy}.") from None
    return Detector(network.to(device, memory_format=torch.channels_last))  # type: ignore[call-overload]


# ---------------------------------------------------------------- from cells to things


def _rows(cells: dict[str, Tensor]) -> Iterable[dict[str, Tensor]]:
    """The network's output for each image, with ``near`` as probabilities of peaks."""
    cells = {name: t.float().cpu() for name, t in cells.items()}
    cells["near"] = _peaks(cells["near"].sigmoid())
    return ({name: t[i] for name, t in cells.items()} for i in range(len(cells["near"])))


def _peaks(near: Tensor) -> Tensor:
    """``near`` [N, 16, 16] where it is the highest of its 3x3 neighbourhood, else 0."""
    highest = F.max_pool2d(near[:, None], 3, stride=1, padding=1)[:, 0]
    return torch.where(near == highest, near, 0.0)


def _things(cells: dict[str, Tensor]) -> list[Found]:
    """The things in one image; of two detections of the same thing the surer one is kept."""
    things: list[Found] = []
    rows, columns = (cells["near"] >= THRESHOLD).nonzero(as_tuple=True)
    order = cells["near"][rows, columns].argsort(descending=True, stable=True)
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        thing = _thing({name: t[row, column] for name, t in cells.items()}, row, column)
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


def matched(found: Sequence[Found], scene: Scene) -> list[tuple[Mention, Found | None]]:
    """Each thing that ``scene``'s caption mentions ("two red triangles" are two), and the found one that stands for it.

    As many statements as possible are right; ties prefer right shapes to right colours, right colours to right fills,
    and so on.
    """
    slots = [mention for mention in scene.mentions for _ in mention.things]
    return list(zip(slots, _assign(slots, found), strict=True))


def judge(found: Sequence[Found], scene: Scene) -> Judgement:
    """Compare the things found in an image with the statements of ``scene``'s caption.

    They are `matched`; all statements about a thing without a partner are wrong.
    """
    pairs = matched(found, scene)
    counts: dict[str, tuple[int, int]] = {}
    if scene.count is not None:
        counts["number"] = (int(len(found) == scene.count), 1)
    for mention, partner in pairs:
        for name, right in _holds(mention, partner).items():
            old = counts.get(name, (0, 0))
            counts[name] = (old[0] + right, old[1] + 1)
    everything = all(right == stated for right, stated in counts.values()) and all(thing for _, thing in pairs)
    return Judgement(counts, everything, bool(counts or pairs))


def _holds(mention: Mention, thing: Found | None) -> dict[str, bool]:
    """For each attribute that ``mention`` states, whether it holds for ``thing``."""
    stated = {name: value for name in (*ATTRIBUTES, "place") if (value := getattr(mention, name)) is not None}
    if thing is None:
        return dict.fromkeys(stated, False)
    return {n: thing.lies(value) if n == "place" else getattr(thing, n) == value for n, value in stated.items()}


def _assign(slots: Sequence[Mention], found: Sequence[Found]) -> list[Found | None]:
    """A different found thing for each slot, or None where there are too few.

    The best assignment fills the most slots, then has the most right statements, then the most right shapes, colours,
    ... (lexicographic order). Scenes have at most four things, so all assignments are tried.
    """
    order = (*ATTRIBUTES, "place")

    def value(slot: int, thing: int) -> tuple[int, ...]:
        holds = _holds(slots[slot], found[thing])
        return (1, sum(holds.values()), *(int(holds.get(name, False)) for name in order))

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


def judge_of(detector: Detector, scenes: Sequence[Scene]) -> Judge:
    """The judge of images [N, 3, 64, 64] in [0, 1], of which image i was generated from the caption of scene i.

    It raises ValueError when there are not as many images as scenes.
    """

    def judged(images: Tensor) -> list[Judgement]:
        if len(images) != len(scenes):
            raise ValueError(f"{len(images)} images cannot be compared with {len(scenes)} captions.")
        return [judge(found, scene) for found, scene in zip(detector.detect(images), scenes, strict=True)]

    return judged


# ---------------------------------------------------------------- over many images


@dataclass(frozen=True)
class Accuracy:
    """Prompt accuracy of a set of images.

    Attributes:
        counts: per attribute of `JUDGED`: (how often right, how often stated).
        all_right: (images in which everything stated holds, images whose caption states something).
        images: how many there are.
    """

    counts: dict[str, tuple[int, int]]
    all_right: tuple[int, int]
    images: int

    @property
    def share(self) -> dict[str, float]:
        """Share of right statements per attribute, and of images for ``all``; attributes never stated are left out."""
        rows = {**self.counts, "all": self.all_right}
        return {name: right / stated for name, (right, stated) in rows.items() if stated}


def prompt_accuracy(detector: Detector, images: Tensor, scenes: Sequence[Scene]) -> Accuracy:
    """Prompt accuracy of images [N, 3, 64, 64] in [0, 1], each compared with the caption of its scene.

    Raises:
        ValueError: there are not as many images as scenes.
    """
    judged = judge_of(detector, scenes)(images)
    counts = {}
    for name in JUDGED:
        pairs = [j.counts[name] for j in judged if name in j.counts]
        counts[name] = (sum(right for right, _ in pairs), sum(stated for _, stated in pairs))
    stating = [j for j in judged if j.stated]
    return Accuracy(counts, (sum(j.all_right for j in stating), len(stating)), len(judged))
