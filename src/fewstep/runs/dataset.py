"""The data that a run trains on: encoded images and captions, the teacher's samples, or both."""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fewstep.data.cache import SKIPPED, Share, image_latents, prompt_latents
from fewstep.data.files import replace_text, text_hash
from fewstep.data.find import captions_and_skipped, find_images
from fewstep.data.pairs import PairSource, WithPairs
from fewstep.data.random import Rng
from fewstep.data.remote import open_shards
from fewstep.data.sources import Buckets, CaptionDropout, LatentSource, Prompts, Source, WithPrompts
from fewstep.data.streamed import Counts, StreamSource
from fewstep.models.hub import Remark
from fewstep.recipe.validate import RecipeError
from fewstep.runs.setup import Run
from fewstep.runs.teacher_samples import captions, data_captions
from fewstep.scenes64.latents import scene_latents
from fewstep.training import checkpoint, distributed
from fewstep.training.progress import progress_bar

LATENTS = "latents"
_Data = LatentSource | Buckets | Prompts | StreamSource
_VALUES = "values "
"""How fingerprints of data begin that are made of their files' hashes; former versions hashed all values together."""


def build_dataset(run: Run, pairs: PairSource | None, place: Path, show_progress: bool = False) -> Source:
    """The batches that the method reads: its data, with captions and with ``pairs`` where it needs these.

    Also writes ``versions.json``, with the fingerprints of the data.

    Args:
        pairs: the teacher's samples, if the recipe needs any. place: folder of the encoded images.

    Warns:
        Remark: images of the same names and captions have other values than those on which the run began.

    Raises:
        RecipeError: the run began with other images or captions; nothing has been encoded yet.
    """
    recipe, streams = run.recipe, run.method.streams
    of_teacher = pairs is not None and recipe.data.source == "teacher"
    before, rows = _begun_with(run), ""
    if pairs is not None and of_teacher:
        data: _Data = pairs
    else:
        data, rows = _encoded(run, place, show_progress, before.get("rows"))
    known = {**versions(), "rows": rows, "data": _VALUES + data.checksum()}
    known |= {} if pairs is None or of_teacher else {"pairs": _VALUES + pairs.checksum()}
    if before.get("data", "").startswith(_VALUES) and before["data"] != known["data"]:
        warnings.warn(Remark(f"The data have other values than those on which {run.folder.path} began."), stacklevel=2)
    if distributed.first():
        replace_text(run.folder.versions, json.dumps(known, indent=1) + "\n")
    source: Source = _with_prompts(data, run, of_teacher) if "prompts" in streams else data
    if recipe.data.caption_dropout:
        source = CaptionDropout(source, recipe.data.caption_dropout)
    return WithPairs(source, pairs) if pairs is not None and "pairs" in streams else source


def _encoded(run: Run, folder: Path, show_progress: bool, rows: str | None) -> tuple[_Data, str]:
    """The recipe's images, or prompts alone, encoded now or before or while it trains, and what identifies them.

    Each process encodes its share.

    Args:
        rows: what identified those on which the run began; None where it begins now.
    """
    path, data, teacher, place = folder / LATENTS, run.recipe.data, run.teacher, run.recipe.place
    share = Share(distributed.rank(), distributed.count(), distributed.wait)
    show_progress, live = show_progress and distributed.first(), data.live
    if place is None:
        with progress_bar(data.size or 0, 0, "encoding", show_progress) as advance:
            return scene_latents(path, teacher, data.size or 0, data.seed, advance, share, live), ""
    if data.stream:
        shards = open_shards(place)
        found = _checked_rows(run, "shards", shards.names, rows)
        counts = Counts(folder, shards.names, share.rank)
        return StreamSource(shards, teacher, counts, data.shuffle_buffer, folder / SKIPPED, share.count), found
    if data.source == "prompts":
        prompts, skipped = captions_and_skipped(place, data.size)
        found = _checked_rows(run, "prompts", prompts, rows)
        with progress_bar(len(prompts), 0, "encoding", show_progress) as advance:
            return prompt_latents(path, teacher, prompts, advance, skipped, share, live), found
    images = find_images(place, data.size)
    found = _checked_rows(run, "images", [f"{image.name}\t{image.caption}" for image in images.images], rows)
    with progress_bar(len(images.images), 0, "encoding", show_progress) as advance:
        return image_latents(path, teacher, images, advance, data.aspect_buckets, share, live), found


def _begun_with(run: Run) -> dict[str, str]:
    """What ``versions.json`` recorded of the data on which a run was trained; nothing where it has no checkpoint."""
    if checkpoint.latest(run.folder.checkpoints) is None:
        return {}
    try:
        known = json.loads(run.folder.versions.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = known if isinstance(known, dict) else {}
    return {key: found[key] for key in ("rows", "data") if isinstance(found.get(key), str)}


def _checked_rows(run: Run, kind: str, texts: Sequence[str], before: str | None) -> str:
    """What identifies these images by name and caption, or prompts.

    Raises:
        RecipeError: a run began with others.
    """
    now = f"{len(texts)} {kind}, {text_hash(chr(10).join(texts))}"
    if before not in (None, now):
        counted = before.partition(",")[0]
        changed = f"not {counted} any more" if counted != now.partition(",")[0] else "others, or have other captions"
        raise RecipeError(
            f"{run.folder.path} was trained on {counted} of {run.recipe.data.path}, and they are {changed}: "
            "restore them, or choose another --out."
        )
    return now


def _with_prompts(data: _Data, run: Run, of_teacher: bool) -> Source:
    """The data with their captions as text, for methods that read them.

    Raises:
        RecipeError: images were skipped, so that captions and latents are not the same rows.
    """
    if isinstance(data, StreamSource):
        return data
    texts = captions(run.recipe) if of_teacher else data_captions(run.recipe)
    if isinstance(data, Buckets) or len(texts) != data.order.size:
        raise RecipeError(
            f"data: the method {run.method.name} reads captions, and some images could not be encoded "
            "(skipped.txt) or have several sizes: take these out of the data, and leave data.aspect_buckets out."
        )
    return WithPrompts(data, texts)


def versions() -> dict[str, str]:
    """Versions of everything that can change a result."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "random": str(Rng.version)}
    for name in ("fewstep", "torch", "diffusers", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
