"""One PCM step of both players against the same step by hand, on the same draws; its edges, its draws, its refusals."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from reference import (
    CASES,
    HOPS,
    SCHEDULES,
    alpha_sigma,
    ask,
    distance,
    grid,
    jump,
    noises,
    off,
    problem,
    residual_head,
    row_scales,
    waves,
    x0_epsilon,
)

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.methods.base import Progress
from fewstep.methods.pcm import PCM, Draws
from fewstep.models.cond import Cond
from fewstep.sampling.samplers import renoise

SETTINGS = {
    "unguided, no game": dict(guidance_scale=1.0, loss="l2", adversarial_weight=0.0),
    "guided": dict(guidance_scale=4.0, loss="huber", huber_c=0.3, adversarial_weight=0.7),
    "drawn scale, lagging": dict(guidance_scale=(2.0, 8.0), loss="l2", adversarial_weight=2.0, target_decay=0.95),
    "normal-cfg": dict(guidance_scale=1.0, caption_dropout=0.5, loss="l2", adversarial_weight=0.7),
}
PHASES = 3  # of five hops: they begin at hops 0, 1 and 3
FIRST = np.array([0, 1, 3, HOPS])


def draws(settings):
    """Every hop, the lowest one twice; each phase noised at its edge, inside, and near its top."""
    scales, (noise, fake, real) = row_scales(settings["guidance_scale"]), noises(3)
    dropped = torch.tensor([True, False, False, True, True, False]) if settings.get("caption_dropout") else None
    height = torch.tensor([0.0, 0.4, 0.999, 0.7, 0.2, 0.5], dtype=torch.float64)
    game = (height, fake, real) if settings["adversarial_weight"] else (None, None, None)
    return Draws(torch.tensor([0, 1, 2, 3, 4, 0]), noise, scales.double(), dropped, *game)


def logits_by_hand(p, weights, x, t, text):
    """The frozen teacher's two layers at x, each under its head."""
    base = p.base
    first = x.flatten(1) @ base.inlet.weight.T + base.inlet.bias + waves(torch.from_numpy(t)) @ base.time.weight.T
    first = torch.tanh(first + base.time.bias + text @ base.text.weight.T + base.text.bias)
    second = (first @ base.hidden.weight.T + base.hidden.bias).reshape(-1, 4, 2, 2)
    taps = {"first": first, "second": second}
    return [residual_head({k.removeprefix(f"heads.{tap}."): w for k, w in weights.items()
                          if k.startswith(f"heads.{tap}.")}, taps[tap]) for tap in taps]  # fmt: skip


def noised_time(name, phase, height):
    low, high = FIRST[phase], FIRST[phase + 1]
    times = grid(name)
    if name == "vp":
        return np.floor(times[low] + height * (times[high] - times[low]))
    place = low + height * (high - low)
    below = np.floor(place).astype(int)
    return times[below] + (place - below) * (times[below + 1] - times[below])


