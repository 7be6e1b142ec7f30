"""Every family is measured at every size; all stages of a chain are measured against the model that it began with."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event, get_ident

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from fewstep.data.pairs import PairFiles
from fewstep.evaluation.compare import rows_at_once
from fewstep.recipe.chain import parse_chain
from fewstep.recipe.load import parse_recipe
from fewstep.recipe.schema import EvaluateConfig
from fewstep.reports.candidates import student_candidates
from fewstep.reports.report import FinishedRun, measured_alike
from fewstep.runs import measured_on, validation
from fewstep.runs.chain import run_chain
from fewstep.runs.distill import distill
from fewstep.runs.first_teacher import first_teacher_of, on_first_teacher, students_behind
from fewstep.runs.folder import RunFolder
from fewstep.runs.foresee import foresee
from fewstep.runs.measured_on import evaluation_captions, prompt_set, teacher_images
from fewstep.runs.plan import describe, dry_run, plan
from fewstep.runs.setup import setup
from fewstep.runs.teacher_samples import TeacherSampling
from fewstep.sampling import DDIMSampler, sample
from fewstep.students.card import Card, load_card
from fewstep.students.student import weights_file
from fewstep.training import distributed
from fewstep.training.logging import read_log
from tests.command_line import inside
from tests.reports.test_own_teacher import own
from tests.training.several import spawn

FIRST = {"path": "model", "size": 64, "dtype": "bf16", "guidance_embed": None, "loras": ["style.safetensors"]}
SAMPLE = {"teacher_steps": 40, "guidance_scale": 5.0, "num_inference_steps": 4}
STAGES = [
    {"name": "coarse", "method": {"name": "lcm"}, "teacher": FIRST, "sample": SAMPLE},
    {"name": "whole", "merge": "coarse"},
    {"name": "fine", "method": {"name": "lcm"}, "teacher": "whole", "sample": {"teacher_steps": 4}},
    {"name": "last", "method": {"name": "tcd"}, "teacher": "fine", "init": "fine", "evaluate": {"metric": "FD"}},
]
TEACHERS = {"coarse": "model+style.safetensors", "whole": "model+style.safetensors",
            "fine": "../../02-whole/student", "last": "../../03-fine/student"}  # fmt: skip


@pytest.fixture()
def chain(tmp_path):
    """The folder of a chain as a run leaves it, without weights."""
    made = parse_chain({"stages": STAGES})
    for number, stage in enumerate(made.stages, 1):
        folder = tmp_path / "chain" / f"{number:02d}-{stage.name}"
        (folder / "student").mkdir(parents=True)
        if stage.recipe is not None:
            (folder / "recipe.yaml").write_text(stage.recipe.as_yaml())
        card = Card("lcm", "lcm", 4, "full" if stage.recipe is None else "lora", TEACHERS[stage.name], image_size=64)
        card.save(folder / "student")
    (tmp_path / "chain" / "recipe.yaml").write_text(made.as_yaml())
    return tmp_path / "chain"


def started(place, **recipe):
    """A run that has begun in ``place``, and its recipe."""
    made = parse_recipe({"method": "lcm", **recipe})
    place.mkdir()
    (place / "recipe.yaml").write_text(made.as_yaml())
    return made, RunFolder(place)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A recipe with twelve prompts of its own, whose reference takes two files, and its run set up."""
    place = tmp_path_factory.mktemp("prepared")
    (place / "prompts.txt").write_text("".join(f"a red circle {i}\n" for i in range(12)))
    made = own(place, "sd15", 64, count=12, prompts=str(place / "prompts.txt"))
    return made, setup(made, place / "run")


# ---------------------------------------------------------------- which model is the first, and how it is sampled


