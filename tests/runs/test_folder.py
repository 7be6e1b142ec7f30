"""Run directories without a run: what may start, resume and count as finished there, old recipes included."""

from __future__ import annotations

import json

import pytest
import yaml

from fewstep.recipe.load import load_recipe, parse_recipe
from fewstep.recipe.resume import MAY_CHANGE
from fewstep.recipe.schema import Recipe
from fewstep.recipe.validate import RecipeError
from fewstep.runs.folder import RunFolder
from fewstep.runs.plan import Change
from fewstep.students.card import CARD_FILE


@pytest.fixture()
def folder(tmp_path):
    """A finished run of scenes-64-tcd, as far as its names say."""
    files = RunFolder(tmp_path / "run")
    files.student.mkdir(parents=True)
    (files.student / CARD_FILE).write_text("{}")
    files.claim(load_recipe("scenes-64-tcd").as_yaml())
    return files


def test_a_folder_belongs_to_the_first_recipe_that_claims_it(folder):
    before = folder.recipe.read_text()
    folder.claim(load_recipe("scenes-64-lcm").as_yaml())
    assert folder.recipe.read_text() == before
    assert folder.holds_run(resume=True)
    with pytest.raises(RecipeError, match="add --resume to continue it"):
        folder.check(load_recipe("scenes-64-tcd"), resume=False)


@pytest.mark.parametrize("change", [
    "training.steps=7", "training.log_every=3", "training.checkpoint_every=9", "training.keep_checkpoints=4",
    "training.trackers=[tensorboard]", "training.accumulation=2", "training.gradient_checkpointing=true",
    "training.fsdp=true", "training.timeout_minutes=60", "training.async_checkpoints=false",
    "pairs.path=elsewhere", "sample.every=5", "sample.prompts=[a star]",
])  # fmt: skip
def test_what_may_change_when_a_run_is_resumed(folder, change):
    recipe = load_recipe("scenes-64-tcd", [change])
    folder.check(recipe, resume=True)
    assert not folder.is_finished(recipe)
    folder.reopen(recipe)
    assert folder.stored() == recipe.as_data() and not (folder.student / CARD_FILE).exists()


@pytest.mark.parametrize("change", ["training.learning_rate=1", "student.rank=3", "seed=5", "method.guidance_scale=2",
                                    "data.size=8", "evaluate.every=9"])  # fmt: skip
def test_what_may_not(folder, change):
    with pytest.raises(RecipeError, match=rf"was started with {change.partition('=')[0]} = .*: resume with the recipe"):
        folder.check(load_recipe("scenes-64-tcd", [change]), resume=True)


def test_every_key_that_may_change_exists():
    flat = {f"{section}.{key}" for section, keys in load_recipe("scenes-64-tcd").as_data().items()
            if isinstance(keys, dict) for key in keys}  # fmt: skip
    assert set(MAY_CHANGE) <= flat | Recipe.model_fields.keys()
    kept = [Change(key, "", 0).same_run for key in ("training.accumulation", "student.rank", "training.precision")]
    assert kept == [True, False, False]


def test_a_finished_run_is_known_by_its_recipes_values_not_by_their_spelling(folder):
    """Earlier versions wrote YAML by another library, which quoted strings that look like numbers."""
    recipe = load_recipe("scenes-64-tcd", ["sample.prompts=['y', 'nan', '#x', 'a: b', ünï]"])
    text = recipe.as_yaml()
    folder.recipe.write_text(text.replace("- y\n", "- 'y'\n").replace("- nan\n", "- 'nan'\n"), encoding="utf-8")
    assert folder.recipe.read_text() != text and folder.is_finished(recipe)
    assert parse_recipe(yaml.safe_load(text)).as_yaml() == text
    (folder.student / CARD_FILE).unlink()
    assert not folder.is_finished(recipe)


def test_settings_of_a_stored_recipe_may_have_former_names(tmp_path):
    recipe = load_recipe("scenes-64-dmd")
    stored = recipe.as_data()
    for old, new in recipe.method_class().renamed.items():
        stored["method"][old] = stored["method"].pop(new)
    assert stored != recipe.as_data()
    files = RunFolder(tmp_path)
    files.claim(yaml.safe_dump(stored))
    files.check(recipe, resume=True)
    assert files.kept_recipe().as_data() == recipe.as_data()  # so a report reads it, too
    with pytest.raises(RecipeError, match=r"is called method\.\w+ now"):
        load_recipe(files.recipe)


def test_keys_that_a_stored_recipe_does_not_know_yet_have_their_defaults(folder):
    """Of a run that was begun before there were any."""
    stored = yaml.safe_load(folder.recipe.read_text(encoding="utf-8"))
    recipe = parse_recipe(stored)
    for key in ("prompts", "reference", "path", "features", "metrics"):
        del stored["evaluate"][key]
    folder.recipe.write_text(yaml.safe_dump(stored), encoding="utf-8")
    assert folder.is_finished(recipe)
    folder.may_resume(recipe)
    folder.may_resume(parse_recipe({**stored, "evaluate": {"path": "elsewhere"}}))  # a place is no other reference
    with pytest.raises(RecipeError, match=r"evaluate.metrics = \[\], not \['perceptual'\]"):
        folder.may_resume(parse_recipe({**stored, "evaluate": {"metrics": ["perceptual"]}}))


def test_the_last_run_of_several_stages_is_the_last_that_trains(tmp_path):
    files = RunFolder(tmp_path)
    assert files.last() == tmp_path and files.stages() == []
    for number, name in ((1, "a"), (2, "b"), (3, "merged")):
        files.stage(number, name).mkdir()
        if name != "merged":
            RunFolder(files.stage(number, name)).recipe.write_text("{}")
    assert files.last() == tmp_path  # no run of stages without a recipe of its own
    files.recipe.write_text(json.dumps({"stages": []}))
    assert files.last() == tmp_path / "02-b" and [p.name for p in files.stages()] == ["01-a", "02-b", "03-merged"]
    with pytest.raises(RecipeError, match="a run of several stages, not of one recipe"):
        files.check(load_recipe("scenes-64-tcd"), resume=True)
