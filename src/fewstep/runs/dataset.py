"""The data that a run trains on: encoded images and captions, the teacher's samples, or both."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fewstep.data.cache import fingerprint, image_latents, prompt_latents
from fewstep.data.files import replace_text
from fewstep.data.find import find_captions, find_images
from fewstep.data.pairs import PairSource, WithPairs
from fewstep.data.sources import Buckets, CaptionDropout, LatentSource, Prompts, Source, WithPrompts
from fewstep.recipe.validate import RecipeError
from fewstep.runs.setup import Run
from fewstep.runs.teacher_samples import captions
from fewstep.scenes64.latents import scene_latents
from fewstep.training import distributed
from fewstep.training.progress import progress_bar

LATENTS = "latents"


def build_dataset(run: Run, pairs: PairSource | None, place: Path, show_progress: bool = False) -> Source:
    """The batches that the method reads: its data, with captions and with ``pairs`` where it needs these.

    Also writes ``versions.json``, with the fingerprints of the data.

    Args:
        pairs: the teacher's samples, if the recipe needs any. place: folder of the encoded images.
    """
    recipe, streams = run.recipe, run.method.streams
    of_teacher = pairs is not None and recipe.data.source == "teacher"
    data = pairs if pairs is not None and of_teacher else _encoded(run, place, show_progress)
    if distributed.first():
        known = {**versions(), "data": fingerprint(data)}
        known |= {} if pairs is None or of_teacher else {"pairs": fingerprint(pairs)}
        replace_text(run.folder.versions, json.dumps(known, indent=1) + "\n")
    source: Source = _with_prompts(data, run, of_teacher) if "prompts" in streams else data
    if recipe.data.caption_dropout:
        source = CaptionDropout(source, recipe.data.caption_dropout)
    return WithPairs(source, pairs) if pairs is not None and "pairs" in streams else source


def _encoded(run: Run, place: Path, show_progress: bool) -> LatentSource | Buckets | Prompts:
    """The recipe's images, or prompts alone, encoded now or before. The first process encodes, the others wait."""
    path, data, device, teacher = place / LATENTS, run.recipe.data, run.recipe.training.device, run.teacher
    show_progress = show_progress and distributed.first()
    with distributed.first_goes_first():
        if data.place is None:
            with progress_bar(data.size or 0, 0, "encoding", show_progress) as advance:
                return scene_latents(path, teacher, data.size or 0, data.seed, device, advance)
        if data.source == "prompts":
            prompts = find_captions(data.place, data.size)
            with progress_bar(len(prompts), 0, "encoding", show_progress) as advance:
                return prompt_latents(path, teacher, prompts, device, advance)
        found = find_images(data.place, data.size)
        with progress_bar(len(found.images), 0, "encoding", show_progress) as advance:
            return image_latents(path, teacher, found, device, advance, data.aspect_buckets)


def _with_prompts(data: LatentSource | Buckets | Prompts, run: Run, of_teacher: bool) -> WithPrompts:
    """The data with their captions as text, for methods that read them.

    Raises:
        RecipeError: images were skipped, so that captions and latents are not the same rows.
    """
    texts = captions(run.recipe, None if of_teacher else run.recipe.data.count())
    if isinstance(data, Buckets) or len(texts) != data.order.size:
        raise RecipeError(
            f"data: the method {run.method.name} reads captions, and some images could not be encoded "
            "(skipped.txt) or have several sizes: take these out of the data, and leave data.aspect_buckets out."
        )
    return WithPrompts(data, texts)


def versions() -> dict[str, str]:
    """Versions of everything that can change a result."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("fewstep", "torch", "diffusers", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
