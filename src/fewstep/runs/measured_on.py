"""What a recipe's students are measured on: prompts, reference images, features and further figures.

scenes-64 brings a prompt set of its own. For every other teacher the recipe's section ``evaluate`` decides: by default
the captions that are held out of training, and the teacher's own images of these as the reference, so that quality can
be measured without any data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.find import Place, find_captions, held_out_captions
from fewstep.data.pairs import noise_of
from fewstep.evaluation.measured import Features, Reference, Score
from fewstep.evaluation.prompt_set import PromptSet
from fewstep.models.encoders import load_pretrained_encoder
from fewstep.models.families import Teacher
from fewstep.models.imagenet import BATCH_SIZE, ImageNetEncoder, apart, load_imagenet_encoder, published_weights
from fewstep.models.rewards import open_reward
from fewstep.planning.validating import Measuring, Seen
from fewstep.recipe.schema import EvaluateConfig, PairsConfig, Recipe
from fewstep.recipe.validate import RecipeError
from fewstep.runs.first_teacher import students_behind
from fewstep.runs.folder import RunFolder
from fewstep.runs.reference_images import ROWS, check_readable, enough, real_images, reference_images
from fewstep.runs.teacher_samples import TeacherSampling, folder_for
from fewstep.scenes64.architecture import IMAGE_SIZE
from fewstep.scenes64.prompts import unseen_captions, unseen_prompts
from fewstep.students.card import Card
from fewstep.training import distributed

NOISE = 2**62
"""Seed of the noise behind every image that is measured, the same for all runs.

It is none that `pairs.seed` has by itself: a student must not be measured from noises whose images it has learnt.
"""
HELD_OUT = "captions held out of training"
_FIGURES = {"clip": "CLIP score", "pickscore": "PickScore", "aesthetic": "aesthetic"}


def measures_scenes(recipe: Recipe, side: int) -> bool:
    """Whether students are measured on scenes-64's own prompts, by its detector, which sees one ``side`` alone."""
    evaluate = recipe.evaluate
    return recipe.data.path is None and not (evaluate.prompts or evaluate.reference) and side == IMAGE_SIZE


def needs_teacher_images(recipe: Recipe, side: int) -> bool:
    """Whether students, images of ``side`` x ``side`` pixels, are measured against images of their teacher."""
    return not measures_scenes(recipe, side) and _against_teacher(recipe.evaluate)


def evaluation_captions(recipe: Recipe, count: int | None = None) -> list[str]:
    """The prompts that students of ``recipe`` are measured on, at most ``count`` (the recipe's own number).

    A run that held nothing out of training is measured on captions that it was trained on.

    Raises:
        ValueError: one sentence when there are too few.
    """
    found = _captions(recipe, recipe.evaluate.count if count is None else count)
    enough("evaluate", len(found), "prompts")
    return found


def _captions(recipe: Recipe, count: int) -> list[str]:
    evaluate, data, place = recipe.evaluate, recipe.data, recipe.place
    if evaluate.prompts:
        try:
            return list(find_captions(Place("prompts", evaluate.prompts), count))
        except ValueError as error:
            raise ValueError(f"evaluate.prompts: {str(error).removeprefix('data.path: ')}") from None
    if place is None:
        return unseen_captions(count)
    if data.stream:
        raise RecipeError("evaluate: the captions of a stream are not listed: give a file of prompts.")
    found = held_out_captions(place, data.size) if place.held_out else find_captions(place, data.size)
    return list(found[:count])


def check_measured(recipe: Recipe) -> None:
    """Refuse before any training what the students of ``recipe`` could not be measured on.

    Raises:
        ValueError: one sentence, where prompts, captions or reference images are missing, or a figure is unknown.
    """
    evaluate = recipe.evaluate
    if not evaluate.every:
        return
    if recipe.place is not None or evaluate.prompts:
        evaluation_captions(recipe)
    if evaluate.path is not None and Path(evaluate.path).is_file():
        raise RecipeError(f"evaluate.path: {evaluate.path} is a file, and a folder is needed: choose another one.")
    against_teacher = _against_teacher(evaluate)
    _check_figures(evaluate, against_teacher)
    if not against_teacher:
        check_readable(reference_images(recipe), recipe.teacher.size or IMAGE_SIZE)


