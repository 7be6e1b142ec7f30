"""A DMD2 run from recipe to picture: its critic in its checkpoints, a card that leads to its own times, its cost."""

import json

import pytest
import torch

from fewstep.data.random import Rng
from fewstep.inference.generate import generate, load_model
from fewstep.recipe.load import load_recipe
from fewstep.recipe.validate import RecipeError
from fewstep.reports.diagnose import diagnose
from fewstep.reports.report import timed
from fewstep.runs.distill import distill
from fewstep.runs.setup import setup
from fewstep.sampling import RenoiseSampler
from fewstep.students.card import load_card, sampler_of
from fewstep.training.checkpoint import latest, load, same, split
from tests.command_line import stop_and_go_on

RATIO = ["method.student_every=3"]


@pytest.fixture(scope="module")
def run(short, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dmd2"
    recipe = load_recipe("scenes-64-dmd2", [*short, *RATIO])
    distill(recipe, folder)
    return recipe, folder


def test_its_students_are_drawn_at_the_times_they_were_trained_at(run, tmp_path):
    folder = run[1]
    assert sampler_of(load_card(folder / "student")) == RenoiseSampler(num_inference_steps=4)
    words = generate(load_model(str(folder)), ["a red star"], None, {}, None, 0, tmp_path / "a.png")
    assert words == "renoise, timesteps 999, 749, 499, 249; guidance 1; seed 0"
    assert [p.name for p in (folder / "student").glob("*.safetensors")] == ["pytorch_lora_weights.safetensors"]


def test_a_step_costs_what_the_documents_say(run):
    """A picture: the student's calls and, when it is due, 2 + teacher 2 + fake 1 + game 1.5; critic 3 + twice 1.5."""
    recipe, folder = run
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    exits = [Rng(recipe.seed, step, 4).shared.integer("exit", 0, 4) for step in range(4)]
    costs = [4 * (exit + (13.5 if step % 3 == 0 else 7)) for step, exit in enumerate(exits)]
    assert [line["forward_equivalents"] for line in lines] == [sum(costs[:2]), sum(costs)]
    logged = {"student/matching", "student/adversarial", "student/fake_error", "student/score_gap", "critic/loss",
              "critic/denoising", "critic/discriminator", "critic/d_accuracy"}  # fmt: skip
    assert lines[-1].keys() >= logged


def test_what_scores_and_the_discriminator_say_is_logged_by_noise_level(run):
    """Bins add up to the statistic over all levels; the report divides by the share of rows."""
    lines = [json.loads(line) for line in (run[1] / "log.jsonl").read_text().splitlines()]
    for line in lines:
        for key in ("critic/d_real", "critic/d_fake", "student/score_scale"):
            if key in line:
                assert sum(line[f"{key}_by_time/{i}"] for i in range(10)) == pytest.approx(line[key], rel=1e-5)
    found = {name: timed(lines, name, what) for name, what in (("score_gap", "matching"), ("d_real", "real"))}
    assert all(0 < x < 1 and y >= 0 for points in found.values() for x, y in points) and found["score_gap"]
    assert all(y <= 1 for _, y in found["d_real"]) and timed(lines, "no_such", "real") == []
    assert timed([{"a/x_by_time/2": 1.0, "a/x_by_time/0": 0.0, "a/y_share_by_time/2": 0.25}], "x", "y") == [(0.25, 4.0)]


@pytest.mark.slow
def test_stopping_and_resuming_ends_in_the_same_weights_and_moments(run, tmp_path, monkeypatch):
    recipe, folder = run
    stop_and_go_on(monkeypatch, recipe, tmp_path / "run", 2)
    mine, theirs = (load(latest(where / "checkpoints"))[0] for where in (tmp_path / "run", folder))
    assert same(mine, theirs)
    fake, heads, moments = (split(mine, part) for part in ("roles/fake", "roles/discriminator", "optimizer/critic"))
    assert any(t.any() for name, t in fake.items() if ".lora_B" in name) and len(heads) == 6
    assert len(moments) == 3 * (len(fake) + len(heads))


def test_a_student_of_its_own_times_is_drawn_there(short, tmp_path):
    recipe = load_recipe("scenes-64-dmd2-1step", [*short, "method.timesteps=[399]"])
    card = setup(recipe, tmp_path).card(0)
    assert (card.num_inference_steps, card.timesteps) == (1, (399,))
    for asked in ({}, {"num_inference_steps": 1}):
        assert torch.as_tensor(sampler_of(card, **asked).timesteps).tolist() == [399]
    with pytest.raises(RecipeError, match=r"sample\.num_inference_steps is 4, but this method's students take 1"):
        load_recipe("scenes-64-dmd2-1step", [*short, "sample.num_inference_steps=4"])


def test_the_logs_of_a_run_can_be_diagnosed(run):
    assert diagnose(run[1])
