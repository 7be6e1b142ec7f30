"""Inputs that no run can use and places that are not there: one sentence each, exit code 2, nothing written."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from fewstep.recipe.load import load_recipe, parse_recipe
from fewstep.recipe.validate import RecipeError
from fewstep.training.console import in_words
from tests.command_line import inside

DEEP = "[" * 5000 + "]" * 5000
HUGE = 10**19


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (f"sample.prompts={DEEP}", "is not valid YAML"),
        ("sample.prompts=" + "[" * 200 + "x" + "]" * 200, "nested deeper than 50 levels"),
        (".".join(["a"] * 5000) + "=1", "no key of a recipe lies so deep"),
        (".".join(["method"] * 60) + "=1", "no key of a recipe lies so deep"),
        (f"student.rank={HUGE}", "student.rank: input should be less than or equal to 65536"),
        ("student.rank=1000000", "student.rank: input should be less than or equal to 65536"),
        (f"training.steps={HUGE}", "training.steps: input should be less than or equal to 2147483647"),
        (f"training.batch_size={HUGE}", "training.batch_size: input should be"),
        (f"training.warmup_steps={HUGE}", "training.warmup_steps: input should be"),
        (f"method.num_grid_steps={HUGE}", "method.num_grid_steps: input should be"),
        (f"sample.num_inference_steps={HUGE}", "sample.num_inference_steps: input should be"),
        (f"data.size={HUGE}", "data.size: input should be"),
        (f"evaluate.count={HUGE}", "evaluate.count: input should be"),
        ("student.rank=" + "9" * 5000, "student.rank"),
    ],
)
def test_what_is_too_deep_or_too_large_is_refused(change, sentence):
    with pytest.raises(RecipeError) as caught:
        load_recipe("scenes-64-tcd", [change])
    text = str(caught.value)
    assert sentence in text and "\n" not in text and len(text) < 400


def test_plain_data_nested_too_deeply_is_refused():
    data = {}
    for _ in range(5000):
        data = {"a": data}
    with pytest.raises(RecipeError, match="nested deeper than 50 levels"):
        parse_recipe({"method": "tcd", "data": data})


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_called_by_its_name(number, monkeypatch, capsys, tmp_path):
    import fewstep.runs.plan as plan

    def full(*_):
        raise OSError(number, "No space left on device", str(tmp_path / "grid.png"))

    monkeypatch.setattr(plan, "dry_run", full)
    code, _, errors = inside(monkeypatch, capsys, tmp_path, "distill", "scenes-64-tcd", "--dry-run")
    assert code == 2 and errors.count("\n") == 1
    assert errors.startswith(f"Error: The disk is full ({tmp_path / 'grid.png'} could not be written): make room")
    assert in_words(OSError(number, "No space left on device")).startswith("The disk is full: make room")
    assert in_words(OSError("The checkpoint is here.")) == "The checkpoint is here."


def test_a_deleted_working_folder_is_a_sentence(tmp_path):
    (tmp_path / "gone").mkdir()
    code = (
        "import os, sys; os.chdir('gone'); os.rmdir('../gone'); sys.argv = ['fewstep', 'methods'];"
        "from fewstep.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "Error: The working folder does not exist any more: change to another one, and try again.\n"
