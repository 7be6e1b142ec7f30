"""Parquet tables and Hugging Face datasets: rows, columns, what a hostile one can hold."""

from __future__ import annotations

import io
import json
import pickle
import sys

import pytest
from PIL import Image

from fewstep.data.find import Place, find_captions, find_images
from fewstep.data.images import pixels

pytestmark = pytest.mark.needs("pyarrow", "datasets")  # of the extra `data`


def png(colour="red", size=(64, 64)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def table(path, columns, rows_at_once=2):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows_at_once)


def find(path, limit=None, source="parquet", **columns):
    return find_images(Place(source, str(path), **columns), limit)


def shown(picture):
    """The colour of a picture, from 0 to 255."""
    return pixels(picture, lambda height, width: (16, 16))[:, 8, 8].tolist()


RED, BLUE, GREEN = [255, 0, 0], [0, 0, 255], [0, 128, 0]


def test_rows_are_pictures_in_their_order_over_groups_and_files(tmp_path):
    """Cells of bytes, and cells as `datasets` writes them."""
    colours = ["red", "blue", "green", "red", "blue"]
    table(
        tmp_path / "a.parquet",
        {"image": [{"bytes": png(c), "path": None} for c in colours], "text": [f"a {c} one" for c in colours]},
    )
    table(tmp_path / "b.parquet", {"jpg": [png("green")], "caption": ["another"], "other": [3]})
    found = find(tmp_path)
    assert [p.caption for p in found.images] == [*(f"a {c} one" for c in colours), "another"]
    assert [p.name for p in found.images][4:] == ["a.parquet: row 4", "b.parquet: row 0"]
    assert [shown(p) for p in found.images] == [RED, BLUE, GREEN, RED, BLUE, GREEN]
    assert shown(found.images[1]) == BLUE and found.skipped == ()  # in any order
    assert len(find(tmp_path / "a.parquet", 3).images) == 3
    assert find_captions(Place("", str(tmp_path)), 2) == ("a red one", "a blue one")


def test_columns_can_be_named(tmp_path):
    table(tmp_path / "a.parquet", {"x": [png("blue")], "title": ["named"], "image": [png()], "text": ["usual"]})
    found = find(tmp_path, image_column="x", caption_column="title")
    assert (found.images[0].caption, shown(found.images[0])) == ("named", BLUE)
    with pytest.raises(
        ValueError, match=r"data\.image_column: there is no column 'y' in .*a\.parquet, which has x, title"
    ):
        find(tmp_path, image_column="y")
    table(tmp_path / "a.parquet", {"x": [png()], "title": ["named"]})
    with pytest.raises(ValueError, match=r"data\.image_column: there is no column image or jpg"):
        find(tmp_path)


class _Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_a_hostile_table_gives_its_good_rows_and_reasons(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "beside.png").write_bytes(png("blue"))
    (folder / "link.png").symlink_to(secret)
    cells = [(png(), None), (None, "beside.png"), (None, str(secret)), (None, "../secret.png"), (None, "link.png"),
             (None, None), (pickle.dumps(_Trap()), None), (png(size=(1, 1)), None)]  # fmt: skip
    table(folder / "a.parquet", {
        "image": [{"bytes": data, "path": path} for data, path in cells] + [None, {"bytes": png(), "path": None}],
        "text": [f"row {i}" for i in range(9)] + [None],
    })  # fmt: skip
    (folder / "b.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-100])
    (folder / "c.parquet").write_bytes(pickle.dumps(_Trap()))
    (folder / "d.parquet").symlink_to(tmp_path / "elsewhere.parquet")
    found = find(folder)
    assert [str(entry) for entry in found.skipped] == [
        "a.parquet: row 9: it has no caption",
        "b.parquet: it is cut short, damaged, or no parquet file",
        "c.parquet: it is cut short, damaged, or no parquet file",
        "d.parquet: it lies outside the folder",
    ]
    said = []
    for picture in found.images:
        try:
            said.append(shown(picture))
        except ValueError as error:
            said.append(str(error))
    outside = "it lies outside the folder"
    assert said == [
        RED, BLUE, outside, outside, outside, "it has no image", "it is damaged, or no image",
        "its 1 x 1 pixels are too few", "it has no image",
    ]  # fmt: skip


def test_what_is_wrong_with_tables_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"there are no tables \(\.parquet\) in"):
        find(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"parquet files need pyarrow: pip install 'fewstep\[data\]'"):
        find(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"datasets need their package: pip install 'fewstep\[data\]'"):
        find("owner/name", source="datasets")


# ---------------------------------------------------------------- datasets


@pytest.fixture
def saved(tmp_path):
    """What `save_to_disk` makes of pictures, and of cells that only look like them, in two splits."""
    import datasets

    datasets.disable_progress_bars()
    (tmp_path / "secret.png").write_bytes(png())
    cell = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    rows = [{"bytes": png(c), "path": None} for c in ("red", "blue")]
    splits = {
        "test": (datasets.Image(), rows),
        "cells": (cell, [{"bytes": None, "path": str(tmp_path / "secret.png")}, rows[0]]),
    }
    made = {}
    for split, (kind, images) in splits.items():
        features = datasets.Features({"image": kind, "text": datasets.Value("string")})
        made[split] = datasets.Dataset.from_dict({"image": images, "text": ["one", "two"]}, features=features)
    datasets.DatasetDict(made).save_to_disk(tmp_path / "set")
    return tmp_path / "set"


def test_a_saved_data_set_is_read_and_its_paths_stay_inside(saved):
    found = find(saved, source="datasets", split="test")
    assert [(p.name, p.caption) for p in found.images] == [("row 0", "one"), ("row 1", "two")]
    assert [shown(p) for p in found.images] == [RED, BLUE]
    cells = find(saved, source="datasets", split="cells").images
    with pytest.raises(ValueError, match="it lies outside the folder"):
        shown(cells[0])
    assert shown(cells[1]) == RED
    assert find(saved, source="datasets", split="test").fingerprint() == found.fingerprint()
    assert find_captions(Place("", str(saved), "test"), 1) == ("one",)


def test_a_saved_data_set_that_leads_elsewhere_is_refused(saved):
    with pytest.raises(ValueError, match=r"cannot be loaded: it was not made by save_to_disk, or lacks this split"):
        find(saved, source="datasets")
    state = saved / "test" / "state.json"
    said = json.loads(state.read_text())
    said["_data_files"][0]["filename"] = "../../elsewhere.arrow"
    state.write_text(json.dumps(said))
    with pytest.raises(ValueError, match="cannot be loaded: it lies outside the folder"):
        find(saved, source="datasets", split="test")


def test_a_folder_with_a_script_or_a_name_that_is_none_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text("raise SystemExit('a script was run')")
    with pytest.raises(ValueError, match="was not made by save_to_disk"):
        find(tmp_path / "set", source="datasets")
    with pytest.raises(ValueError, match="is no folder and no hub name"):
        find("nothing", source="datasets")