def check_networks(recipes: Iterable[Recipe], device: str = "cpu") -> None:
    """Load each network that students of ``recipes`` are measured by and drop it, before anything else is done.

    Args:
        device: on "meta" configs and tokenizers are read, and no weights.

    Raises:
        RecipeError: one sentence, where a network cannot be loaded.
    """
    wanted: dict[tuple[str, str], None] = {}
    for recipe in recipes:
        evaluate = recipe.evaluate
        if evaluate.every and distributed.first():
            by_default = "" if measures_scenes(recipe, recipe.teacher.size or IMAGE_SIZE) else "imagenet"
            wanted["features", evaluate.features or by_default] = None
            wanted |= {("metrics", name): None for name in evaluate.metrics}
    for key, name in wanted:
        try:
            if name in ("imagenet", "perceptual"):
                published_weights()
            elif key == "features" and name:
                open_features(name, device)
            elif name:
                open_reward(name, device, measures=True)
        except ValueError as error:
            raise RecipeError(f"evaluate.{key}: {error}") from None


def measuring_of(recipe: Recipe, side: int, card: Card) -> Measuring:
    """Validation as the memory plan counts it; networks that are not on this machine are left out.

    Args:
        side: of the images. card: of the student, which says how it is sampled.
    """
    evaluate, scenes = recipe.evaluate, measures_scenes(recipe, side)
    wanted = [*evaluate.metrics, evaluate.features or ("" if scenes else "imagenet")]
    seen = []
    for name in filter(None, wanted):
        try:
            seen.append(_seen_by(name, rates=name in evaluate.metrics))
        except ValueError:
            continue
    paired = not scenes and _against_teacher(evaluate)
    return Measuring(evaluate.count, card.num_inference_steps, card.guidance_scale, tuple(seen), paired)


@cache
def _imagenet_on_meta() -> ImageNetEncoder:
    """One network for features and the perceptual distance."""
    return load_imagenet_encoder("meta")


def _seen_by(name: str, rates: bool) -> Seen:
    """A network that measures, without weights."""
    if name in ("imagenet", "perceptual"):
        net = _imagenet_on_meta()
        return (
            net.network,
            net.features if name == "imagenet" else lambda x: apart(net.stages(x), net.stages(x)),
            BATCH_SIZE,
        )
    if rates:
        reward = open_reward(name, "meta", measures=True)
        return reward.network, lambda x: reward(x, [""] * len(x)), ROWS
    encoder = load_pretrained_encoder(name, "meta")
    return encoder.network, encoder.summary, 64


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
    count = recipe.evaluate.count if count is None else count
    if measures_scenes(recipe, teacher.image_size):
        return _of_scenes(recipe, teacher, count)
    evaluate, device = recipe.evaluate, recipe.training.device
    _check_figures(evaluate, _against_teacher(evaluate))
    captions = evaluation_captions(recipe, count)
    features, scores = open_features(evaluate.features or "imagenet", device), _scores(captions, evaluate, device)
    noise = torch.stack([noise_of(NOISE, i, teacher.latent_shape) for i in range(len(captions))])
    perceptual = _perceptual(features, device) if "perceptual" in evaluate.metrics else None
    if _against_teacher(evaluate):
        images = teacher_images(recipe, teacher, folder, captions, show_progress)
        reference = Reference.of_batches(images.split(ROWS), features)
        return PromptSet(
            captions, features, reference, noise=noise, teacher=images, scores=scores, perceptual=perceptual,
            about=_in_words(recipe),
        )  # fmt: skip
    reference = Reference.of_batches(real_images(recipe, teacher), features)
    return PromptSet(captions, features, reference, noise=noise, scores=scores, about=_in_words(recipe))


def _of_scenes(recipe: Recipe, teacher: Teacher, count: int) -> PromptSet:
    """scenes-64's own prompt set, with the recipe's features and further figures."""
    evaluate, device = recipe.evaluate, recipe.training.device
    _check_figures(evaluate, against_teacher=False)
    enough("evaluate", count, "prompts")
    found = unseen_prompts(teacher, count)
    found = replace(found, scores=_scores(found.captions, evaluate, device))
    if evaluate.features is None:
        return found
    return replace(found, features=open_features(evaluate.features, device), reference=None)


def _against_teacher(evaluate: EvaluateConfig) -> bool:
    """Whether the reference of a recipe's own prompt set is the teacher's images."""
    return evaluate.reference in (None, "teacher")