def noised(name, x, s, t, z):
    """The forward process from s on to t: alpha_t / alpha_s of the signal, noise filled up to sigma_t."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = alpha_sigma(name, s), alpha_sigma(name, t)
    return alpha_t / alpha_s * x + (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).clamp_min(0).sqrt() * z


def by_hand(p, draws, detach_target=True):
    settings = p.method.settings
    text, x0, w = p.batch.cond["text"], p.batch.x0, draws.guidance_scale.reshape(-1, 1, 1, 1)
    null = p.null.expand(6, 3)
    if draws.dropped is not None:
        text = torch.where(draws.dropped[:, None], null, text)
    phase = np.array([0, 1, 1, 2, 2, 0])  # of hops 0 ... 4 and 0 again
    t, u, edge = grid(p.name)[draws.index + 1], grid(p.name)[draws.index], grid(p.name)[FIRST[phase]]
    alpha, sigma = alpha_sigma(p.name, t)
    x_t = alpha * x0 + sigma * draws.noise
    teacher = [x0_epsilon(p.name, p.kind, x_t, ask(p.base, {}, p.name, x_t, t, c), t) for c in (text, null)]
    guided = tuple(with_ + (w - 1) * (with_ - without) for with_, without in zip(*teacher, strict=True))
    x_u = jump(p.name, guided, u)
    student = p.tensors("student")
    followed = p.tensors("target") if settings.target_decay else student

    def answer(tensors, x, t):
        pair = x0_epsilon(p.name, p.kind, x, ask(p.base, tensors, p.name, x, t, text), t)
        return torch.where(torch.from_numpy(t == edge).reshape(-1, 1, 1, 1), x, jump(p.name, pair, edge))

    a, b = answer(student, x_t, t), answer(followed, x_u, u)
    b = b.detach() if detach_target else b
    loss = distance(a, b, settings.loss, settings.huber_c)
    step = SimpleNamespace(x_t=x_t, x_u=x_u, x_edge=a, target=b, critic=None, heads={})
    if settings.adversarial_weight:
        heads = {k: w.detach().clone().requires_grad_() for k, w in p.roles.tensors_of("discriminator").items()}
        at = noised_time(p.name, phase, draws.height.numpy())
        said_of_fake = logits_by_hand(p, heads, noised(p.name, a, edge, at, draws.fake_noise), at, text)
        said_of_real = logits_by_hand(p, heads, noised(p.name, b, edge, at, draws.real_noise), at, text)
        loss = loss - settings.adversarial_weight * sum(f.mean() for f in said_of_fake) / 2
        pairs = zip(said_of_real, said_of_fake, strict=True)
        step.critic = sum((1 - r).clamp_min(0).mean() + (1 + f).clamp_min(0).mean() for r, f in pairs) / 2
        step.heads = dict(zip(heads, torch.autograd.grad(step.critic, heads.values(), retain_graph=True), strict=True))
    step.loss = loss
    step.gradients = dict(zip(student, torch.autograd.grad(loss, student.values()), strict=True))
    return step


def actual(p, draws):
    shared = p.method.prepare(p.roles, p.batch, draws, {"student", "discriminator"})
    step = SimpleNamespace(**vars(shared), critic=None, heads={})
    loss = p.method.student(p.roles, p.batch, draws, shared).total
    if p.method.settings.adversarial_weight:
        heads = p.roles.tensors_of("discriminator")
        critic = p.method.discriminator(p.roles, p.batch, draws, shared).total
        step.critic = critic
        step.heads = dict(zip(heads, torch.autograd.grad(critic, heads.values(), retain_graph=True), strict=True))
    student = p.roles.tensors_of("student")
    step.loss = loss
    step.gradients = dict(zip(student, torch.autograd.grad(loss, student.values()), strict=True))
    return step


def build(schedule, kind, variant, weights="full"):
    p = problem(PCM, schedule, kind, weights, num_phases=PHASES, **SETTINGS[variant])
    with torch.no_grad():
        for tensor in p.roles.tensors_of("discriminator").values() if p.method.gan else ():
            tensor.mul_(2)  # some logits past the hinge's margins, on both sides
    return p


@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("variant", SETTINGS)
@pytest.mark.parametrize(("schedule", "kind"), CASES)
def test_both_players_steps_are_the_papers(schedule, kind, variant, weights):
    p, random = build(schedule, kind, variant, weights), draws(SETTINGS[variant])
    mine, theirs = actual(p, random), by_hand(p, random)
    for field in ("x_t", "x_u", "x_edge", "target"):
        for row, wanted in zip(getattr(mine, field), getattr(theirs, field), strict=True):
            assert off(row, wanted) <= 1e-10, field
    assert off(mine.loss, theirs.loss) <= 1e-10
    assert mine.gradients.keys() == theirs.gradients.keys() and mine.heads.keys() == theirs.heads.keys()
    if theirs.critic is not None:
        assert off(mine.critic, theirs.critic) <= 1e-10 and mine.critic.item() != pytest.approx(2, abs=0.05)
    for key, wanted in {**theirs.gradients, **theirs.heads}.items():
        assert wanted.abs().max() > 0, key
        assert off({**mine.gradients, **mine.heads}[key], wanted) <= 1e-9, key


@pytest.mark.parametrize(("schedule", "kind"), CASES)
def test_landing_on_an_edge_the_target_is_the_teachers_point_to_the_bit(schedule, kind):
    """The only places where the teacher anchors a phase: its lowest hop."""
    step = actual(build(schedule, kind, "guided"), draws(SETTINGS["guided"]))
    same = (step.target == step.x_u).flatten(1).all(1)
    assert same.tolist() == [True, True, False, True, False, True]
    assert step.edge.tolist() == grid(schedule)[[0, 1, 1, 3, 3, 0]].tolist()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_gradient_flows_through_the_target(schedule):
    p, random = build(schedule, "v_prediction", "guided"), draws(SETTINGS["guided"])
    mine, attached = actual(p, random), by_hand(p, random, detach_target=False)
    assert not any(x.requires_grad for x in (mine.target, mine.x_u, *mine.real))
    assert off(mine.loss, attached.loss) <= 1e-10  # the same number, but not the same gradient
    assert min(off(mine.gradients[key], g) for key, g in attached.gradients.items()) > 0.01


def test_no_graph_leads_from_the_discriminators_loss_to_the_student():
    p, random = build("vp", "epsilon", "guided"), draws(SETTINGS["guided"])
    shared = p.method.prepare(p.roles, p.batch, random, {"student", "discriminator"})
    loss = p.method.discriminator(p.roles, p.batch, random, shared).total
    found = torch.autograd.grad(loss, p.roles.parameters("student"), allow_unused=True)
    assert not any(gradient is not None for gradient in found)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_both_sides_are_noised_as_the_forward_process_does(schedule):
    """From every edge to any time of its phase: the noise of x at the edge and the new one add up to sigma_t.

    The release's flow form has (sigma_t - sigma_s) / (1 - sigma_s) instead: 0.5 where 0.707 is right.
    """
    method = PCM(SCHEDULES[schedule], num_phases=4, num_grid_steps=12, guidance_scale=1.0)
    phase = torch.arange(4).repeat(50)
    height = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s, t = method.edges[phase], method.noised_time(phase, height)
    one, zero = torch.ones(200, 1, dtype=torch.float64), torch.zeros(200, 1, dtype=torch.float64)
    kept, added = (renoise(method.schedule, *pair)[:, 0] for pair in ((one, s, t, zero), (zero, s, t, one)))
    (alpha_s, sigma_s), (alpha_t, sigma_t) = ((c.flatten() for c in alpha_sigma(schedule, x)) for x in (s, t))
    torch.testing.assert_close(kept * alpha_s, alpha_t, rtol=1e-12, atol=0)
    torch.testing.assert_close((kept * sigma_s) ** 2 + added**2, sigma_t**2, rtol=1e-12, atol=1e-15)
    if schedule == "flow":
        half = renoise(method.schedule, torch.zeros(1), 0.5, 0.75, torch.ones(1))
        assert half.item() == pytest.approx(0.7071, abs=1e-4)


@pytest.mark.parametrize(
    ("phases", "hops", "edges"),
    [
        (2, 50, [0, 499, 999]),
        (4, 50, [0, 239, 499, 739, 999]),
        (8, 50, [0, 119, 239, 359, 499, 619, 739, 859, 999]),
        (4, 40, [0, 249, 499, 749, 999]),
        (1, 50, [0, 999]),
    ],
)
def test_edges_and_the_phase_of_every_hop(phases, hops, edges):
    """A hop belongs to the phase whose lower edge is the highest at or below where it lands."""
    method = PCM(SCHEDULES["vp"], num_phases=phases, num_grid_steps=hops)
    assert method.edges.tolist() == edges
    for hop, landing in enumerate(method.grid[:-1].tolist()):
        assert edges[method.phase[hop]] == max(e for e in edges if e <= landing)
        assert method.grid[hop + 1] <= edges[method.phase[hop] + 1]  # a time on an edge is the top of the phase below


def test_draws_cover_every_hop_and_every_height():
    method = PCM(SCHEDULES["vp"], num_grid_steps=10, guidance_scale=(2.0, 8.0), num_phases=2)
    random = method.draw(Batch(torch.zeros(20_000, 2)), Rng(3, 0, 20_000), Progress(0, 1))
    counts = torch.bincount(random.index, minlength=10)
    assert len(counts) == 10 and (counts - 2000).abs().max() < 5 * 2000**0.5
    assert 2 <= random.guidance_scale.min() < 2.01 and 7.99 < random.guidance_scale.max() < 8
    times = method.noised_time(torch.zeros(20_000, dtype=torch.int64), random.height)
    counts = torch.bincount(times.long(), minlength=499)
    assert torch.equal(times, times.round()) and len(counts) == 499  # 0 ... 498: the next edge is another phase's
    assert (counts - 20_000 / 499).abs().max() < 6 * (20_000 / 499) ** 0.5
    upper = method.noised_time(torch.ones(20_000, dtype=torch.int64), random.height)
    assert (upper.min(), upper.max()) == (499, 998)
    noises = torch.stack([random.noise, random.fake_noise, random.real_noise]).flatten(1)
    assert (torch.corrcoef(noises) - torch.eye(3)).abs().max() < 0.04  # of their own, all three
    assert (noises.std(dim=1) - 1).abs().max() < 0.02


@pytest.mark.parametrize("schedule", ["edm", "flow"])
def test_noised_times_elsewhere_are_even_over_the_hops(schedule):
    method = PCM(SCHEDULES[schedule], num_grid_steps=6, num_phases=2, guidance_scale=1.0)
    height = (torch.arange(6000, dtype=torch.float64) + 0.5) / 6000
    for phase in (0, 1):
        times = method.noised_time(torch.full((6000,), phase), height)
        inside = torch.histc(torch.searchsorted(method.grid, times, right=True).double() - 1, 6, 0, 6)
        assert inside[3 * phase : 3 * phase + 3].tolist() == [2000, 2000, 2000]
        assert method.edges[phase] <= times.min() and times.max() < method.edges[phase + 1]


def test_captions_are_dropped_as_often_as_asked():
    method = PCM(SCHEDULES["vp"], guidance_scale=1.0, caption_dropout=0.1)
    random = method.draw(Batch(torch.zeros(20_000, 2)), Rng(3, 0, 20_000), Progress(0, 1))
    assert random.dropped.double().mean().item() == pytest.approx(0.1, abs=0.008)
    with pytest.raises(ValueError, match="needs data with a condition"):
        method.prepare(None, Batch(torch.zeros(20_000, 2)), random, set())
    cond = Cond({"a": torch.ones(3, 2)}, null={"a": torch.zeros(1, 2)})
    assert method._captions(cond, torch.tensor([True, False, True]))["a"][:, 0].tolist() == [0, 1, 0]


def test_without_its_weight_there_is_no_discriminator():
    quiet = PCM(SCHEDULES["vp"], adversarial_weight=0.0)
    assert [p.name for p in quiet.players] == ["student"] and quiet.heads() == ()
    assert [p.name for p in PCM(SCHEDULES["vp"]).players] == ["student", "discriminator"]


def test_students_want_as_many_steps_as_phases_and_guidance_only_if_they_were_trained_without():
    wanted = PCM.sampling(PCM.Settings(num_phases=8))
    assert (wanted.num_inference_steps, wanted.eta, wanted.guidance_scale) == (8, 0.0, 1.0)
    assert PCM.sampling(replace(PCM.Settings(), guidance_scale=1.0, caption_dropout=0.1)).guidance_scale == 3.0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"eta": 0.3}, "PCM has no setting 'eta'"),
        ({"loss": "lpips"}, r"loss: input should be .*, not 'lpips'"),
        ({"num_phases": 51, "num_grid_steps": 50}, "num_phases must be between 1 and the 50 steps"),
        ({"num_phases": 0}, "num_phases: input should be greater than or equal to 1, not 0"),
        ({"caption_dropout": 1.0}, "caption_dropout: input should be less than 1, not 1.0"),
        ({"caption_dropout": 0.1}, "normal-cfg form: set guidance_scale to 1"),
        ({"adversarial_weight": -1.0}, "adversarial_weight: input should be greater than or equal to 0, not -1.0"),
    ],
)
def test_wrong_settings_are_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        PCM(reference.SCHEDULES["vp"], **settings)
