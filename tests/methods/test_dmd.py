"""One DMD step against the same step by hand, on the same draws: answers, gradient, both losses, every gradient."""

import copy
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from reference import CASES, SCHEDULES, Network, alpha_sigma, ask, distance, off, roles_on, shake, x0_epsilon

from fewstep.data.batch import Batch, Pairs
from fewstep.data.random import Rng
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Progress
from fewstep.methods.dmd import DMD, Draws
from fewstep.models.cond import Cond
from fewstep.models.helpers import Helpers

SETTINGS = {
    "unguided": dict(guidance_scale=1.0),
    "guided": dict(guidance_scale=3.0),
    "kl, huber": dict(guidance_scale=3.0, weighting="kl", regression="huber", huber_c=0.3, regression_weight=2.0),
    "features": dict(guidance_scale=2.0, regression_space="features"),
    "asked earlier": dict(guidance_scale=1.0, timestep=0.4),
}
START = {"vp": 999.0, "edm": 80.0, "flow": 1.0}
TIMES = {"vp": [20, 300, 980], "edm": [0.01, 1.0, 60.0], "flow": [0.05, 0.5, 0.97]}
EARLIER = {"vp": 399.0, "edm": 3.0, "flow": 0.4}


def settings_of(schedule, variant):
    settings = dict(SETTINGS[variant])
    return settings | ({"timestep": EARLIER[schedule]} if "timestep" in settings else {})


class Encoder:
    """Two layers of pictures [B, 2, 2, 2]: a vector and a map, from matrices of its own."""

    tap_channels: ClassVar = {"flat": 5, "map": 3}

    def __init__(self):
        generator = torch.Generator().manual_seed(7)
        self.flat, self.map = (torch.randn(*s, generator=generator).double() for s in ((8, 5), (2, 3)))

    def features(self, pictures, taps):
        found = {
            "flat": torch.tanh(pictures.flatten(1) @ self.flat),
            "map": torch.einsum("bchw,cd->bdhw", pictures**2, self.map),
        }
        return [found[tap] for tap in taps]


def decode(latents):
    return torch.sin(latents) + 0.3 * latents.flip(1)


@dataclass
class Problem:
    name: str
    kind: str
    method: DMD
    roles: object
    base: torch.nn.Module
    batch: Batch
    draws: Draws


def problem(name, kind, variant="guided", weights="full"):
    """Three rows in float64, both trained roles shaken off the teacher and each other."""
    method = DMD(SCHEDULES[name], **settings_of(name, variant))
    torch.manual_seed(0)
    network = Network().double()
    base = copy.deepcopy(network)
    roles = roles_on(network, name, kind, method, weights, helpers=Helpers(decode, Encoder()))
    for role in ("student", "fake"):
        shake(roles.tensors_of(role).values())
    x0, noise, wanted, *noises = (torch.randn(3, 2, 2, 2).double() for _ in range(6))
    null = {"text": torch.randn(1, 3).double()}
    cond, other = (Cond({"text": torch.randn(3, 3).double()}, null=null) for _ in range(2))
    times = torch.tensor(TIMES[name], dtype=torch.float64)
    draws = Draws(noises[0], times, noises[1], times.flip(0), noises[2])
    return Problem(name, kind, method, roles, base, Batch(x0, cond, Pairs(noise, wanted, other)), draws)


@dataclass
class Step:
    """What a step must come to; gradients of the student's loss and of the fake score's, by name."""

    x0_student: torch.Tensor
    reference: torch.Tensor
    matching: torch.Tensor
    regression: torch.Tensor
    student: torch.Tensor
    fake: torch.Tensor
    of_student: dict
    of_fake: dict


def leaves(p, role):
    return {key: t.detach().clone().requires_grad_() for key, t in p.roles.tensors_of(role).items()}


