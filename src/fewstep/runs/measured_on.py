"""What a recipe's students are measured on: prompts, reference images, features and further figures.

scenes-64 brings a prompt set of its own. For every other teacher the recipe's section ``evaluate`` decides: by default
the captions that are held out of training, and the teacher's own images of these as the reference, so that quality can
be measured without any data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.entries import Skipped, attempt
from fewstep.data.find import FEWEST, Place, find_captions, held_out_captions, held_out_images
from fewstep.data.folder import uncaptioned_images
from fewstep.data.images import pixels
from fewstep.data.pairs import noise_of
from fewstep.evaluation.measured import Features, Reference
from fewstep.evaluation.prompt_set import PromptSet
from fewstep.models.encoders import load_pretrained_encoder
from fewstep.models.families import Teacher
from fewstep.models.imagenet import ImageNetEncoder, load_imagenet_encoder
from fewstep.models.rewards import open_reward
from fewstep.recipe.schema import EvaluateConfig, PairsConfig, Recipe
from fewstep.recipe.validate import RecipeError
from fewstep.runs.folder import RunFolder
from fewstep.runs.teacher_samples import TeacherSampling, folder_for
from fewstep.scenes64.prompts import unseen_captions, unseen_prompts

NOISE = 2**62
"""Seed of the noise behind every image that is measured, the same for all runs.

It is none that `pairs.seed` has by itself: a student must not be measured from noises whose images it has learnt.
"""
_SIDE = 64
"""The detector of scenes-64 sees images of this side alone."""
_ROWS = 8  # reference images in a file, generated at once
_FIGURES = {"clip": "CLIP score", "pickscore": "PickScore", "aesthetic": "aesthetic"}


def measures_scenes(recipe: Recipe, side: int) -> bool:
    """Whether students are measured on scenes-64's own prompts, by its detector, at this side of the images."""
    evaluate = recipe.evaluate
    return recipe.data.path is None and not (evaluate.prompts or evaluate.reference) and side == _SIDE


def evaluation_captions(recipe: Recipe, count: int | None = None) -> list[str]:
    """The prompts that students of ``recipe`` are measured on, at most ``count`` (the recipe's own number).

    A run that held nothing out of training is measured on captions that it was trained on.

    Raises:
        ValueError: one sentence when there are too few.
    """
    evaluate, data = recipe.evaluate, recipe.data
    count = count or evaluate.count
    if evaluate.prompts:
        return list(find_captions(Place("prompts", evaluate.prompts), count))
    if data.place is None:
        return unseen_captions(count)
    place = recipe.place
    assert place is not None
    found = held_out_captions(place, data.size) if place.held_out else find_captions(place, data.size)
    return list(found[:count])


def prompt_set(
    recipe: Recipe, teacher: Teacher, folder: RunFolder, count: int | None = None, show_progress: bool = False
) -> PromptSet:
    """Everything that images of ``recipe``'s students are measured by.

    Args:
        teacher: the model whose images are the reference, and whose autoencoder all images pass.
        folder: of the run; the teacher's images are kept in it, or in ``evaluate.path``.

    Raises:
        ValueError: one sentence, where images, networks or prompts are missing.
    """
    if measures_scenes(recipe, teacher.image_size):
        return unseen_prompts(teacher, count or recipe.evaluate.count)
    evaluate, device = recipe.evaluate, recipe.training.device
    captions = evaluation_captions(recipe, count)
    features = open_features(evaluate.features or "imagenet", device)
    scores = {figure: partial(score, captions=captions) for figure, score in _scores(evaluate, device).items()}
    noise = torch.stack([noise_of(NOISE, i, teacher.latent_shape) for i in range(len(captions))])
    perceptual = _perceptual(features, device) if "perceptual" in evaluate.metrics else None
    if (evaluate.reference or "teacher") == "teacher":
        images = teacher_images(recipe, teacher, folder, captions, show_progress)
        reference = Reference.of_batches(images.split(_ROWS), features)
        return PromptSet(
            captions, features, reference, noise=noise, teacher=images, scores=scores, perceptual=perceptual,
            about=_in_words(recipe),
        )  # fmt: skip
    if perceptual is not None:
        raise RecipeError("evaluate.metrics: perceptual is a distance to the teacher's images: set reference: teacher.")
    reference = Reference.of_batches(_real_images(recipe, teacher), features)
    return PromptSet(captions, features, reference, noise=noise, scores=scores, about=_in_words(recipe))