def test_every_stage_is_measured_as_the_first_was_trained(chain):
    """Model, LoRAs and number format, full steps and guidance: of the stage that was trained on the model itself."""
    for name in ("01-coarse", "03-fine", "04-last"):
        files = RunFolder(chain / name)
        recipe = files.kept_recipe()
        found = on_first_teacher(recipe, files)
        assert (found is recipe) == (name == "01-coarse")
        assert (found.teacher.path, found.teacher.loras) == ("model", ("style.safetensors",))
        assert (found.teacher.dtype, found.teacher.size) == ("bf16", 64)
        assert (found.sample.teacher_steps, found.sample.guidance_scale) == (40, 5.0)
        assert found.sample.num_inference_steps == recipe.sample.num_inference_steps
        assert found.evaluate == recipe.evaluate and found.method == recipe.method
    stages = parse_chain({"stages": STAGES}).on_first_teacher()
    assert {recipe.sample.teacher_steps for recipe in stages.values()} == {40}


def test_a_run_on_a_finished_chain_is_of_its_lineage(chain, tmp_path):
    recipe, folder = started(tmp_path / "run", teacher=str(chain), sample={"teacher_steps": 4})
    found = on_first_teacher(recipe, folder)
    assert (found.teacher.path, found.sample.teacher_steps) == ("model", 40)
    assert students_behind(folder) == [
        chain / name / "student" for name in ("04-last", "03-fine", "02-whole", "01-coarse")
    ]


def test_a_run_on_a_finished_chain_at_another_size(chain, tmp_path):
    recipe, folder = started(tmp_path / "run", teacher={"path": str(chain), "size": 128, "dtype": "fp32"})
    found = on_first_teacher(recipe, folder).teacher
    assert (found.path, found.size, found.dtype) == ("model", 128, "bf16")


def test_a_student_on_a_student_without_runs(tmp_path):
    Card("lcm", "lcm", 4, "full", "model", image_size=96).save(_made(tmp_path / "one"))
    Card("lcm", "lcm", 4, "lora", str(tmp_path / "one"), image_size=96).save(_made(tmp_path / "two"))
    recipe, folder = started(tmp_path / "run", teacher=str(tmp_path / "two"))
    assert on_first_teacher(recipe, folder).teacher.path == "model"
    assert students_behind(folder) == [tmp_path / "two", tmp_path / "one"]


def test_first_weights_change_nothing_but_where_images_are_looked_for(chain, tmp_path):
    recipe, folder = started(tmp_path / "run", teacher="model", init=str(chain / "01-coarse"))
    assert on_first_teacher(recipe, folder) is recipe
    assert students_behind(folder) == [chain / "01-coarse" / "student"]


def test_a_student_alone_is_known_by_its_card(tmp_path):
    """Its run is gone: the model is on its card, the rest is as the recipe states."""
    Card("lcm", "lcm", 4, "full", "model+style.safetensors", image_size=96).save(_made(tmp_path / "alone"))
    recipe, folder = started(tmp_path / "run", teacher=str(tmp_path / "alone"), sample={"teacher_steps": 7})
    found = on_first_teacher(recipe, folder)
    assert (found.teacher.path, found.teacher.size) == ("model+style.safetensors", 96)
    assert found.sample == recipe.sample


def _made(place):
    place.mkdir()
    return place


def test_stages_share_one_folder_of_reference_images(chain, tmp_path, monkeypatch):
    for name in ("01-coarse", "04-last"):
        assert RunFolder(chain / name).reference == chain / "data" / "reference"
    assert RunFolder(chain / "04-last").beside("whole") == chain / "02-whole"
    assert RunFolder(chain).beside("whole") is RunFolder(chain / "04-last").beside("who") is None
    monkeypatch.chdir(chain)
    assert RunFolder(Path("01-coarse")).reference == chain / "data" / "reference"
    for name in ("01-alone", "run"):  # beside no recipe of several stages
        assert RunFolder(tmp_path / name).reference == tmp_path / name / "data" / "reference"


# ---------------------------------------------------------------- trained


def colours(images):
    """Features [N, 12]: colours of four parts."""
    return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.mark.slow
