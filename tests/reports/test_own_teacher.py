"""A teacher of one's own, from training to the page: measured against its own images, a worse student ranks behind."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from fewstep.evaluation.figures import FIGURES
from fewstep.recipe.chain import parse_chain
from fewstep.recipe.load import parse_recipe
from fewstep.recipe.schema import EvaluateConfig
from fewstep.reports.benchmark import Benchmark
from fewstep.reports.candidates import student_candidates
from fewstep.reports.evaluate import Sweep, best, evaluate
from fewstep.reports.finished import FinishedRun, finished_runs, labels_of, measured_alike
from fewstep.reports.jobs import BenchmarkEntry
from fewstep.reports.report import report
from fewstep.reports.results import verdict
from fewstep.runs.chain import run_chain
from fewstep.runs.distill import distill
from fewstep.runs.first_teacher import first_teacher_of
from fewstep.runs.folder import RunFolder
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
def quick(few_resamplings, monkeypatch):
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
    assert sentence.startswith("student, 1 step: FD ")
    assert sentence.endswith("; 6 × faster (1 network evaluation per image; teacher, 3 steps: 6).")  # guided: two each
    assert page.index(sentence.split("[")[0]) < page.index("<h2>") and ">accuracy" not in page


def test_a_teachers_lora_is_merged_once(runs, tmp_path):
    """The student stands on the teacher with its LoRA, to the bit."""
    recipe = parse_recipe(yaml.safe_load((runs[1] / "recipe.yaml").read_text()))
    loras = (str(runs[1] / "student" / LORA),)
    made = recipe.model_copy(update={
        "teacher": recipe.teacher.model_copy(update={"loras": loras}), "evaluate": EvaluateConfig(),
    })  # fmt: skip
    distill(made, tmp_path / "run")
    teacher, (student,) = first_teacher_of(made), student_candidates(tmp_path / "run" / "student", recipe=made)
    under = {name.replace("base_layer.", ""): t for name, t in student.denoiser.network.network.named_parameters()}
    for name, weight in teacher.denoiser.network.named_parameters():
        assert torch.equal(under[name], weight), name


@pytest.mark.slow
def test_a_chain_is_measured_against_the_model_that_it_began_with(runs, tmp_path):
    data = yaml.safe_load((runs[0] / "recipe.yaml").read_text())
    stages = [{"name": "coarse"}, {"name": "fine", "teacher": "coarse"}, {"name": "one", "merge": "fine"}]
    chain = parse_chain({**data, "evaluate": {}, "training": {**data["training"], "steps": 1}, "stages": stages})
    run_chain(chain, tmp_path / "chain")
    run = FinishedRun.read(RunFolder(tmp_path / "chain").last(), "fine")
    teacher = first_teacher_of(run.recipe)
    wanted = first_teacher_of(FinishedRun.read(runs[0], "good").recipe)
    for (name, a), b in zip(
        teacher.denoiser.network.named_parameters(), wanted.denoiser.network.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    (candidate,) = Sweep(steps=(2,)).of(run, "fine", teacher.denoiser.schedule)
    assert candidate.steps == 2 and teacher.image_size == wanted.image_size


def copied(run, place, *changes):
    """The run in another folder, as if its recipe had been another one."""
    shutil.copytree(run, place)
    text = (place / "recipe.yaml").read_text()
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (place / "recipe.yaml").write_text(text)
    return place


def test_captions_that_another_run_may_have_seen_are_said(runs, tmp_path):
    other = copied(runs[0], tmp_path / "other", ("evaluate:\n  every: 1\n", "evaluate:\n  every: 0\n"))
    pair = [FinishedRun.read(run, run.name) for run in (runs[0], other)]
    teacher, against = first_teacher_of(pair[0].recipe), ", against the teacher's images of the same prompts and noise"
    for wanted, found in ((" of good, which others may have seen", pair), ("", pair[:1])):
        assert measured_alike(found, teacher).about == f"captions held out of training{wanted}{against}"
    assert measured_alike(pair[::-1], teacher).about == f"captions trained on{against}"


def test_runs_that_cannot_be_compared(runs, tmp_path):
    large, prompts = copied(runs[0], tmp_path / "large"), tmp_path / "few.txt"
    card = json.loads((large / "student" / "few_step.json").read_text())
    (large / "student" / "few_step.json").write_text(json.dumps({**card, "image_size": 128}))
    with pytest.raises(ValueError, match="Images of one size are compared, not of 128 and 64"):
        evaluate([runs[0], large], Sweep(), tmp_path / "evaluation.json")
    (large / "student" / "few_step.json").write_text(json.dumps({**card, "weights": "full"}))
    with pytest.raises(ValueError, match="--lora-scale goes with a LoRA student"):
        evaluate([large], Sweep(lora_scale=(1.0,)), tmp_path / "evaluation.json")
    prompts.write_text("a cat\n")
    for given in ({"prompts": prompts}, {"count": 3}):
        with pytest.raises(ValueError, match=r"^evaluate: (1 prompt is|3 prompts are) too few to measure on: give 8"):
            evaluate(runs[:1], Sweep(), tmp_path / "evaluation.json", **given)
    for make, name in ((evaluate, "x.png"), (report, "x.png"), (report, "x.json")):
        with pytest.raises(ValueError, match=r"give it another ending than \.(png|json)"):
            make(runs[:1], *([Sweep()] if make is evaluate else []), tmp_path / name)
        assert not (tmp_path / name).exists()
    assert not (tmp_path / "evaluation.json").exists()


def test_students_are_measured_on_the_device_that_is_asked_for(runs):
    (run,), _ = finished_runs(runs[:1], "cpu")
    other = replace(run, recipe=run.recipe.on_device("cuda"))
    assert (run.own.training.device, other.own.training.device) == ("cpu", "cuda")
    assert run.settings == other.settings and run.settings["training.device"] == "cpu"


def test_a_run_may_be_called_teacher(tmp_path):
    folders = [tmp_path / "mine" / name for name in ("teacher", "other")]
    assert labels_of(folders) == ["mine/teacher", "mine/other"]


@pytest.mark.slow
def test_a_table_has_the_number_of_its_images_and_a_teacher_of_the_same_prompts(runs, tmp_path):
    """Of 8 captions 16 were asked for; other prompts have another teacher's row."""
    (tmp_path / "nine.txt").write_text("a blue square\n" * 9)
    tables = []
    for prompts in ("null", str(tmp_path / "nine.txt")):
        entry = BenchmarkEntry("lcm", str(runs[0] / "recipe.yaml"), steps=(2,), count=16)
        overrides = ["evaluate.every=0", f"evaluate.prompts={prompts}", "training.steps=1", "data.size=8"]
        work = Benchmark(list(entry.runs(overrides)), tmp_path / "out", tmp_path / "runs", curves=("ddim",))
        assert work.work(lambda line: None)
        tables.append(work.results())
        shutil.rmtree(tmp_path / "runs" / "lcm-s0")
    assert [table.count for table in tables] == [8, 9]
    assert tables[0].about.startswith("captions trained on") and tables[1].about.startswith("prompts of nine.txt")
    assert tables[0].full.figures["spread"] != tables[1].full.figures["spread"]
