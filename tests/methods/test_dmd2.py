"""One DMD2 step of both players against the same step by hand, on the same draws; its inputs, draws and refusals."""

import copy
import weakref
from collections import Counter
from types import SimpleNamespace

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
    off,
    residual_head,
    roles_on,
    shake,
    waves,
    weights_of,
)
from reference import x0_epsilon as read

from fewstep.data.batch import Batch
from fewstep.data.random import Rng, SampleRandom
from fewstep.methods.base import Progress
from fewstep.methods.dmd2 import DMD2, Draws
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.mlp import MLP
from fewstep.models.roles import Weights
from fewstep.sampling import LCMSampler, RenoiseSampler, sample
from fewstep.training.players import PlayerState
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, build_roles

ROWS = 5
SETTINGS = {
    "unguided, alone": dict(guidance_scale=1.0, adversarial_weight=0.0, weighting="kl"),
    "guided": dict(guidance_scale=4.0, adversarial_weight=0.7, discriminator_weight=0.3),
    "its own discriminator": dict(guidance_scale=1.0, adversarial_weight=0.7, discriminator_backbone="teacher"),
    "one step": dict(guidance_scale=8.0, adversarial_weight=0.2, head="residual", num_inference_steps=1),
    "data-noised": dict(guidance_scale=3.0, adversarial_weight=0.2, student_input="noised", terminal="table"),
}
TIMES = {
    "vp": [[20, 300, 499, 801, 980], [0, 250, 999, 12, 600], [7, 500, 900, 33, 1], [999, 3, 450, 77, 8],
           [5, 6, 7, 8, 9]],
    "edm": [[0.01, 0.2, 1.0, 7.0, 60.0], [0.002, 0.5, 80.0, 0.1, 3.0], [0.3, 0.02, 2.0, 9.0, 40.0], [1, 2, 3, 4, 5],
            [0.9, 0.8, 0.7, 0.6, 0.5]],
    "flow": [[0.02, 0.3, 0.5, 0.8, 0.98], [0.001, 0.2, 1.0, 0.6, 0.4], [0.1, 0.9, 0.35, 0.05, 0.7],
             [0.2, 0.3, 0.4, 0.5, 0.6], [0.95, 0.85, 0.75, 0.65, 0.55]],
}  # fmt: skip


def sampled_at(name, n):
    """The student's own times."""
    k = np.arange(n, 0, -1) / n
    if name == "vp":
        return np.round(1000 * k) - 1
    if name == "flow":
        return 3 * k / (1 + 2 * k)
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    return np.array([80.0]) if n == 1 else (high + np.arange(n) / (n - 1) * (low - high)) ** 7


def draws(name, variant, exit):
    settings = SETTINGS[variant]
    generator = torch.Generator().manual_seed(1)
    noises = 1 if settings.get("student_input") == "noised" else exit + 1
    first = torch.randn(ROWS, noises, 2, 2, 2, generator=generator, dtype=torch.float64)
    noise = [torch.randn(ROWS, 2, 2, 2, generator=generator, dtype=torch.float64) for _ in range(5)]
    times = [torch.tensor(t, dtype=torch.float64) for t in TIMES[name]]
    names = ("fake", "matching", "played", "judged", "data")[: 5 if settings["adversarial_weight"] else 2]
    found = {f"{name}_{what}": x for what, all_of in (("time", times), ("noise", noise))
             for name, x in zip(names, all_of, strict=False)}  # fmt: skip
    return Draws(exit=exit, noise=first, **found)


def build(name, kind, variant, weights="full"):
    method = DMD2(SCHEDULES[name], **SETTINGS[variant])
    torch.manual_seed(0)
    network = Network().double()
    base = copy.deepcopy(network)
    roles = roles_on(network, name, kind, method, weights)
    shake(roles.tensors().values())
    return Problem(name, kind, method, roles, base, *captioned(ROWS))


def conv_head(weights, features):
    """A 4x4 convolution over the map, padded with zeros to 4x4; a norm over all four channels; SiLU; one logit."""
    padded = torch.zeros(ROWS, 4, 4, 4, dtype=torch.float64)
    padded[:, :, :2, :2] = features
    h = torch.einsum("oihw,bihw->bo", weights["last.0.weight"], padded) + weights["last.0.bias"]
    centred = h - h.mean(dim=1, keepdim=True)
    h = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    h = weights["last.1.weight"] * h + weights["last.1.bias"]
    return h / (1 + (-h).exp()) @ weights["outlet.weight"][0, :, 0, 0] + weights["outlet.bias"]