def test_a_chain_is_measured_against_one_set_of_images(tmp_path, monkeypatch):
    """A later stage's images of reference are those of the first one, made once, and those of its report, and of a run
    on the finished chain; the first teacher makes them, with its own steps and guidance."""
    monkeypatch.setattr("fewstep.runs.measured_on.load_imagenet_encoder", lambda device: colours)
    places, generate = [], TeacherSampling._generate
    monkeypatch.setattr(
        TeacherSampling, "_generate", lambda self, *a: (places.append(a[0].place), generate(self, *a))[1]
    )
    data = own(tmp_path, "sd15", 64).as_data()
    (tmp_path / "prompts.txt").write_text("".join(f"a red circle {i}\n" for i in range(12)))  # in two files
    data["training"]["steps"], data["evaluate"] = 1, {"every": 1, "count": 12, "prompts": str(tmp_path / "prompts.txt")}
    stages = [
        {"name": "coarse"},
        {"name": "whole", "merge": "coarse"},
        {"name": "fine", "teacher": "whole", "sample": {"teacher_steps": 2, "guidance_scale": 1.0}},
    ]
    run_chain(parse_chain({**data, "stages": stages}), tmp_path / "chain")
    (place,) = places
    assert place.parent == tmp_path / "chain" / "data" / "reference"
    first = setup(parse_recipe(data), tmp_path / "unused")
    kept = FinishedRun.read(RunFolder(tmp_path / "chain").last(), "fine")
    prompts = measured_alike([kept], first_teacher_of(kept.recipe))
    cond = first.teacher.encode_prompts(prompts.captions)
    x0 = sample(first.teacher.denoiser, DDIMSampler(num_inference_steps=3), prompts.noise, cond, 3.0).x0
    stored = [load_file(file)["x0"] for file in sorted(place.glob("*.safetensors"))]
    assert len(stored) == 2 and sum(map(len, stored)) == 12
    assert (x0 - torch.cat(stored)).abs().max() < 2e-3 * x0.abs().max()
    later = parse_recipe({**data, "teacher": str(tmp_path / "chain")})
    distill(later, tmp_path / "later")
    assert places == [place]
    lines = {
        name: json.loads((tmp_path / name / "evaluations.jsonl").read_text())
        for name in ("chain/01-coarse", "chain/03-fine", "later")
    }
    assert all(line["to teacher"] > 0 for line in lines.values())


# ---------------------------------------------------------------- held as the teacher is


HELD = {"path": "model", "size": 128, "dtype": "bf16", "quantize": "int8", "vae_tiling": True, "loras": ["a", "b"]}


def test_the_first_teacher_is_held_as_in_training(monkeypatch):
    """Number format, size, quantisation, tiling, LoRAs, device: in validation of a later stage, and in reports."""
    asked = []
    monkeypatch.setattr("fewstep.runs.first_teacher.open_teacher", lambda *names, **how: asked.append((names, how)))
    first_teacher_of(parse_recipe({"method": "lcm", "teacher": HELD, "training": {"device": "cuda:1"}}))
    ((names, how),) = asked
    assert names == ("model", ("a", "b"))
    assert how == {
        "size": 128, "dtype": torch.bfloat16, "quantization": "int8", "vae_tiling": True, "device": "cuda:1",
        "guidance_embed": None, "config": None,
    }  # fmt: skip


def test_a_student_is_held_as_its_own_run_held_its_teacher(chain, monkeypatch):
    """A chain's later stage in float32 is measured in float32, its first teacher in bfloat16 as in its own stage."""
    held = []
    monkeypatch.setattr("fewstep.reports.candidates.teacher_of", lambda *_, **how: held.append(how["dtype"]))
    monkeypatch.setattr("fewstep.reports.candidates.load_student", lambda *_: None)
    run = FinishedRun.read(chain / "04-last", "last")
    (candidate,) = student_candidates(run.files.student, (4,), recipe=run.own)
    assert held == [torch.float32] and candidate.sampler and run.recipe.teacher.dtype == "bf16"


def test_what_measures_is_on_the_training_device(prepared, monkeypatch):
    seen = []

    def opened(name, device, **_):
        seen.append((name, device))
        return lambda images, captions=(): images.mean((1, 2, 3))[:, None]

    monkeypatch.setattr("fewstep.runs.measured_on.load_pretrained_encoder", opened)
    monkeypatch.setattr("fewstep.runs.measured_on.open_reward", opened)
    made, run = prepared
    changes = {"features": "some/dino", "metrics": ("pickscore",), "reference": made.data.path}
    changed = {
        "training": dataclasses.replace(made.training, device="cuda:1"),
        "evaluate": made.evaluate.model_copy(update=changes),
    }
    prompt_set(made.model_copy(update=changed), run.teacher, run.folder)
    assert seen == [("some/dino", "cuda:1"), ("pickscore", "cuda:1")]