def by_hand(p):
    """Algorithm 1, from a network's output up."""
    settings, student, fake = p.method.settings, leaves(p, "student"), leaves(p, "fake")
    text, null = p.batch.cond["text"], p.batch.cond.null()["text"]

    def clean(tensors, x, t, words):
        return x0_epsilon(p.name, p.kind, x, ask(p.base, tensors, p.name, x, t, words), t)[0]

    begin = START[p.name] if settings.timestep is None else settings.timestep
    first = np.full(3, begin)
    size = begin if p.name == "edm" else 1.0
    x = clean(student, size * p.draws.start, first, text)
    reference = clean(student, size * p.batch.pairs.noise, first, p.batch.pairs.cond["text"])
    t = p.draws.time.numpy()
    alpha, sigma = alpha_sigma(p.name, t)
    x_t = (alpha * x + sigma * p.draws.noise).detach()
    with_, without, said = (clean(w, x_t, t, c) for w, c in (({}, text), ({}, null), (fake, text)))
    real = without + settings.guidance_scale * (with_ - without)
    gap = (said - real).detach()
    if settings.weighting == "kl":
        gap = (alpha / sigma) ** 2 * gap
    else:
        gap = gap / torch.stack([abs(a - b).mean() for a, b in zip(x.detach(), real, strict=True)]).reshape(3, 1, 1, 1)
    matching = 0.5 * ((x - (x - gap).detach()) ** 2).mean()
    if settings.regression_space == "latents":
        regression = distance(reference, p.batch.pairs.x0, settings.regression, settings.huber_c)
    else:
        regression = perceptual(decode(reference), decode(p.batch.pairs.x0))
    total = matching + settings.regression_weight * regression
    total.backward()
    t = p.draws.fake_time.numpy()
    alpha, sigma = alpha_sigma(p.name, t)
    answer, noise = x.detach(), p.draws.fake_noise
    x_t = alpha * answer + sigma * noise
    output = ask(p.base, fake, p.name, x_t, t, text)
    data = 0.5 if p.name == "edm" else 1.0
    weight = (alpha / sigma) ** 2 + 1 / data**2 if p.kind == "sample" else 1.0
    target = {
        "sample": answer,
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * answer,
        "flow": noise - answer,
    }
    lost = (weight * (output - target[p.kind]) ** 2).mean()
    lost.backward()
    gradients = ({key: leaf.grad for key, leaf in role.items()} for role in (student, fake))
    return Step(x, reference, matching, regression, total, lost, *gradients)


def perceptual(a, b):
    """LPIPS' formula without its weights, by loops over layers, rows and places."""
    encoder, layers = Encoder(), []
    for one, other in zip(encoder.features(a, ["flat", "map"]), encoder.features(b, ["flat", "map"]), strict=True):
        places = one.flatten(2) if one.ndim > 2 else one[:, :, None]
        others = other.flatten(2) if other.ndim > 2 else other[:, :, None]
        found = [
            ((x / (x**2).sum().sqrt() - y / (y**2).sum().sqrt()) ** 2).sum()
            for row, wanted in zip(places, others, strict=True)
            for x, y in zip(row.T, wanted.T, strict=True)
        ]
        layers.append(sum(found) / len(found))
    return sum(layers) / 2


def actual(p):
    shared = p.method.prepare(p.roles, p.batch, p.draws, {"student", "fake"})
    loss = p.method.student(p.roles, p.batch, p.draws, shared)
    loss.total.backward(inputs=p.roles.parameters("student"), retain_graph=True)
    of_student = {key: leaf.grad for key, leaf in p.roles.tensors_of("student").items()}
    lost = p.method.fake(p.roles, p.batch, p.draws, shared).total
    lost.backward()  # into everything it reaches
    of_fake = {key: leaf.grad for key, leaf in p.roles.tensors_of("fake").items()}
    parts = loss.parts
    return Step(
        shared.x0_student,
        shared.reference,
        parts["matching"],
        parts["regression"],
        loss.total,
        lost,
        of_student,
        of_fake,
    )


@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("variant", SETTINGS)
@pytest.mark.parametrize(("schedule", "kind"), CASES)
def test_both_players_steps_are_the_papers(schedule, kind, variant, weights):
    p = problem(schedule, kind, variant, weights)
    theirs, mine = by_hand(p), actual(p)
    for field in ("x0_student", "reference", "matching", "regression", "student", "fake"):
        assert off(getattr(mine, field), getattr(theirs, field)) <= 1e-9, field
    for field in ("of_student", "of_fake"):
        found, wanted = getattr(mine, field), getattr(theirs, field)
        assert found.keys() == wanted.keys()
        for key, gradient in wanted.items():
            assert gradient.abs().max() > 0, key
            assert off(found[key], gradient) <= 1e-9, key


