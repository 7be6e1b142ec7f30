"""`Method.needs_images` against the methods themselves: what looks at data becomes NaN where data are NaN."""

import dataclasses

import pytest
import torch

from fewstep.methods.base import Progress
from fewstep.methods.dmd2 import DMD2
from fewstep.recipe.load import parse_recipe
from fewstep.recipe.validate import RecipeError
from tests.methods import test_contract as contract

CASES = [param for param in contract.VARIANTS if param.values[0].name != "duel"]
MORE = [  # beside the cases of the contract: DMD2 without a discriminator, both ways to its inputs
    pytest.param(DMD2, {"adversarial_weight": 0.0, "student_input": policy, "num_inference_steps": 2, **more}, id=name)
    for name, policy, more in (
        ("dmd2 on its own samples", "simulated", {}),
        ("dmd2 on noised data", "noised", {}),
        ("dmd2 on noised data in one step", "noised", {"num_inference_steps": 1, "terminal": "table"}),
    )
]


@pytest.mark.parametrize(("cls", "settings"), [*CASES, *MORE])
def test_a_method_that_needs_no_images_learns_without_them(cls, settings):
    """On prompts alone x0 is NaN (`fewstep.data.sources.Prompts`); a sentence that asks for images counts as NaN."""
    method, roles, _ = contract.build(cls, settings)
    try:
        finite = all(loss.total.isfinite() for loss in losses_without_images(method, roles))
    except ValueError as error:
        assert "needs images" in str(error)
        finite = False
    assert finite == (not cls.needs_images(method.settings))


def losses_without_images(method, roles):
    """Over three steps, with every player due."""
    for step in range(3):
        rng = contract.rng_of(step=step)
        batch = contract.SOURCE.batch(rng)
        blind = dataclasses.replace(batch, x0=torch.full_like(batch.x0, torch.nan), has_data=False)
        draws = method.draw(blind, rng, Progress(step, 10))
        shared = method.prepare(roles, blind, draws, {player.name for player in method.players})
        for player in method.players:
            yield from getattr(method, player.name)(roles, blind, draws, shared).terms()


def test_both_kinds_are_met():
    assert {cls.needs_images(cls.Settings(**settings)) for cls, settings in (p.values for p in (*CASES, *MORE))} == {
        True,
        False,
    }


def test_noised_inputs_are_refused_for_prompts_alone(tmp_path):
    method = {"name": "dmd2", "adversarial_weight": 0, "student_input": "noised"}
    recipe = {"method": method, "data": {"source": "prompts", "path": str(tmp_path / "prompts.txt")}}
    with pytest.raises(RecipeError, match="dmd2 needs images"):
        parse_recipe(recipe)
    recipe["method"]["student_input"] = "simulated"
    parse_recipe(recipe)