def logits(p, backbone, heads, x, t, text):
    """What the head says of the second layer, under the backbone's weights."""
    w = weights_of(p.base, backbone)
    h = x.flatten(1) @ w["inlet.weight"].T + w["inlet.bias"] + waves(t) @ w["time.weight"].T + w["time.bias"]
    h = torch.tanh(h + text @ w["text.weight"].T + w["text.bias"])
    h = (h @ w["hidden.weight"].T + w["hidden.bias"]).reshape(ROWS, 4, 2, 2)
    mine = {key.removeprefix("heads.second."): value for key, value in heads.items()}
    return residual_head(mine, h) if p.method.settings.head == "residual" else conv_head(mine, h)


def softplus(x):
    return torch.log1p((-x.abs()).exp()) + x.clamp_min(0)


def by_hand(p, d):
    settings, text, x0 = p.method.settings, p.batch.cond["text"], p.batch.x0
    student, fake = p.leaves("student"), p.leaves("fake")
    heads = p.leaves("discriminator") if settings.adversarial_weight else {}
    backbone = fake if settings.discriminator_backbone == "fake" else {}

    def noised(x, noise, t):
        alpha, sigma = alpha_sigma(p.name, t)
        return alpha * x + sigma * noise

    def clean(tensors, x, t, text=text):
        t = np.broadcast_to(np.asarray(t, dtype=np.float64), ROWS).copy()
        return read(p.name, p.kind, x, ask(p.base, tensors, p.name, x, t, text), t)[0]

    times = sampled_at(p.name, settings.num_inference_steps)
    if settings.student_input == "noised":
        x_t = noised(x0, d.noise[:, 0], np.full(ROWS, times[d.exit]))
    else:
        x_t = d.noise[:, 0] * (80.0 if p.name == "edm" else 1.0)
        for i in range(d.exit):
            x_t = noised(clean(student, x_t, times[i]), d.noise[:, i + 1], np.full(ROWS, times[i + 1])).detach()
    x = clean(student, x_t, times[d.exit])

    at = d.matching_time.numpy()
    state = noised(x.detach(), d.matching_noise, at)
    null, real = clean({}, state, at, p.null.expand(ROWS, 3)), clean({}, state, at)
    guided = null + settings.guidance_scale * (real - null)
    gap = clean(fake, state, at) - guided
    alpha, sigma = alpha_sigma(p.name, at)
    scale = (x - guided).abs().mean(dim=(1, 2, 3), keepdim=True)
    g = (gap / scale if settings.weighting == "l1" else (alpha / sigma) ** 2 * gap).detach()
    loss = 0.5 * ((x - (x - g).detach()) ** 2).mean()
    step = SimpleNamespace(
        x_t=x_t, x0_student=x, errors=[((fake_x0 - x) ** 2).mean() for fake_x0 in (gap + guided, real)]
    )
    if heads:
        said = logits(p, backbone, heads, noised(x, d.played_noise, d.played_time.numpy()), d.played_time, text)
        loss = loss + settings.adversarial_weight * softplus(-said).mean()

    at, a = d.fake_time.numpy(), x.detach()
    alpha, sigma = alpha_sigma(p.name, at)
    state = noised(a, d.fake_noise, at)
    said = ask(p.base, fake, p.name, state, at, text)
    wanted = {"epsilon": d.fake_noise, "sample": a, "v_prediction": alpha * d.fake_noise - sigma * a,
              "flow": d.fake_noise - a}[p.kind]  # fmt: skip
    weight = (alpha / sigma) ** 2 + (4.0 if p.name == "edm" else 1.0) if p.kind == "sample" else 1.0
    critic = (weight * (said - wanted) ** 2).mean()
    if heads:
        of_data = logits(p, backbone, heads, noised(x0, d.data_noise, d.data_time.numpy()), d.data_time, text)
        of_answers = logits(p, backbone, heads, noised(a, d.judged_noise, d.judged_time.numpy()), d.judged_time, text)
        critic = critic + settings.discriminator_weight * (softplus(-of_data).mean() + softplus(of_answers).mean())
    step.loss, step.critic, step.gradients = loss, critic, gradients(loss, student)
    step.fake, step.heads = gradients(critic, fake), gradients(critic, heads)
    return step


def gradients(loss, tensors):
    if not tensors:
        return {}
    found = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True, allow_unused=True)
    return dict(zip(tensors, found, strict=True))


