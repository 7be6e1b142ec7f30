"""The prompt set of scenes-64: captions that no recipe trains on, real scenes, and the detector as judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fewstep.evaluation.compare import Candidate, compare
from fewstep.evaluation.measured import Reference
from fewstep.evaluation.prompt_set import PromptSet
from fewstep.evaluation.result import Comparison
from fewstep.models.families import Teacher, load_teacher
from fewstep.sampling import DDIMSampler
from fewstep.scenes64.detector import judge_of, load_detector
from fewstep.scenes64.scenes import Scenes
from fewstep.scenes64.scenes.caption import DEFAULT_STATED

UNSEEN = 3
"""Seed of the set of scenes that nothing is trained on."""
ASSET = Path(__file__).parent.parent / "assets" / "reference.safetensors"
REFERENCE_FIRST, REFERENCE_SCENES = 10_000, 2000
"""Number of the first scene of the shipped statistics, and how many scenes they are computed from."""
STEPS = (50, 8, 4)
"""Steps of `measure_teacher`."""


def unseen_prompts(teacher: Teacher, count: int, stated: float = DEFAULT_STATED) -> PromptSet:
    """The captions of the first ``count`` unseen scenes, with all that is needed to measure images of them.

    Args:
        stated: share of the attributes of what they name that they state.
    """
    scenes, detector = [Scenes(UNSEEN).scene(i, stated=stated) for i in range(count)], load_detector()
    return PromptSet(
        captions=[scene.caption for scene in scenes],
        features=detector.features,
        reference=reference_of(teacher),
        about="captions of unseen scenes, against real scenes",
        judge=judge_of(detector, scenes),
        real=lambda numbers: real_images(teacher, numbers),
    )


def unseen_captions(count: int) -> list[str]:
    """The captions of the first ``count`` unseen scenes."""
    return [Scenes(UNSEEN).scene(i).caption for i in range(count)]


def real_images(teacher: Teacher, numbers: range) -> Tensor:
    """Unseen scenes, encoded and decoded: the images of a perfect generator of latents, [n, 3, H, W] in [0, 1]."""
    rendered = Scenes(UNSEEN, size=teacher.image_size).render(numbers).images
    images = torch.from_numpy(rendered).permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.cat([teacher.decode(teacher.encode_images(part)[0]).cpu() for part in images.split(64)])


def reference_of(teacher: Teacher) -> Reference | None:
    """The shipped statistics for the shipped model; None for all others, whose autoencoders differ."""
    return Reference.load(ASSET) if teacher.name == "scenes-64" and ASSET.is_file() else None


def make_reference(teacher: Teacher, path: Path, count: int = REFERENCE_SCENES) -> Reference:
    """Statistics of real scenes through ``teacher``'s autoencoder, written to ``path``."""
    images = real_images(teacher, range(REFERENCE_FIRST, REFERENCE_FIRST + count))
    Reference.of(images, load_detector().features).save(path, {"scenes": str(count), "seed": str(UNSEEN)})
    return Reference.load(path)


def measure_teacher(
    name: str,
    count: int,
    guidance_scales: Sequence[float],
    seed: int = 0,
    path: Path | None = None,
    advance: Callable[[int], None] | None = None,
    stated: float = DEFAULT_STATED,
) -> Comparison:
    """The teacher at 50, 8 and 4 steps of DDIM and at every guidance scale, on the same prompts and noise.

    Args:
        path: file for new statistics of real scenes, which then serve as the reference.
        stated: share of the attributes that the prompts state.
    """
    teacher = load_teacher(name)
    prompts = unseen_prompts(teacher, count, stated)
    if path is not None:
        prompts = replace(prompts, reference=make_reference(teacher, path))
    candidates = [
        Candidate(f"guidance {scale:g}", teacher.denoiser, DDIMSampler(num_inference_steps=steps), scale)
        for scale in guidance_scales
        for steps in STEPS
    ]
    return compare(teacher, candidates, prompts, seed, advance)


def recommended_guidance(comparison: Comparison) -> float:
    """The scale of lowest FD among those whose accuracy at full steps is within one point of the best."""
    full = [r for r in comparison.results if r.steps == STEPS[0]]
    best = max(r.figures["accuracy"] for r in full)
    good = [r for r in full if r.figures["accuracy"] >= best - 0.01]
    return float(min(good, key=lambda r: r.figures["FD"]).facts["guidance_scale"])
