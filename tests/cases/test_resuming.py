"""What a resumed run may find changed: the number of steps, and the data."""

from __future__ import annotations

import warnings

import pytest
from PIL import Image

from fewstep.models.hub import Remark
from fewstep.recipe.load import load_recipe, parse_recipe
from fewstep.recipe.resume import consequences
from fewstep.recipe.validate import RecipeError
from fewstep.runs.distill import distill, prepare_data
from fewstep.runs.folder import RunFolder
from tests.command_line import inside

ICT = {"method": {"name": "cm", "first_grid_steps": 2, "num_grid_steps": 8}}


@pytest.mark.parametrize(
    ("recipe", "steps", "says"),
    [
        ({"method": "tcd", "training": {"lr_schedule": "cosine"}}, 2000, "training.lr_schedule cosine ends at"),
        ({"method": "tcd", "training": {"lr_schedule": "cosine"}}, 500, "training.lr_schedule cosine ends at"),
        (ICT, 2000, "the method cm changes its settings on the way to the last step"),
        ({"method": "tcd", "training": {"lr_schedule": "cosine"}}, 1000, ""),
        ({"method": "tcd"}, 2000, ""),
        ({"method": {"name": "cm", "num_grid_steps": 8}}, 2000, ""),
    ],
)
def test_what_a_longer_run_means_is_said(recipe, steps, says):
    before = parse_recipe({**recipe, "training": {**recipe.get("training", {}), "steps": 1000}})
    now = parse_recipe({**recipe, "training": {**recipe.get("training", {}), "steps": steps}})
    found = consequences(before.as_data(), now)
    assert len(found) == bool(says) and all(says in line and "1000" in line and str(steps) in line for line in found)


def test_it_is_said_once_a_run_has_trained(tmp_path, monkeypatch):
    files = RunFolder(tmp_path / "run")
    files.path.mkdir()
    files.claim(load_recipe("scenes-64-tcd").as_yaml())
    longer = load_recipe("scenes-64-tcd", ["training.steps=1500"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files.check(longer, resume=True)
    (files.checkpoints / "step-0000500").mkdir(parents=True)
    (files.checkpoints / "step-0000500" / "state.json").write_text("{}")
    with pytest.warns(
        Remark, match=r"cosine ends at the last step: up to here .* 1000 steps, .* that of 1500\. Choose"
    ):
        files.check(longer, resume=True)


def test_the_command_line_prints_a_remark_as_one_sentence(tmp_path, monkeypatch, capsys):
    import fewstep.runs.plan as plan

    def remark(*_):
        for _ in range(2):
            warnings.warn(Remark("This is another run."), stacklevel=1)
        return "done"

    monkeypatch.setattr(plan, "dry_run", remark)
    code, output, errors = inside(monkeypatch, capsys, tmp_path, "distill", "scenes-64-tcd", "--dry-run")
    assert (code, output, errors) == (0, "done\n", "Note: This is another run.\n")


# ---------------------------------------------------------------- data


@pytest.fixture()
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64), (60 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


@pytest.fixture()
def recipe(tiny, pictures):
    def made(steps=2, **data):
        return parse_recipe({
            "teacher": str(tiny), "method": {"name": "lcm", "num_grid_steps": 4}, "student": {"rank": 2},
            "data": {"source": "folder", "path": str(pictures), **data},
            "training": {"steps": steps, "batch_size": 2, "log_every": 1, "checkpoint_every": 1},
            "sample": {"every": 100, "teacher_steps": 1, "prompts": ["a red circle"]},
        })  # fmt: skip

    return made


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_data(recipe, pictures, tmp_path):
    run = tmp_path / "run"
    distill(recipe(), run)
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def refused(sentence):
        with pytest.raises(RecipeError, match=sentence):
            distill(recipe(3), run, resume=True)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files

    (pictures / "2.txt").write_text("something else")
    refused("was trained on 4 images of .*, and they are others, or have other captions: restore them, or choose")
    (pictures / "2.txt").write_text("picture 2")
    Image.new("RGB", (64, 64)).save(pictures / "9.png")
    (pictures / "9.txt").write_text("picture 9")
    refused("was trained on 4 images of .*, and they are not 4 images any more")
    (pictures / "9.png").unlink()
    (pictures / "9.txt").unlink()
    (pictures / "0.png").rename(pictures / "aside")
    refused("not 4 images any more")
    (pictures / "aside").rename(pictures / "0.png")
    Image.new("RGB", (64, 64), (60, 0, 0)).save(pictures / "1.png")  # the same pixels, written anew
    with warnings.catch_warnings():
        warnings.simplefilter("error", Remark)
        distill(recipe(3), run, resume=True)
    Image.new("RGB", (64, 64), (0, 250, 0)).save(pictures / "1.png")
    with pytest.warns(Remark, match="The data have other values than those on which .* began"):
        distill(recipe(4), run, resume=True)


@pytest.mark.slow
def test_data_may_change_until_the_first_checkpoint(recipe, pictures, tmp_path):
    run = tmp_path / "run"
    prepare_data(recipe(), run)
    (pictures / "2.txt").write_text("something else")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Remark)
        distill(recipe(), run, resume=True)


@pytest.mark.slow
def test_prompts_count_as_data(recipe, tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na star\n")
    keys = {"source": "prompts", "path": str(tmp_path / "prompts.txt")}

    def made(steps):
        data = recipe(steps).model_dump()
        method = {"name": "dmd2", "adversarial_weight": 0.0, "student_input": "simulated"}
        return parse_recipe({**data, "method": method, "data": keys})

    distill(made(2), tmp_path / "run")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na moon\n")
    with pytest.raises(RecipeError, match=r"was trained on 3 prompts of .* are others"):
        distill(made(3), tmp_path / "run", resume=True)
