"""Teacher against student on unseen prompts: the same noise, the same captions, the same figures for every way."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from fewstep.data.scenes import Scenes
from fewstep.evaluation.grids import image_grid
from fewstep.evaluation.metrics import Moments, detail_features, frechet_distance
from fewstep.evaluation.reader import Reader, prompt_accuracy
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import Teacher
from fewstep.sampling import Sampler, sample

UNSEEN = 3
"""The set of scenes that nothing is trained on."""


@dataclass
class Way:
    """One way to make pictures: a model, its sampler, its guidance."""

    label: str
    denoiser: Denoiser
    sampler: Sampler
    guidance_scale: float = 1.0
    guidance_embed: float | None = None


@dataclass
class Outcome:
    """What a way gave.

    Attributes:
        label: its name. pictures: [N, 3, H, W] in [0, 1].
        figures: name -> value, in the order of `FIGURES`.
    """

    label: str
    pictures: Tensor
    figures: dict[str, float] = field(default_factory=dict)


FIGURES = {
    "evaluations": "network evaluations per picture, both branches of guidance counted",
    "ms": "milliseconds of sampling per picture, decoding apart",
    "FD": "Frechet distance of the reader's features to real scenes",
    "detail FD": "Frechet distance of 8x8 patches to real scenes",
    "accuracy": "share of pictures that show everything their caption states, by the reader",
    "to first": "root mean square pixel difference to the first row, same noise",
}
"""What is measured of each way; real scenes are seen through the teacher's autoencoder, and are as many."""


def compare(
    teacher: Teacher,
    ways: Sequence[Way],
    count: int,
    seed: int = 0,
    reader: Reader | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """Sample ``count`` unseen captions in every way from the same noise.

    Args:
        reader: without it FD and accuracy are left out.
        advance: called with the number of ways done.
    """
    scenes = Scenes(UNSEEN, size=teacher.image_size)
    asked = [scenes.scene(i) for i in range(count)]
    cond = teacher.encode_prompts([scene.caption for scene in asked])
    noise = torch.randn(count, *teacher.latent_shape, generator=torch.Generator().manual_seed(seed))
    noise = noise.to(cond["prompt_embeds"].device)
    real = _real(teacher, scenes, range(count, 2 * count))
    real_detail = Moments.of(detail_features(real))
    real_features = None if reader is None else Moments.of(reader.features(real))
    outcomes: list[Outcome] = []
    for i, way in enumerate(ways):
        before, started = way.denoiser.cost.evaluations, time.perf_counter()
        latents = _sample(way, noise, cond, seed)
        seconds = time.perf_counter() - started
        pictures = teacher.decode(latents).cpu()
        figures = {"evaluations": (way.denoiser.cost.evaluations - before) / count, "ms": 1000 * seconds / count}
        if reader is not None and real_features is not None:
            figures["FD"] = frechet_distance(Moments.of(reader.features(pictures)), real_features)
        figures["detail FD"] = frechet_distance(Moments.of(detail_features(pictures)), real_detail)
        if reader is not None:
            figures["accuracy"] = prompt_accuracy(reader, pictures, asked).share["all"]
        first = outcomes[0].pictures if outcomes else pictures
        figures["to first"] = float((pictures - first).square().mean().sqrt())
        outcomes.append(Outcome(way.label, pictures, figures))
        if advance is not None:
            advance(i + 1)
    return outcomes


def table(outcomes: Sequence[Outcome], count: int) -> str:
    """The figures in columns, and a line for each that says what it is."""
    names = list(outcomes[0].figures)
    width = max(len(o.label) for o in outcomes)
    lines = [" " * width + "".join(f"{name:>13}" for name in names)]
    lines += [f"{o.label:{width}}" + "".join(f"{o.figures[n]:13.4g}" for n in names) for o in outcomes]
    lines += ["", f"Over {count} unseen prompts:", *(f"  {name}: {FIGURES[name]}" for name in names)]
    return "\n".join(lines)


def picture(outcomes: Sequence[Outcome], columns: int = 8) -> Image.Image:
    """A row for each way, the first ``columns`` pictures with their captions."""
    captions = [Scenes(UNSEEN).scene(i).caption for i in range(columns)]
    return image_grid([o.pictures[:columns] for o in outcomes], [o.label for o in outcomes], captions)


def as_json(outcomes: Sequence[Outcome], count: int, seed: int) -> str:
    """The figures for programs."""
    figures = {"pictures": count, "seed": seed, "ways": {o.label: o.figures for o in outcomes}}
    return json.dumps(figures, indent=1) + "\n"


def _sample(way: Way, noise: Tensor, cond: Cond, seed: int, batch: int = 64) -> Tensor:
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


def _real(teacher: Teacher, scenes: Scenes, indices: range) -> Tensor:
    """Scenes encoded and decoded: what a perfect generator of latents would show."""
    images = torch.from_numpy(scenes.render(indices).images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.cat([teacher.decode(teacher.encode_images(part)[0]).cpu() for part in images.split(64)])