def _in_words(recipe: Recipe) -> str:
    """The prompts and the reference of a recipe's own prompt set."""
    evaluate, place = recipe.evaluate, recipe.place
    held_out = place is not None and place.held_out
    prompts = HELD_OUT if held_out else "captions trained on"
    if evaluate.prompts or place is None:
        prompts = f"prompts of {Path(evaluate.prompts).name}" if evaluate.prompts else "captions of unseen scenes"
    against = {
        "data": "held-out images" if held_out else "images trained on",
        "teacher": "the teacher's images of the same prompts and noise",
    }
    reference = evaluate.reference or "teacher"
    return f"{prompts}, against {against.get(reference, f'the images of {Path(reference).name}')}"


def teacher_images(
    recipe: Recipe, teacher: Teacher, folder: RunFolder, captions: list[str], show_progress: bool = False
) -> Tensor:
    """The teacher's images at its full number of steps, from the noise that students start from; made once and kept.

    A run uses those that an earlier run of its lineage has made.

    Returns:
        [N, 3, H, W] in [0, 1], on the host.
    """
    shown, evaluate = recipe.sample, recipe.evaluate
    settings = PairsConfig(
        size=len(captions), num_inference_steps=shown.teacher_steps, guidance_scale=shown.guidance_scale, seed=NOISE,
        batch_size=ROWS,
    )  # fmt: skip
    sampling = TeacherSampling(teacher, teacher.denoiser, settings, captions, recipe.training.device)
    form = {"shape": str(tuple(teacher.latent_shape)), "guidance_embed": str(teacher.guidance_embed)}
    places = [folder.reference, *(RunFolder(student.parent).reference for student in students_behind(folder))]
    places = places if evaluate.path is None else [Path(evaluate.path)]
    found = [sampling.files(folder_for(place, "teacher", {**sampling.about, **form})) for place in places]
    first = distributed.first()  # the others take what it finds
    whole = distributed.from_first(next((i for i, files in enumerate(found) if first and not files.missing()), 0))
    latents = sampling.load(found[whole], show_progress).mean
    return torch.cat([teacher.decode(part.float()).cpu() for part in latents.split(ROWS)])


def open_features(name: str, device: str = "cpu") -> Features:
    """``imagenet``, or DINOv2, CLIP, SigLIP or the like from a folder or a hub name.

    Raises:
        ValueError: one sentence when it is not there.
    """
    return load_imagenet_encoder(device) if name == "imagenet" else load_pretrained_encoder(name, device)


def _perceptual(features: Features, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The perceptual distance of the ImageNet network, loaded once where it also gives the features."""
    return (features if isinstance(features, ImageNetEncoder) else load_imagenet_encoder(device)).distance


def _check_figures(evaluate: EvaluateConfig, against_teacher: bool) -> None:
    """Raises RecipeError for a figure that there is not, or that needs the teacher's images as the reference."""
    for name in evaluate.metrics:
        if name.partition(":")[0] not in ("perceptual", *_FIGURES):
            known = ", ".join(["perceptual", *_FIGURES])
            raise RecipeError(f"evaluate.metrics: there is no figure '{name}': use {known}.")
    kinds = [name.partition(":")[0] for name in evaluate.metrics]
    if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
        raise RecipeError(f"evaluate.metrics: {twice} is there twice: a figure has one model.")
    if "perceptual" in evaluate.metrics and not against_teacher:
        raise RecipeError("evaluate.metrics: perceptual is a distance to the teacher's images: set reference: teacher.")


def _scores(captions: Sequence[str], evaluate: EvaluateConfig, device: str) -> dict[str, Score]:
    """What rates images of these captions, by the name of its figure: reward models that only measure."""
    return {
        _FIGURES[name.partition(":")[0]]: partial(_rated, open_reward(name, device, measures=True), captions, device)
        for name in evaluate.metrics
        if name != "perceptual"
    }


@torch.no_grad()
def _rated(reward: Callable[..., Tensor], captions: Sequence[str], device: str, images: Tensor) -> Tensor:
    """A reward [N] of images [N, 3, H, W] in [0, 1], one of each caption, on the host."""
    parts = zip(images.split(ROWS), range(0, len(captions), ROWS), strict=True)
    return torch.cat([reward(part.to(device) * 2 - 1, captions[i : i + ROWS]).cpu() for part, i in parts])