# ---------------------------------------------------------------- planned


@pytest.mark.slow
def test_a_plan_counts_the_first_teacher(tmp_path):
    """A second network and its text encoders while the images are made, where a stage's teacher is a student."""
    made = own(tmp_path, "sd15", 64)
    later = plan(made, timed=False, on_student=True)
    parts = {name: sum(p.nbytes for p in part.parameters()) for name, part in later.outline.parts.items()}
    training = later.estimate.training
    held = sum(training.values()) - sum(training[name] for name in ("optimiser", "gradients", "activations"))
    assert later.reference == held + 2 * sum(parts.values()) - parts["unet"]  # its own text encoders are there, too
    assert later.peak >= later.reference and any("behind the teacher generates" in line for line in describe(later))
    for other, on_student in ((made, False), (made.model_copy(update={"evaluate": EvaluateConfig()}), True)):
        planned = plan(other, timed=False, on_student=on_student)
        assert planned.reference == 0 and not any("behind the teacher" in line for line in describe(planned))


def test_a_plan_of_stages_knows_which_teachers_are_students(monkeypatch):
    """It holds each stage's teacher as that stage does."""
    asked = []
    monkeypatch.setattr("fewstep.runs.plan.foresee", lambda chain, elsewhere: None)
    monkeypatch.setattr("fewstep.runs.plan.describe", lambda planned: [])
    monkeypatch.setattr("fewstep.runs.plan.plan", lambda recipe, **how: asked.append((recipe.teacher, how)))
    dry_run(parse_chain({"stages": STAGES}))
    assert [how["on_student"] for _, how in asked] == [False, True, True]
    assert [(teacher.path, teacher.dtype, teacher.size) for teacher, _ in asked] == [
        ("model", "bf16", 64), ("model", "fp32", 64), ("model", "fp32", 64),
    ]  # fmt: skip


def test_large_images_are_sampled_a_few_at_a_time():
    sizes = {8: 64, 16: 64, 32: 64, 64: 16, 96: 7, 128: 4, 256: 4}
    assert {side: rows_at_once((100, 4, side, side)) for side in sizes} == sizes


# ---------------------------------------------------------------- images made once, whatever happens


def shared(made, place):
    return made.model_copy(update={"evaluate": made.evaluate.model_copy(update={"path": str(place)})})


def images_of(made, run):
    return teacher_images(made, run.teacher, run.folder, evaluation_captions(made))