def test_the_fake_scores_loss_leaves_no_gradient_on_the_student():
    p = problem("vp", "epsilon")
    shared = p.method.prepare(p.roles, p.batch, p.draws, {"student", "fake"})
    p.method.fake(p.roles, p.batch, p.draws, shared).total.backward()
    assert all(leaf.grad is None for leaf in p.roles.parameters("student"))
    assert all(leaf.grad is not None for leaf in p.roles.parameters("fake"))


def test_draws_are_uniform_over_the_levels_that_the_paper_names():
    method = DMD(SCHEDULES["vp"])
    draws = method.draw(Batch(torch.zeros(40_000, 2)), Rng(3, 0, 40_000), Progress(0, 1))
    assert (draws.time.min(), draws.time.max()) == (20, 980) and (draws.fake_time.min(), draws.fake_time.max()) == (
        0,
        999,
    )
    assert abs(float(draws.time.mean()) - 500) < 6 and abs(float(draws.fake_time.mean()) - 499.5) < 6
    drawn = [draws.start, draws.noise, draws.fake_noise]
    assert all(abs(float((a * b).mean())) < 0.02 for a, b in ((drawn[0], drawn[1]), (drawn[1], drawn[2])))
    assert abs(float(torch.corrcoef(torch.stack([draws.time, draws.fake_time]))[0, 1])) < 0.02


def test_where_the_scores_agree_and_the_pairs_are_met_nothing_pulls():
    """The teacher as fake score, no guidance, pairs that are the student's own: a loss of exactly 0."""
    p = problem("vp", "v_prediction", "unguided")
    with torch.no_grad():
        for mine, base in zip(p.roles.tensors_of("fake").values(), p.base.parameters(), strict=True):
            mine.copy_(base)
    shared = p.method.prepare(p.roles, p.batch, p.draws, {"student"})
    p.batch.pairs.x0 = shared.reference.detach()
    loss = p.method.student(p.roles, p.batch, p.draws, shared)
    assert loss.total.item() == 0
    loss.total.backward(inputs=p.roles.parameters("student"))
    assert not any(leaf.grad.any() for leaf in p.roles.parameters("student"))


def test_data_without_pairs_is_one_sentence():
    method = DMD(Schedule.scaled_linear())
    with pytest.raises(ValueError, match="DMD learns from pairs of the teacher, and this data has none"):
        method.prepare(None, Batch(torch.zeros(2, 3)), None, {"student"})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_inference_steps": 4}, "DMD has no setting 'num_inference_steps'"),
        ({"regression": "lpips"}, r"regression: input should be .*, not 'lpips'"),
        ({"regression_space": "pixels"}, r"regression_space: input should be .*, not 'pixels'"),
        ({"regression_weight": -1.0}, "regression_weight: input should be greater than or equal to 0, not -1.0"),
        ({"regression_weight": math.nan}, "regression_weight: input should be a finite number, not nan"),
        ({"weighting": "sds"}, r"weighting: input should be .*, not 'sds'"),
        ({"timestep": -1}, "timestep must be above clean data"),
        ({"timestep": 1000}, "outside this vp schedule"),
    ],
)
def test_wrong_settings_are_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        DMD(Schedule.scaled_linear(), **settings)


def test_an_encoder_is_asked_for_where_features_are_compared():
    vp = Schedule.scaled_linear()
    assert (DMD(vp).encoder, DMD(vp, regression_space="features").encoder) == ("", "scenes-64")


def test_its_students_are_asked_once_where_they_were_trained():
    for settings, times in ((DMD.Settings(), ()), (DMD.Settings(timestep=399), (399,))):
        wanted = DMD.sampling(settings)
        assert (wanted.num_inference_steps, wanted.timesteps, wanted.guidance_scale) == (1, times, 1.0)
        assert wanted.no_other_steps