def player(p, name):
    (found,) = (player for player in p.method.players if player.name == name)
    return PlayerState(found, [w for role in found.roles for w in p.roles.parameters(role)], TrainingSettings())


def actual(p, d):
    shared = p.method.prepare(p.roles, p.batch, d, {"student", "critic"})
    step = SimpleNamespace(**vars(shared))
    step.student = player(p, "student").learn(p.method.student(p.roles, p.batch, d, shared), 1)
    step.critic_loss = player(p, "critic").learn(p.method.critic(p.roles, p.batch, d, shared), 1)
    step.loss, step.critic = step.student.total, step.critic_loss.total
    of = {role: {k: w.grad for k, w in p.roles.tensors_of(role).items()} for role in ("student", "fake")}
    heads = p.roles.tensors_of("discriminator") if p.method.gan else {}
    step.gradients, step.fake, step.heads = of["student"], of["fake"], {k: w.grad for k, w in heads.items()}
    return step


@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("variant", SETTINGS)
@pytest.mark.parametrize(("schedule", "kind"), CASES)
def test_both_players_steps_are_the_papers(schedule, kind, variant, weights):
    p = build(schedule, kind, variant, weights)
    d = draws(schedule, variant, 0 if SETTINGS[variant].get("num_inference_steps") == 1 else 2)
    mine, theirs = actual(p, d), by_hand(p, d)
    for field in ("x_t", "x0_student"):
        for row, wanted in zip(getattr(mine, field), getattr(theirs, field), strict=True):
            assert off(row, wanted) <= 1e-10, field
    assert off(mine.loss, theirs.loss) <= 1e-10 and off(mine.critic, theirs.critic) <= 1e-10
    for field in ("gradients", "fake", "heads"):
        found, expected = getattr(mine, field), getattr(theirs, field)
        assert found.keys() == expected.keys()
        for key, wanted in expected.items():
            assert wanted is not None and wanted.abs().max() > 0, key
            assert off(found[key], wanted) <= 1e-9, key
    for name, wanted in zip(("fake_error", "teacher_fake_error"), theirs.errors, strict=True):
        assert off(mine.student.stats[name], wanted) <= 1e-9


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_student_is_trained_where_it_will_be_sampled(schedule):
    """Simulated states are those that its own sampler passes through, to the bit, from the same noises."""
    p = build(schedule, "v_prediction", "guided")
    d = draws(schedule, "guided", 3)
    noises = list(d.noise.unbind(1))
    run = sample(p.roles.student, RenoiseSampler(num_inference_steps=4), noises[0], p.batch.cond, noises=noises[1:])
    assert torch.equal(run.timesteps, p.method.rollout.timesteps)
    assert run.timesteps.tolist() == pytest.approx(sampled_at(schedule, 4).tolist(), rel=1e-12)
    for exit in range(4):
        x_t = p.method.rollout.state(p.roles.student, p.batch.x0, d.noise[:, : exit + 1], exit, p.batch.cond)
        assert torch.equal(x_t, run.states[exit]) and not x_t.requires_grad
    if schedule == "vp":  # and those of other programs' LCM samplers, given its times
        lcm = sample(
            p.roles.student, LCMSampler(timesteps=[999, 749, 499, 249]), noises[0], p.batch.cond, noises=noises[1:]
        )
        torch.testing.assert_close(lcm.x0, run.x0, rtol=0, atol=1e-5)


def test_one_step_at_a_lower_time_starts_from_noise_as_it_is():
    method = DMD2(SCHEDULES["vp"], timesteps=(399,))
    noise = torch.randn(3, 1, 2, dtype=torch.float64)
    assert torch.equal(method.rollout.state(None, torch.zeros(3, 2), noise, 0, None), noise[:, 0])
    assert method.sampling(method.settings).timesteps == (399,)
    assert method.sampling(method.settings).num_inference_steps == 1
    table = DMD2(SCHEDULES["vp"], timesteps=(399,), terminal="table")
    sigma = alpha_sigma("vp", np.array([399]))[1].item()
    torch.testing.assert_close(table.rollout.state(None, torch.zeros(3, 2), noise, 0, None), sigma * noise[:, 0])


def test_the_first_state_is_noise_even_where_the_others_are_data():
    inputs = DMD2(SCHEDULES["vp"], student_input="noised").rollout
    x0, noise = torch.full((3, 2), 7.0), torch.randn(3, 1, 2)
    assert torch.equal(inputs.state(None, x0, noise, 0, None), noise[:, 0])
    assert (inputs.state(None, x0, noise, 3, None) - noise[:, 0]).abs().min() > 4


