"""One file adds a method: command line, recipes, plan, sampling defaults, card and verify find all of it there."""

from pathlib import Path

import pytest

from fewstep.diffusion.schedule import Schedule
from fewstep.methods.registry import METHODS, find_method
from fewstep.recipe.load import load_recipe
from fewstep.runs.plan import cost_of_step, plan
from fewstep.runs.setup import setup
from fewstep.verification.verify import verify
from tests.command_line import SHORT, inside

MINE = '''
"""Knowledge distillation on a grid: the student learns, from noise, where the guided teacher's solver steps end."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.methods.base import Loss, Method, RoleSpec, Sampling


@dataclass
class Draws:
    """noise: [B, ...] unit normal."""

    noise: Tensor


class Mine(Method):
    """One step, told the guidance scale."""

    name = "mine"
    summary = "Knowledge distillation: one step to the end of the teacher's solver trajectory."
    sampler = "tcd"

    @dataclass(frozen=True)
    class Settings:
        """Settings of Mine.

        Attributes:
            num_grid_steps: solver steps of the teacher. guidance_scale: the teacher's w (1 = off).
        """

        num_grid_steps: int = 6
        guidance_scale: float = 2.5

    def roles(self):
        return (RoleSpec("student", ("guidance_embed",)),)

    @classmethod
    def sampling(cls, settings):
        return Sampling(num_inference_steps=2, eta=0.7)

    @classmethod
    def needs_images(cls, settings):
        return False

    def draw(self, batch, rng, progress):
        return Draws(rng.sample.normal("noise", batch.x0.shape[1:]))

    def prepare(self, roles, batch, draws, due):
        grid = self.schedule.training_grid(self.settings.num_grid_steps)[::-1].copy()
        x, scale = draws.noise, self.settings.guidance_scale
        with torch.no_grad():
            for t, s in pairwise(grid):
                x = roles.teacher(x, t, batch.cond, guidance_scale=scale).at(s)
        return x

    def student(self, roles, batch, draws, shared):
        scale = self.settings.guidance_scale
        x0 = roles.student(draws.noise, self.schedule.start, batch.cond, guidance_embed=scale).x0
        return Loss((x0 - shared).square().mean())

    def calls_per_step(self):
        return {"student": 1, "teacher": self.settings.num_grid_steps}
'''


@pytest.fixture
def mine(tmp_path):
    """``./mine.py:Mine`` as people type it."""
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path / 'mine.py'}:Mine"


def recipe_of(name, folder: Path, *more):
    path = folder / "mine.yaml"
    path.write_text(f"method: {{name: '{name}', num_grid_steps: 5}}\ndata: {{source: teacher, size: 8}}\n")
    return load_recipe(path, [*SHORT, "pairs.num_inference_steps=2", *more])


def test_a_recipe_takes_its_settings_and_defaults(mine, tmp_path):
    recipe = recipe_of(mine, tmp_path)
    assert recipe.method_settings().num_grid_steps == 5
    assert (recipe.sample.num_inference_steps, recipe.sample.eta) == (2, 0.7)  # its sampling
    assert recipe.pairs.guidance_scale == 2.5  # its teacher's guidance
    with pytest.raises(ValueError, match=r"Unknown key 'method\.num_grid_step': did you mean 'num_grid_steps'"):
        recipe_of(mine, tmp_path, "method.num_grid_step=3")
    with pytest.raises(ValueError, match=r"^method\.num_grid_steps: input should be a valid integer"):
        recipe_of(mine, tmp_path, "method.num_grid_steps=many")


def test_its_plan_counts_its_calls(mine, tmp_path):
    short, longer = recipe_of(mine, tmp_path), recipe_of(mine, tmp_path, "method.num_grid_steps=6")
    assert plan(short, timed=False).estimate is not None
    assert cost_of_step(longer) - cost_of_step(short) == 2 * 4  # one more guided call of the teacher for 4 samples


def test_its_card_says_how_to_sample_and_export(mine, tmp_path):
    recipe = recipe_of(mine, tmp_path)
    card = setup(recipe, tmp_path / "run").card(4)
    assert (card.method, card.sampler, card.num_inference_steps, card.eta) == ("mine", "tcd", 2, 0.7)
    assert (card.original_inference_steps, card.guidance_embed) == (5, 2.5)
    assert card.extra_inputs == ("guidance_embed",) and card.guidance_scale == 1.0


def test_verify_holds_it_to_its_contract(mine):
    report = verify(mine, steps=0, guidance_scale=1.0)
    assert report.passed and report.method == "mine"
    assert report["network calls per step: teacher"].measured == 6


def test_one_line_in_the_registry_lists_it(mine, tmp_path, monkeypatch, capsys):
    cls = find_method(mine)
    monkeypatch.setitem(METHODS, cls.name, cls)
    code, output, _ = inside(monkeypatch, capsys, tmp_path, "methods")
    assert code == 0 and f"{'mine':8} {cls.summary}" in output.splitlines()
    assert "network calls per step: student 1, teacher 6" in output
    assert find_method("mine") is cls and recipe_of("mine", tmp_path).method_class() is cls
    assert cls(Schedule.scaled_linear()).title == "mine"


def test_a_former_name_of_the_contract_is_refused(tmp_path):
    file = tmp_path / "old.py"
    file.write_text(
        "from fewstep import Method\n\n\nclass Old(Method):\n"
        "    @classmethod\n    def needs_pictures(cls, settings):\n        return False\n"
    )
    with pytest.raises(ValueError, match=r"Old\.needs_pictures is called needs_images now"):
        find_method(f"{file}:Old")
