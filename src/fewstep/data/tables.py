"""Tables of images and captions: parquet files, and Hugging Face datasets by the name or folder of one.

A cell holds an image's bytes, or {"bytes": ..., "path": ...} as `datasets` writes it. A path is followed only where it
leads to a file beside the table. Scripts of data sets are never run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from fewstep.data.entries import Skipped, Unusable, attempt
from fewstep.data.images import CaptionedImage, from_files, inside
from fewstep.data.text import caption_among, caption_keys
from fewstep.models.hub import short_error

TABLE_SUFFIX = ".parquet"
_IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "img", "picture")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_OLDEST = 4  # version of `datasets`; earlier ones run a data set's own script


def parquet_images(
    path: Path, image_column: str | None = None, caption_column: str | None = None
) -> Iterator[CaptionedImage | Skipped]:
    """The rows of a parquet file, or of all in a folder and below it in the order of their names.

    Args:
        image_column, caption_column: by default the first of those that such tables mostly have.

    Raises:
        ValueError: one sentence when there is no such file, or pyarrow is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ValueError("data.source: parquet files need pyarrow: pip install 'fewstep[data]'.") from None
    return from_files(path, TABLE_SUFFIX, "tables", partial(_rows, image=image_column, caption=caption_column))


def _rows(folder: Path, name: str, image: str | None, caption: str | None) -> Iterator[CaptionedImage | Skipped]:
    import pyarrow.parquet

    table, first = folder / name, 0
    try:
        stamp = table.stat().st_mtime_ns
        with pyarrow.parquet.ParquetFile(table) as file:
            image, captions = columns_of(file.schema_arrow, image, caption, table)
            for group in range(file.num_row_groups):
                texts = file.read_row_group(group, columns=captions).select(captions).to_pylist()
                for row, text in enumerate(texts):
                    read = partial(_cell, folder, table, stamp, group, image, row)
                    yield row_of(f"{name}: row {first + row}", text, captions, f"{stamp} {group} {row}", read)
                first += len(texts)
    except (pyarrow.ArrowException, OSError):
        yield Skipped(name, "it is cut short, damaged, or no parquet file")


def row_of(
    name: str, row: Mapping[str, Any], captions: Sequence[str], stamp: str, read: Callable[[], bytes]
) -> CaptionedImage | Skipped:
    caption = attempt(name, caption_among, row, captions)
    return caption if isinstance(caption, Skipped) else CaptionedImage(name, caption, stamp, read)


def columns_of(schema: Any, image: str | None, caption: str | None, table: Path | str) -> tuple[str, list[str]]:
    """The names of the image column and of the caption columns, of which the first with text counts in each row.

    Raises:
        ValueError: one sentence when the table has no such column, or its images are no bytes.
    """

    def pick(key: str, usual: Sequence[str]) -> list[str]:
        found = [name for name in usual if name in schema.names]
        if not found:
            wanted = " or ".join(usual) if len(usual) > 1 else f"'{usual[0]}'"
            there = ", ".join(schema.names)
            raise ValueError(f"data.{key}: there is no column {wanted} in {table}, which has {there}.")
        if any(schema.names.count(name) > 1 for name in found):
            raise ValueError(f"data.{key}: {table} has several columns of the name {' or '.join(found)}: rename them.")
        return found

    column = pick("image_column", _IMAGE_COLUMNS if image is None else (image,))[0]
    captions = pick("caption_column", caption_keys(caption))
    kind = schema.field(column).type
    if not _holds_images(kind):
        raise ValueError(
            f"data.image_column: '{column}' of {table} is a column of {kind}, and images are read from bytes, or from "
            "{bytes, path} as `datasets` writes them: paths alone, URLs and base64 are not followed or decoded."
        )
    return column, captions