def _in_words(recipe: Recipe) -> str:
    """The prompts and the reference of a recipe's own prompt set."""
    evaluate, place = recipe.evaluate, recipe.place
    prompts = "captions held out of training" if place is not None and place.held_out else "captions trained on"
    if evaluate.prompts or place is None:
        prompts = f"prompts of {Path(evaluate.prompts).name}" if evaluate.prompts else "captions of unseen scenes"
    against = {"data": "held-out images", "teacher": "the teacher's images of the same prompts and noise"}
    reference = evaluate.reference or "teacher"
    return f"{prompts}, against {against.get(reference, f'the images of {Path(reference).name}')}"


def teacher_images(
    recipe: Recipe, teacher: Teacher, folder: RunFolder, captions: list[str], show_progress: bool = False
) -> Tensor:
    """The teacher's images at its full number of steps, from the noise that students start from; made once and kept.

    Returns:
        [N, 3, H, W] in [0, 1], on the host.
    """
    shown, evaluate = recipe.sample, recipe.evaluate
    settings = PairsConfig(
        size=len(captions), num_inference_steps=shown.teacher_steps, guidance_scale=shown.guidance_scale, seed=NOISE,
        batch_size=_ROWS,
    )  # fmt: skip
    sampling = TeacherSampling(teacher, teacher.denoiser, settings, captions, recipe.training.device)
    shared = folder.reference if evaluate.path is None else Path(evaluate.path)
    latents = sampling.load(sampling.files(folder_for(shared, "teacher", sampling.about())), show_progress).mean
    return torch.cat([teacher.decode(part.float()).cpu() for part in latents.split(_ROWS)])


def open_features(name: str, device: str = "cpu") -> Features:
    """``imagenet``, or DINOv2, CLIP, SigLIP or the like from a folder or a hub name.

    Raises:
        ValueError: one sentence when it is not there.
    """
    return load_imagenet_encoder(device) if name == "imagenet" else load_pretrained_encoder(name, device)


def _perceptual(features: Features, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The perceptual distance of the ImageNet network, loaded once where it also gives the features."""
    return (features if isinstance(features, ImageNetEncoder) else load_imagenet_encoder(device)).distance


def _scores(evaluate: EvaluateConfig, device: str) -> dict[str, Callable[..., Tensor]]:
    """Reward models that only measure, by the name of their figure."""
    found = {}
    for name in evaluate.metrics:
        if name == "perceptual":
            continue
        kind = name.partition(":")[0]
        if kind not in _FIGURES:
            known = ", ".join(["perceptual", *_FIGURES])
            raise RecipeError(f"evaluate.metrics: there is no figure '{name}': use {known}.")
        reward = open_reward(name, device, measures=True)

        @torch.no_grad()
        def score(images: Tensor, captions: list[str], rate: Callable[..., Tensor] = reward) -> Tensor:
            parts = zip(images.split(_ROWS), range(0, len(captions), _ROWS), strict=True)
            return torch.cat([rate(part.to(device) * 2 - 1, captions[i : i + _ROWS]).cpu() for part, i in parts])

        found[_FIGURES[kind]] = score
    return found


def _real_images(recipe: Recipe, teacher: Teacher) -> Iterator[Tensor]:
    """Batches of the reference images, cropped as in training and as the teacher's autoencoder reproduces them."""
    side, evaluate = teacher.image_size, recipe.evaluate
    if evaluate.reference == "data":
        if recipe.place is None or recipe.data.source == "prompts":
            raise RecipeError("evaluate.reference: the data hold no images: give a folder, or set it to teacher.")
        found = held_out_images(recipe.place, recipe.data.size).images
    else:
        found = uncaptioned_images(Path(str(evaluate.reference)))
    if len(found) < FEWEST:
        raise RecipeError(f"evaluate.reference: {len(found)} images are too few to measure on: give {FEWEST} or more.")
    for first in range(0, len(found), _ROWS):
        read = [attempt(image.name, pixels, image, lambda h, w: (side, side)) for image in found[first : first + _ROWS]]
        kept = [entry for entry in read if not isinstance(entry, Skipped)]
        if kept:
            mean, _ = teacher.encode_images(torch.stack(kept).float() / 127.5 - 1)
            yield teacher.decode(mean).cpu()
