"""Data sets as people keep them: captions, lists, shards and tables, each read or refused in one sentence.

The cases are those of public reports, and others of the same kinds.
"""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
from pathlib import Path

import pytest
from PIL import Image

import fewstep.data.images as images_of
from fewstep.data.cache import SKIPPED, Encoding
from fewstep.data.entries import Skipped
from fewstep.data.files import text_hash
from fewstep.data.find import Place, captions_and_skipped, find_captions, find_images
from fewstep.data.preferences import read_preferences
from fewstep.recipe.load import load_recipe, parse_recipe
from fewstep.recipe.shipped import find_recipe
from fewstep.runs.distill import prepare_data
from fewstep.training.console import at_home

BOM = b"\xef\xbb\xbf"


def png(colour="red"):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(file, "PNG")
    return file.getvalue()


PNG = png()


def folder(place, files):
    """A folder of these files, name -> bytes or text; the bytes of an image where the value is None."""
    for name, content in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG if content is None else content if isinstance(content, bytes) else content.encode())
    return place


def found(place, source="folder", **columns):
    """({name: caption}, {name: why it was skipped})."""
    collection = find_images(Place(source, str(place), **columns))
    assert len({image.name for image in collection.images}) == len(collection.images)
    return {i.name: i.caption for i in collection.images}, {s.name: s.why for s in collection.skipped}


def lines_of(*entries):
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


# ---------------------------------------------------------------- folders


def test_captions_beside_images_are_utf_8_with_a_mark_or_without(tmp_path):
    texts = {
        "a": BOM + b"a red circle", "b": "a red circle\r\n", "c": "line one\r\nline two",
        "d": "\u2028a\u2028b\x85c\x0bd", "e": "a circle".encode("utf-16"),
        "f": "ein Kreis gr\xfcn".encode("latin-1"), "g": "\u200b \u00a0", "h": BOM,
        "i": "  \n\t", "j": b"", "k": "a\0 circle \0", "l": "\U0001f534 \u0444 \u7ea2",
    }  # fmt: skip
    files = {f"{name}.png": None for name in texts} | {f"{name}.txt": text for name, text in texts.items()}
    captions, skipped = found(folder(tmp_path, files))
    assert captions == {
        "a.png": "a red circle", "b.png": "a red circle", "c.png": "line one\r\nline two",
        "d.png": "a\u2028b\x85c\x0bd", "k.png": "a circle", "l.png": "\U0001f534 \u0444 \u7ea2",
    }  # fmt: skip
    other, none = "its caption is not text in UTF-8", "it has no caption"
    assert skipped == {"e.png": other, "f.png": other, "g.png": none, "h.png": none, "i.png": none, "j.png": none}


def test_captions_have_several_names(tmp_path):
    """In any case of letters; images of one stem share a caption, and one of the image's whole name comes after it."""
    files = {
        "A.JPG": None, "A.TXT": "upper", "b.png": None, "b.caption": "kohya", "c.png": None, "c.png.txt": "whole name",
        "d.jpg": None, "d.png": None, "d.txt": "both", "e.png": None, "e.caption": "second", "e.txt": "first",
        "sub/a.png": None, "sub/a.txt": "deeper", "f.png": None, "other/f.txt": "elsewhere",
    }  # fmt: skip
    captions, skipped = found(folder(tmp_path, files))
    assert captions == {
        "A.JPG": "upper", "b.png": "kohya", "c.png": "whole name", "d.jpg": "both", "d.png": "both", "e.png": "first",
        "sub/a.png": "deeper",
    }  # fmt: skip
    assert skipped == {"f.png": "it has no caption: write it to f.txt, or to metadata.jsonl"}


