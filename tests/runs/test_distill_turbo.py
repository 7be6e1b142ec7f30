"""ADD and LADD from recipe to picture: two players, a LoRA that others read, the sampler their students want."""

import json

import pytest

from fewstep.inference.generate import generate, load_model
from fewstep.recipe.load import load_recipe
from fewstep.recipe.validate import RecipeError
from fewstep.runs.distill import distill
from fewstep.sampling import EulerAncestralSampler
from fewstep.students.card import load_card, sampler_of


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parts"), [("turbo", {"adversarial", "distillation"}), ("ladd", {"adversarial"})])
def test_a_run_from_recipe_to_picture(name, parts, short, tmp_path):
    """A picture costs 5: turbo's student 1 + 2 and the guided teacher 2; ladd's student 3, features 1/2 and 1/2 + 1."""
    recipe = load_recipe(f"scenes-64-{name}", short)
    folder = distill(recipe, tmp_path / "run")
    card = load_card(folder)
    assert sampler_of(card) == EulerAncestralSampler(num_inference_steps=2) and card.guidance_scale == 1.0
    words = generate(load_model(str(folder)), ["a red star"], None, {}, None, 0, tmp_path / "a.png")
    assert words == "euler-ancestral, timesteps 999, 499; guidance 1; seed 0"
    assert [p.name for p in folder.glob("*.safetensors")] == ["pytorch_lora_weights.safetensors"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["forward_equivalents"] == 4 * 4 * 5
    assert lines[-1].keys() >= {f"student/{part}" for part in parts} | {"discriminator/d_accuracy"}


def test_an_encoder_that_is_not_there_is_one_sentence(short, tmp_path):
    recipe = load_recipe("scenes-64-turbo", [*short, "method.encoder=./nowhere"])
    with pytest.raises((RecipeError, ValueError), match=r"The encoder './nowhere' cannot be loaded"):
        distill(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
