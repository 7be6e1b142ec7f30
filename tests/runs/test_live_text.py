"""Runs with ``data.text: live``: the student of kept embeddings to the bit, resumed too; plans count the encoders."""

from __future__ import annotations

import pytest
import torch

from fewstep.planning.rehearsal import Rehearsal
from fewstep.recipe.load import load_recipe
from fewstep.runs.distill import distill
from fewstep.runs.plan import cheaper, describe, plan
from fewstep.scenes64.scenes import Scenes, write_image_folder
from fewstep.training.checkpoint import latest, load, same
from tests.command_line import stop_and_go_on

LIVE = "data.text=live"


def recipe(short, *more, name="scenes-64-tcd"):
    return load_recipe(name, [*short, "sample.every=100", "training.steps=3", *more])


def colours(images):
    """Features [N, 12]: colours of four parts."""
    return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def tensors(folder):
    return load(latest(folder / "checkpoints"))[0]


@pytest.mark.slow
def test_a_run_learns_as_with_kept_embeddings(short, tmp_path, monkeypatch):
    """Captions dropped, gradients accumulated; and the encoders stay until its end."""
    more = ["data.caption_dropout=0.3", "training.accumulation=2"]
    freed = []
    monkeypatch.setattr("fewstep.models.families.Teacher.make_room", _noted(freed))
    distill(recipe(short, *more), tmp_path / "kept")
    distill(recipe(short, *more, LIVE), tmp_path / "live")
    assert same(tensors(tmp_path / "kept"), tensors(tmp_path / "live"))
    assert freed == [True, False]


def _noted(freed):
    from fewstep.models.families import Teacher

    make_room = Teacher.make_room

    def noted(self, *args, **kwargs):
        make_room(self, *args, **kwargs)
        freed.append(self.pipeline.text_encoder is None)

    return noted


@pytest.mark.slow
def test_held_out_rows_validation_and_resuming_are_the_same(short, tmp_path, monkeypatch):
    write_image_folder(tmp_path / "images", Scenes(1, size=64), 32)
    more = [
        "data.source=folder", f"data.path={tmp_path / 'images'}", "data.size=32",
        "evaluate.every=2", "evaluate.count=8", "evaluate.reference=data",
    ]  # fmt: skip
    monkeypatch.setattr("fewstep.runs.measured_on.open_features", lambda name, device="cpu": colours)
    distill(recipe(short, *more), tmp_path / "kept")
    distill(recipe(short, *more, LIVE), tmp_path / "live")
    stop_and_go_on(monkeypatch, recipe(short, *more, LIVE), tmp_path / "stopped", 2)
    found = [tensors(tmp_path / name) for name in ("kept", "live", "stopped")]
    assert same(found[0], found[1]) and same(found[0], found[2])
    lines = [(tmp_path / name / "evaluations.jsonl").read_text() for name in ("kept", "live", "stopped")]
    assert lines[0] == lines[1] == lines[2]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "source"), [("dmd", "scenes"), ("tcd", "teacher")])
def test_samples_of_the_teacher_are_learnt_from_likewise(name, source, short, tmp_path):
    more = ["pairs.size=8", "pairs.num_inference_steps=2", f"data.source={source}"]
    for folder, text in (("kept", "data.text=cached"), ("live", LIVE)):
        distill(recipe(short, *more, text, name=f"scenes-64-{name}"), tmp_path / folder)
    assert same(tensors(tmp_path / "kept"), tensors(tmp_path / "live"))


@pytest.mark.slow
def test_plans_say_and_count_what_stays(short, monkeypatch):
    """Text encoders by their own bytes; advice is to keep embeddings; encoding captions may be the peak."""
    step = Rehearsal(10**6, 1.0, 0.0)  # which is not the subject
    monkeypatch.setattr("fewstep.planning.estimate.rehearse", lambda *_: step)
    kept, live = (plan(recipe(short, *more), timed=False) for more in ((), (LIVE,)))
    encoder = live.outline.parts["text_encoder"]
    size = sum(t.nbytes for t in (*encoder.parameters(), *encoder.buffers()))
    mine, theirs = live.estimate, kept.estimate
    assert mine.training["text encoders"] == size and "text encoders" not in theirs.training
    embeddings = 16 * torch.Size(live.outline.prompts(1, torch.float16)["prompt_embeds"].shape).numel() * 2
    assert theirs.training["encoded data"] - mine.training["encoded data"] == embeddings
    assert mine.encoding == theirs.encoding - embeddings  # where they were always there
    said = "\n".join(describe(live))
    assert "text encoders" in said and "while a batch is encoded, before a step" in said
    assert "text encoders" not in "\n".join(describe(kept)) and theirs.encoding_batch == 0
    assert mine.encoding_batch > sum(mine.training.values()) - mine.step
    found = {change.key: change for change in cheaper(live)}
    assert found["data.text"].value == "cached" and found["data.text"].saves == size - embeddings
    assert "data.text" not in {change.key for change in cheaper(kept)}
