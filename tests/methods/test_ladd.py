"""One step of LADD's players against the same step by hand, on the same draws; its levels, its draws, its refusals."""

from types import SimpleNamespace

import numpy as np
import projection_reference as hand
import pytest
import torch
import torch.nn.functional as F
from projection_reference import ROWS, actual, gradients, problem
from reference import CASES, SCHEDULES, alpha_sigma, off, waves

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.methods.base import Progress
from fewstep.methods.ladd import LADD, Draws

SETTINGS = {
    "the paper's": dict(),
    "with R1": dict(r1_weight=0.3, terminal="table"),
    "logistic": dict(loss="logistic"),
}


def draws():
    generator = torch.Generator().manual_seed(1)
    noises = [torch.randn(ROWS, 2, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3)]
    ratio = torch.tensor([-1.5, -0.3, 0.4, 1.0, 1.9, 2.6], dtype=torch.float64)
    return Draws(torch.tensor([0, 1, 2, 3, 0, 2]), noises[0], ratio, *noises[1:])


def judged_at(name, ratio):
    """Where sigma/alpha is exp(ratio); the nearest index, in the logarithm, on the table."""
    if name == "edm":
        return np.exp(ratio.numpy())
    if name == "flow":
        return 1 / (1 + np.exp(-ratio.numpy()))
    alpha, sigma = alpha_sigma("vp", np.arange(1000))
    table = (sigma / alpha).log().flatten()
    found = []
    for r in ratio.tolist():
        above = int((table < r).sum())
        part = (r - table[above - 1]) / (table[above] - table[above - 1])
        found.append(float(above - 1 + (part > 0.5)))
    return np.array(found)


def features(p, x, t):
    """The frozen teacher's two layers as maps: [B, 16, 1, 1] and [B, 4, 2, 2]."""
    first = x.flatten(1) @ p.base.inlet.weight.T + p.base.inlet.bias + waves(torch.from_numpy(t)) @ p.base.time.weight.T
    text = p.batch.cond["text"] @ p.base.text.weight.T + p.base.text.bias
    first = torch.tanh(first + p.base.time.bias + text)
    second = (first @ p.base.hidden.weight.T + p.base.hidden.bias).reshape(-1, 4, 2, 2)
    return {"first": first[..., None, None], "second": second}


def level_sines(name, t):
    alpha, sigma = alpha_sigma(name, t)
    angle = 100 * (sigma / alpha).log().reshape(-1, 1) / 10000 ** (torch.arange(16, dtype=torch.float64) / 15)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def by_hand(p, random):
    settings, student, weights = p.method.settings, p.leaves("student"), p.leaves("discriminator")
    x_s, x0_student = hand.student_answer(p, student, random.noise, random.level, settings.terminal)
    t = judged_at(p.name, random.ratio)
    alpha, sigma = alpha_sigma(p.name, t)
    fake = features(p, alpha * x0_student + sigma * random.fake_noise, t)
    real = features(p, alpha * p.batch.x0 + sigma * random.real_noise, t)
    condition = torch.cat([hand.sized(x) for x in (p.batch.cond["text"], level_sines(p.name, t))], dim=1)
    step = SimpleNamespace(x_s=x_s, x0_student=x0_student)
    said = hand.heads(weights, fake, condition)
    kept = hand.heads(weights, {tap: f.detach() for tap, f in fake.items()}, condition)
    says = hand.heads(weights, real, condition)
    if settings.loss == "hinge":
        step.loss, step.critic = -sum(f.mean() for f in said) / 2, hand.hinge(says, kept)
    else:
        step.loss = sum(F.softplus(-f).mean() for f in said) / 2
        step.critic = sum(F.softplus(-r).mean() + F.softplus(f).mean() for r, f in zip(says, kept, strict=True)) / 2
    if settings.r1_weight:
        step.critic = step.critic + settings.r1_weight * hand.slopes_at_heads(weights, real, condition)
    step.gradients, step.heads = gradients(step.loss, student), gradients(step.critic, weights)
    return step


