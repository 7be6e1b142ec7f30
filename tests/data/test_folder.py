"""Folders of pictures: what is found in them, what is passed over, and that nothing outside is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from fewstep.data.find import Place, find_captions, find_images
from fewstep.data.images import CaptionedImage, Skipped
from fewstep.recipe.load import parse_recipe
from fewstep.recipe.validate import RecipeError


def picture(path, colour="red", size=(80, 64), **how):
    Image.new("RGB", size, colour).save(path, **how)


def find(folder, limit=None):
    return find_images(Place("folder", str(folder)), limit)


def said(collection):
    """Why each thing was passed over."""
    return {entry.name: entry.why for entry in collection.skipped}


@pytest.fixture
def folder(tmp_path):
    """Two pictures, one of them deeper."""
    (tmp_path / "more").mkdir()
    for name, caption in (("b.png", "a blue square"), ("more/a.jpg", "a red circle\n")):
        picture(tmp_path / name, caption.split()[1])
        (tmp_path / name).with_suffix(".txt").write_text(caption)
    return tmp_path


def test_captions_stand_beside_their_pictures_or_in_a_list(folder):
    found = find(folder)
    assert [(p.name, p.caption) for p in found.images] == [("b.png", "a blue square"), ("more/a.jpg", "a red circle")]
    assert found.skipped == () and find(folder, 1).images[0].name == "b.png" and len(find(folder, 1).images) == 1
    assert found.images[1].read() == (folder / "more" / "a.jpg").read_bytes()
    lines = [{"file_name": "more/a.jpg", "text": "one"}, {"file_name": "b.png", "text": "two"}]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert [(p.name, p.caption) for p in find(folder).images] == [("b.png", "two"), ("more/a.jpg", "one")]
    assert find_captions(Place("", str(folder))) == ("two", "one")


def test_a_fingerprint_knows_names_times_and_captions(folder):
    first = find(folder).fingerprint()
    assert find(folder).fingerprint() == first != find(folder, 1).fingerprint()
    (folder / "b.txt").write_text("a square")
    second = find(folder).fingerprint()
    (folder / "b.png").rename(folder / "c.png")
    (folder / "b.txt").rename(folder / "c.txt")
    assert len({first, second, find(folder).fingerprint()}) == 3


def test_what_has_no_usable_caption_is_passed_over_and_listed(folder):
    for name, caption in (
        ("c", None),
        ("d", "  \n"),
        ("e", b"\xff\xfe\x00"),
        ("f", "x" * 2**21),
        ("g", "long " * 2000),
    ):
        picture(folder / f"{name}.png")
        if caption is not None:
            (folder / f"{name}.txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())
    found = find(folder)
    assert [p.name for p in found.images] == ["b.png", "g.png", "more/a.jpg"]
    assert len(found.images[1].caption) == 9999
    assert said(found) == {
        "c.png": "it has no caption: write it to c.txt, or to metadata.jsonl",
        "d.png": "it has no caption",
        "e.png": "its caption is not text in UTF-8",
        "f.png": "its caption is longer than a megabyte",
    }


@pytest.fixture
def outside(tmp_path_factory):
    """A picture and a caption that are nobody's business."""
    there = tmp_path_factory.mktemp("outside")
    picture(there / "secret.png")
    (there / "secret.txt").write_text("a secret")
    return there


def test_links_that_lead_outside_are_not_followed(folder, outside):
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "link.txt").write_text("a picture that is elsewhere")
    picture(folder / "own.png")
    (folder / "own.txt").symlink_to(outside / "secret.txt")
    (folder / "round.png").symlink_to(folder / "round.png")
    (folder / "deep").symlink_to(outside)
    (folder / "same.png").symlink_to(folder / "b.png")  # within the folder links are welcome
    (folder / "same.txt").write_text("the same")
    found = find(folder)
    assert [p.name for p in found.images] == ["b.png", "more/a.jpg", "same.png"]
    skipped = said(found)
    assert skipped.pop("deep").startswith("it is a link to a folder, and those are not followed")
    assert skipped == dict.fromkeys(("link.png", "own.png", "round.png"), "it lies outside the folder")


def test_a_list_that_leads_outside_is_not_followed(folder, outside):
    (folder / "deep").symlink_to(outside)
    (folder / "more" / "notes.pkl").write_bytes(b"never opened")
    names = [
        str(outside / "secret.png"),
        f"../{outside.name}/secret.png",
        "deep/secret.png",
        "none.png",
        "more/notes.pkl",
    ]
    entries = [{"file_name": name, "text": "x"} for name in names] + [{"file_name": "b.png", "text": "two"}]
    lines = [json.dumps(entry) for entry in entries] + ['{"file_name": 3}', "{", "[" * 10**5, '{"file_name": "b.png"}']
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    found = find(folder)
    assert [p.name for p in found.images] == ["b.png"]
    why = said(found)
    assert len(why) == len(names) + 4
    for number, name in enumerate(names, 1):
        wanted = "it lies outside the folder" if number < 4 else "it is"
        assert why[f"{name} (line {number} of metadata.jsonl)"].startswith(wanted)
    for number in range(7, 11):
        assert "it is not like" in why[f"line {number} of metadata.jsonl"]
    (folder / "metadata.jsonl").unlink()
    (outside / "list.jsonl").write_text('{"file_name": "b.png", "text": "two"}')
    (folder / "metadata.jsonl").symlink_to(outside / "list.jsonl")
    with pytest.raises(ValueError, match=r"the first because metadata\.jsonl: it lies outside the folder"):
        find(folder)


def test_what_is_wrong_with_a_folder_is_one_sentence(folder, tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        find(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no images that could be used \(\.png"):
        find(tmp_path / "empty")
    (folder / "more" / "a.txt").unlink()
    (folder / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"the first because b\.png: it has no caption: write it to b\.txt"):
        find(folder)
    (folder / "metadata.jsonl").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"metadata\.jsonl: it is not text"):
        find(folder)


def test_entries_are_pictures_or_reasons(folder):
    assert isinstance(find(folder).images[0], CaptionedImage)
    assert str(Skipped("a.png", "it is blue")) == "a.png: it is blue"
    assert Path(folder / "b.png").is_file()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"source": "folder"}, r"data\.path and 'source: folder' go together"),
        ({"path": "pictures"}, r"data\.path and 'source: folder' go together"),
        ({"source": "parquet"}, r"data\.path and 'source: parquet' go together"),
        ({"aspect_buckets": True}, r"aspect_buckets needs images of your own, not 'source: scenes'"),
        ({"source": "prompts", "path": "a.txt"}, "lcm needs images, so prompts alone are not enough"),
        ({"caption_dropout": 1.0}, "caption_dropout"),
        ({"source": "tar", "path": "a"}, "data.source"),
    ],
)
def test_what_does_not_go_together_is_refused(data, says):
    with pytest.raises(RecipeError, match=says):
        parse_recipe({"method": "lcm", "data": data})
    assert parse_recipe({"method": "lcm"}).data.size == 4000