def test_draws():
    method = DMD2(SCHEDULES["vp"], num_inference_steps=3)
    batch = Batch(torch.zeros(4, 2))
    exits = [method.draw(batch, Rng(3, step, 4), Progress(step, 1)).exit for step in range(600)]
    assert np.bincount(exits, minlength=3).tolist() == pytest.approx([200] * 3, abs=60)
    step = exits.index(2)
    random = method.draw(Batch(torch.zeros(20_000, 2)), Rng(3, step, 20_000), Progress(0, 1))
    others = ("matching", "fake", "played", "judged", "data")
    noises = torch.cat([*random.noise.unbind(1), *(getattr(random, f"{name}_noise") for name in others)], dim=1)
    assert noises.shape == (20_000, 16)
    assert (torch.corrcoef(noises.T) - torch.eye(16)).abs().max() < 0.04  # each of its own
    times = torch.stack([getattr(random, f"{name}_time") for name in others])
    assert (torch.corrcoef(times) - torch.eye(5, dtype=torch.float64)).abs().max() < 0.04
    assert times.min(dim=1).values.tolist() == [20, 0, 0, 0, 0]
    assert times.max(dim=1).values.tolist() == [980, 999, 999, 999, 999]


def test_what_the_student_alone_would_use_is_not_drawn_where_it_is_not_due():
    """The critic's numbers are the same either way, and so is its loss."""
    method, roles, batch = fresh(5.0, shaken=True)
    both, critic = (
        method.draw(batch, Rng(1, 1, 6, dtype=torch.float64), Progress(1, 9, due=due)) for due in (None, {"critic"})
    )
    assert {name for name, value in vars(critic).items() if value is None} == {
        "matching_time", "matching_noise", "played_time", "played_noise",
    }  # fmt: skip
    for name, value in vars(critic).items():
        assert value is None or torch.equal(torch.as_tensor(value), torch.as_tensor(getattr(both, name))), name
    terms = [[], []]
    for draws, found in zip((both, critic), terms, strict=True):
        shared = method.prepare(roles, batch, draws, {"critic"})
        found += [term.total.item() for term in method.critic(roles, batch, draws, shared).terms()]
    assert len(terms[0]) == 2 and terms[0] == terms[1]


def test_no_noise_is_drawn_for_a_student_that_is_not_due(monkeypatch):
    """By the trainer: two rounds of its players, with two micro-batches each."""
    names, real = [], SampleRandom.normal

    def normal(rng, name, shape):
        names.append(name)
        return real(rng, name, shape)

    monkeypatch.setattr(SampleRandom, "normal", normal)
    method, roles, batch = fresh(1.0)
    source = SimpleNamespace(batch=lambda rng: Batch(batch.x0[rng.rows], batch.cond[rng.rows]))
    method.players = DMD2(SCHEDULES["vp"], student_every=3).players
    run = Trainer(method, roles, source, TrainingSettings(precision="fp64", batch_size=6, accumulation=2))
    for step in range(6):
        run.step(step)
    critic = ["noise", "fake_noise", "judged_noise", "data_noise"]
    assert Counter(names) == dict.fromkeys(critic, 12) | dict.fromkeys(["matching_noise", "played_noise"], 4)


def fresh(scale, checkpointing=False, shaken=False):
    """LoRA roles that are the teacher's yet, on a text network."""
    torch.manual_seed(0)
    method = DMD2(SCHEDULES["vp"], guidance_scale=scale)
    settings = TrainingSettings(precision="fp64", gradient_checkpointing=checkpointing)
    network = MLP(SCHEDULES["vp"], 2, width=16, depth=2, num_classes=3).double()
    roles = build_roles(Denoiser(network, SCHEDULES["vp"]), method, settings, Weights("lora", rank=4))
    if shaken:
        with torch.no_grad():
            for tensor in roles.tensors().values():
                tensor.add_(0.1 * torch.randn_like(tensor))
    cond = Cond({"label": torch.arange(6) % 3}, null={"label": torch.tensor([-1])})
    return method, roles, Batch(torch.randn(6, 2).double(), cond)