@pytest.mark.parametrize("variant", SETTINGS)
@pytest.mark.parametrize(("schedule", "kind"), CASES)
def test_both_players_steps_are_the_papers(schedule, kind, variant):
    weights = "lora" if variant == "logistic" else "full"
    p, random = problem(LADD, schedule, kind, weights, **SETTINGS[variant]), draws()
    mine, theirs = actual(p, random), by_hand(p, random)
    for field in ("x_s", "x0_student"):
        for row, wanted in zip(getattr(mine, field), getattr(theirs, field), strict=True):
            assert off(row, wanted) <= 1e-10, field
    assert off(mine.loss, theirs.loss) <= 1e-9 and off(mine.critic, theirs.critic) <= 1e-9
    assert mine.gradients.keys() == theirs.gradients.keys() and mine.heads.keys() == theirs.heads.keys()
    for key, wanted in {**theirs.gradients, **theirs.heads}.items():
        assert wanted.abs().max() > 0, key
        assert off({**mine.gradients, **mine.heads}[key], wanted) <= 1e-9, key


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_answer_feels_every_logit_and_the_teacher_none(schedule):
    p, random = problem(LADD, schedule, "v_prediction"), draws()
    shared = p.method.prepare(p.roles, p.batch, random, {"student", "discriminator"})
    for head in p.roles.heads["discriminator"](shared.fake, shared.condition):
        (slope,) = torch.autograd.grad(head.sum(), shared.x0_student, retain_graph=True)
        assert (slope.flatten(1).abs().sum(1) > 0).all()
    assert not any(x.requires_grad for x in (*shared.real, shared.condition, shared.x_s))
    p.method.student(p.roles, p.batch, random, shared).total.backward(inputs=p.roles.parameters("student"))
    assert all(w.grad is None for w in p.roles.base.parameters())
    loss = p.method.discriminator(p.roles, p.batch, random, shared).total
    found = torch.autograd.grad(loss, p.roles.parameters("student"), allow_unused=True)
    assert not any(gradient is not None for gradient in found)


def test_levels_are_drawn_by_their_weights_after_a_warm_up_of_the_easy_ones():
    method, batch = LADD(SCHEDULES["flow"]), Batch(torch.zeros(20_000, 2))
    for step, shares in ((499, [0, 0, 0.5, 0.5]), (500, [0.7, 0.1, 0.1, 0.1])):
        random = method.draw(batch, Rng(3, step, 20_000), Progress(step, 1000))
        counts = torch.bincount(random.level, minlength=4).double() / 20_000
        assert (counts - torch.tensor(shares)).abs().max() < 0.02 and (counts[torch.tensor(shares) == 0] == 0).all()
    even = LADD(SCHEDULES["vp"], level_weights=(), warmup_steps=0, num_levels=2)
    assert torch.bincount(even.draw(batch, Rng(3, 0, 20_000), Progress(0, 1)).level).double().std() < 300


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_judged_levels_are_logit_normal_on_every_schedule(schedule):
    """log(sigma/alpha) ~ N(1, 1): on flow's own time, sigmoid of it, median 0.731."""
    method = LADD(SCHEDULES[schedule])
    random = method.draw(Batch(torch.zeros(20_000, 2)), Rng(3, 700, 20_000), Progress(700, 1000))
    times = method.judged_at(random.ratio)
    ratio = torch.from_numpy(np.log(SCHEDULES[schedule].noise_to_signal(times)))
    assert ratio.median().item() == pytest.approx(1, abs=0.04)
    assert ratio.quantile(0.1587).item() == pytest.approx(0, abs=0.06)
    if schedule == "flow":
        assert times.median().item() == pytest.approx(0.731, abs=0.01)
        assert ratio.std().item() == pytest.approx(1, abs=0.03)
    if schedule == "vp":
        assert torch.equal(times, times.round())
    noises = torch.stack([random.noise, random.fake_noise, random.real_noise]).flatten(1)
    assert (torch.corrcoef(noises) - torch.eye(3)).abs().max() < 0.03


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"level_weights": (1.0, 0.0)}, "level_weights must be 4 weights, one for each of num_levels"),
        ({"warmup_weights": (0.0, 0.0, 0.0, 0.0)}, "warmup_weights must be 4 weights"),
        ({"terminal": "zero"}, r"terminal: input should be .*, not 'zero'"),
        ({"loss": "lsgan"}, r"loss: input should be .*, not 'lsgan'"),
        ({"ratio_std": -1.0}, "ratio_std: input should be greater than or equal to 0, not -1.0"),
    ],
)
def test_wrong_settings_are_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        LADD(SCHEDULES["vp"], **settings)
