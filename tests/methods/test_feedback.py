"""One step of human feedback against the same step by hand, on the same draws; its draws, thresholds and refusals."""

import copy
import dataclasses
import math
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from reference import (
    CASES,
    SCHEDULES,
    Network,
    Problem,
    alpha_sigma,
    ask,
    captioned,
    grid,
    jump,
    off,
    roles_on,
    shake,
    x0_epsilon,
)

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.methods.base import Progress
from fewstep.methods.feedback import Draws, Feedback, Goal
from fewstep.models.helpers import Helpers, PointReward
from fewstep.models.lora import base_parameters
from fewstep.sampling import make_sampler, sample

ROWS = 6
PROMPTS = ("a", "two shapes", "", "a red star", "three", "a picture of shapes")
SETTINGS = {
    "tcd, two rewards": dict(
        rewards=(Goal("waves", 0.4, 0.7), Goal("grey", -0.1, 2.0, name="plain")), held_out="length", num_grid_steps=5,
        num_inference_steps=3,
    ),
    "ddim, perceptual and anchor": dict(
        rewards=(Goal("waves", 0.6, 0.3),), sampler="ddim", eta=0.0, num_inference_steps=2, perceptual_weight=0.4,
        anchor_weight=0.2, encoder="by hand",
    ),
    "renoise, one step": dict(rewards=(Goal("grey", -0.05, 1.5),), sampler="renoise", num_inference_steps=1),
}  # fmt: skip
EXIT = {"tcd, two rewards": 2, "ddim, perceptual and anchor": 1, "renoise, one step": 0}


class Encoder:
    """A map of pictures [B, 2, 2, 2]."""

    tap_channels: ClassVar = {"map": 3}

    def __init__(self):
        self.map = torch.randn(2, 3, generator=torch.Generator().manual_seed(7)).double()

    def features(self, pictures, taps):
        assert taps == ("map",)
        return [torch.einsum("bchw,cd->bdhw", pictures**2 + pictures, self.map)]


def decode(latents):
    return torch.sin(latents) + 0.3 * latents.flip(1)


def waves(pictures, prompts):
    """Depends on every number of a picture, and on its prompt."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.float64)
    return torch.cos(pictures.flatten(1) * torch.arange(1, 9).double()).mean(1) + 0.02 * lengths


REWARDS = {
    "waves": waves,
    "grey": lambda pictures, prompts: -pictures.flatten(1).var(dim=1),
    "length": lambda pictures, prompts: pictures[:, 0, 0, 0] ** 3,
}


def draws(variant):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(ROWS, *shape, 2, 2, 2, generator=generator, dtype=torch.float64)

    exit, perceptual = EXIT[variant], SETTINGS[variant].get("perceptual_weight")
    level = torch.tensor([1, 1, 1, 1, 1, 1]) if perceptual else None
    return Draws(exit, normal(exit + 1), level, normal() if perceptual else None)


def build(name, kind, variant, weights):
    """Each threshold is such that half of the pictures have reached it, three of them."""
    method = Feedback(SCHEDULES[name], **SETTINGS[variant])
    torch.manual_seed(0)
    network = Network().double()
    base = copy.deepcopy(network)
    helpers = Helpers(decode, Encoder(), rewards=REWARDS)
    roles = roles_on(network, name, kind, method, weights, helpers=helpers)
    shake(roles.tensors().values())
    p = Problem(name, kind, method, roles, base, *captioned(ROWS))
    p.batch.prompts = PROMPTS
    with torch.no_grad():
        pictures = decode(p.method.prepare(roles, p.batch, draws(variant), {"student"}).x0_student)
    goals = method.settings.rewards
    halves = [float(REWARDS[goal.model](pictures, PROMPTS).sort().values[2:4].mean()) for goal in goals]
    goals = tuple(dataclasses.replace(goal, threshold=half) for goal, half in zip(goals, halves, strict=True))
    p.method = Feedback(SCHEDULES[name], **SETTINGS[variant] | {"rewards": goals})
    return p


def student_times(name, variant):
    """The student's own times, and where its sampler lands."""
    if variant.startswith("tcd"):
        return [float(grid(name)[i]) for i in (5, 4, 2)]
    n = SETTINGS[variant]["num_inference_steps"]
    k = np.arange(n, 0, -1) / n
    if name == "vp":
        return (np.round(1000 * k) - 1).tolist()
    if name == "flow":
        return (3 * k / (1 + 2 * k)).tolist()
    return [80.0] if n == 1 else [80.0, 0.002]


