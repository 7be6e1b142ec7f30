"""Captioned images and prompts of the data set that a recipe names: a folder, shards, tables or a text file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from fewstep.data.entries import Skipped, usable
from fewstep.data.files import at_home
from fewstep.data.folder import folder_images
from fewstep.data.images import IMAGE_SUFFIXES, Collection, walk
from fewstep.data.listing import once
from fewstep.data.prompts import PROMPT_SUFFIXES, read_prompts
from fewstep.data.random import stream_key
from fewstep.data.shards import SHARD_SUFFIX, shard_images
from fewstep.data.tables import TABLE_SUFFIX, dataset_images, parquet_images

T = TypeVar("T")

STREAMED = ("webdataset", "parquet", "datasets")
"""Sources of which a run may read shards while it trains (`fewstep.data.remote`)."""
FEWEST = 8
"""Images or captions below which nothing is measured."""


@dataclass(frozen=True)
class Place:
    """Where a data set is.

    Attributes:
        source: "folder", "webdataset", "parquet", "datasets" or "prompts"; "" goes by what lies there.
        path: its folder or file, ~ being the home folder, or a hub name.
        split: of a Hugging Face data set. image_column: of tables; the images' suffix in shards.
        caption_column: of tables, JSON and lists of captions.
        held_out: how many images are kept out of training to measure on, at most a third of all.
    """

    source: str
    path: str
    split: str = "train"
    image_column: str | None = None
    caption_column: str | None = None
    held_out: int = 0

    @property
    def root(self) -> Path:
        """``path`` with the home folder for ~."""
        return Path(at_home(self.path))

    @property
    def kind(self) -> str:
        """``source`` if it is set, else the source that fits the files at ``path``."""
        path = self.root
        if self.source:
            return self.source
        suffix, is_folder = path.suffix.lower(), path.is_dir()
        if suffix in PROMPT_SUFFIXES and not is_folder:
            return "prompts"
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return "datasets"
        there = {file.suffix.lower() for file in walk(path)[0]} if is_folder else {suffix}
        for kind, its in (("webdataset", SHARD_SUFFIX), ("parquet", TABLE_SUFFIX)):
            if its in there:
                return kind
        return "folder"


def find_images(place: Place, limit: int | None = None) -> Collection:
    """The images of a data set in its own order, without those held out; at most ``limit`` before that.

    Raises:
        ValueError: one sentence when there are none, too few to hold some out, or what reads them is not installed.
    """
    found = _all_images(place, limit)
    return replace(found, images=_split(found.images, place)[0])


def held_out_images(place: Place, limit: int | None = None) -> Collection:
    """The images that `find_images` leaves out."""
    found = _all_images(place, limit)
    return replace(found, images=_split(found.images, place)[1])


def find_captions(place: Place, limit: int | None = None) -> tuple[str, ...]:
    """The captions of a data set, or the prompts of a file, in their order and without those held out."""
    return captions_and_skipped(place, limit)[0]


def captions_and_skipped(place: Place, limit: int | None = None) -> tuple[tuple[str, ...], tuple[Skipped, ...]]:
    """As `find_captions`, and what was passed over."""
    captions, skipped = _all_captions(place, limit)
    return _split(captions, place)[0], skipped


def held_out_captions(place: Place, limit: int | None = None) -> tuple[str, ...]:
    """The captions that `find_captions` leaves out."""
    return _split(_all_captions(place, limit)[0], place)[1]


def _all_captions(place: Place, limit: int | None) -> tuple[tuple[str, ...], tuple[Skipped, ...]]:
    if kind_of(place) == "prompts":
        return once(("prompts", _whole(place), limit), lambda: read_prompts(place.root, limit, place.caption_column))
    found = _all_images(place, limit)
    return tuple(image.caption for image in found.images), found.skipped


def _all_images(place: Place, limit: int | None) -> Collection:
    return once(("images", _whole(place), limit), lambda: _list_images(place, limit))


def kind_of(place: Place) -> str:
    """`Place.kind`, which may look at every name in the folder."""
    return once(("kind", _whole(place)), lambda: place.kind)


def _whole(place: Place) -> Place:
    """The place without what is held out, which is listed with the rest."""
    return replace(place, held_out=0)


def _list_images(place: Place, limit: int | None) -> Collection:
    path, columns, hint = place.root, (place.image_column, place.caption_column), ""
    kind = kind_of(place)
    if kind == "webdataset":
        found = shard_images(path, *columns)
    elif kind == "parquet":
        found = parquet_images(path, *columns)
    elif kind == "datasets":
        found = dataset_images(at_home(place.path), place.split, *columns)
    else:
        found, hint = folder_images(path, place.caption_column), f" ({', '.join(IMAGE_SUFFIXES)})"
    return Collection(*usable(found, place.path, "images", limit, hint))


def _split(entries: tuple[T, ...], place: Place) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """(entries to train on, entries held out), each in their order; which are held out follows from their number.

    Raises:
        ValueError: a third of them is not enough to measure on.
    """
    if not place.held_out:
        return entries, ()
    count = min(place.held_out, len(entries) // 3)
    if count < FEWEST:
        raise ValueError(
            f"evaluate: {place.path} has {len(entries)} captions, too few to hold {FEWEST} of them out of training: "
            "give evaluate.prompts a file of others, or leave evaluate.every at 0."
        )
    picked = np.random.Generator(np.random.Philox(stream_key(0, "held out", len(entries)))).permutation(len(entries))
    out = set(picked[:count].tolist())
    kept = tuple(entry for i, entry in enumerate(entries) if i not in out)
    return kept, tuple(entry for i, entry in enumerate(entries) if i in out)
