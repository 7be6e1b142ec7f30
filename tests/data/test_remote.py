"""Shards that are streamed: the samples that `shard_images` finds, patterns of names, and errors of one sentence."""

import functools
import http.server
import io
import tarfile
import threading

import pytest
from PIL import Image

from fewstep.data.entries import Skipped
from fewstep.data.find import Place
from fewstep.data.remote import expanded, open_shards
from fewstep.data.shards import shard_images
from fewstep.scenes64.scenes import Scenes, write_webdataset


def png(colour):
    data = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(data, "PNG")
    return data.getvalue()


def tar(path, members, mode="w"):
    """A tar file of (name, content) or of TarInfos."""
    with tarfile.open(path, mode) as file:
        for name, content in members:
            entry = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


def entries(path, **columns):
    shards = open_shards(Place("webdataset", str(path), **columns))
    return [entry for number in range(len(shards.names)) for entry in shards.read(number)]


def told(found):
    return [str(e) if isinstance(e, Skipped) else (e.name, e.caption, e.read()) for e in found]


def link(name):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return entry


MEMBERS = [
    ("cat.jpg", png("red")), ("cat.txt", b"a cat"), ("dog.PNG", png("blue")), ("dog.json", b'{"text": "a dog"}'),
    ("._cat.jpg", b"from macOS"), ("deep/cat.png", png("green")), ("deep/cat.caption", b"another cat"),
    ("fox.jpg", png("white")), ("fox.mask.png", png("black")), ("fox.txt", b"a fox"), ("owl.png", png("red")),
    ("pkl.pkl", b"abc"), (link("bee.png"), b""), ("two.png", png("red")), ("two.png", png("blue")), ("two.txt", b"2"),
    ("bad.png", png("red")), ("bad.json", b"{"), ("ant.png", b"no image"), ("ant.txt", b"an ant"),
]  # fmt: skip


def test_samples_are_those_of_shards_that_are_listed(tmp_path):
    """Names, captions and bytes of usable ones; the others are entries too, each with its reason."""
    path = tar(tmp_path / "a.tar", MEMBERS)
    listed = {e.name: (e.caption, e.read()) for e in shard_images(path) if not isinstance(e, Skipped)}
    found = entries(path)
    usable = {e.name: (e.caption, e.read()) for e in found if not isinstance(e, Skipped)}
    assert usable == listed and set(usable) == {f"a.tar: {name}" for name in ("cat", "dog", "deep/cat", "fox", "ant")}
    assert [str(e) for e in found if isinstance(e, Skipped)] == [
        "a.tar: owl: it has no caption",
        "a.tar: pkl: it has no image, but pkl",
        "a.tar: bee: it is a link or a device",
        "a.tar: two: it holds png twice",
        "a.tar: bad: its JSON is damaged",
    ]
    named = tar(tmp_path / "b.tar", [("a.x.png", png("red")), ("a.y.png", png("blue")), ("a.json", b'{"alt": "b"}')])
    (only,) = entries(named, image_column="y.png", caption_column="alt")
    assert (only.caption, only.read()) == ("b", png("blue"))


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_shards_may_be_compressed(tmp_path, mode):
    assert told(entries(tar(tmp_path / "a.tar", MEMBERS, mode))) == told(entries(tar(tmp_path / "a.tar", MEMBERS)))


def test_of_a_shard_cut_short_what_is_whole_is_kept(tmp_path):
    whole = tar(tmp_path / "a.tar", MEMBERS).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: whole.index(b"owl.png") + 600])
    *kept, last = told(entries(tmp_path / "a.tar"))
    assert [name for name, *_ in kept] == [f"a.tar: {name}" for name in ("cat", "dog", "deep/cat", "fox")]
    assert last == "a.tar: it is cut short, damaged, or no tar file: what follows is lost"
    (tmp_path / "b.tar").write_bytes(b"hello" * 500)
    assert told(entries(tmp_path / "b.tar")) == [
        "b.tar: it is cut short, damaged, or no tar file: what follows is lost"
    ]


