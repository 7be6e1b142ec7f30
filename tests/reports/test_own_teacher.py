"""A teacher of one's own, from training to the page: measured against its own images, a worse student ranks behind."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fewstep.evaluation.figures import FIGURES
from fewstep.recipe.load import parse_recipe
from fewstep.reports.evaluate import Sweep, best, evaluate
from fewstep.reports.report import report, verdict
from fewstep.runs.distill import distill
from tests.models.pipelines import WORDS, build

LORA = "pytorch_lora_weights.safetensors"
AGAINST_TEACHER = ("FD", "KID", "detail FD", "to teacher", "unlike teacher")


def own(place, family, side, **changes):
    """A recipe for a tiny pipeline of that family with 24 pictures of the user's."""
    generator = np.random.default_rng(0)
    (place / "images").mkdir()
    for i in range(24):
        pixels = generator.integers(0, 255, (side + 9, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "images" / f"{i:02d}.png")
        (place / "images" / f"{i:02d}.txt").write_text(f"a {WORDS[1 + i % 4]} number {i}")
    build(family).save_pretrained(place / "model")
    return parse_recipe({
        "method": {"name": "lcm", "num_grid_steps": 10, "guidance_scale": 2.0},
        "teacher": {"path": str(place / "model"), "size": side}, "student": {"rank": 2},
        "data": {"source": "folder", "path": str(place / "images")},
        "training": {"steps": 2, "batch_size": 2, "log_every": 1, "checkpoint_every": 2},
        "sample": {"prompts": ["a red circle"], "every": 2, "num_inference_steps": 2, "teacher_steps": 3},
        "evaluate": {"every": 1, "count": 8, "patience": 2, **changes},
    })  # fmt: skip


@pytest.fixture()
def quick(monkeypatch):
    """Colours of four parts of an image as its features: the ImageNet network takes most of the time."""
    monkeypatch.setattr("fewstep.runs.measured_on.load_imagenet_encoder", lambda device: colours)


def colours(images):
    return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def spoiled(run, place):
    """The run with a student whose LoRA is noise."""
    shutil.copytree(run, place)
    weights, generator = load_file(place / "student" / LORA), torch.Generator().manual_seed(0)
    noise = {key: t + 0.3 * torch.randn(t.shape, generator=generator) for key, t in weights.items()}
    save_file(noise, place / "student" / LORA)
    return place


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("own")
    distill(own(place, "sd15", 64), place / "good")
    return [place / "good", spoiled(place / "good", place / "bad")]


@pytest.mark.slow
def test_a_worse_student_ranks_behind_and_every_figure_has_its_interval(runs, tmp_path):
    found = evaluate(runs, Sweep(steps=(2,)), tmp_path / "evaluation.json")
    full, _, good, bad = found.results
    assert [r.label for r in found.results] == ["teacher, 3 steps", "teacher, 2 steps", "good, 2 steps", "bad, 2 steps"]
    for name in AGAINST_TEACHER:
        assert good.figures[name] < bad.figures[name], name
    assert full.figures["to teacher"] < 0.01  # float16 on the disk
    for result in found.results:
        assert "accuracy" not in result.figures and "to first" not in result.figures
        for name in result.figures.keys() - {"evaluations", "ms"}:
            low, high = result.intervals[name]
            assert np.isfinite([low, result.figures[name], high]).all() and low <= high and name in FIGURES
    assert best(found, "FD") == f"Best by FD: good, 2 steps ({good.in_words('FD')})."
    kept = json.loads((tmp_path / "evaluation.json").read_text())
    assert kept["pictures"] == 8 and "good, 2 steps" in kept["ways"]
    assert Image.open(tmp_path / "evaluation.png").size[0] > 64


def test_a_sweep_is_every_combination_of_the_students(runs, quick, tmp_path):
    """Strength 0 of the LoRA is the teacher by the student's sampler; a strength of 1 comes back exactly."""
    found = evaluate(runs[:1], Sweep(steps=(1, 2), lora_scale=(0.0, 1.0), guidance=(0.0, 2.0)), tmp_path / "sweep.json")
    labels = [result.label for result in found.results[3:]]
    assert labels == [
        f"student, LoRA {scale}, guidance {guidance}, {steps}"
        for scale in (0, 1) for steps in ("1 step", "2 steps") for guidance in (0, 2)
    ]  # fmt: skip
    one = evaluate(runs[:1], Sweep(steps=(2,), guidance=(0.0,)), tmp_path / "one.json").results[-1]
    assert found.results[labels.index("student, LoRA 1, guidance 0, 2 steps") + 3].figures["FD"] == pytest.approx(
        one.figures["FD"], rel=1e-3
    )


@pytest.mark.parametrize(("value", "name"), [((0,), "steps"), ((2.0,), "eta"), ((float("nan"),), "guidance")])
def test_values_that_no_sampler_takes_are_one_sentence(value, name):
    with pytest.raises(ValueError, match=f"^{name}: .* is not from"):
        Sweep(**{name: value})


def test_the_page_says_against_what_and_begins_with_what_was_reached(runs, quick, tmp_path):
    comparison = report(runs[:1], tmp_path / "report.html", count=8)
    page = (tmp_path / "report.html").read_text()
    assert "8 captions held out of training, against the teacher&#39;s images of the same prompts and noise" in page
    sentence = verdict(comparison)[0]
    assert (
        sentence.startswith("good, 1 step: FD ") and "times fewer network evaluations than teacher, 3 steps" in sentence
    )
    assert page.index(sentence.split("[")[0]) < page.index("<h2>") and "accuracy:" not in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "side"), [("sd2v", 64), ("sdxl", 96), ("sd3", 128), ("flux", 64), ("pixart", 64), ("sd15", 128)]
)
def test_every_family_and_size(family, side, tmp_path):
    """Training with validation, the best student kept, evaluated, reported."""
    student = distill(own(tmp_path, family, side), tmp_path / "run")
    assert student.is_dir() and (tmp_path / "run" / "best").is_dir()
    bad = spoiled(tmp_path / "run", tmp_path / "bad")
    found = evaluate([tmp_path / "run", bad], Sweep(), tmp_path / "evaluation.json")
    good, worse = found.results[-2:]
    assert all(good.figures[name] < worse.figures[name] for name in ("FD", "detail FD", "to teacher"))
    report([tmp_path / "run"], tmp_path / "report.html", count=8)
    assert (tmp_path / "report.png").is_file()