def _holds_images(kind: Any) -> bool:
    """Whether cells of this Arrow type may be images: binary of any kind, or a struct with such bytes or a path."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        return _holds_images(fields["bytes"]) if "bytes" in fields else "path" in fields
    return types.is_null(kind) or (not types.is_nested(kind) and "binary" in str(kind))


def _cell(folder: Path, table: Path, stamp: int, group: int, column: str, row: int) -> bytes:
    return _bytes(_group(table, stamp, group, column)[row].as_py(), [folder])


@lru_cache(maxsize=1)
def _group(table: Path, stamp: int, group: int, column: str) -> Any:
    """One column of a row group; the last one is remembered, because rows are read one after the other."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(table) as file:
        return file.read_row_group(group, columns=[column]).column(0)


def _bytes(cell: Any, folders: Sequence[Path]) -> bytes:
    """The bytes in a cell, or in the file beside the table that the cell names.

    Raises:
        Unusable: neither.
    """
    if isinstance(cell, dict):
        data, path = cell.get("bytes"), cell.get("path")
        if data is None and isinstance(path, str):
            return _beside(path, folders)
        cell = data
    if not isinstance(cell, bytes):
        raise Unusable("it has no image")
    return cell


def _beside(path: str, folders: Sequence[Path]) -> bytes:
    for folder in folders[:-1]:
        try:
            return inside(folder, path).read_bytes()
        except Unusable:
            continue
    return inside(folders[-1], path).read_bytes()


# ---------------------------------------------------------------- Hugging Face datasets


def dataset_images(
    name: str, split: str = "train", image_column: str | None = None, caption_column: str | None = None
) -> Iterator[CaptionedImage | Skipped]:
    """The rows of a data set of the hub, or of a folder that `datasets.Dataset.save_to_disk` made.

    Raises:
        ValueError: one sentence: `datasets` is not installed, there is no such data set, split or column.
    """
    datasets = library()
    data, folders = _opened(datasets, name, split)
    image, captions = columns_of(data.features.arrow_schema, image_column, caption_column, name)
    if isinstance(data.features[image], datasets.Image):
        data = data.cast_column(image, datasets.Image(decode=False))
    return _dataset_rows(data, folders, image, captions)


def library() -> Any:
    """The package `datasets`.

    Raises:
        ValueError: one sentence: it is not installed, or too old.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError("data.source: datasets need their package: pip install 'fewstep[data]'.") from None
    if int(datasets.__version__.split(".")[0]) < _OLDEST:
        raise ValueError(f"data.source: datasets {datasets.__version__} may run scripts: install {_OLDEST} or newer.")
    return datasets


def _opened(datasets: Any, name: str, split: str) -> tuple[Any, list[Path]]:
    """(the data set, the folders in which its images may lie)."""
    try:
        if Path(name).is_dir():
            folder = _saved(Path(name), split)
            return datasets.load_from_disk(str(folder)), [folder]
        if not _HUB_NAME.fullmatch(name):
            raise ValueError(f"'{name}' is no folder and no hub name (owner/name)")
        found = datasets.load_dataset(name, split=split)
    except Exception as error:  # several libraries read these files, each with errors of its own
        raise ValueError(f"data.path: the data set '{name}' cannot be loaded: {short_error(error)}.") from None
    return found, [Path(datasets.config.HF_DATASETS_CACHE), Path(datasets.config.HF_HUB_CACHE)]


def _saved(folder: Path, split: str) -> Path:
    """The folder of one split, whose own list of files stays in it.

    Raises:
        ValueError: `save_to_disk` did not make this.
    """
    if (folder / "dataset_dict.json").is_file():
        folder = folder / split
    if not (folder / "state.json").is_file():
        raise ValueError(
            "it was not made by save_to_disk, or lacks this split; other folders have sources of their own"
        )
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    for file in state.get("_data_files") or []:
        inside(folder, str(file["filename"]))
    return folder


def _dataset_rows(
    data: Any, folders: list[Path], image: str, captions: list[str]
) -> Iterator[CaptionedImage | Skipped]:
    stamp = str(data._fingerprint)
    for row, text in enumerate(data.select_columns(captions)):
        read = partial(_dataset_cell, data, row, image, folders)
        yield row_of(f"row {row}", text, captions, f"{stamp} {row}", read)


def _dataset_cell(data: Any, row: int, image: str, folders: list[Path]) -> bytes:
    return _bytes(data[row][image], folders)