def test_formats_that_are_not_read_are_listed(tmp_path):
    unusable = ["a.gif", "b.avif", "c.HEIC", "d.svg", "e.mp4", "deep/f.exr"]
    others = {"README.md": "x", "Thumbs.db": "x", "ok.npz": "x", ".DS_Store": "x", "x.png/y.txt": "a folder named so"}
    read = ["g.png", "h.jfif", "i.TIFF", "j.tif", "k.bmp"]
    files = {**dict.fromkeys([*unusable, *read]), **others} | {
        f"{name[: -len(name.split('.')[-1])]}txt": "x" for name in read
    }
    captions, skipped = found(folder(tmp_path, files))
    assert sorted(captions) == sorted(read) and sorted(skipped) == sorted(unusable)
    assert set(skipped.values()) == {"it is none of .png, .jpg, .jpeg, .jfif, .webp, .bmp, .tif, .tiff: convert it"}


def test_pipes_and_broken_links_are_listed_and_not_waited_for(tmp_path):
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it was waited for"))
    signal.alarm(10)
    folder(tmp_path, {"a.png": None, "a.txt": "x", "b.txt": "x", "c.png": None, "d.txt": "x"})
    os.mkfifo(tmp_path / "b.png")
    os.mkfifo(tmp_path / "c.txt")
    (tmp_path / "d.png").symlink_to("no such file")
    captions, skipped = found(tmp_path)
    os.mkfifo(tmp_path / "e.tar")
    with pytest.raises(ValueError, match="there are no shards"):
        found(tmp_path / "e.tar", "webdataset")
    with pytest.raises(ValueError, match="there is no folder"):
        found(tmp_path / "e.tar")
    with pytest.raises(ValueError, match="prompts are a file"):
        find_captions(Place("prompts", str(tmp_path / "c.txt")))
    folder(
        tmp_path, {"metadata.jsonl": lines_of({"file_name": "a.png", "text": "x"}, {"file_name": "b.png", "text": "x"})}
    )
    listed = found(tmp_path)[1]
    signal.alarm(0)
    pipe = "it is not there as a file, but as a folder, pipe or device"
    assert captions == {"a.png": "x"} and skipped == {"b.png": pipe, "c.png": pipe, "d.png": "it is not there"}
    assert listed == {"b.png (line 2 of metadata.jsonl)": pipe}


def test_a_folder_that_cannot_be_read_is_listed(tmp_path, monkeypatch):
    """Permissions bind no administrator, so that the system's refusal is put in its place."""
    folder(tmp_path, {"a.png": None, "a.txt": "x", "closed/b.png": None, "closed/b.txt": "x"})
    scan = os.scandir

    def refusing(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(images_of.os, "scandir", refusing)
    assert found(tmp_path) == ({"a.png": "x"}, {"closed": "it cannot be read (Permission denied)"})


def test_a_caption_that_cannot_be_read_is_listed(tmp_path, monkeypatch):
    folder(tmp_path, {"a.png": None, "a.txt": "x", "b.png": None, "b.txt": "y"})
    real = open

    def refusing(path, *args, **how):
        if Path(path).name == "b.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **how)

    monkeypatch.setattr("builtins.open", refusing)
    assert found(tmp_path) == ({"a.png": "x"}, {"b.png": "it cannot be read (Permission denied)"})


def test_links_to_folders_are_listed(tmp_path):
    """Wherever they lead: to another place, to a folder that is read anyway, to themselves."""
    folder(tmp_path, {"else/a.png": None, "else/a.txt": "x", "data/in/b.png": None, "data/in/b.txt": "y"})
    for name, target in (("out", tmp_path / "else"), ("twice", tmp_path / "data/in"), ("me", tmp_path / "data")):
        (tmp_path / "data" / name).symlink_to(target)
    captions, skipped = found(tmp_path / "data")
    assert captions == {"in/b.png": "y"} and sorted(skipped) == ["me", "out", "twice"]
    assert all(why.startswith("it is a link to a folder, and those are not followed") for why in skipped.values())
    (tmp_path / "link").symlink_to(tmp_path / "else")
    assert found(tmp_path / "link") == ({"a.png": "x"}, {})


def test_a_column_that_a_folder_without_a_list_cannot_have(tmp_path):
    place = folder(tmp_path, {"a.png": None, "a.txt": "x"})
    with pytest.raises(ValueError, match=r"data.caption_column: '.*' has no metadata.jsonl .*, in which 'blip' would"):
        found(place, caption_column="blip")


@pytest.mark.parametrize("name, says", [
    ("none", r"there is no folder '.*none'\."), ("a.zip", "but a file: unpack it, or set data.source to its kind"),
])  # fmt: skip
def test_what_is_no_folder(tmp_path, name, says):
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=says):
        found(tmp_path / name)


