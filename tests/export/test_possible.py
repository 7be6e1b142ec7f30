"""Whether a student will have an export is known, and said, before it is trained."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fewstep.diffusion.schedule import Schedule
from fewstep.export.possible import obstacle
from fewstep.export.publish import check_form
from fewstep.methods.registry import METHODS
from fewstep.models.families.sana import Sana
from fewstep.recipe.chain import Chain, load
from fewstep.recipe.shipped import shipped_recipes
from fewstep.runs.fit import foreseen_card
from fewstep.students.card import Card
from tests.command_line import inside
from tests.export.test_comfyui import FAMILIES
from tests.models.pipelines import build

ALL = FAMILIES | {"sana": (Sana, Schedule.flow(3.0), {"flow_shift": 3.0, "use_flow_sigmas": True})}
"""Those that ComfyUI samples, and others."""
UNETS_BANKS = {"sd15-pdd", "sdxl-pdd"}
"""Their students have a last layer for every step, a convolution; those of transformers are exported --to heads."""


def why_not(name, *changes):
    family, found = name.split("-")[0], ""
    recipe, (cls, schedule, scheduler, *_) = load(name, changes), ALL[family]
    for stage in recipe.on_first_teacher().values() if isinstance(recipe, Chain) else [recipe]:
        method = stage.method_class()(schedule, stage.method_settings())
        kind = "flow" if schedule.family == "flow" else "epsilon"
        found = found or obstacle(foreseen_card(stage, method, kind), schedule, scheduler, cls)
    return found


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.split("-")[0] in ALL])
def test_every_shipped_recipe_makes_what_can_be_exported(name):
    said = why_not(name)
    assert ("a last layer for every step" in said) == (name in UNETS_BANKS) == bool(said) and "Remedy" not in said


@pytest.mark.parametrize("name, changes, first", [
    ("sd3-tcd", ["sample.eta=0.3"], "diffusers has no scheduler of flow models that steps like 'tcd' with eta 0.3. "),
    ("flux-tcd", ["sample.eta=0.3"], "diffusers has no scheduler of flow models that steps like 'tcd' with eta 0.3. "),
    ("sd3-ladd", ["sample.sampler=euler-ancestral", "sample.eta=1"], "diffusers has no scheduler of flow models that "),
    ("sd15-pcm", ["sample.eta=0.5"], "diffusers has no scheduler that steps like 'phased'"),
    ("sd15-ctm", ["sample.eta=0.5"], "An export of a student that is conditioned on its target time holds the target "),
])  # fmt: skip
def test_the_way_out_is_one(name, changes, first):
    """What the sentence names is tried: with it the student has an export."""
    said = why_not(name, *changes)
    assert said.startswith(first) and said.endswith(".")
    ways = re.findall(r"(sample\.\w+=[\w.]+)", said.partition("Remedy: ")[2])
    assert ways
    for way in ways:
        reset = ["sample.eta=0"] if "sampler" in way else []
        assert why_not(name, *changes, way, *reset) == ""


def test_one_step_draws_no_noise():
    assert why_not("sd3-ladd", "sample.sampler=euler-ancestral", "sample.eta=1", "sample.num_inference_steps=1") == ""
    assert why_not("sd3-tcd", "sample.eta=0.3", "sample.num_inference_steps=1") == ""


@pytest.mark.slow
def test_it_is_said_before_training(tmp_path, monkeypatch, capsys):
    """By --dry-run, and by a run as it starts; a recipe with an export says nothing of the kind."""
    build("sd3").save_pretrained(tmp_path / "sd3")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"method: {{name: tcd, num_grid_steps: 4}}\nteacher: {{path: {tmp_path / 'sd3'}, size: 64}}\n"
        "student: {rank: 2}\ntraining: {steps: 1, batch_size: 2}\ndata: {size: 4}\n"
        "sample: {num_inference_steps: 2, teacher_steps: 2, prompts: [a red circle]}\n"
    )
    begins = "diffusers has no scheduler of flow models that steps like 'tcd' with eta 0.3. Remedy: sample.eta=0"
    code, out, err = inside(monkeypatch, capsys, tmp_path, "distill", recipe, "--dry-run")
    assert code == 0 and f"# no export: {begins}" in out, err
    code, out, err = inside(monkeypatch, capsys, tmp_path, "distill", recipe, "--out", "run")
    assert code == 0 and err.startswith(f"This student will have no export. {begins}"), err
    code, _, err = inside(monkeypatch, capsys, tmp_path, "export", "run", "--out", "there")
    assert code == 2 and "steps like 'tcd' with eta 0.3" in err and "these keys in run/student/few_step.json" in err
    card = tmp_path / "run" / "student" / "few_step.json"
    card.write_text(card.read_text().replace('"eta": 0.3', '"eta": 0.0'))
    code, _, err = inside(monkeypatch, capsys, tmp_path, "export", "run", "--out", "there")
    assert code == 0, err
    code, out, err = inside(monkeypatch, capsys, tmp_path, "distill", recipe, "--dry-run", "--set", "sample.eta=0")
    assert code == 0 and "no export" not in out + err


def refused(to, card, folder):
    """Whether this form of a student is refused, of a UNet, or of a transformer if it is one of transformers alone."""
    cls, schedule, scheduler, *_ = ALL["sd3" if to == "heads" else "sd15"]
    if card.bank:
        card = replace(card, bank=tuple(np.append(schedule.timesteps(4).numpy(), schedule.clean).tolist()))
    card = replace(card, prediction_type="flow" if schedule.family == "flow" else "epsilon")
    card.save(folder)
    try:
        check_form(to, card, folder)
    except ValueError:
        return True
    return bool(obstacle(card, schedule, scheduler, cls))


def test_the_table_of_forms_is_what_is_refused(tmp_path):
    """docs/methods/README.md: every method with a target time or a bank is in it, and every cell is true."""
    text = (Path(__file__).parents[2] / "docs/methods/README.md").read_text(encoding="utf-8")
    lines = text.partition("| Student | `diffusers` |")[2].partition("\n\n")[0].splitlines()
    forms, seen = ("diffusers", "merged", "lora", "kohya", "heads"), set()
    for line in lines[2:]:
        student, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        weights, eta = "full" if "full weights" in student else "lora", 0.3 if "eta above 0" in student else 0.0
        names = [name for name in re.findall("`(.+?)`", student) if name in METHODS]
        seen |= set(names)
        for name in names:
            extras = {"bank": (1.0, 0.0), "bank_steps": (4, 1)} if name == "pdd" else {"extra_inputs": ("end",)}
            steps = 1 if "one step" in student else 4
            card = Card(name, METHODS[name].sampler, steps, weights, "scenes-64", eta=eta, rank=4, **extras)
            found = {to: "–" if refused(to, card, tmp_path) else "yes" for to in forms}
            assert found == dict(zip(forms, cells, strict=True)), (name, student)
    told = {name for name, method in METHODS.items() if "tell_end" in method.Settings.__annotations__}
    given = {
        name
        for name, method in METHODS.items()
        for role in method(Schedule.scaled_linear()).roles()
        if role.name == "student" and (role.bank or "end" in role.extra_inputs)
    }
    assert seen == told | given