def by_hand(p, variant, d):
    settings, text, x0 = p.method.settings, p.batch.cond["text"], p.batch.x0
    leaves, times, eta = p.leaves("student"), student_times(p.name, variant), 0.3

    def asked(tensors, x, t):
        t = np.full(ROWS, t)
        return x0_epsilon(p.name, p.kind, x, ask(p.base, tensors, p.name, x, t, text), t)

    x = d.noise[:, 0] * (80.0 if p.name == "edm" else 1.0)
    for i in range(d.exit):
        pair, after = asked(leaves, x, times[i]), times[i + 1]
        if not variant.startswith("tcd"):
            x = jump(p.name, pair, np.full(ROWS, after)).detach()
            continue
        lower = (1 - eta) * after
        lower = math.floor(lower) if p.name == "vp" else max(lower, 0.002 if p.name == "edm" else 0.0)
        (a_s, s_s), (a_t, s_t) = alpha_sigma(p.name, np.full(ROWS, lower)), alpha_sigma(p.name, np.full(ROWS, after))
        landed = jump(p.name, pair, np.full(ROWS, lower))
        spread = (s_t**2 - (a_t * s_s / a_s) ** 2).sqrt()
        x = (a_t / a_s * landed + spread * d.noise[:, i + 1]).detach()
    answer = asked(leaves, x, times[d.exit])[0]
    pictures = decode(answer)
    found, loss = {}, 0
    for goal in settings.rewards:
        r = REWARDS[goal.model](pictures, PROMPTS)
        name = goal.name or goal.model
        missing = sum(goal.threshold - value if value < goal.threshold else 0 * value for value in r) / ROWS
        loss = loss + goal.weight * missing
        found |= {f"{name}_mean": r.mean(), f"{name}_std": ((r - r.mean()) ** 2).mean().sqrt()}
        found[f"{name}_reached"] = torch.tensor(sum(float(v >= goal.threshold) for v in r) / ROWS, dtype=torch.float64)
    if settings.held_out:
        r = REWARDS[settings.held_out](pictures, PROMPTS)
        found |= {"held_out_mean": r.mean(), "held_out_std": ((r - r.mean()) ** 2).mean().sqrt()}
    if settings.perceptual_weight:
        alpha, sigma = alpha_sigma(p.name, np.array(times)[d.level])
        kept = asked(leaves, alpha * x0 + sigma * d.level_noise, times[1])[0]
        here, there = (Encoder().features(decode(side), ("map",))[0] for side in (kept, x0))
        apart = here / here.norm(dim=1, keepdim=True) - there / there.norm(dim=1, keepdim=True)
        loss = loss + settings.perceptual_weight * (apart**2).sum(dim=1).mean()
    if settings.anchor_weight:
        before = asked({}, x, times[d.exit])[0]
        loss = loss + settings.anchor_weight * ((answer - before) ** 2).mean()
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return SimpleNamespace(x_t=x, x0_student=answer, loss=loss, gradients=gradients, stats=found)


def actual(p, d):
    shared = p.method.prepare(p.roles, p.batch, d, {"student"})
    loss = p.method.student(p.roles, p.batch, d, shared)
    loss.total.backward(inputs=p.roles.parameters("student"))
    gradients = {key: leaf.grad for key, leaf in p.roles.tensors_of("student").items()}
    return SimpleNamespace(**vars(shared), loss=loss.total, gradients=gradients, stats=loss.stats, parts=loss.parts)


