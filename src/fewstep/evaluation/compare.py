"""Teacher against student on unseen prompts: the same noise, the same captions, the same figures for every way."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from fewstep.evaluation.grids import image_grid
from fewstep.evaluation.measured import Features, Measured, Reference, gap_closed, interval
from fewstep.evaluation.metrics import Moments, frechet_distance, spread
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import Teacher
from fewstep.sampling import Sampler, sample
from fewstep.scenes64.detector import Detector, load_detector
from fewstep.scenes64.scenes import Scene, Scenes

UNSEEN = 3
"""The set of scenes that nothing is trained on."""


@dataclass
class Candidate:
    """One way to make pictures: a model, its sampler, its guidance."""

    label: str
    denoiser: Denoiser
    sampler: Sampler
    guidance_scale: float = 1.0
    guidance_embed: float | None = None


@dataclass
class Result:
    """What a way gave.

    Attributes:
        label: its name. pictures: [N, 3, H, W] in [0, 1].
        figures: name -> value, in the order of `FIGURES`; intervals: 95 %, of those that have one.
        resampled: the same over resamplings that all ways share; differences and ratios are taken one by one.
    """

    label: str
    pictures: Tensor
    figures: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    resampled: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Comparison:
    """All ways, and what is needed to judge their figures.

    Attributes:
        outcomes: in the order of the ways; count: pictures of each; seed: of the noise.
        floors: FD and detail FD of as many real scenes, other ones than the reference's: nothing can do better.
    """

    outcomes: list[Result]
    count: int
    seed: int
    floors: dict[str, float]

    def closed(self, figure: str, few: int, many: int, student: int) -> tuple[float, tuple[float, float]] | None:
        """Part of the loss from outcome ``many`` to ``few`` that ``student`` does not have, with its 95 % interval.

        None where there is no loss to speak of: the interval of the teacher's own loss holds 0.
        """
        return gap_closed_by(figure, self.outcomes[few], self.outcomes[many], self.outcomes[student])

    def better_by(self, figure: str, way: int, than: int) -> tuple[float, tuple[float, float]]:
        """By how much outcome ``way`` is lower than ``than``, on the same prompts and noise, with its 95 % interval."""
        return lower_by(figure, self.outcomes[way], self.outcomes[than])


class Figures(Protocol):
    """Figures with their resamplings, the same draws for all: an `Result`, or one that was kept."""

    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    resampled: dict[str, Tensor]


def gap_closed_by(
    figure: str, few: Figures, many: Figures, student: Figures
) -> tuple[float, tuple[float, float]] | None:
    """`Comparison.closed` of three sets of figures."""
    picked = (few, many, student)
    if float((few.resampled[figure] - many.resampled[figure]).quantile(0.025)) <= 0:
        return None
    plain = gap_closed(*(torch.tensor(each.figures[figure], dtype=torch.float64) for each in picked))
    return float(plain), interval(gap_closed(*(each.resampled[figure] for each in picked)), float(plain))


def lower_by(figure: str, ours: Figures, theirs: Figures) -> tuple[float, tuple[float, float]]:
    """`Comparison.better_by` of two sets of figures."""
    better = theirs.figures[figure] - ours.figures[figure]
    return better, interval(theirs.resampled[figure] - ours.resampled[figure], better)


FIGURES = {
    "evaluations": "network evaluations per picture, both branches of guidance counted",
    "ms": "milliseconds of sampling per picture, decoding apart",
    "FD": "Frechet distance of features (the reader's, unless others were asked for) to real scenes",
    "KID": "unbiased kernel distance of the same features",
    "detail FD": "Frechet distance of 8x8 patches to real scenes",
    "accuracy": "share of pictures that show everything their caption states, by the reader",
    "precision": "share of pictures that lie among real ones",
    "recall": "share of real scenes that lie among the pictures",
    "density": "how many real neighbourhoods a picture lies in, 1 for equals",
    "coverage": "share of real neighbourhoods that hold a picture",
    "spread": "mean distance of two pictures of one prompt, in features",
    "to first": "root mean square pixel difference to the first row, same noise",
}
"""What is measured of each way; real scenes are seen through the teacher's autoencoder."""

SHORT = ("evaluations", "ms", "FD", "detail FD", "accuracy", "to first")
"""What the table in a terminal shows."""


def compare(
    teacher: Teacher,
    ways: Sequence[Candidate],
    count: int,
    seed: int = 0,
    reader: Detector | None = None,
    advance: Callable[[int], None] | None = None,
    reference: Reference | None = None,
    per_prompt: int = 0,
    features: Features | None = None,
    floors: bool = True,
) -> Comparison:
    """Sample ``count`` unseen captions in every way from the same noise.

    Args:
        reader: gives accuracy, and features too (by default the one that ships).
        advance: called with the number of ways done.
        reference: real scenes (by default ``count`` others, made on the spot).
        features: other ones than the reader's, e.g. `fewstep.models.encoders.load_pretrained_encoder`; a given
            reference must be of the same.
        floors: whether to measure as many real scenes too.
        per_prompt: that many more pictures of each of the first 16 prompts, for their spread; 0 leaves it out.
    """
    reader = reader or load_detector()
    features = features or reader.features
    scenes = Scenes(UNSEEN, size=teacher.image_size)
    asked, cond, noise = eval_inputs(teacher, count, seed)
    real = reference or Reference.of(real_pictures(teacher, scenes, range(count, 2 * count)), features)
    lowest = _floors(real_pictures(teacher, scenes, range(2 * count, 3 * count)), real, features) if floors else {}
    outcomes: list[Result] = []
    for i, way in enumerate(ways):
        before, started = way.denoiser.cost.evaluations, time.perf_counter()
        latents = sample_candidate(way, noise, cond, seed)
        seconds = time.perf_counter() - started
        pictures = teacher.decode(latents).cpu()
        figures = {"evaluations": (way.denoiser.cost.evaluations - before) / count, "ms": 1000 * seconds / count}
        measured = Measured.of(pictures, asked, features, reader)
        figures |= measured.figures(real)
        if per_prompt:
            figures["spread"] = _spread(teacher, way, cond[: min(16, count)], per_prompt, seed, features)
        first = outcomes[0].pictures if outcomes else pictures
        figures["to first"] = float((pictures - first).square().mean().sqrt())
        resampled = measured.resampled(real)
        intervals = {name: interval(values, figures[name]) for name, values in resampled.items()}
        outcomes.append(Result(way.label, pictures, figures, intervals, resampled))
        if advance is not None:
            advance(i + 1)
    return Comparison(outcomes, count, seed, lowest)


