"""webdataset shards: samples, captions, what a hostile tar can hold; nothing is unpacked and no pickle is opened."""

from __future__ import annotations

import io
import json
import pickle
import tarfile

import pytest
from PIL import Image

from fewstep.data.find import Place, find_captions, find_images
from fewstep.data.images import pixels
from fewstep.scenes64.scenes import Scenes, write_webdataset


def png(colour="red", size=(64, 64)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def shard(path, members):
    """A tar file of (name, bytes), or of a ready TarInfo."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                name, data = member
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def find(path, limit=None, **columns):
    return find_images(Place("webdataset", str(path), **columns), limit)


def test_scenes_written_as_shards_are_read_back(tmp_path):
    """The same bytes and captions, in their order, over several shards."""
    scenes = Scenes(3, size=16)
    write_webdataset(tmp_path, scenes, 7, shard_size=3)
    found = find(tmp_path)
    assert found.skipped == ()
    assert [p.caption for p in found.images] == [scenes.scene(i).caption for i in range(7)]
    assert found.images[4].name == "scenes-000001.tar: 00000004"
    rendered = scenes.render(range(7)).images
    for picture, image in zip(found.images, rendered, strict=True):
        assert (pixels(picture, lambda height, width: (16, 16)).permute(1, 2, 0).numpy() == image).all()
    assert [p.name for p in find(tmp_path, 4).images] == [p.name for p in found.images[:4]]
    assert [p.caption for p in find(tmp_path / "scenes-000002.tar").images] == [scenes.scene(6).caption]
    assert find_captions(Place("", str(tmp_path)))[:2] == tuple(scenes.scene(i).caption for i in range(2))


def test_captions_are_text_or_a_key_of_json(tmp_path):
    members = [
        ("a.JPG", png()),
        ("a.caption", b"one"),
        ("sub/b.seg.png", png("blue")),
        ("sub/b.json", b'{"caption": "two"}'),
    ]
    members += [("c.png", png()), ("c.json", json.dumps({"title": "three", "n": 3}).encode())]
    shard(tmp_path / "x.tar", members)
    found = find(tmp_path)
    assert [(p.name, p.caption) for p in found.images] == [("x.tar: a", "one"), ("x.tar: sub/b", "two")]
    assert [str(s) for s in found.skipped] == [
        "x.tar: c: its JSON has no text by the name of text or caption or prompt"
    ]
    assert [p.caption for p in find(tmp_path, caption_column="title").images] == ["one", "three"]


class _Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def linked(name, to, kind=tarfile.SYMTYPE):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, to
    return entry


def test_a_hostile_tar_gives_its_good_samples_and_reasons(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    device = tarfile.TarInfo("i.png")
    device.type = tarfile.CHRTYPE
    bad = pickle.dumps(_Trap())
    shard(tmp_path / "x.tar", [
        ("good.png", png()), ("good.txt", b"good"), ("good.pkl", bad), ("good.pyd", bad),
        ("a.pkl", bad), ("a.txt", b"a pickle alone"),
        ("../b.png", png()), ("../b.txt", b"above"),
        (str(tmp_path / "c.png"), png()), ("c.txt", b"absolute"),
        ("d.png", png()), linked("d.txt", str(secret)),
        linked("e.png", "good.png", tarfile.LNKTYPE), ("e.txt", b"a hard link"),
        ("f.png", png()), ("f.txt", b"\xff\xff"),
        ("g.png", png()), ("h.png", png()), ("h.json", b"{"), device, ("i.txt", b"a device"),
        ("j.png", bad), ("j.txt", b"a pickle that says it is a picture"),
    ])  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    found = find(tmp_path)
    assert [p.name for p in found.images] == ["x.tar: good", "x.tar: j"]
    with pytest.raises(ValueError, match="damaged, or no image"):
        pixels(found.images[1], lambda height, width: (8, 8))
    why = {entry.name.removeprefix("x.tar: "): entry.why for entry in found.skipped}
    assert why["a"] == "it has no image, but pkl, txt"
    assert why["../b.png"] == why["../b.txt"] == why[str(tmp_path / "c.png")] == "its name lies outside the folder"
    assert why["d.txt"] == why["e.png"] == why["i.png"] == "it is a link or a device"
    assert why["d"] == why["g"] == "it has no caption" and why["f"] == "its caption is not text in UTF-8"
    assert why["h"] == "its JSON is damaged" and why["c"] == why["e"] == why["i"] == "it has no image, but txt"
    assert len(why) == 14 and sorted(tmp_path.rglob("*")) == before  # nothing was unpacked
    assert "secret" not in repr(found)


@pytest.mark.parametrize("keep", [0, 100, 512 + 200, 1024 + 512 + 3, 2048 + 700, 5000])
def test_of_a_tar_cut_short_what_is_whole_is_kept(tmp_path, keep):
    members = [(f"{i}.{kind}", data) for i in range(3) for kind, data in (("png", png()), ("txt", b"x" * 600))]
    shard(tmp_path / "a.tar", members)
    whole = (tmp_path / "a.tar").read_bytes()
    assert keep < len(whole)
    (tmp_path / "b.tar").write_bytes(whole[:keep])
    found = find(tmp_path)
    assert [p.name for p in found.images][:3] == ["a.tar: 0", "a.tar: 1", "a.tar: 2"]
    mine = [p.name for p in found.images[3:]]
    assert mine == [f"b.tar: {i}" for i in range(len(mine))] and len(mine) < 3
    assert any("cut short" in entry.why for entry in found.skipped)
    for picture in found.images:
        pixels(picture, lambda height, width: (8, 8))
        assert picture.caption == "x" * 600


def test_a_tar_cut_between_members_is_noticed(tmp_path):
    shard(tmp_path / "a.tar", [("0.png", png()), ("0.txt", b"x")])
    whole = (tmp_path / "a.tar").read_bytes()
    end = 512 + -(-len(png()) // 512) * 512 + 1024
    assert not any(whole[end:])
    (tmp_path / "a.tar").write_bytes(whole[:end])
    found = find(tmp_path)
    assert len(found.images) == 1
    assert [str(entry) for entry in found.skipped] == ["a.tar: it is cut short: its end-of-archive block is missing"]


def test_what_is_wrong_with_shards_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"there are no shards \(\.tar\) in"):
        find(tmp_path)
    (tmp_path / "in.tar").write_bytes(pickle.dumps(_Trap()) * 100)
    with pytest.raises(ValueError, match=r"the first because in\.tar: it is cut short or no tar file"):
        find(tmp_path)
    (tmp_path / "in.tar").unlink()
    (tmp_path / "deeper").mkdir()
    shard(tmp_path / "out.tar", [("a.png", png()), ("a.txt", b"x")])
    (tmp_path / "deeper" / "link.tar").symlink_to(tmp_path / "out.tar")
    with pytest.raises(ValueError, match=r"link\.tar: it lies outside the folder"):
        find(tmp_path / "deeper")