@pytest.mark.parametrize("weights", ["lora", "full"])
@pytest.mark.parametrize("variant", SETTINGS)
@pytest.mark.parametrize(("schedule", "kind"), CASES)
def test_a_step_is_the_papers(schedule, kind, variant, weights):
    p, d = build(schedule, kind, variant, weights), draws(variant)
    assert p.method.times[:-1].tolist() == pytest.approx(student_times(schedule, variant), rel=1e-12)
    mine, theirs = actual(p, d), by_hand(p, variant, d)
    assert not mine.x_t.requires_grad and mine.x0_student.requires_grad
    for field in ("x_t", "x0_student"):
        for row, wanted in zip(getattr(mine, field), getattr(theirs, field), strict=True):
            assert off(row, wanted) <= 1e-10, field
    assert off(mine.loss, theirs.loss) <= 1e-9
    assert mine.gradients.keys() == theirs.gradients.keys()
    for key, wanted in theirs.gradients.items():
        assert wanted.abs().max() > 0, key
        assert off(mine.gradients[key], wanted) <= 1e-9, key
    assert all(float(share) == 0.5 for key, share in mine.stats.items() if key.endswith("_reached"))
    for key, wanted in theirs.stats.items():
        assert abs(float(mine.stats[key]) - float(wanted.detach())) <= 1e-9 * max(1.0, abs(float(wanted.detach()))), key
    assert all(w.grad is None and not w.requires_grad for w in base_parameters(p.roles.base))