# ---------------------------------------------------------------- lists


@pytest.mark.parametrize("column, entry", [
    (None, {"text": "one"}), (None, {"caption": "one"}), (None, {"prompt": "one"}),
    ("title", {"title": "one", "text": "x"}), ("caption", {"caption": "one", "text": "x"}),
    (None, {"text": "one", "caption": "x", "width": 3, "tags": ["x"]}),
])  # fmt: skip
def test_captions_in_a_list_have_the_usual_keys_or_the_named_one(tmp_path, column, entry):
    for name in ("metadata.jsonl", "metadata.csv"):
        cells = [entry] if name.endswith("jsonl") else [["file_name", *entry], ["a.png", *map(str, entry.values())]]
        text = (
            lines_of({"file_name": "a.png", **cells[0]})
            if name.endswith("jsonl")
            else "".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in cells)
        )
        place = folder(tmp_path / name.replace("metadata", "of"), {"a.png": None, name: text})
        assert found(place, caption_column=column) == ({"a.png": "one"}, {})
        assert find_captions(Place("", str(place), caption_column=column)) == ("one",)
    recipe = parse_recipe({"method": "lcm", "data": {"source": "folder", "path": str(place), "caption_column": column}})
    assert find_captions(recipe.data.place) == ("one",)


def test_a_line_ends_at_a_line_feed_alone(tmp_path):
    odd = "one\u2028two\x85three\x0bfour\x0cfive\u2029six\x1c\x1d\x1e"
    entries = [{"file_name": "a.png", "text": odd}, {"file_name": "b.png", "text": "x"}]
    text = BOM + lines_of(*entries).replace("\n", "\r\n\r\n").replace("\x1c\x1d\x1e", "\\u001c\\u001d\\u001e").encode()
    text = text.replace(b"\x0b", b"\\u000b").replace(b"\x0c", b"\\u000c")  # JSON must spell these; not the others
    place = folder(tmp_path, {"a.png": None, "b.png": None, "metadata.jsonl": text})
    assert found(place) == ({"a.png": odd.rstrip(), "b.png": "x"}, {})
    folder(tmp_path, {"p.txt": BOM + b"one\r\n\r\n" + "two\u2028three\x0cfour\n".encode() + BOM + b"five"})
    assert find_captions(Place("prompts", str(tmp_path / "p.txt"))) == ("one", "two\u2028three\x0cfour", "five")
    folder(tmp_path, {"p.jsonl": BOM + lines_of({"text": "a\u2028b"}, {"prompt": "two"}).encode()})
    assert find_captions(Place("prompts", str(tmp_path / "p.jsonl"))) == ("a\u2028b", "two")


def test_captions_that_are_no_text_are_skipped_and_listed(tmp_path):
    values = [["a", "b"], {"a": 1}, 3, True, None, "", "\u200b", "good"]
    files = {f"{i}.png": None for i in range(len(values) + 1)}
    text = lines_of(*({"file_name": f"{i}.png", "text": value} for i, value in enumerate(values)))
    text += '{"file_name": "8.png", "text": "half \\ud83d"}\n'
    captions, skipped = found(folder(tmp_path, {**files, "metadata.jsonl": text}))
    assert captions == {"7.png": "good"}
    assert [skipped[f"{i}.png (line {i + 1} of metadata.jsonl)"] for i in (0, 1, 2, 3, 4, 5, 6, 8)] == [
        "its caption is no text, but ['a', 'b']", "its caption is no text, but {'a': 1}",
        "its caption is no text, but 3", "its caption is no text, but True", *["it has no caption"] * 3,
        "its caption is not text in UTF-8",
    ]  # fmt: skip