def test_a_folder_a_pattern_and_a_range_name_the_same_shards(tmp_path):
    write_webdataset(tmp_path, Scenes(1, size=16), 10, shard_size=4)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["scenes-000000.tar", "scenes-000001.tar", "scenes-000002.tar"]
    patterns = ["*.tar", "scenes-{000000..000002}.tar", f"{{{','.join(names)}}}"]
    ways = [tmp_path, *(tmp_path / pattern for pattern in patterns)]
    found = [told(entries(way)) for way in (*ways, f"file://{ways[2]}")]
    assert all(each == found[0] for each in found) and len(found[0]) == 10
    assert [name for name, *_ in found[0]] == [e.name for e in shard_images(tmp_path)]


def test_ranges_are_spelled_out_as_shells_do():
    assert expanded("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expanded("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"] and expanded("plain") == ["plain"]
    for pattern in ("{3..1}", "{0..99999999}", "{0..9999}{0..9999}"):
        with pytest.raises(ValueError, match=r"^data\.path: .+\.$"):
            expanded(pattern)


@pytest.mark.parametrize(("path", "says"), [
    ("{tmp}/none.tar", r"there is no shard '{tmp}/none\.tar'"),
    ("{tmp}/{{0..2}}.tar", r"there is no shard '{tmp}/2\.tar'"),
    ("{tmp}/*.zip", r"there is no shard '{tmp}/\*\.zip'"),
    ("{tmp}/empty", r"there are no shards \(\.tar\) in '{tmp}/empty'"),
    ("{tmp}/{{5..2}}.tar", r"\{{5\.\.2\}} is no range of 1 to 1,000,000 shards"),
    ("nosuch://x/a.tar", "nosuch://x/a.tar cannot be read|there is no shard"),
], ids=["file", "range", "pattern", "folder", "backwards", "storage"])  # fmt: skip
def test_a_shard_that_is_not_there_is_one_sentence(tmp_path, path, says):
    (tmp_path / "empty").mkdir()
    for number in range(2):
        tar(tmp_path / f"{number}.tar", MEMBERS)
    with pytest.raises(ValueError, match=rf"^data\.path: {says.format(tmp=tmp_path)}.*\.$"):
        open_shards(Place("webdataset", path.format(tmp=tmp_path)))


def test_a_package_that_is_missing_is_one_sentence(monkeypatch):
    import fsspec

    def absent(name):
        raise ImportError("HTTPFileSystem requires aiohttp")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(
        ValueError, match=r"^data\.path: reading https://x/a\.tar needs a package: pip install 'fewstep"
    ):
        open_shards(Place("webdataset", "https://x/a.tar"))


@pytest.mark.needs("aiohttp")
def test_shards_come_over_http(tmp_path):
    write_webdataset(tmp_path, Scenes(1, size=16), 10, shard_size=4)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        names = sorted(path.name for path in tmp_path.iterdir())
        assert told(entries(f"{url}/{{{','.join(names)}}}")) == told(entries(tmp_path))
        with pytest.raises(ValueError, match=r"^data\.path: there is no shard 'http://127.+/9\.tar'\.$"):
            open_shards(Place("webdataset", f"{url}/9.tar"))
        server.shutdown()


@pytest.mark.needs("pyarrow", "datasets")
def test_tables_are_streamed(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for number in range(2):
        cells = [{"bytes": png(colour), "path": None} for colour in ("red", "blue")] + [
            {"bytes": None, "path": "x.png"}
        ]
        table = pyarrow.table({"image": cells, "text": [f"a {number}", "", "c"]})
        pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet")
    shards = open_shards(Place("parquet", str(tmp_path)))
    assert len(shards.names) == 2
    first, second = (list(shards.read(number)) for number in range(2))
    assert [e.caption for e in (first[0], second[0])] == ["a 0", "a 1"] and first[0].read() == png("red")
    assert str(first[1]) == "0.parquet: row 1: it has no caption"
    with pytest.raises(ValueError, match="it has no image"):
        first[2].read()
    with pytest.raises(ValueError, match=r"data\.caption_column: there is no column 'b'"):
        open_shards(Place("parquet", str(tmp_path), caption_column="b"))
