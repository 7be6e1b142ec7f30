"""Runs on streamed shards: resumed to the bit wherever they were killed; what does not go with a stream is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from fewstep.models.families import Teacher
from fewstep.recipe.load import load_recipe, parse_recipe
from fewstep.recipe.validate import RecipeError
from fewstep.runs.distill import distill
from fewstep.runs.foresee import missing_here
from fewstep.runs.hints import next_commands, own_prompts
from fewstep.runs.measured_on import evaluation_captions
from fewstep.runs.plan import describe, plan
from fewstep.scenes64.scenes import Scenes, write_webdataset
from fewstep.training.checkpoint import latest, load, same
from fewstep.training.trainer import Trainer
from tests.command_line import inside, sets, stop_and_go_on


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three shards of seven scenes, and one that holds a damaged image."""
    folder = tmp_path_factory.mktemp("shards")
    write_webdataset(folder, Scenes(1, size=64), 21, shard_size=7)
    path = sorted(folder.iterdir())[1]
    data = path.read_bytes()
    start = data.index(b"\x89PNG") if b"\x89PNG" in data else data.index(b"\xff\xd8")
    path.write_bytes(data[:start] + bytes(200) + data[start + 200 :])
    return folder


def recipe(short, shards, *more):
    kept = [item for item in short if not item.startswith("data.size")]
    stream = [
        "data.source=webdataset",
        f"data.path={shards}",
        "data.stream=true",
        "data.shuffle_buffer=6",
        "data.size=null",
    ]
    return load_recipe("scenes-64-tcd", [*kept, "sample.every=100", *stream, *more])


def tensors(folder):
    return load(latest(folder / "checkpoints"))[0]


class Killed(BaseException):
    """As from outside: nothing is saved."""


def kill_and_go_on(monkeypatch, wanted, folder, done):
    step = Trainer.step

    def killed(self, number):
        if number == done:
            raise Killed
        step(self, number)

    monkeypatch.setattr(Trainer, "step", killed)
    with pytest.raises(Killed):
        distill(wanted, folder)
    monkeypatch.setattr(Trainer, "step", step)
    distill(wanted, folder, resume=True)


MORE = [
    "data.caption_dropout=0.3", "training.accumulation=2", "training.steps=8", "training.checkpoint_every=2",
    "training.lr_schedule=constant",
]  # fmt: skip


ROOM = []


@pytest.fixture(scope="module")
def unbroken(short, shards, tmp_path_factory):
    """A run of which nothing was stopped; how memory was freed before its first step is noted."""
    folder, make_room = tmp_path_factory.mktemp("unbroken") / "run", Teacher.make_room
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "make_room", lambda *given, **how: (ROOM.append(how), make_room(*given, **how))[1])
        distill(recipe(short, shards, *MORE), folder)
    return folder


@pytest.mark.slow
def test_the_autoencoder_stays_where_it_works(unbroken):
    assert ROOM == [{"texts": True, "autoencoder": True}]