def test_the_first_key_with_text_counts(tmp_path):
    entries = [{"text": None, "caption": "one"}, {"text": " ", "prompt": "two"}, {"caption": "three", "text": 3}]
    text = lines_of(*({"file_name": f"{i}.png", **entry} for i, entry in enumerate(entries)))
    place = folder(tmp_path, {**{f"{i}.png": None for i in range(3)}, "metadata.jsonl": text})
    assert found(place) == ({"0.png": "one", "1.png": "two", "2.png": "three"}, {})


def test_what_a_list_names_and_is_not_there(tmp_path):
    names = ["a.png", "missing.png", "sub/../c.png", "sub\\b.png", "a.gif", "x.png"]
    files = {"a.png": None, "sub/b.png": None, "a.gif": None, "c.png": None, "x.png/y": "a folder"}
    wrong = [
        '[{"file_name": "a.png"}]',
        '"text"',
        '{"image": "a.png", "text": "x"}',
        '{"file_name": 3, "text": "x"}',
        "{",
    ]
    text = lines_of(*({"file_name": name, "text": "x"} for name in names)).encode()
    place = folder(tmp_path, {**files, "metadata.jsonl": text + "\n".join(wrong).encode() + b"\n\xff\n"})
    captions, skipped = found(place)
    assert captions == {"a.png": "x", "sub/b.png": "x", "sub/../c.png": "x"}
    assert {name.partition(" (")[0]: why for name, why in skipped.items() if "(" in name} == {
        "missing.png": "it is not there", "x.png": "it is not there as a file, but as a folder, pipe or device",
        "a.gif": "it is none of .png, .jpg, .jpeg, .jfif, .webp, .bmp, .tif, .tiff: convert it",
    }  # fmt: skip
    assert found(folder(tmp_path / "odd", {"a.png": None, "metadata.jsonl": lines_of(
        {"file_name": "a.png", "text": "x"}, {"file_name": "a\0.png", "text": "x"})}))[1] == {
        "a\0.png (line 2 of metadata.jsonl)": "no file can have this name"}  # fmt: skip
    for number in range(7, 12):
        like = 'it is not like {"file_name": "cat.jpg", "text": "a cat"}'
        assert skipped[f"line {number} of metadata.jsonl"] == like
    assert skipped["line 12 of metadata.jsonl"] == "it is not text in UTF-8"


def test_tables_of_captions(tmp_path):
    """Cells hold line ends, quotes and commas; a row in another encoding or without a cell does not end the others."""
    rows = BOM + 'file_name,text,n\r\na.png,"one,\r\n""two""\u2028",1\r\n\r\nb.png,"\nb\n",2\n'.encode()
    rows += b"c.png,gr\xfcn,3\nd.png\ne.png,last,5\nnone.png,x,0\nf.png,a cat, sitting,6\n"
    place = folder(tmp_path, {**{f"{name}.png": None for name in "abcdef"}, "metadata.csv": rows})
    captions, skipped = found(place)
    assert captions == {"a.png": 'one,\r\n"two"', "b.png": "b", "e.png": "last"}
    assert skipped == {
        "c.png (row 3 of metadata.csv)": "its caption is not text in UTF-8",
        "d.png (row 4 of metadata.csv)": "it has no caption", "none.png (row 6 of metadata.csv)": "it is not there",
        "row 7 of metadata.csv": "it has more cells than columns: quote text with commas",
    }  # fmt: skip


def test_a_long_cell_does_not_end_a_table(tmp_path):
    rows = "file_name,text\na.png," + "x" * 200_000 + "\nb.png,b\n"
    captions, skipped = found(folder(tmp_path, {"a.png": None, "b.png": None, "metadata.csv": rows}))
    assert captions == {"a.png": "x" * 200_000, "b.png": "b"} and not skipped