@pytest.mark.parametrize("sampler", ["tcd", "lcm", "ddim", "euler-ancestral", "phased", "dpm++2m"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_way_to_each_exit_is_the_samplers_own(schedule, sampler):
    """To the bit, from the same noises: what is trained is what is drawn."""
    method = Feedback(SCHEDULES[schedule], sampler=sampler, num_inference_steps=4, eta=0.4, num_grid_steps=20)
    torch.manual_seed(0)
    roles = roles_on(Network().double(), schedule, "v_prediction", method)
    batch, _ = captioned(ROWS)
    noise = torch.randn(ROWS, 4, 2, 2, 2, dtype=torch.float64)
    options = {"eta": 0.4} if sampler in ("tcd", "ddim", "euler-ancestral", "phased") else {}
    options |= {"original_inference_steps": 20} if sampler in ("tcd", "lcm", "phased") else {}
    own = make_sampler(sampler, num_inference_steps=4, **options)
    run = sample(roles.student, own, noise[:, 0], batch.cond, noises=list(noise[:, 1:].unbind(1)))
    for exit in range(4):
        x_t = method.state(roles.student, Draws(exit, noise[:, : exit + 1]), batch.cond)
        assert torch.equal(x_t, run.states[exit]), exit
    assert method.sampler == sampler and method.sampling(method.settings).eta == 0.4


def test_nothing_pulls_once_every_picture_is_liked_enough():
    """Exactly nothing, on every weight; and a picture pulls alone where it alone is missing something."""
    p = build("vp", "epsilon", "renoise, one step", "full")
    d = draws("renoise, one step")
    rewards = REWARDS["grey"](decode(p.method.prepare(p.roles, p.batch, d, {"student"}).x0_student), PROMPTS)
    for missing, threshold in enumerate(rewards.detach().sort().values.tolist()):
        p.method = Feedback(SCHEDULES["vp"], **SETTINGS["renoise, one step"] | {"rewards": (Goal("grey", threshold),)})
        for weight in p.roles.tensors_of("student").values():
            weight.grad = None
        step = actual(p, d)
        pulled = [key for key, gradient in step.gradients.items() if gradient.any()]
        assert (pulled == []) is (missing == 0)
        assert float(step.parts["grey_missing"]) >= 0
        assert float(step.stats["grey_reached"]) == pytest.approx((ROWS - missing) / ROWS)


def test_the_gradient_is_the_last_calls_alone():
    """However far the exit: what earlier calls recorded would be there as a graph of x_t."""
    p = build("flow", "flow", "tcd, two rewards", "lora")
    p.roles.student.cost.calls = p.roles.student.cost.graph_evaluations = 0
    shared = p.method.prepare(p.roles, p.batch, draws("tcd, two rewards"), {"student"})
    assert (p.roles.student.cost.graph_evaluations, p.roles.student.cost.calls) == (ROWS, 3)
    assert not shared.x_t.requires_grad


def test_draws():
    method = Feedback(SCHEDULES["vp"], num_inference_steps=4, first_exit=1, perceptual_weight=1.0)
    batch = Batch(torch.zeros(4, 2))
    exits = [method.draw(batch, Rng(3, step, 4), Progress(step, 1)).exit for step in range(600)]
    assert np.bincount(exits, minlength=4).tolist() == pytest.approx([0, 200, 200, 200], abs=60)
    step = exits.index(3)
    random = method.draw(Batch(torch.zeros(20_000, 2)), Rng(3, step, 20_000), Progress(0, 1))
    noises = torch.cat([*random.noise.unbind(1), random.level_noise], dim=1)
    assert noises.shape == (20_000, 10) and (torch.corrcoef(noises.T) - torch.eye(10)).abs().max() < 0.04
    counts = torch.bincount(random.level, minlength=4)
    assert counts[0] == 0 and (counts[1:] - 20_000 / 3).abs().max() < 5 * (20_000 / 3) ** 0.5
    assert method.calls(random) == {"student": 5, "teacher": 0}
    assert method.calls_per_step() == {"student": 4, "teacher": 0}  # exits 1, 2, 3
    quiet = Feedback(SCHEDULES["vp"])
    assert quiet.draw(batch, Rng(3, 0, 4), Progress(0, 1)).level is None and quiet.encoder == ""
    assert quiet.rewards == ("pickscore",) and quiet.measures == ()


def test_a_reward_is_called_by_its_kind_or_its_file():
    models = "pickscore", "aesthetic:models/clip", "runs/a-1/taste.2.safetensors"
    labels = [Goal(model, 0.0).label for model in models]
    assert labels == ["pickscore", "aesthetic", "taste_2"] and Goal("pickscore", 0.0, name="people").label == "people"


def test_points_have_a_linear_reward():
    x = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.0, -1.0, 0.0, 0.0]])
    assert PointReward()(x, ("", "")).tolist() == [6.0, -0.5]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rewards": ()}, "rewards: name one or more"),
        (
            {"rewards": ({"model": "a", "threshold": 1.0, "weight": -1.0},)},
            r"rewards\.0\.weight: input should be greater",
        ),
        (
            {"rewards": ({"model": "a", "threshold": math.nan},)},
            r"rewards\.0\.threshold: input should be a finite number",
        ),
        ({"rewards": (Goal("a", 1.0), Goal("b/a", 1.0))}, "Two terms of the loss are called a"),
        ({"rewards": (Goal("a", 1.0, name="anchor"),)}, "Two terms of the loss are called anchor"),
        ({"held_out": "pickscore"}, "held_out is pickscore, which is trained on"),
        ({"first_exit": 4}, "first_exit must be one of the 4 calls, counted from 0, not 4"),
        ({"num_inference_steps": 1, "perceptual_weight": 1.0}, "perceptual_weight needs a student of two steps"),
        ({"perceptual_weight": float("inf")}, "perceptual_weight: input should be a finite number, not inf"),
        ({"anchor_weight": -0.1}, "anchor_weight: input should be greater than or equal to 0, not -0.1"),
        ({"sampler": "tdc"}, "Unknown sampler 'tdc'"),
        ({"eta": 1.5}, "eta must be between 0 and 1, not 1.5"),
        ({"num_inference_steps": 7, "num_grid_steps": 5}, "num_inference_steps 7 exceeds"),
    ],
)
def test_wrong_settings_are_one_sentence(settings, said):
    with pytest.raises(ValueError, match=said):
        Feedback(SCHEDULES["vp"], **settings)