def _floors(pictures: Tensor, real: Reference, features: Features) -> dict[str, float]:
    """What other real scenes measure: nothing can do better."""
    others = Reference.of(pictures, features)
    return {
        "FD": frechet_distance(Moments.of(others.features), Moments.of(real.features)),
        "detail FD": frechet_distance(others.detail, real.detail),
    }


def table(comparison: Comparison, names: Sequence[str] = SHORT) -> str:
    """The figures in columns, 95 % intervals beside them, and a line for each that says what it is."""
    outcomes = comparison.outcomes
    names = [name for name in names if name in outcomes[0].figures]
    rows = [["", *names], *([o.label, *(cell(o, name) for name in names)] for o in outcomes)]
    rows.append(["real scenes", *(f"{comparison.floors[n]:.3g}" if n in comparison.floors else "" for n in names)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
             for row in rows]  # fmt: skip
    lines += ["", f"Over {comparison.count} unseen prompts, 95 % intervals in brackets; lower FD is better:"]
    return "\n".join([line.rstrip() for line in lines] + [f"  {n}: {FIGURES[n]}" for n in names if n in FIGURES])


def cell(found: Figures, name: str) -> str:
    """A figure with its interval, if it has one."""
    value = f"{found.figures[name]:.3g}"
    if name not in found.intervals:
        return value
    low, high = found.intervals[name]
    return f"{value} [{low:.3g}, {high:.3g}]"


def picture(comparison: Comparison, columns: int = 8) -> Image.Image:
    """A row for each way, the first ``columns`` pictures with their captions."""
    outcomes = comparison.outcomes
    captions = [Scenes(UNSEEN).scene(i).caption for i in range(min(columns, comparison.count))]
    return image_grid([o.pictures[:columns] for o in outcomes], [o.label for o in outcomes], captions)


def as_json(comparison: Comparison) -> str:
    """The figures for programs."""
    ways = {o.label: {**o.figures, "intervals": o.intervals} for o in comparison.outcomes}
    figures = {"pictures": comparison.count, "seed": comparison.seed, "real": comparison.floors, "ways": ways}
    return json.dumps(figures, indent=1) + "\n"


def _spread(teacher: Teacher, way: Candidate, cond: Cond, per_prompt: int, seed: int, features: Features) -> float:
    """Diversity within prompts, each drawn ``per_prompt`` times from noise of its own."""
    rows = torch.arange(len(cond)).repeat_interleave(per_prompt)
    generator = torch.Generator().manual_seed(seed + 10**6)
    noise = torch.randn(len(rows), *teacher.latent_shape, generator=generator).to(cond["prompt_embeds"].device)
    pictures = teacher.decode(sample_candidate(way, noise, cond[rows], seed)).cpu()
    return spread(features(pictures), per_prompt)


def unseen(count: int) -> list[Scene]:
    """The first ``count`` scenes that no recipe trains on."""
    scenes = Scenes(UNSEEN)
    return [scenes.scene(i) for i in range(count)]


def eval_inputs(teacher: Teacher, count: int, seed: int) -> tuple[list[Scene], Cond, Tensor]:
    """The first ``count`` unseen scenes, their captions as a condition, and the noise of ``seed`` to start from."""
    asked = unseen(count)
    cond = teacher.encode_prompts([scene.caption for scene in asked])
    noise = torch.randn(count, *teacher.latent_shape, generator=torch.Generator().manual_seed(seed))
    return asked, cond, noise.to(cond["prompt_embeds"].device)


def sample_candidate(way: Candidate, noise: Tensor, cond: Cond, seed: int, batch: int = 64) -> Tensor:
    """All pictures' latents; each batch has its own stream, so a picture does not depend on how many follow it."""
    parts = []
    for first in range(0, len(noise), batch):
        rows = slice(first, first + batch)
        run = sample(
            way.denoiser,
            way.sampler,
            noise[rows],
            cond[rows],
            way.guidance_scale,
            guidance_embed=way.guidance_embed,
            generator=torch.Generator().manual_seed(seed + 1 + first),
        )
        parts.append(run.x0)
    return torch.cat(parts)


def real_pictures(teacher: Teacher, scenes: Scenes, indices: range) -> Tensor:
    """Scenes encoded and decoded: what a perfect generator of latents would show."""
    images = torch.from_numpy(scenes.render(indices).images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.cat([teacher.decode(teacher.encode_images(part)[0]).cpu() for part in images.split(64)])