@pytest.mark.slow
@pytest.mark.parametrize("done", [0, 2, 3, 7])
def test_a_run_is_resumed_to_the_bit_wherever_it_was_killed(done, short, shards, unbroken, tmp_path, monkeypatch):
    """Over the end of an epoch, too: 32 rows of 21 images; also where the counts of shards are lost."""
    wanted = recipe(short, shards, *MORE)
    kill_and_go_on(monkeypatch, wanted, tmp_path / "run", done)
    assert same(tensors(tmp_path / "run"), tensors(unbroken))
    assert not list((tmp_path / "run" / "data").glob("*.safetensors"))
    assert len((unbroken / "data" / "skipped.txt").read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_run_goes_on_after_ctrl_c_and_without_its_counts(short, shards, unbroken, tmp_path, monkeypatch):
    wanted = recipe(short, shards, *MORE)
    stop_and_go_on(monkeypatch, wanted, tmp_path / "stopped", 5)
    assert same(tensors(tmp_path / "stopped"), tensors(unbroken))
    longer = recipe(short, shards, *MORE, "training.steps=10")
    counts = list((tmp_path / "stopped" / "data").glob("shards-*.json"))
    for path in counts:
        path.unlink()
    distill(longer, tmp_path / "stopped", resume=True)
    distill(longer, tmp_path / "whole")
    assert counts and same(tensors(tmp_path / "stopped"), tensors(tmp_path / "whole"))


@pytest.mark.slow
def test_other_shards_are_refused_on_resume(short, shards, unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    shutil.copytree(shards, tmp_path / "shards")
    wanted = recipe(short, shards, *MORE, "training.steps=9")
    known = json.loads((unbroken / "versions.json").read_text())
    assert known["rows"].startswith("3 shards, ")
    (tmp_path / "run" / "versions.json").write_text(json.dumps(known | {"rows": "2 shards, abc"}))
    with pytest.raises(
        RecipeError, match=r"was trained on 2 shards of .+, and they are not 2 shards any more: restore"
    ):
        distill(wanted, tmp_path / "run", resume=True)


STREAM = {"source": "webdataset", "path": "x", "stream": True}


@pytest.mark.parametrize(("changes", "says"), [
    ({"data": {**STREAM, "source": "folder"}}, "data.stream reads the sources webdataset, parquet, datasets, not"),
    ({"data": {**STREAM, "size": 3}}, "data.size does not go with data.stream: set it to null"),
    ({"data": {**STREAM, "aspect_buckets": True}}, "data.aspect_buckets does not go with data.stream: set"),
    ({"data": STREAM, "method": "dmd"}, "data.stream does not go with dmd, which needs samples"),
    ({"data": STREAM, "evaluate": {"every": 1}}, "nothing can be held out of a stream: give evaluate.prompts a file"),
    ({"data": {**STREAM, "shuffle_buffer": 0}}, "data.shuffle_buffer"),
])  # fmt: skip
def test_what_does_not_go_with_a_stream_is_refused(changes, says):
    with pytest.raises(RecipeError, match=says):
        parse_recipe({"method": "tcd", **changes})


def test_shards_are_not_listed_for_a_line_of_help_or_for_prompts(short, tmp_path):
    """They may be terabytes elsewhere."""
    wanted = recipe(short, "https://example.invalid/{000..999}.tar")
    assert own_prompts(wanted) == list(wanted.sample.prompts[:2])
    with pytest.raises(RecipeError, match="the captions of a stream are not listed: give a file of prompts"):
        evaluation_captions(wanted)
    assert [words[0] for words in next_commands(wanted, tmp_path)] == ["sample"]


def test_a_benchmark_of_a_stream_is_refused_before_it_trains(short, tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(10240))
    more = [f"data.path={path}", "data.source=webdataset", "data.stream=true", "data.size=null"]
    kept = [item for item in short if not item.startswith("data.size")]
    code, output, errors = inside(
        monkeypatch, capsys, tmp_path, "benchmark", "scenes-64-tcd", "--out", "out", *sets([*kept, *more])
    )
    assert (code, output) == (2, "")
    assert errors == "Error: evaluate: the captions of a stream are not listed: give a file of prompts.\n"


def test_a_finished_run_proposes_no_measure_on_too_few_captions(short, tmp_path):
    """And ends well: eight are needed to measure, not to train."""
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo shapes\n", encoding="utf-8")
    few = ["data.source=prompts", f"data.path={tmp_path / 'prompts.txt'}", "data.size=null"]
    wanted = load_recipe("scenes-64-dmd2", [*short, *few, "method.adversarial_weight=0"])
    first, second = own_prompts(wanted)
    assert next_commands(wanted, tmp_path) == [["sample", tmp_path, "-p", first, "-p", second]]
    assert [first, second] == list(wanted.sample.prompts[:2])


def test_no_such_shard_is_one_sentence_and_leaves_nothing(short, tmp_path, monkeypatch, capsys):
    kept = [item for item in short if not item.startswith("data.size")]
    more = ["data.source=webdataset", "data.path=none-{0..3}.tar", "data.stream=true", "data.size=null"]
    arguments = ["distill", "scenes-64-tcd", "--out", "run", *sets([*kept, *more])]
    code, output, errors = inside(monkeypatch, capsys, tmp_path, *arguments)
    assert (code, output, errors) == (2, "", "Error: data.path: there is no shard 'none-0.tar'.\n")
    assert not (tmp_path / "run").exists()
    assert missing_here(load_recipe("scenes-64-tcd", [*kept, *more])) == [errors.removeprefix("Error: ").strip()]


@pytest.mark.slow
def test_plans_count_what_a_stream_keeps(short, shards):
    found = plan(recipe(short, shards), timed=False)
    kept = found.estimate
    assert kept.training["encoded data"] == 0 and kept.training["text encoders"] > 0 and kept.encoding == 0
    assert "while a batch is encoded, before a step" in "\n".join(describe(found))
    encoder = found.outline.parts["vae"]
    assert kept.encoding_batch > sum(kept.training.values()) - kept.step
    assert kept.training["autoencoder"] >= sum(t.nbytes for t in encoder.parameters())
    assert torch.device(found.recipe.training.device).type == "cpu"
