"""Captioned pictures by what a recipe says of them: one door to folders, shards, tables and prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fewstep.data.folder import folder_pictures
from fewstep.data.pictures import Collection, collect
from fewstep.data.prompts import KINDS as PROMPT_KINDS
from fewstep.data.prompts import read_prompts
from fewstep.data.shards import shard_pictures, shards_of
from fewstep.data.tables import dataset_pictures, parquet_pictures, tables_of


@dataclass(frozen=True)
class Place:
    """Where a data set is.

    Attributes:
        source: "folder", "webdataset", "parquet", "datasets" or "prompts"; "" looks what lies there.
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
        """``source``, or the one that what lies there wants."""
        path = Path(self.path)
        if self.source:
            return self.source
        if path.suffix.lower() in PROMPT_KINDS:
            return "prompts"
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return "datasets"
        if path.suffix == ".tar" or (path.is_dir() and shards_of(path)):
            return "webdataset"
        return "parquet" if path.suffix == ".parquet" or (path.is_dir() and tables_of(path)) else "folder"


def find_pictures(place: Place, limit: int | None = None) -> Collection:
    """The pictures of a data set in its own order, at most ``limit``.

    Raises:
        ValueError: one sentence when there are none, or what reads them is not installed.
    """
    path = Path(place.path)
    if place.kind == "webdataset":
        found = shard_pictures(path, place.caption_column)
    elif place.kind == "parquet":
        found = parquet_pictures(path, place.image_column, place.caption_column)
    elif place.kind == "datasets":
        found = dataset_pictures(place.path, place.split, place.image_column, place.caption_column)
    else:
        found = folder_pictures(path)
    return collect(found, place.path, limit)


def find_captions(place: Place, limit: int | None = None) -> tuple[str, ...]:
    """The captions of a data set, or the prompts of a file, in their order."""
    if place.kind == "prompts":
        return read_prompts(Path(place.path), limit, place.caption_column)[0]
    return tuple(picture.caption for picture in find_pictures(place, limit).pictures)
