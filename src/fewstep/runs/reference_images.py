"""Images of one's own that students are compared with: held-out images of the data, or a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.entries import Skipped, attempt
from fewstep.data.find import FEWEST, find_images, held_out_images, kind_of
from fewstep.data.folder import uncaptioned_images
from fewstep.data.images import CaptionedImage, pixels
from fewstep.models.families import Teacher
from fewstep.recipe.schema import Recipe
from fewstep.recipe.validate import RecipeError

ROWS = 8
"""Reference images that are generated or read at once."""


def enough(key: str, count: int, what: str, example: Skipped | None = None) -> None:
    """Raises RecipeError where ``count`` prompts or images are too few to measure on.

    Args:
        example: one of those that could not be used.
    """
    if count < FEWEST:
        counted = f"1 {what.removesuffix('s')} is" if count == 1 else f"{count} {what} are"
        because = "" if example is None else f" ({example})"
        raise RecipeError(f"{key}: {counted} too few to measure on{because}: give {FEWEST} or more.")


def real_images(recipe: Recipe, teacher: Teacher) -> Iterator[Tensor]:
    """Batches of the reference images, cropped as in training and as the teacher's autoencoder reproduces them."""
    side, found, count = teacher.image_size, reference_images(recipe), 0
    for first in range(0, len(found), ROWS):
        read = [attempt(image.name, pixels, image, lambda h, w: (side, side)) for image in found[first : first + ROWS]]
        kept = [entry for entry in read if not isinstance(entry, Skipped)]
        count += len(kept)
        if kept:
            mean, _ = teacher.encode_images(torch.stack(kept).float() / 127.5 - 1)
            yield teacher.decode(mean).cpu()
    enough("evaluate.reference", count, "images")


def check_readable(images: Sequence[CaptionedImage], side: int) -> None:
    """Raises RecipeError where too few of the reference images can be used; reads no more than it takes to know."""
    good, example = 0, None
    for image in images:
        read = attempt(image.name, pixels, image, lambda h, w: (side, side))
        if isinstance(read, Skipped):
            example = example or read
            continue
        good += 1
        if good == FEWEST:
            return
    enough("evaluate.reference", good, "images", example)


def reference_images(recipe: Recipe) -> Sequence[CaptionedImage]:
    """The images that ``evaluate.reference`` names: of data of which none are held out, as many as prompts.

    Raises:
        ValueError: one sentence, when there are too few.
    """
    evaluate, place = recipe.evaluate, recipe.place
    if evaluate.reference != "data":
        found: Sequence[CaptionedImage] = uncaptioned_images(Path(str(evaluate.reference)))
    elif place is None or kind_of(place) == "prompts":
        raise RecipeError("evaluate.reference: the data hold no images: give a folder, or set it to teacher.")
    elif place.held_out:
        found = held_out_images(place, recipe.data.size).images
    else:
        found = find_images(place, recipe.data.size).images[: evaluate.count]
    enough("evaluate.reference", len(found), "images")
    return found
