"""Every family is measured at every size; all stages of a chain are measured against the model that it began with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewstep.recipe.chain import parse_chain
from fewstep.recipe.load import parse_recipe
from fewstep.reports.report import FinishedRun, measured_alike
from fewstep.runs.chain import run_chain
from fewstep.runs.distill import distill
from fewstep.runs.first_teacher import first_teacher_of, on_first_teacher, students_behind
from fewstep.runs.folder import RunFolder
from fewstep.runs.setup import setup
from fewstep.runs.teacher_samples import TeacherSampling
from fewstep.sampling import DDIMSampler, sample
from fewstep.students.card import Card
from tests.reports.test_own_teacher import own

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
