"""A CTM run from recipe to picture: a student that is told where it jumps, in training, files and sampling."""

import json

import pytest
import torch

from fewstep.inference.generate import generate, load_model
from fewstep.recipe.load import load_recipe
from fewstep.runs.distill import distill
from fewstep.sampling import CTMSampler
from fewstep.students.card import load_card, sampler_of
from fewstep.training.checkpoint import latest, load


@pytest.mark.slow
def test_a_student_learns_its_ends_and_is_told_them_again(short, tmp_path):
    """A picture costs: student 1 + 2, 1, 1 + 2; the outer map 1 + 2 and 1; the teacher 2 for each of h hops and 2."""
    folder = distill(load_recipe("scenes-64-ctm", short), tmp_path / "run")
    card = load_card(folder)
    assert sampler_of(card) == CTMSampler(num_inference_steps=4, eta=0.0) and list(card.extra_inputs) == ["end"]
    words = generate(load_model(str(folder)), ["a red star"], None, {}, None, 0, tmp_path / "a.png")
    assert words == "ctm, timesteps 999, 749, 499, 249; guidance 1; seed 0"
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1].keys() >= {"student/consistency", "student/denoising", "student/denoising_weight"}
    hops = (lines[-1]["forward_equivalents"] / (4 * 4) - 13) / 2  # four steps of four pictures
    assert hops * 4 == round(hops * 4) and 1 <= hops <= 4
    tensors, _ = load(latest(tmp_path / "run" / "checkpoints"))
    told = [t for key, t in tensors.items() if key.startswith("roles/student/extras.")]
    assert told and all(torch.any(t != 0) for t in told)
