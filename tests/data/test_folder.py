"""Folders of pictures: what is found in them, how it is cut, when it is encoded again, and what is refused."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fewstep.data.cache import folder_latents, home
from fewstep.data.folder import find_pictures, fingerprint_of, read_pictures
from fewstep.data.sources import LatentSource
from fewstep.models.cond import Cond
from fewstep.models.families import as_teacher
from fewstep.recipe import RecipeError, parse_recipe
from tests.models.pipelines import SIZE, build


def picture(path, colour="red", size=(80, 64), **how):
    Image.new("RGB", size, colour).save(path, **how)


@pytest.fixture
def folder(tmp_path):
    """Two pictures, one of them deeper."""
    (tmp_path / "more").mkdir()
    for name, caption in (("b.png", "a blue square"), ("more/a.jpg", "a red circle\n")):
        picture(tmp_path / name, caption.split()[1])
        (tmp_path / name).with_suffix(".txt").write_text(caption)
    return tmp_path


def test_captions_stand_beside_their_pictures_or_in_a_list(folder):
    found = find_pictures(folder)
    assert [(p.path.name, p.caption) for p in found] == [("b.png", "a blue square"), ("a.jpg", "a red circle")]
    assert find_pictures(folder, 1) == found[:1]
    lines = [{"file_name": "more/a.jpg", "text": "one"}, {"file_name": "b.png", "text": "two"}]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert [(p.path.name, p.caption) for p in find_pictures(folder)] == [("b.png", "two"), ("a.jpg", "one")]


def test_pictures_are_upright_square_and_of_the_teachers_size(tmp_path):
    """Red on the left, blue on the right: as a square that its camera says to turn, and twice as broad as high."""
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise: the left half comes to the top
    for name, size, red, how in (("a", (60, 60), 30, {"exif": exif}), ("b", (60, 30), 24, {})):
        image = Image.new("RGB", size, "blue")
        image.paste("red", (0, 0, red, size[1]))
        image.save(tmp_path / f"{name}.png", **how)
        (tmp_path / f"{name}.txt").write_text("a")
    turned, cut = read_pictures(find_pictures(tmp_path), 32)
    assert turned.shape == (3, 32, 32) and (turned.min(), turned.max()) == (-1, 1)
    assert (turned[0, :14] > 0.9).all() and (turned[2, 18:] > 0.9).all()
    # of the broad one the middle, from 15 to 45, is kept: red up to 24, which is 9 of 30
    assert (cut[0, :, :8] > 0.9).all() and (cut[2, :, 12:] > 0.9).all()


def test_a_changed_caption_or_picture_is_encoded_again(folder, tmp_path):
    teacher = as_teacher(build("sdxl"), size=SIZE)
    path, encoded = tmp_path / "cache" / "latents.safetensors", []

    def latents():
        return folder_latents(path, teacher, find_pictures(folder), advance=encoded.append)

    first = latents()
    assert encoded == [2] and torch.equal(latents().mean, first.mean) and encoded == [2]
    assert set(first.cond) == {"prompt_embeds", "pooled_embeds", "time_ids"} and len(first.cond) == 2
    assert first.cond["time_ids"].tolist() == [[SIZE, SIZE, 0, 0, SIZE, SIZE]] * 2
    assert first.cond.null()["time_ids"].tolist() == first.cond["time_ids"].tolist()
    (folder / "b.txt").write_text("a square")
    assert not torch.equal(latents().cond["prompt_embeds"], first.cond["prompt_embeds"]) and encoded == [2, 2]
    picture(folder / "b.png", "green")
    os.utime(folder / "b.png", ns=(1, 1))
    assert not torch.equal(latents().mean, first.mean) and encoded == [2, 2, 2]
    other = as_teacher(build("sdxl"), size=2 * SIZE)
    assert folder_latents(path, other, find_pictures(folder)).mean.shape[-1] == 2 * first.mean.shape[-1]
    assert fingerprint_of(find_pictures(folder)) != fingerprint_of(find_pictures(folder, 1))


def test_large_data_stay_on_the_host():
    assert (home("cuda", 2**31), home("cuda", 2**31 + 1), home("cpu", 2**40)) == ("cuda", "cpu", "cpu")
    # the batch comes from there to wherever the step is
    source = LatentSource(torch.ones(4, 2), torch.zeros(4, 2), Cond({"a": torch.ones(4, 3)}))
    batch = source.batch(SimpleNamespace(
        seed=0, step=0, rows=slice(0, 2), batch_size=2, device="meta", dtype=torch.float32,
        sample=SimpleNamespace(normal=lambda name, shape: torch.zeros(2, *shape, device="meta")),
    ))  # fmt: skip
    assert batch.x0.is_meta and batch.cond["a"].is_meta


def test_what_is_wrong_with_a_folder_is_one_sentence(folder, tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        find_pictures(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        find_pictures(tmp_path / "empty")
    (folder / "more" / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"a\.jpg has no caption: write it to a\.txt"):
        find_pictures(folder)
    (folder / "more" / "a.txt").write_text("a")
    (folder / "b.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"b\.png cannot be read as a picture"):
        read_pictures(find_pictures(folder), 8)
    missing = '{"file_name": "x.png", "text": "a"}'
    for line, says in (('{"file_name": 3}', "line 1 of .* is not like"), (missing, "which is not there")):
        (folder / "metadata.jsonl").write_text(line)
        with pytest.raises(ValueError, match=says):
            find_pictures(folder)


@pytest.mark.parametrize("data", [{"source": "folder"}, {"path": "pictures"}])
def test_a_folder_and_its_path_go_together(data):
    with pytest.raises(RecipeError, match=r"data\.path and 'source: folder' go together"):
        parse_recipe({"method": "lcm", "data": data})
    assert parse_recipe({"method": "lcm"}).data.size == 4000