@pytest.mark.parametrize("name, text, says", [
    ("metadata.csv", "file_name;text\na.png;one\n", "its columns must be file_name and text or caption or prompt, "
                                                    "separated by commas, not file_name;text"),
    ("metadata.csv", "", "its columns must be file_name and text"),
    ("metadata.csv", "file_name,text\na.png,one\n".encode("utf-16"), "metadata.csv: it is not text in UTF-8"),
    ("metadata.csv", "image,text\na.png,one\n", "not image, text"),
    ("metadata.csv", "file_name,text\n", "metadata.csv: it names no image"),
    ("metadata.csv", 'file_name,text\na.png,"' + "x" * 2_000_000, "it is damaged after row 0"),
    ("metadata.jsonl", "\n \n", "metadata.jsonl: it names no image"),
    ("metadata.jsonl", '[\n {\n  "file_name": "a.png",\n  "text": "one"\n }\n]', "line 1 of metadata.jsonl: it is not"),
    ("sub/metadata.jsonl", lines_of({"file_name": "b.png", "text": "x"}),
     "or give the folder of its metadata.jsonl as data.path"),
])  # fmt: skip
def test_a_list_that_is_none_is_one_sentence(tmp_path, name, text, says):
    with pytest.raises(ValueError) as error:
        found(folder(tmp_path, {"sub/b.png": None, name: text}))
    assert says in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- shards


