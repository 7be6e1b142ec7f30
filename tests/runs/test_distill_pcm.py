"""A PCM run from recipe to picture: two players, heads in its checkpoints, a card that leads to the phases' edges."""

import json

import pytest
import torch

from fewstep.inference.generate import generate, load_model
from fewstep.recipe.load import load_recipe, parse_recipe
from fewstep.recipe.validate import RecipeError
from fewstep.runs.distill import distill
from fewstep.runs.setup import setup
from fewstep.sampling import PhasedSampler
from fewstep.students.card import load_card, sampler_of
from fewstep.training.checkpoint import latest, load, same, split
from tests.command_line import stop_and_go_on


@pytest.fixture(scope="module")
def run(short, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "pcm"
    recipe = load_recipe("scenes-64-pcm", short)
    distill(recipe, folder)
    return recipe, folder


def test_its_students_are_drawn_on_the_edges_they_were_trained_on(run, tmp_path):
    folder = run[1]
    card = load_card(folder / "student")
    assert sampler_of(card) == PhasedSampler(num_inference_steps=4, original_inference_steps=8, eta=0.0)
    words = generate(load_model(str(folder)), ["a red star"], None, {}, None, 0, tmp_path / "a.png")
    assert words == "phased, timesteps 999, 749, 499, 249; guidance 1; seed 0"
    assert [p.name for p in (folder / "student").glob("*.safetensors")] == ["pytorch_lora_weights.safetensors"]


def test_a_step_costs_what_the_documents_say(run):
    """A picture: student 1 + 2, teacher 2 for guidance, target 1, features 1/2 (real) and 1/2 + 1 (fake)."""
    lines = [json.loads(line) for line in (run[1] / "log.jsonl").read_text().splitlines()]
    assert [line["forward_equivalents"] for line in lines] == [2 * 4 * 8, 4 * 4 * 8]
    logged = {"student/consistency", "student/adversarial", "discriminator/loss", "discriminator/d_accuracy"}
    assert lines[-1].keys() >= logged


@pytest.mark.slow
def test_stopping_and_resuming_ends_in_the_same_heads_and_moments(run, tmp_path, monkeypatch):
    recipe, folder = run
    stop_and_go_on(monkeypatch, recipe, tmp_path / "run", 2)
    mine, theirs = (load(latest(where / "checkpoints"))[0] for where in (tmp_path / "run", folder))
    assert same(mine, theirs)
    heads, moments = split(mine, "roles/discriminator"), split(mine, "optimizer/discriminator")
    fresh = {k: t.detach() for k, t in setup(recipe, tmp_path / "other").roles.tensors_of("discriminator").items()}
    assert heads.keys() == fresh.keys() and moments
    assert all(not torch.equal(t, fresh[k]) and t.dtype == torch.float32 for k, t in heads.items())


def test_normal_cfg_students_keep_their_guidance(short, tmp_path):
    changes = ["method.guidance_scale=1", "method.caption_dropout=0.1", "method.num_phases=2", "training.steps=1"]
    recipe = load_recipe("scenes-64-pcm", [*short, *changes])
    folder = distill(recipe, tmp_path / "run")
    card = load_card(folder)
    assert (card.num_inference_steps, card.guidance_scale) == (2, 3.0)
    words = generate(load_model(str(folder)), ["a red star"], None, {}, None, 0, tmp_path / "a.png")
    assert words == "phased, timesteps 999, 499; guidance 3; seed 0"


def test_what_a_recipe_leaves_out_is_the_methods_own():
    for name, steps, eta in (("pcm", 4, 0.0), ("tcd", 4, 0.3), ("lcm", 4, 0.0)):
        sample = parse_recipe({"method": name}).sample
        assert (sample.num_inference_steps, sample.eta) == (steps, eta)
    eight = parse_recipe({"method": {"name": "pcm", "num_phases": 8}, "sample": {"eta": 0.5}}).sample
    assert (eight.num_inference_steps, eight.eta) == (8, 0.5)


def test_other_steps_than_phases_are_refused_in_one_sentence():
    with pytest.raises(RecipeError, match="num_inference_steps is 6, but this method's students take 4: leave it out"):
        parse_recipe({"method": "pcm", "sample": {"num_inference_steps": 6}})
