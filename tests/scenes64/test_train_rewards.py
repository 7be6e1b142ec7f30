"""Bradley and Terry's loss by hand; a small reward learnt from simulated raters; what it says of held-out choices."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fewstep.data.preferences import Preference, Preferences
from fewstep.models.encoders import load_encoder
from fewstep.models.rewards import About, RewardNetwork, load_reward
from fewstep.scenes64.scenes.raters import write_preferences
from fewstep.scenes64.train_rewards import SETTINGS, PairFeatures, margins, measure, preference_loss, train_reward
from fewstep.training.trainer import Trainer

torch.set_num_threads(1)


def test_the_loss_is_the_likelihood_of_the_choices():
    margin = torch.tensor([0.3, -2.0, 5.0], dtype=torch.float64, requires_grad=True)
    wanted = -sum(math.log(1 / (1 + math.exp(-m))) for m in margin.tolist()) / 3
    loss = preference_loss(margin)
    assert float(loss) == pytest.approx(wanted, rel=1e-12)
    slopes = [-(1 - 1 / (1 + math.exp(-m))) / 3 for m in margin.tolist()]
    assert torch.autograd.grad(loss, margin)[0].tolist() == pytest.approx(slopes, rel=1e-12)


def test_measured_on_held_out_choices():
    """The share of choices it would make too; in the mean over what the raters could have chosen; and the most."""
    network = RewardNetwork(About("encoder", load_encoder().heads))
    with torch.no_grad():
        network.usual[0] = 0
        network.taste.weight.zero_()
        network.taste.weight[0, 0] = 1
    first, second = torch.zeros(5, 43), torch.zeros(5, 43)
    first[:, 0] = torch.tensor([1.0, -1.0, 2.0, 0.5, -3.0])  # positive: it agrees with the choice
    pairs = [Preference("", "a", "b", p) for p in (0.9, 0.2, 0.4, 0.7, 0.6, 0.5)]
    rows = torch.tensor([0, 1, 2, 3, 4])
    found = measure(network, Preferences(tuple(pairs), 2), rows, PairFeatures(first, second))
    assert (found.trained, found.held_out, found.ties, found.accuracy) == (1, 5, 2, 0.6)
    assert found.expected == pytest.approx((0.9 + 0.8 + 0.4 + 0.7 + 0.4) / 5)
    assert found.ceiling == pytest.approx((0.9 + 0.8 + 0.6 + 0.7 + 0.6) / 5)
    assert "60.0 % of 5 held-out choices are the model's too; in the mean over the raters' noise 64.0 %" in str(found)
    people = Preferences(tuple(Preference("", "a", "b") for _ in range(6)))
    unknown = measure(network, people, rows, PairFeatures(first, second))
    assert unknown.expected is None and str(unknown) == "60.0 % of 5 held-out choices are the model's too."


@pytest.fixture(scope="module")
def choices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choices")
    write_preferences(folder, 3, 100)
    return folder


def test_a_reward_is_learnt_from_choices_and_is_the_same_again(choices, tmp_path):
    """From 80 pairs it knows the rule of taste roughly; its numbers are in standard deviations."""
    results = [
        train_reward(choices, tmp_path / name, load_encoder(), 1, replace(SETTINGS, steps=150)) for name in ("a", "b")
    ]
    assert results[0] == results[1] and results[0].held_out == 20 and results[0].trained == 80
    files = [load_file(tmp_path / name / "reward.safetensors") for name in ("a", "b")]
    assert all(torch.equal(t, files[1][key]) for key, t in files[0].items())
    assert results[0].expected > 0.5 + 0.6 * (results[0].ceiling - 0.5)
    assert json.loads((tmp_path / "a" / "measured.json").read_text())["accuracy"] == results[0].accuracy
    network = load_reward(tmp_path / "a" / "reward.safetensors")
    weights = dict(zip(["plain", "striped", "checked", "dotted", "grainy"], range(5), strict=True))
    at = 1 + 6  # after the mass and the shapes: colours, in the order of COLOURS
    usual = network.usual[1, at : at + 8]
    liked = network.taste.weight[0, at : at + 8] / usual
    assert liked[[0, 1, 2, 6]].mean() > liked[[3, 4, 5, 7]].mean() + 0.5  # red, orange, yellow, pink
    fills = network.taste.weight[0, at + 8 : at + 13] / network.usual[1, at + 8 : at + 13]
    assert fills[weights["plain"]] > fills[1:].mean()
    other = train_reward(choices, tmp_path / "c", load_encoder(), 2, replace(SETTINGS, steps=5))
    assert other.held_out == 20 and other.ceiling != results[0].ceiling  # other pairs are held out


def stopped(trainer, resume):
    """In the place of `Trainer.run`: an end in the middle, with a checkpoint."""
    for trainer.done in range(1, 6):
        trainer.step(trainer.done - 1)
    trainer.save()
    raise ZeroDivisionError


def test_an_interrupted_training_goes_on(tmp_path):
    choices = tmp_path / "choices"
    write_preferences(choices, 3, 12)
    whole = train_reward(choices, tmp_path / "whole", load_encoder(), 0, replace(SETTINGS, steps=8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run", stopped)
        with pytest.raises(ZeroDivisionError):
            train_reward(choices, tmp_path / "part", load_encoder(), 0, replace(SETTINGS, steps=8))
    assert (tmp_path / "part" / "checkpoints" / "step-0000005").is_dir()
    assert not (tmp_path / "part" / "reward.safetensors").exists()
    assert train_reward(choices, tmp_path / "part", load_encoder(), 0, replace(SETTINGS, steps=8)) == whole
    files = [load_file(tmp_path / name / "reward.safetensors") for name in ("whole", "part")]
    assert all(torch.equal(t, files[1][key]) for key, t in files[0].items())


def test_too_few_choices_and_spoilt_pictures_are_one_sentence(choices, tmp_path):
    place = tmp_path / "few"
    write_preferences(place, 3, 10)
    lines = (place / "preferences.jsonl").read_text().splitlines()
    (place / "preferences.jsonl").write_text("\n".join(lines[:2]))
    with pytest.raises(ValueError, match="holds 2 choices, too few to learn from"):
        train_reward(place, tmp_path / "out", load_encoder())
    (place / "preferences.jsonl").write_text("\n".join(lines))
    (place / json.loads(lines[4])["chosen"]).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"000004-chosen.png cannot be learnt from: .*\.$"):
        train_reward(place, tmp_path / "out", load_encoder())


def test_margins_are_of_the_unscaled_numbers():
    network = RewardNetwork(About("encoder", load_encoder().heads))
    seen = PairFeatures(torch.randn(4, 43), torch.randn(4, 43))
    wanted = (seen.chosen - seen.rejected) / network.usual[1] @ network.taste.weight[0]
    assert torch.allclose(margins(network, seen), wanted, atol=1e-5)
