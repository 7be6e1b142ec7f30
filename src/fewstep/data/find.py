"""Captioned images and prompts of the data set that a recipe names: a folder, shards, tables or a text file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fewstep.data.folder import folder_images
from fewstep.data.images import IMAGE_SUFFIXES, Collection, files_of, usable
from fewstep.data.prompts import PROMPT_SUFFIXES, read_prompts
from fewstep.data.shards import SHARD_SUFFIX, shard_images
from fewstep.data.tables import TABLE_SUFFIX, dataset_images, parquet_images


@dataclass(frozen=True)
class Place:
    """Where a data set is.

    Attributes:
        source: "folder", "webdataset", "parquet", "datasets" or "prompts"; "" goes by what lies there.
        path: its folder or file, or a hub name.
        split: of a Hugging Face data set. image_column, caption_column: of tables; the latter of JSON too.
    """

    source: str
    path: str
    split: str = "train"
    image_column: str | None = None
    caption_column: str | None = None

    @property
    def kind(self) -> str:
        """``source`` if it is set, else the source that fits the files at ``path``."""
        path = Path(self.path)
        if self.source:
            return self.source
        if path.suffix.lower() in PROMPT_SUFFIXES:
            return "prompts"
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return "datasets"
        for kind, suffix in (("webdataset", SHARD_SUFFIX), ("parquet", TABLE_SUFFIX)):
            if path.suffix == suffix or (path.is_dir() and files_of(path, suffix)):
                return kind
        return "folder"


def find_images(place: Place, limit: int | None = None) -> Collection:
    """The images of a data set in its own order, at most ``limit``.

    Raises:
        ValueError: one sentence when there are none, or what reads them is not installed.
    """
    path = Path(place.path)
    if place.kind == "webdataset":
        found = shard_images(path, place.caption_column)
    elif place.kind == "parquet":
        found = parquet_images(path, place.image_column, place.caption_column)
    elif place.kind == "datasets":
        found = dataset_images(place.path, place.split, place.image_column, place.caption_column)
    else:
        found = folder_images(path)
    return Collection(*usable(found, place.path, "images", limit, f" ({', '.join(IMAGE_SUFFIXES)})"))


def find_captions(place: Place, limit: int | None = None) -> tuple[str, ...]:
    """The captions of a data set, or the prompts of a file, in their order."""
    if place.kind == "prompts":
        return read_prompts(Path(place.path), limit, place.caption_column)[0]
    return tuple(image.caption for image in find_images(place, limit).images)