def shard(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def test_of_several_images_the_plain_suffix_counts(tmp_path):
    """The order of the members says nothing; captions likewise."""
    blue, members = png("blue"), []
    for key, images, texts in (
        ("0", ["mask.png", "jpg"], ["txt"]), ("1", ["jpg", "mask.png"], ["txt"]), ("2", ["jpg", "png"], ["txt"]),
        ("3", ["a.png", "b.png"], ["txt"]), ("4", ["seg.png"], ["txt"]), ("5", ["png"], ["caption.txt"]),
        ("6", ["png"], ["a.txt", "b.txt"]), ("7", ["png"], ["other.txt", "txt"]), ("8", ["0.png"], ["0.txt"]),
        ("9", ["png", "Mask.PNG"], ["TXT"]),
    ):  # fmt: skip
        members += [(f"{key}.{kind}", blue if kind in ("jpg", "seg.png") else PNG) for kind in images]
        members += [(f"{key}.{kind}", b"x" if kind == "other.txt" else b"right") for kind in texts]
    shard(tmp_path / "a.tar", members)
    collection = find_images(Place("webdataset", str(tmp_path)))
    read = {image.name[-1]: (image.read() == blue, image.caption) for image in collection.images}
    assert read == {k: (k in "014", "right") for k in "0145789"}
    assert {s.name[-1]: s.why for s in collection.skipped} == {
        "2": "it has several images (jpg, png): name one in data.image_column",
        "3": "it has several images (a.png, b.png): name one in data.image_column",
        "6": "it has several captions (a.txt, b.txt) and none with a plain suffix",
    }
    named, skipped = found(tmp_path, "webdataset", image_column="mask.png")
    assert (
        sorted(named) == ["a.tar: 0", "a.tar: 1", "a.tar: 9"]
        and skipped["a.tar: 4"] == "it has no mask.png, but seg.png, txt"
    )


def test_a_key_of_captions_is_looked_for_in_json_first(tmp_path):
    """A text beside it has no keys, and would be another caption than the one that is asked for."""
    entry = json.dumps({"long": "the long one", "caption": "x"}).encode()
    shard(tmp_path / "a.tar", [("a.png", PNG), ("a.txt", b"short"), ("a.json", entry), ("b.png", PNG), ("b.txt", b"b")])
    assert found(tmp_path, "webdataset") == ({"a.tar: a": "short", "a.tar: b": "b"}, {})
    long = found(tmp_path, "webdataset", caption_column="long")
    assert long == ({"a.tar: a": "the long one", "a.tar: b": "b"}, {})


def test_hidden_members_are_no_sample_and_doubles_are_ambiguous(tmp_path):
    """macOS puts ._NAME beside every file; two shards written into one may give one sample's text to another."""
    members = [("._a.png", PNG), ("._a.txt", b"junk"), ("./.b.png", PNG), ("./.b.txt", b"junk"), ("a.png", PNG)]
    members += [("a.txt", b"x"), ("c.png", PNG), ("c.txt", b"one"), ("c.PNG", png("blue"))]
    shard(tmp_path / "a.tar", members)
    doubled = {"a.tar: c": "it holds png twice, of two samples perhaps"}
    assert found(tmp_path, "webdataset") == ({"a.tar: a": "x"}, doubled)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_shard_says_so(tmp_path, mode):
    shard(tmp_path / "a.tar", [("a.png", PNG), ("a.txt", b"x")], mode)
    with pytest.raises(ValueError, match=r"a\.tar: it is compressed, .* decompress it to a plain tar file\."):
        found(tmp_path, "webdataset")
    (tmp_path / "a.tar").rename(tmp_path / "a.tar.gz")
    with pytest.raises(
        ValueError, match=r"no shards \(\.tar\) in .*: decompress its files of \.tar\.gz and the like\."
    ):
        found(tmp_path, "webdataset")


def test_shards_of_any_spelling_and_no_patterns(tmp_path):
    shard(
        tmp_path / "A.TAR", [("a.png", PNG), ("a.txt", BOM + b"x"), ("b.png", PNG), ("b.json", BOM + b'{"text": "y"}')]
    )
    assert found(tmp_path, "") == ({"A.TAR: a": "x", "A.TAR: b": "y"}, {})
    for name, source, kind in (("{0..1}.tar", "webdataset", "shards"), ("*.tar", "webdataset", "shards")):
        with pytest.raises(ValueError, match=f"there are no {kind} .*: patterns are not expanded, so give one file or"):
            found(tmp_path / name, source)


# ---------------------------------------------------------------- tables


def table(path, **columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.needs("pyarrow")
def test_tables_whose_images_are_no_bytes_are_refused(tmp_path):
    import base64

    import pyarrow

    text = ["a", "b"]
    for name, cells in {
        "paths": ["a.png", "b.png"], "base64": [base64.b64encode(PNG).decode()] * 2, "lists": [[1, 2], [3]],
        "lists of bytes": [[PNG], [PNG]], "structs": [{"url": "x"}, {"url": "y"}],
        "structs of base64": [{"bytes": base64.b64encode(PNG).decode(), "path": "x.png"}] * 2,
        "structs of numbers": [{"bytes": [1, 2]}] * 2, "numbers": [1, 2],
        "dictionary of strings": pyarrow.array(["a", "b"]).dictionary_encode(),
    }.items():  # fmt: skip
        table(tmp_path / "a.parquet", image=cells, text=text)
        with pytest.raises(ValueError, match=r"data\.image_column: 'image' of .* is a column of .*read from bytes, or"):
            find_images(Place("parquet", str(tmp_path / "a.parquet")), 1)
        recipe = {"method": "lcm", "teacher": "no/such", "data": {"source": "parquet", "path": str(tmp_path)}}
        from fewstep.runs.setup import setup

        with pytest.raises(ValueError, match=r"data\.image_column"):  # before a teacher is looked for
            setup(parse_recipe(recipe), tmp_path / f"run {name}")
    (tmp_path / "b.png").write_bytes(PNG)
    for cells in (
        [PNG, PNG], pyarrow.array([PNG] * 2, pyarrow.large_binary()), pyarrow.array([PNG, PNG]).dictionary_encode(),
        pyarrow.array([PNG, PNG], pyarrow.binary(len(PNG))), [{"bytes": PNG, "path": None}] * 2, [{"bytes": PNG}] * 2,
        [{"bytes": None, "path": "b.png"}] * 2, [{"path": "b.png"}] * 2,
    ):  # fmt: skip
        table(tmp_path / "a.parquet", image=cells, text=text)
        images = find_images(Place("parquet", str(tmp_path / "a.parquet"))).images
        assert [image.read() for image in images] == [PNG, PNG]


@pytest.mark.needs("pyarrow")
def test_captions_of_tables(tmp_path):
    import pyarrow
    import pyarrow.parquet

    cells = [PNG] * 4
    table(tmp_path / "a.parquet", caption=["a", "b", "c", None], image=cells, text=[None, "", "t", None])
    captions, skipped = found(tmp_path, "parquet")
    assert captions == {f"a.parquet: row {i}": text for i, text in enumerate("abt")}
    assert skipped == {"a.parquet: row 3": "it has no caption"}
    twice = pyarrow.Table.from_arrays(
        [pyarrow.array(cells)] * 2 + [pyarrow.array(["x"] * 4)], ["image", "image", "text"]
    )
    pyarrow.parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"data\.image_column: .* has several columns of the name image: rename them\."
    ):
        found(tmp_path, "parquet")
    table(tmp_path / "a.parquet", image=cells, text=[["a", "b"], ["c"], [], None])
    with pytest.raises(ValueError, match=r"row 0: its caption is no text, but \['a', 'b'\]"):
        found(tmp_path, "parquet")
    table(tmp_path / "a.parquet", image=cells, text=pyarrow.array([b"bytes", b"\xff", b"", None]))
    assert found(tmp_path, "parquet")[0] == {"a.parquet: row 0": "bytes"}


@pytest.mark.needs("datasets")
def test_a_saved_data_set_of_paths_is_refused(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"image": ["a.png"], "text": ["x"]}).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=r"data\.image_column: 'image' of .* is a column of string"):
        found(tmp_path / "set", "datasets")


