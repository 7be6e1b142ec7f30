"""Runs on data of every kind: from bytes on disk to a student, resumed to the bit, with what was skipped said."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
import torch
from PIL import Image

from fewstep.data.random import Rng
from fewstep.recipe.load import load_recipe, parse_recipe
from fewstep.recipe.validate import RecipeError
from fewstep.runs.distill import distill, prepare_data
from fewstep.runs.setup import setup
from fewstep.scenes64.scenes import Scenes, write_image_folder, write_webdataset
from fewstep.training.checkpoint import latest, load, same
from tests.command_line import inside, sets, stop_and_go_on


def recipe(short, *more, name="scenes-64-tcd"):
    return load_recipe(name, [*short, "sample.every=100", *more])


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [line["student/loss"] for line in log_of(folder)]


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    """Pictures of three shapes, and one that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, (size, colour) in enumerate(
        [((64, 64), "red"), ((120, 60), "blue"), ((60, 120), "green"), ((130, 64), "white")] * 2
    ):
        Image.new("RGB", size, colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} square")
    (folder / "x.png").write_bytes(b"no picture")
    (folder / "x.txt").write_text("a star")
    return folder


def test_shards_and_folders_of_the_same_pictures_are_the_same_data(short, tmp_path):
    scenes = Scenes(1, size=64)
    write_image_folder(tmp_path / "pictures", scenes, 16)
    write_webdataset(tmp_path / "shards", scenes, 16, shard_size=6)
    known = set()
    for source, path in (("scenes", None), ("folder", "pictures"), ("webdataset", "shards")):
        more = [] if path is None else [f"data.source={source}", f"data.path={tmp_path / path}"]
        prepare_data(recipe(short, *more), tmp_path / source)
        known.add(json.loads((tmp_path / source / "versions.json").read_text())["data"])
        assert not (tmp_path / source / "data" / "skipped.txt").exists()
    assert len(known) == 1


@pytest.mark.slow
def test_a_run_in_buckets_is_resumed_to_the_bit_and_says_what_it_skipped(short, shaped, tmp_path, monkeypatch, capsys):
    more = [
        "data.source=folder",
        f"data.path={shaped}",
        "data.size=9",
        "data.aspect_buckets=true",
        "data.caption_dropout=0.3",
    ]
    wanted = recipe(short, *more)
    arguments = ["distill", "scenes-64-tcd", "--out", "run", "-q", *sets([*short, "sample.every=100", *more])]
    code, output, errors = inside(monkeypatch, capsys, tmp_path, *arguments)
    assert (code, errors) == (0, "")
    assert "1 of the images or captions could not be used: see run/data/skipped.txt." in output
    assert (tmp_path / "run" / "data" / "skipped.txt").read_text() == "x.png: it is damaged, or no image\n"
    stop_and_go_on(monkeypatch, wanted, tmp_path / "stopped", 3)
    first, second = (load(latest(tmp_path / name / "checkpoints"))[0] for name in ("run", "stopped"))
    assert same(first, second) and len(losses(tmp_path / "run")) == 2


@pytest.mark.parametrize(("name", "says"), [("dmd2", "set method.head to residual, or leave"), ("lightning", "leave")])
def test_a_discriminator_of_squares_takes_no_buckets(tiny, shaped, tmp_path, name, says):
    data = {"source": "folder", "path": str(shaped), "aspect_buckets": True}
    wanted = parse_recipe({"method": {"name": name}, "teacher": str(tiny), "data": data})
    with pytest.raises(RecipeError, match=f"the discriminator of {name} needs squares: {says} them out"):
        setup(wanted, tmp_path / "run")


def test_methods_that_look_at_no_pictures_learn_from_prompts(short, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo shapes\na blue star\n")
    more = ["data.source=prompts", f"data.path={tmp_path / 'prompts.txt'}", "data.size=3"]
    with pytest.raises(RecipeError, match="dmd2 needs images"):
        recipe(short, *more, name="scenes-64-dmd2")
    wanted = recipe(short, *more, "method.adversarial_weight=0", "training.steps=2", name="scenes-64-dmd2")
    distill(wanted, tmp_path / "run")
    lines = log_of(tmp_path / "run")
    numbers = [value for line in lines for value in line.values() if isinstance(value, float)]
    assert torch.tensor(numbers).isfinite().all() and "student/matching" in lines[-1]
    assert not any(key.startswith("student/data") for line in lines for key in line)


def test_the_teacher_can_be_sampled_on_prompts(short, tmp_path):
    """And a method that looks at pictures learns from what it made of them."""
    (tmp_path / "prompts.jsonl").write_text('{"text": "a red circle"}\n{"text": "two shapes"}\n')
    more = [
        "data.source=teacher",
        f"data.path={tmp_path / 'prompts.jsonl'}",
        "data.size=2",
        "pairs.num_inference_steps=2",
    ]
    wanted = recipe(short, *more)
    made = prepare_data(wanted, tmp_path / "run", from_teacher=True)
    job = setup(wanted, tmp_path / "run")
    cond = job.teacher.encode_prompts(["a red circle", "two shapes"])
    torch.testing.assert_close(made.cond["prompt_embeds"].float(), cond["prompt_embeds"], rtol=1e-3, atol=1e-3)
    assert made.batch(Rng(0, 0, 2)).has_data


def test_nothing_that_can_be_used_is_one_sentence(short, tmp_path, monkeypatch, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        entry = tarfile.TarInfo("a.pkl")
        entry.size = 3
        tar.addfile(entry, io.BytesIO(b"abc"))
    arguments = [
        "distill",
        "scenes-64-tcd",
        "--out",
        "run",
        *sets([*short, "data.source=webdataset", "data.path=a.tar"]),
    ]
    code, output, errors = inside(monkeypatch, capsys, tmp_path, *arguments)
    assert (code, output) == (2, "") and not (tmp_path / "run").exists()
    assert errors.startswith("Error: data.path: a.tar holds no images that could be used, the first because a.tar: a: ")