def test_images_that_were_interrupted_are_gone_on_with(prepared, tmp_path, monkeypatch):
    made, run = prepared
    whole, broken = (shared(made, tmp_path / name) for name in ("whole", "broken"))
    write = PairFiles.write

    def interrupted(self, number, *rest):
        if number == 1:
            raise KeyboardInterrupt
        write(self, number, *rest)

    monkeypatch.setattr(PairFiles, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        images_of(broken, run)
    (kept,) = (tmp_path / "broken").glob("teacher-*/pairs-*.safetensors")
    before = kept.stat().st_mtime_ns
    monkeypatch.setattr(PairFiles, "write", write)
    assert torch.equal(images_of(broken, run), images_of(whole, run))
    assert kept.stat().st_mtime_ns == before and len(list(kept.parent.glob("pairs-*.safetensors"))) == 2


def test_of_two_runs_that_start_at_once_one_makes_the_images(prepared, tmp_path, monkeypatch):
    """The other one waits for them, and makes none."""
    made, run = shared(prepared[0], tmp_path / "shared"), prepared[1]
    begun, go, makers, draw = Event(), Event(), [], TeacherSampling._sample

    def slowly(self, rows, cond):
        makers.append(get_ident())
        begun.set()
        assert go.wait(60)
        return draw(self, rows, cond)

    monkeypatch.setattr(TeacherSampling, "_sample", slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(images_of, made, run)
        assert begun.wait(60)
        second = pool.submit(images_of, made, run)
        wait([second], timeout=0.5)
        assert not second.done() and len(makers) == 1
        go.set()
        assert torch.equal(first.result(60), second.result(60))
    assert len(makers) == 2 and len(set(makers)) == 1  # two files, by one of them
    assert not list((tmp_path / "shared").glob("teacher-*/.*.part"))


def in_two_processes(data, place):
    """What each of two processes does; the second one measures other figures than the first, which must not count."""
    torch.set_num_threads(1)
    rank = distributed.rank()
    measured_on.load_imagenet_encoder = lambda device: colours
    measured_on.published_weights = lambda: None
    write, measure = PairFiles.write, validation.Validation._measure

    def noted(self, number, *rest):
        (place / f"{rank}-{number}").touch()
        write(self, number, *rest)

    def other(self, step):
        assert measure(self, step)["to teacher"] > 0
        return {"FD": float(step if rank == 0 else -step)}

    PairFiles.write, validation.Validation._measure = noted, other
    student = distill(parse_recipe(data), place / "run")
    (place / f"ended-{rank}").write_text(student.name)


@pytest.mark.slow
def test_two_processes_make_one_reference_and_decide_alike(prepared, tmp_path):
    """Each file is made by one of them; both keep the student of the first step and stop after the third of five."""
    data = prepared[0].as_data()
    data["evaluate"] |= {"metric": "FD", "patience": 2}
    data["training"]["steps"] = 5
    spawn(in_two_processes, data, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("?-?")) == ["0-0", "1-1"]
    assert len(list(tmp_path.glob("ended-*"))) == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["step"], line["FD"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert load_card(tmp_path / "run" / "student").steps == 1


# ---------------------------------------------------------------- what people write


@pytest.mark.parametrize(
    "evaluate, sentence",
    [
        ({"count": 0}, "evaluate.count: input should be greater than or equal to 8, not 0."),
        ({"prompts": "empty.txt"}, "evaluate.prompts: empty.txt holds no prompts that could be used."),
        ({"prompts": "one.txt"}, "evaluate: 1 prompt is too few to measure on: give 8 or more."),
        ({"prompts": "."}, "evaluate.prompts: prompts are a file of .txt or .jsonl, one a line, not '.'."),
        ({"prompts": "latin.txt"}, "line 1 of latin.txt: its caption is not text in UTF-8."),
        ({"reference": "single"}, "evaluate.reference: 1 image is too few to measure on: give 8 or more."),
        ({"reference": "specks"}, "evaluate.reference: 0 images are too few to measure on (0.png: "),
        ({"reference": "one.txt"}, "There is no folder 'one.txt' of images to compare with."),
        ({"path": "one.txt"}, "evaluate.path: one.txt is a file, and a folder is needed: choose another one."),
        ({"metric": "accuracy"}, "'accuracy' is not measured here: only the detector of scenes-64 judges prompts."),
        ({"metric": "PickScore"}, "'PickScore' is not measured here: add pickscore to evaluate.metrics."),
        ({"metric": "to teacher", "reference": "data"}, "is not measured here: set evaluate.reference to teacher."),
    ],
)
def test_what_cannot_be_measured_is_said_before_a_run(prepared, tmp_path, monkeypatch, evaluate, sentence):
    """In one sentence, before anything is loaded or written; so ``--dry-run`` says it, too."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("empty.txt", b"\n"), ("one.txt", b"a cat\n"), ("latin.txt", "caf\xe9\n".encode("latin-1") * 9)):
        Path(name).write_bytes(text)
    for name, side, count in (("single", 64, 1), ("specks", 3, 9)):
        Path(name).mkdir()
        for i in range(count):
            Image.new("RGB", (side, side)).save(Path(name, f"{i}.png"))
    data = prepared[0].as_data()
    data["evaluate"] = {**data["evaluate"], "prompts": None, "count": 8, **evaluate}
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        foresee(parse_recipe(data))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("evaluate", [{"count": 1000}, {"every": 100}, {"every": 0, "patience": 3}])
def test_what_has_a_meaning_works(prepared, tmp_path, monkeypatch, evaluate):
    """More prompts than there are, measurements rarer than steps, patience without measurements."""
    monkeypatch.setattr("fewstep.runs.measured_on.load_imagenet_encoder", lambda device: colours)
    data = prepared[0].as_data()
    data["evaluate"] |= evaluate
    distill(parse_recipe(data), tmp_path / "run")
    lines = read_log(tmp_path / "run" / "evaluations.jsonl")
    steps = {1000: [1, 2], 12: [2] if evaluate.get("every") else []}[data["evaluate"]["count"]]
    assert [line["step"] for line in lines] == steps
    assert all(line["on"].startswith("12 prompts of prompts.txt, against the teacher's") for line in lines)


# ---------------------------------------------------------------- families


def damaged(run, place, strength):
    """The run with a student to whose weights noise is added, in their standard deviation."""
    shutil.copytree(run, place)
    file, generator = weights_file(place / "student"), torch.Generator().manual_seed(0)
    weights = load_file(file)
    scale = strength * torch.cat([t.float().flatten() for t in weights.values()]).std()
    noisy = {key: t + (scale * torch.randn(t.shape, generator=generator)).to(t) for key, t in weights.items()}
    save_file({key: t.contiguous() for key, t in noisy.items()}, file)
    return place


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, side, weights, dtype, then",
    [
        ("sd15", 128, "lora", "fp32", "report"),
        ("sd2v", 64, "lora", "bf16", "export --to kohya"),
        ("sdxl", 96, "full", "fp32", "benchmark"),
        ("sd3", 128, "lora", "fp32", "benchmark"),
        ("flux", 64, "lora", "bf16", "report"),
        ("pixart", 96, "full", "fp32", "export --to diffusers"),
    ],
)
def test_every_family_and_size_through_the_command_line(
    family, side, weights, dtype, then, tmp_path, monkeypatch, capsys
):
    """Trained with validation, the best student kept, evaluated beside a damaged one, which ranks behind.

    Then reported, put into a table or exported. By the ImageNet network: see benchmarks/families.py.
    """
    monkeypatch.setattr("fewstep.runs.measured_on.load_imagenet_encoder", lambda device: colours)
    data = own(tmp_path, family, side, metric="KID").as_data()
    data["teacher"]["dtype"], data["student"]["weights"] = dtype, weights
    data["sample"]["guidance_scale"] = data["method"]["guidance_scale"] = 1.0  # so that a good student comes close
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(data))

    def fewstep(*words):
        code, _, errors = inside(monkeypatch, capsys, tmp_path, *words)
        assert code == 0, errors

    fewstep("distill", "my.yaml", "--out", "run", "-q")
    lines = read_log(tmp_path / "run" / "evaluations.jsonl")
    assert [line["step"] for line in lines] == [1, 2] and (tmp_path / "run" / "best").is_dir()
    damaged(tmp_path / "run", tmp_path / "worse", {"lora": 10, "full": 1}[weights])
    fewstep("evaluate", "run", "worse", "--out", "evaluation.json", "-q")
    ways = json.loads((tmp_path / "evaluation.json").read_text())["ways"]
    good, bad = list(ways.values())[-2:]
    for name in ("FD", "KID", "detail FD", "to teacher", "unlike teacher"):
        assert good[name] < bad[name], name
    for figures in ways.values():
        for name in figures.keys() - {"intervals", "evaluations", "ms"}:
            low, high = figures["intervals"][name]
            assert low <= high and all(map(math.isfinite, (low, figures[name], high))), name
    command, *words = then.split()
    if command == "benchmark":
        fewstep("benchmark", "my.yaml", "--out", "table", "--steps", 2, "--count", 8, "-q")
        assert "detail FD" in (tmp_path / "table" / "table.md").read_text()
    elif command == "report":
        fewstep("report", "run", "--out", "report.html", "--count", 8, "-q")
        assert "network evaluations per image" in (tmp_path / "report.html").read_text()
    else:
        fewstep("export", "run", *words, "--out", "export")
        assert (tmp_path / "export" / "README.md").is_file()