# ---------------------------------------------------------------- prompts, preferences, paths


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_prompts_in_another_encoding_are_one_sentence(tmp_path, encoding):
    for name, text in (("p.txt", "\ufeffa\nb\n"), ("p.jsonl", "\ufeff" + lines_of({"text": "a"}, {"text": "b"}))):
        (tmp_path / name).write_bytes(text.removeprefix("\ufeff" if encoding == "utf-16" else "").encode(encoding))
        with pytest.raises(ValueError, match=f"the first because line 1 of {name}: it is text in UTF-16, not in UTF-8"):
            find_captions(Place("prompts", str(tmp_path / name)))


def test_prompts_that_are_no_text_are_listed(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(lines_of({"text": "one"}, {"text": 3}, "just text", {"prompt": "two"}, {"text": ["a"]}))
    prompts, skipped = captions_and_skipped(Place("prompts", str(path)))
    assert prompts == ("one", "two") and [str(entry) for entry in skipped] == [
        "line 2 of p.jsonl: its caption is no text, but 3",
        "line 3 of p.jsonl: its JSON has no text by the name of text or caption or prompt",
        "line 5 of p.jsonl: its caption is no text, but ['a']",
    ]


@pytest.mark.slow
def test_a_run_lists_the_prompts_that_it_could_not_use(short, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"a red circle\n\xff\ntwo shapes\n")
    data = ["data.source=prompts", f"data.path={tmp_path / 'p.txt'}", "data.size=null", "method.adversarial_weight=0"]
    prepare_data(load_recipe("scenes-64-dmd2", [*short, *data]), tmp_path / "run")
    listed = (tmp_path / "run" / "data" / SKIPPED).read_text()
    assert listed == "line 2 of p.txt: its caption is not text in UTF-8\n"


def test_names_that_are_no_text_can_be_listed(tmp_path):
    entry = Skipped(os.fsdecode(b"\xff\xfe.png"), "it is\nblue")
    Encoding(tmp_path / "latents", None, "x", 0, None)._list([str(entry)])
    assert (tmp_path / SKIPPED).read_text(encoding="utf-8") == "\\udcff\\udcfe.png: it is blue\n"
    assert len(text_hash(entry.name)) == 16


def test_preferences_may_begin_with_a_mark(tmp_path):
    folder(tmp_path, {"a.png": None, "b.png": None})
    line = lines_of({"prompt": "x\u2028y", "chosen": "a.png", "rejected": "b.png"}).encode()
    (tmp_path / "preferences.jsonl").write_bytes(BOM + line.replace(b"\n", b"\r\n"))
    assert [choice.prompt for choice in read_preferences(tmp_path).choices] == ["x\u2028y"]


def test_the_home_folder_stands_for_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder(tmp_path / "set", {"a.png": None, "a.txt": "x"})
    assert found("~/set") == ({"a.png": "x"}, {}) == found("~/set", "")
    recipe = parse_recipe({
        "method": {"name": "feedback", "rewards": [{"model": "~/r.safetensors", "threshold": 1.0}]},
        "teacher": {"path": "~/m.safetensors@~/configs", "loras": ["~/l.safetensors", "owner/name~x"], "config": "~"},
        "init": "~/i+~/j", "data": {"source": "folder", "path": "~/set"}, "pairs": {"path": "~/pairs"},
        "sample": {"prompts": ["~/is a prompt", "~"]},
    })  # fmt: skip
    home = str(tmp_path)
    assert recipe.teacher.path == f"{home}/m.safetensors@{home}/configs" and recipe.teacher.config == home
    assert recipe.teacher.loras == (f"{home}/l.safetensors", "owner/name~x")
    assert (recipe.init, recipe.data.path, recipe.pairs.path) == (f"{home}/i+{home}/j", f"{home}/set", f"{home}/pairs")
    assert recipe.method["rewards"][0]["model"] == f"{home}/r.safetensors"
    assert recipe.sample.prompts == ("~/is a prompt", "~")
    (tmp_path / "mine.yaml").write_text("method: lcm\ndata: {source: folder, path: ~/set}\n")
    assert find_recipe("~/mine.yaml") == tmp_path / "mine.yaml"
    assert load_recipe("~/mine.yaml").data.path == load_recipe("~/mine.yaml", ["data.path=~/set"]).data.path


def test_the_home_folder_of_what_is_loaded(tmp_path, monkeypatch):
    from fewstep.inference import load
    from fewstep.models import families

    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []
    monkeypatch.setattr(load, "find_export", seen.append)
    monkeypatch.setattr(load, "check_lora", lambda path: None)
    monkeypatch.setattr(load, "student_folder", lambda path: path)
    monkeypatch.setattr(load, "_student", lambda folder, base, styles, how: (folder, base, styles))
    found = load.load_model("~/runs/mine", base="~/base", loras=["~/a.safetensors", ("~/b.safetensors", 2)])
    styles = [(tmp_path / "a.safetensors", 1.0), (tmp_path / "b.safetensors", 2.0)]
    assert seen == [tmp_path / "runs" / "mine"] and found == (seen[0], "~/base", styles)
    assert families.load.expanded("~/base") == tmp_path / "base"  # what loads a base
    assert families.load.expanded("~nobody here/base") == Path("~nobody here/base")


def test_the_home_folder_on_the_command_line(tmp_path, monkeypatch):
    """In every word where a path may begin; prompts are texts."""
    monkeypatch.setenv("HOME", "/h")
    words = ["sample", "~/m", "--out=~/a.png", "--image", "~/i.png", "--lora", "~/l:0.5", "--set", "data.path=~/x"]
    assert at_home(words) == [
        "sample", "/h/m", "--out=/h/a.png", "--image", "/h/i.png", "--lora", "/h/l:0.5", "--set", "data.path=~/x"
    ]  # fmt: skip
    prompts = ["-p", "~/a", "--prompt", "~", "--prompt=~/b", "--negative-prompt", "~/c", "-p", "~", "-q"]
    assert at_home(prompts) == prompts