def test_before_training_both_scores_agree_up_to_guidance():
    for scale in (1.0, 5.0):
        method, roles, batch = fresh(scale)
        x, noise, t = batch.x0, torch.ones(6, 2, dtype=torch.float64), torch.full((6,), 600.0)
        g = method.scores.matching(roles, x, noise, t, batch.cond).gradient
        x_t = method.schedule.add_noise(x, noise, t)
        with torch.no_grad():
            with_, without = roles.teacher(x_t, t, batch.cond).x0, roles.teacher(x_t, t, batch.cond.null()).x0
        guided = without + scale * (with_ - without)
        expected = -(scale - 1) * (with_ - without) / (x - guided).abs().mean(dim=1, keepdim=True)
        torch.testing.assert_close(g, expected, rtol=1e-10, atol=0)
        assert bool(g.any()) == (scale != 1)


def test_recomputed_activations_are_those_of_their_own_role():
    """Student and fake score are adapters of one shape on one base, and the student is played against the fake's."""
    found = []
    for checkpointing in (False, True):
        method, roles, batch = fresh(5.0, checkpointing, shaken=True)
        random = method.draw(batch, Rng(1, 0, 6, dtype=torch.float64), Progress(0, 1))
        p = SimpleNamespace(method=method, roles=roles, batch=batch)
        step = actual(p, random)
        found.append({**step.gradients, **{f"fake {k}": v for k, v in step.fake.items()}, **step.heads})
    assert len(found[0]) > 20 and all(gradient.any() for gradient in found[0].values())
    for key, gradient in found[0].items():
        assert torch.equal(found[1][key], gradient), key


def test_one_graph_of_a_network_at_a_time():
    """When the critic's second term is made, nothing is left of the first one's graph."""
    method, roles, batch = fresh(1.0)
    random = method.draw(batch, Rng(1, 0, 6, dtype=torch.float64), Progress(0, 1))
    kept = []

    def pack(x):
        saved = [x]
        kept.append(weakref.ref(x))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved[0]):
        shared = method.prepare(roles, batch, random, {"critic"})
        assert not kept and not shared.x0_student.requires_grad  # the student is not due
        loss = method.critic(roles, batch, random, shared)
        first = len(kept)
        loss.total.backward(inputs=roles.parameters("fake"))
        parameters = {id(w) for w in roles.tensors().values()} | {id(w) for w in roles.base.parameters()}
        left = [ref() for ref in kept if ref() is not None and id(ref()) not in parameters]
        assert first > 0 and not [x for x in left if x.requires_grad and x.grad_fn is not None]
        second = loss.then()
        assert len(kept) > first and second.total.requires_grad


def test_no_graph_leads_from_the_critics_losses_to_the_student():
    method, roles, batch = fresh(1.0)
    random = method.draw(batch, Rng(1, 0, 6, dtype=torch.float64), Progress(0, 1))
    shared = method.prepare(roles, batch, random, {"student", "critic"})
    assert shared.x0_student.requires_grad
    for term in method.critic(roles, batch, random, shared).terms():
        found = torch.autograd.grad(term.total, roles.parameters("student"), allow_unused=True, retain_graph=True)
        assert not any(gradient is not None for gradient in found)


def test_without_its_weight_there_is_no_discriminator():
    quiet, loud = DMD2(SCHEDULES["vp"], adversarial_weight=0.0), DMD2(SCHEDULES["vp"])
    assert quiet.heads() == () and quiet.players[1].roles == ("fake",)
    assert loud.players[1].roles == ("fake", "discriminator") and loud.heads()[0].backbone == "fake"
    assert [p.every for p in loud.players] == [5, 1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"timesteps": ()}, "one or more times"),
        ({"timesteps": (249, 499)}, "decrease"),
        ({"timesteps": (1200,)}, "outside this vp schedule"),
        ({"timesteps": (499, -1)}, "above clean data"),
        ({"num_inference_steps": 0}, "num_inference_steps: input should be greater than or equal to 1"),
        ({"student_every": 0}, "student_every"),
        ({"student_input": "data"}, r"student_input: input should be .*, not 'data'"),
        ({"terminal": "zero"}, r"terminal: input should be .*, not 'zero'"),
        ({"adversarial_weight": -1.0}, "adversarial_weight"),
        ({"discriminator_weight": float("nan")}, "discriminator_weight"),
        ({"discriminator_backbone": "dino"}, r"discriminator_backbone: input should be .*, not 'dino'"),
        ({"halvings": -1}, "halvings: input should be greater than or equal to 0, not -1"),
        ({"head": "vit"}, r"head: input should be .*, not 'vit'"),
    ],
)
def test_refusals(settings, said):
    with pytest.raises(ValueError, match=said):
        DMD2(SCHEDULES["vp"], **settings)
