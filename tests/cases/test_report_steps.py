"""A report has the numbers of steps that a student can take, and leaves out the others."""

from __future__ import annotations

import pytest
import torch

from fewstep.evaluation.result import Comparison, Result
from fewstep.models.families import load_teacher
from fewstep.recipe.load import load_recipe, parse_recipe
from fewstep.reports.blocks import by_steps_grid
from fewstep.reports.finished import FinishedRun, steps_of
from fewstep.runs.fit import foreseen_card
from fewstep.runs.folder import RunFolder


@pytest.fixture(scope="module")
def schedule():
    return load_teacher("scenes-64").denoiser.schedule


def steps(recipe, schedule, folder):
    method = recipe.method_class()(schedule, recipe.method_settings())
    files = RunFolder(folder)
    files.student.mkdir(parents=True)
    foreseen_card(recipe, method, "epsilon").save(files.student)
    return steps_of(FinishedRun("run", files, recipe, []), schedule)


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        ({"method": {"name": "lcm", "num_grid_steps": 4}}, (1, 2, 4)),  # eight of four grid times: none
        ({"method": "tcd"}, (1, 2, 4, 8)),
        ({"method": {"name": "lightning", "num_inference_steps": 3, "num_teacher_steps": 6}}, (3,)),
        ({"method": {"name": "pcm", "num_phases": 2}}, (2,)),
        ({"method": {"name": "pcm", "num_phases": 2}, "sample": {"sampler": "ddim"}}, (1, 2, 4, 8)),
        ({"method": {"name": "dmd"}}, (1,)),
        ({"method": {"name": "hyper", "segments": 2}}, (2,)),
    ],
)
def test_step_counts_that_the_student_cannot_take_are_left_out(recipe, wanted, schedule, tmp_path):
    assert steps(parse_recipe(recipe), schedule, tmp_path) == wanted


def test_the_grid_leaves_their_places_white():
    made = [("teacher", 50, 0.5), ("teacher", 1, 0.25), ("teacher", 4, 0.25), ("student", 4, 0.0)]
    results = [Result(model, steps, torch.full((4, 3, 8, 8), value)) for model, steps, value in made]
    grid = by_steps_grid(Comparison(results, ["a"] * 4, 0, {}), prompts=1)
    colours = {colour for _, colour in grid.getcolors(1 << 20)}
    assert {(128, 128, 128), (64, 64, 64), (0, 0, 0), (255, 255, 255)} <= colours


def test_a_recipe_that_is_shipped_has_its_own_steps(schedule, tmp_path):
    assert steps(load_recipe("scenes-64-tcd"), schedule, tmp_path / "a") == (1, 2, 4, 8)
    assert steps(load_recipe("scenes-64-pcm"), schedule, tmp_path / "b") == (4,)
