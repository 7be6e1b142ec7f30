"""A guidance scale of 0 means off, as 1 does, wherever one can be written."""

from __future__ import annotations

import json

import pytest
import torch

from fewstep.methods.guidance import OFF, Guidance
from fewstep.methods.registry import METHODS
from fewstep.recipe.load import load_recipe, parse_recipe
from fewstep.reports.candidates import teacher_candidates
from fewstep.runs.fit import foreseen_card
from fewstep.students.card import CARD_FILE, load_card

GUIDED = [name for name, cls in METHODS.items() if "guidance_scale" in cls.setting_names()]


@pytest.mark.parametrize("zero", [0, 0.0, -0.0, "0e0"])
@pytest.mark.parametrize("name", GUIDED)
def test_a_method_whose_guidance_is_0_is_the_one_without(name, zero):
    off, same = (parse_recipe({"method": {"name": name, "guidance_scale": scale}}) for scale in (zero, 1))
    assert off == same or off.as_data() == same.as_data()
    assert off.method_class().teacher_guidance(off.method_settings()) == OFF


def test_a_range_stays_a_range():
    assert (Guidance.of((0, 8)).low, Guidance.of((0, 8)).high) == (0, 8)
    assert Guidance.of(0) == Guidance.of((0, 0)) == Guidance.of(1) == OFF
    assert parse_recipe({"method": {"name": "lcm", "guidance_scale": [0, 0]}}).method_settings().guidance_scale == 1


def test_the_samples_of_the_teacher_and_their_cost():
    sets = ["pairs.guidance_scale=0", "sample.guidance_scale=0", "pairs.size=10", "pairs.num_inference_steps=5"]
    recipe = load_recipe("scenes-64-dmd", sets)
    assert recipe.pairs.guidance_scale == recipe.sample.guidance_scale == 1
    assert recipe.pairs.cost == 10 * 5
    own = load_recipe("scenes-64-dmd", ["method.guidance_scale=0", "pairs.size=10", "pairs.num_inference_steps=5"])
    assert own.pairs.guidance_scale == 1
    for scale in (-1, "nan", "inf"):
        with pytest.raises(ValueError, match=r"sample\.guidance_scale"):
            load_recipe("scenes-64-dmd", [f"sample.guidance_scale={'.' if scale != -1 else ''}{scale}"])


def test_cards_are_read_so(tmp_path):
    recipe = load_recipe("scenes-64-tcd")
    from fewstep.models.families import load_teacher

    teacher = load_teacher("scenes-64")
    method = recipe.method_class()(teacher.denoiser.schedule, recipe.method_settings())
    foreseen_card(recipe, method, "epsilon").save(tmp_path)
    data = json.loads((tmp_path / CARD_FILE).read_text())
    (tmp_path / CARD_FILE).write_text(json.dumps({**data, "guidance_scale": 0}))
    assert load_card(tmp_path).guidance_scale == 1
    recipe = load_recipe("scenes-64-tcd", ["sample.guidance_scale=0"])
    (candidate,) = teacher_candidates(teacher, [1], recipe.sample.guidance_scale)
    cond, noise = teacher.encode_prompts(["a red circle"]), torch.zeros(1, *teacher.latent_shape)
    asked = teacher.denoiser.uncounted()
    asked(noise, 999, cond, guidance_scale=candidate.guidance_scale)
    assert asked.cost.evaluations == 1
