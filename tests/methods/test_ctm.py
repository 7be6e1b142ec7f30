"""One CTM step of both players against the same step by hand, on the same draws; its draws, weights and refusals."""

import copy
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
    every_step,
    grid,
    jump,
    noises,
    off,
    problem,
    row_scales,
    x0_epsilon,
)
from test_pcm import logits_by_hand, noised

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.methods.base import Balanced, Player, Progress
from fewstep.methods.ctm import CTM, Draws
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import UNetNetwork
from fewstep.models.roles import Roles
from fewstep.sampling import CTMSampler, TCDSampler, sample
from fewstep.scenes64 import architecture as scenes64
from fewstep.training.players import PlayerState
from fewstep.training.settings import TrainingSettings

SETTINGS = {
    "heun": dict(solver="heun"),
    "guided": dict(solver="ddim", guidance_scale=4.0, loss="huber", huber_c=0.3),
    "lagging, a game": dict(
        solver="heun", guidance_scale=(2.0, 8.0), target_decay=0.95, adversarial_weight=0.7, denoising_weight=2.0
    ),
    "one hop, a game": dict(solver="ddim", denoising_weight=0.0, adversarial_weight=0.5),
}
MAX_HOPS = 3


def draws(name, variant):
    """Two hops (or one); rows 0, 3 and 5 end where the teacher landed, two of them at the grid's end."""
    settings = SETTINGS[variant]
    scales, noise = row_scales(settings.get("guidance_scale", 1.0)), noises(4)
    hops = 1 if variant == "one hop, a game" else 2
    index = torch.tensor([0, 1, 3, 2, 3, 0]) + hops
    diagonal = torch.from_numpy(grid(name)[[1, 2, 3, 4, 5, 1]].astype(np.float64))
    judged = torch.tensor([1, 2, 3, 4, 5, 2])
    game = (judged, noise[2], noise[3]) if settings.get("adversarial_weight") else (None, None, None)
    ends = torch.tensor([0, 0, 2, 2, 1, 0])
    return Draws(hops, index, ends, noise[0], scales.double(), diagonal, noise[1], *game, True)


def by_hand(p, random, outer="map", detach_target=True):
    """Algorithm 1, every term apart.

    Wrong on request: the outer map is the identity, or only its gradient is, or its weights learn as well.
    """
    settings, text, x0 = p.method.settings, p.batch.cond["text"], p.batch.x0
    times = grid(p.name).astype(np.float64)
    index, h, end = random.index.numpy(), random.num_steps, times[0]
    t, s = times[index], times[random.end_index.numpy()]
    alpha, sigma = alpha_sigma(p.name, t)
    x_t = alpha * x0 + sigma * random.noise

    def teacher(x, time):
        w = random.guidance_scale.reshape(-1, 1, 1, 1)
        said = [ask(p.base, {}, p.name, x, time, c) for c in (text, p.null.expand(6, 3))]
        pairs = [x0_epsilon(p.name, p.kind, x, output, time) for output in said]
        return tuple(without + w * (with_ - without) for with_, without in zip(*pairs, strict=True))

    x = x_t
    for k in range(h):
        above, below = times[index - k], times[index - k - 1]
        first = teacher(x, above)
        landed = jump(p.name, first, below)
        if settings.solver == "heun":
            (a, sa), (b, sb) = alpha_sigma(p.name, above), alpha_sigma(p.name, below)
            second = teacher(landed, np.where(below == 0, 0.1, below) if p.name == "flow" else below)
            if p.name == "flow":
                stepped = x + (sb - sa) * (first[1] - first[0] + second[1] - second[0]) / 2
            else:
                stepped = b * (x / a + (sb / b - sa / a) * (first[1] + second[1]) / 2)
            landed = torch.where(sb == 0, landed, stepped)
        x = landed
    x_u, u = x, times[index - h]

    def g(tensors, x, time, told):
        if p.name == "flow":
            time = np.where(time == 0, 0.1, time)  # rows at clean data are unused
        return x0_epsilon(p.name, p.kind, x, ask(p.base, tensors, p.name, x, time, text, told), time)

    def G(tensors, x, time, to):  # (sigma_s / sigma_t) x + (alpha_s - alpha_t sigma_s / sigma_t) g
        still = torch.from_numpy(time == to).reshape(-1, 1, 1, 1)
        (a, sa), (b, sb) = alpha_sigma(p.name, time), alpha_sigma(p.name, to)
        sa = torch.where(still, 1, sa)
        clean = g(tensors, x, time, {"end": torch.from_numpy(to)})[0]
        return torch.where(still, x, sb / sa * x + (b - a * sb / sa) * clean)

    student = p.tensors("student")
    followed = p.tensors("target") if settings.target_decay else student
    frozen = followed if outer == "learns" else {k: v.detach() for k, v in followed.items()}

    def to_end(x):
        if outer == "identity":
            return x
        carried = G(frozen, x, s, np.full(6, end))
        return x + (carried - x).detach() if outer == "straight" else carried

    landing = G(student, x_t, t, s)
    answer = to_end(landing)
    below = G(student, x_u, u, s)
    target = to_end(below)
    target = target.detach() if detach_target else target
    terms = {"consistency": distance(answer, target, settings.loss, settings.huber_c)}
    if settings.denoising_weight:
        at = random.diagonal.numpy()
        a, sa = alpha_sigma(p.name, at)
        x = a * x0 + sa * random.diagonal_noise
        wanted = x0 if settings.guidance_scale == 1 else teacher(x, at)[0]
        data = 0.5 if p.name == "edm" else 1.0
        error = (g(student, x, at, {"end": torch.from_numpy(at)})[0] - wanted) ** 2
        terms["denoising"] = ((a**2 / sa**2 + 1 / data**2) * error).mean()
    step = SimpleNamespace(x_t=x_t, x_u=x_u, x_s=landing, x_est=answer, target=target, critic=None, heads={})
    if settings.adversarial_weight:
        heads = {k: w.detach().clone().requires_grad_() for k, w in p.roles.tensors_of("discriminator").items()}
        tau = times[random.judged.numpy()]
        a, sa = alpha_sigma(p.name, tau)
        fake = noised(p.name, answer, np.full(6, end), tau, random.fake_noise)
        said_of_fake = logits_by_hand(p, heads, fake, tau, text)
        said_of_real = logits_by_hand(p, heads, a * x0 + sa * random.real_noise, tau, text)
        terms["adversarial"] = -sum(f.mean() for f in said_of_fake) / 2
        pairs = zip(said_of_real, said_of_fake, strict=True)
        step.critic = sum((1 - r).clamp_min(0).mean() + (1 + f).clamp_min(0).mean() for r, f in pairs) / 2
        step.heads = dict(zip(heads, torch.autograd.grad(step.critic, heads.values(), retain_graph=True), strict=True))
    step.terms, step.gradients = terms, {}
    for name, term in terms.items():
        found = torch.autograd.grad(term, student.values(), retain_graph=True, allow_unused=True)
        step.gradients[name] = dict(zip(student, found, strict=True))
    return step


def actual(p, random):
    """The same by the method: terms and their gradients apart, and what the player makes of them together."""
    shared = p.method.prepare(p.roles, p.batch, random, {"student", "discriminator"})
    loss = p.method.student(p.roles, p.batch, random, shared)
    step = SimpleNamespace(**vars(shared), critic=None, heads={}, terms=loss.parts, gradients={}, loss=loss)
    student = p.roles.tensors_of("student")
    terms = {"consistency": loss.total} | {name: balance.term for name, balance in loss.balanced.items()}
    for name, term in terms.items():
        found = torch.autograd.grad(term, student.values(), retain_graph=True)
        step.gradients[name] = dict(zip(student, found, strict=True))
    if p.method.gan:
        heads = p.roles.tensors_of("discriminator")
        step.critic = p.method.discriminator(p.roles, p.batch, random, shared).total
        step.heads = dict(zip(heads, torch.autograd.grad(step.critic, heads.values(), retain_graph=True), strict=True))
    return step


def build(schedule, kind, variant, weights="full", native=True):
    return problem(CTM, schedule, kind, weights, native, max_hops=MAX_HOPS, **SETTINGS[variant])


@every_step(SETTINGS)
def test_both_players_steps_are_the_papers(schedule, kind, variant, weights, native):
    p, random = build(schedule, kind, variant, weights, native), draws(schedule, variant)
    mine, theirs = actual(p, random), by_hand(p, random)
    for field in ("x_t", "x_u", "x_s", "x_est", "target"):
        for row, wanted in zip(getattr(mine, field), getattr(theirs, field), strict=True):
            assert off(row, wanted) <= 1e-10, field
    assert mine.terms.keys() == theirs.terms.keys() == mine.gradients.keys()
    for name, wanted in theirs.terms.items():
        assert off(mine.terms[name], wanted) <= 1e-9, name
        assert theirs.gradients[name].keys() == mine.gradients[name].keys()
        for key, gradient in theirs.gradients[name].items():
            assert gradient.abs().max() > 0, (name, key)
            assert off(mine.gradients[name][key], gradient) <= 1e-9, (name, key)
    if theirs.critic is not None:
        assert off(mine.critic, theirs.critic) <= 1e-10
        for key, gradient in theirs.heads.items():
            assert gradient.abs().max() > 0 and off(mine.heads[key], gradient) <= 1e-9, key


@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("variant", ["heun", "lagging, a game"])
def test_terms_are_weighted_by_their_pull_at_the_last_weight(variant, weights):
    """In two uneven micro-batches' worth of calls too: norms are those of the sums."""
    p, random = build("edm", "sample", variant, weights, native=False), draws("edm", variant)
    theirs, loss = by_hand(p, random), actual(p, random).loss
    probe = "outlet.weight" if weights == "full" else "outlet.lora_B.weight"
    assert p.roles.tensors_of("student")[probe] is p.roles.probe("student")
    settings = TrainingSettings(precision="fp64", max_grad_norm=0.0)
    player = PlayerState(Player("student"), p.roles.parameters("student"), settings, probe=p.roles.probe("student"))
    player.backward(loss.total, 1, loss.balanced)
    player._balance()
    wanted = dict(theirs.gradients["consistency"])
    bounds = {"denoising": (0, 1e4, p.method.settings.denoising_weight), "adversarial": (0.01, 10, 0.7)}
    for name in loss.balanced:
        low, high, scale = bounds[name]
        term = theirs.gradients[name]
        ratio = float(theirs.gradients["consistency"][probe].norm() / (term[probe].norm() + 1e-4))
        weight = scale * min(max(ratio, low), high)
        assert float(player.weights[name]) == pytest.approx(weight, rel=1e-9)
        wanted = {key: gradient + weight * term[key] for key, gradient in wanted.items()}
    for key, tensor in p.roles.tensors_of("student").items():
        assert off(tensor.grad, wanted[key]) <= 1e-9, key


def test_balanced_terms_add_up_over_micro_batches_before_they_are_weighed():
    """Weights are those of the whole batch: of the sum of gradients, not the sum of weights; and they are clamped."""

    def player(w):
        return PlayerState(Player("student"), [w], TrainingSettings(precision="fp64", max_grad_norm=0.0))

    w = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    a, b = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double(), torch.tensor([[0.0, 1.0], [5.0, 0.0]]).double()
    mine = player(w)
    for i in range(2):
        mine.backward((a[i] * w).sum(), 2, {"term": Balanced((b[i] * w).sum(), scale=0.5)})
    mine._balance()
    ratio = a.mean(0).norm() / (b.mean(0).norm() + 1e-4)
    torch.testing.assert_close(mine.weights["term"], 0.5 * ratio, rtol=1e-12, atol=0)
    torch.testing.assert_close(w.grad, a.mean(0) + 0.5 * ratio * b.mean(0), rtol=1e-12, atol=0)
    for low, high, weight in ((2.0, 3.0, 2.0), (0.0, 0.25, 0.25)):
        w.grad = None
        mine = player(w)
        mine.backward((a[0] * w).sum(), 1, {"term": Balanced((3 * a[0] * w).sum(), low=low, high=high)})
        mine._balance()
        assert float(mine.weights["term"]) == weight
        assert not mine._terms  # nothing is carried into the next step


def test_a_term_alone_may_reach_a_weight():
    a, b = (torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    player = PlayerState(Player("student"), [b, a], TrainingSettings(precision="fp64"))
    player.backward((2 * a).sum(), 1, {"term": Balanced((a + b).sum())})
    player._balance()
    assert b.grad.tolist() == pytest.approx([2.0, 2.0], rel=1e-3)


def test_a_pull_that_is_not_finite_skips_the_step():
    w = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    player = PlayerState(Player("student"), [w], TrainingSettings(precision="fp64"))
    player.backward((2 * w).sum(), 1, {"term": Balanced((w * float("nan")).sum())})
    player.update(3)
    assert w.tolist() == [1, 1] and player.first_bad_step == 3


# ------------------------------------------------------------------ gradient paths


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_gradient_passes_through_the_outer_map_to_its_input_only(schedule, decay):
    """Spec 3.8: without the outer map, or past it, or into its weights as well, the student's gradient is another."""
    p, random = problem(CTM, schedule, "v_prediction", max_hops=3, target_decay=decay), draws(schedule, "heun")
    p.method.solver = "ddim"
    mine, theirs = actual(p, random), by_hand(p, random)
    wrong = [by_hand(p, random, outer) for outer in ("identity", "straight", *([] if decay else ["learns"]))]
    wrong.append(by_hand(p, random, detach_target=False))
    assert all(off(mine.terms["consistency"], step.terms["consistency"]) <= 1e-9 for step in wrong[1:])
    gradients = mine.gradients["consistency"]
    assert all(off(g, theirs.gradients["consistency"][key]) <= 1e-9 for key, g in gradients.items())
    for step in wrong:
        apart = [off(g, step.gradients["consistency"][key]) for key, g in gradients.items()]
        assert min(apart) > 1e-4 and max(apart) > 0.01
    assert not mine.target.requires_grad and not mine.x_u.requires_grad


def test_jumps_that_end_where_they_start_are_the_identity_to_the_bit():
    for schedule, kind in CASES:
        p, random = build(schedule, kind, "guided"), draws(schedule, "guided")
        step = actual(p, random)
        at_end = random.end_index == 0
        assert torch.equal((step.x_est == step.x_s).flatten(1).all(1), at_end)
        anchored = at_end & (random.end_index == random.index - random.num_steps)
        assert torch.equal((step.target == step.x_u).flatten(1).all(1), anchored) and anchored.tolist() == [
            True, False, False, False, False, True,
        ]  # fmt: skip


def test_no_graph_leads_from_the_discriminators_loss_to_the_student():
    p, random = build("vp", "epsilon", "lagging, a game"), draws("vp", "lagging, a game")
    shared = p.method.prepare(p.roles, p.batch, random, {"student", "discriminator"})
    loss = p.method.discriminator(p.roles, p.batch, random, shared).total
    found = torch.autograd.grad(loss, p.roles.parameters("student"), allow_unused=True)
    assert not any(gradient is not None for gradient in found)


def test_until_its_start_the_game_does_not_move_the_student():
    p, random = build("vp", "epsilon", "lagging, a game"), draws("vp", "lagging, a game")
    shared = p.method.prepare(p.roles, p.batch, random, {"student", "discriminator"})
    assert "adversarial" in p.method.student(p.roles, p.batch, random, shared).balanced
    early = replace(random, playing=False)
    shared = p.method.prepare(p.roles, p.batch, early, {"student", "discriminator"})
    loss = p.method.student(p.roles, p.batch, early, shared)
    assert "adversarial" not in loss.balanced and "adversarial" not in loss.parts
    late = CTM(SCHEDULES["vp"], adversarial_weight=1.0, adversarial_start=3)
    assert [drawn(late, 4, step).playing for step in range(5)] == [False, False, False, True, True]


# ------------------------------------------------------------------ draws


def drawn(method, n, step=0):
    return method.draw(Batch(torch.zeros(n, 2)), Rng(3, step, n), Progress(step, 1))


def test_hops_are_one_for_the_batch_in_proportion_to_their_number():
    method = CTM(SCHEDULES["vp"], num_grid_steps=HOPS, max_hops=4)
    counts = torch.bincount(torch.tensor([drawn(method, 2, step).num_steps for step in range(2000)]), minlength=5)
    wanted = 200.0 * torch.arange(5)
    assert ((counts - wanted).abs() <= 5 * wanted.sqrt()).all() and counts.sum() == 2000 and len(counts) == 5
    rows = [method.draw(Batch(torch.zeros(2, 2)), Rng(3, 7, 8, slice(i, i + 2)), Progress(7, 9)) for i in (0, 2, 6)]
    assert len({row.num_steps for row in rows}) == 1


def test_draws_cover_every_start_and_every_end_below_the_landing():
    method = CTM(SCHEDULES["vp"], num_grid_steps=HOPS, max_hops=4)
    step = next(step for step in range(100) if drawn(method, 2, step).num_steps == 3)
    random = drawn(method, 30_000, step)
    assert set(random.index.tolist()) == {3, 4, 5}
    for index in (3, 4, 5):
        ends = torch.bincount(random.end_index[random.index == index], minlength=HOPS)
        wanted = 10_000 / (index - 2)
        assert not ends[index - 2 :].any()  # never above u
        assert (ends[: index - 2] - wanted).abs().max() < 5 * wanted**0.5  # uniform, s = u and s = 0 included
    noises = torch.stack([random.noise, random.diagonal_noise]).flatten(1)
    assert (torch.corrcoef(noises) - torch.eye(2)).abs().max() < 0.02


def test_the_diagonal_is_trained_where_edm_is_and_at_high_noise():
    times = drawn(CTM(SCHEDULES["edm"]), 40_000).diagonal
    assert times.min() >= 0.002 and times.max() <= 80
    place = (times ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
    upper = (place - 0.3) / 0.7  # half of them: even over Karras' upper 70 %
    half = lambda level: 0.5 * torch.special.ndtr((torch.tensor(level).log() + 1.2) / 1.2)  # noqa: E731
    for level in (0.05, 0.2, 1.0, 5.0):
        where = (level ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
        wanted = float(half(level)) + 0.5 * max(0.0, (where - 0.3) / 0.7)
        assert float((times <= level).double().mean()) == pytest.approx(wanted, abs=0.01)
    assert upper.max() <= 1 + 1e-9
    times = drawn(CTM(SCHEDULES["vp"]), 40_000).diagonal
    assert torch.equal(times, times.round()) and times.min() == 0 and times.max() == 998
    assert float((times < 300).double().mean()) == pytest.approx(0.15, abs=0.01)
    times = drawn(CTM(SCHEDULES["flow"]), 40_000).diagonal
    assert times.min() == 1e-3 and times.max() < 1
    t = torch.from_numpy(SCHEDULES["flow"].shifted(0.3))
    assert float((times < t).double().mean()) == pytest.approx(0.15, abs=0.01)


def test_the_diagonals_weight_is_edms_and_the_v_loss_elsewhere():
    t = torch.tensor([0.002, 0.3, 80.0], dtype=torch.float64)
    found = CTM(SCHEDULES["edm"])._denoising_weight(t)
    np.testing.assert_allclose(found, (t.numpy() ** 2 + 0.25) / (0.5 * t.numpy()) ** 2, rtol=1e-12)
    t = torch.tensor([0.0, 500.0, 999.0], dtype=torch.float64)
    alpha, sigma = (c.flatten().numpy() for c in alpha_sigma("vp", t.numpy()))
    np.testing.assert_allclose(CTM(SCHEDULES["vp"])._denoising_weight(t), alpha**2 / sigma**2 + 1, rtol=1e-12)


# ------------------------------------------------------------------ calls and settings


@pytest.mark.parametrize(
    ("schedule", "settings", "calls"),
    [
        ("edm", {"max_hops": 17}, (3, 70 / 3, 2)),
        ("vp", {"max_hops": 4}, (3, 3, 2)),
        ("vp", {"max_hops": 4, "guidance_scale": 3.0, "adversarial_weight": 1.0}, (3, 6, 2)),
        ("flow", {"max_hops": 4, "denoising_weight": 0.0}, (2, 3, 2)),
    ],
)
def test_what_a_step_asks_in_the_mean(schedule, settings, calls):
    found = CTM(SCHEDULES[schedule], **settings).calls_per_step()
    assert tuple(found.values()) == pytest.approx(calls) and list(found) == ["student", "teacher", "target"]


def test_a_new_student_is_the_teacher_whatever_end_it_is_told():
    p = build("vp", "epsilon", "heun", "lora", native=False)
    fresh = copy.deepcopy(p.base)
    roles = reference.build_roles(
        Denoiser(fresh, SCHEDULES["vp"], "epsilon"), p.method, TrainingSettings(precision="fp64")
    )
    x, cond = p.batch.x0, p.batch.cond
    teacher, student = roles.teacher(x, 500, cond).output, roles.student(x, 500, cond, end=100).output
    assert torch.equal(teacher, student)


def test_the_probe_is_the_last_weight_that_is_no_extra_inputs():
    """A LoRA's last B; a diffusers UNet registers its middle after its decoder, so that is not the last."""
    p = build("vp", "epsilon", "heun", "lora", native=False)
    assert p.roles.probe("student") is p.roles.tensors_of("student")["outlet.lora_B.weight"]
    roles = Roles(Denoiser(UNetNetwork(scenes64.build_unet()), SCHEDULES["vp"], "epsilon"))
    roles.add("student", reference.Weights("lora", rank=2), extra_inputs=("end",))
    names = [key for key, tensor in roles.tensors_of("student").items() if tensor is roles.probe("student")]
    assert len(names) == 1 and "up_blocks" in names[0] and names[0].endswith("lora_B.weight")


# ------------------------------------------------------------------ TCD's map, and sampling


@pytest.mark.parametrize(("schedule", "kind"), CASES)
def test_tcd_and_ctm_are_one_map_in_two_parametrisations(schedule, kind):
    """TCD's alpha_s x0 + sigma_s epsilon is CTM's (sigma_s/sigma_t) x + (alpha_s - alpha_t sigma_s/sigma_t) g.

    The same network, told s, jumps to the same point; what differs is the loss, and what gamma scales.
    """
    p = build(schedule, kind, "heun")
    x, cond, times = p.batch.x0, p.batch.cond, grid(schedule).astype(np.float64)
    t, s = times[[3, 4, 5, 2, 3, 5]], times[[1, 2, 1, 1, 2, 3]]
    said = p.roles.student(x, torch.from_numpy(t), cond, end=torch.from_numpy(s))
    (a, sa), (b, sb) = alpha_sigma(schedule, t), alpha_sigma(schedule, s)
    tcd = b * said.x0 + sb * (x - a * said.x0) / sa
    ctm = sb / sa * x + (b - a * sb / sa) * said.x0
    assert off(tcd, ctm) <= 1e-10 and off(said.at(torch.from_numpy(s)), ctm) <= 1e-10
    for eta in (0.0, 0.4, 1.0):
        ends = [cls(num_inference_steps=2, eta=eta).end(SCHEDULES[schedule], times[4], times[2], False)
                for cls in (CTMSampler, TCDSampler)]  # fmt: skip
        assert (ends[0] == ends[1]) == (eta in (0.0, 1.0))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sampling_tells_the_student_where_it_jumps(schedule):
    """Gamma 0 jumps from time to time; gamma 1 to the end and back up; in between to sqrt(1 - gamma^2) of the level."""
    told = []

    class Student:
        accepts = ("end",)

        def __call__(self, x, t, cond=None, *, end):
            told.append((float(t[0]), float(end[0])))
            return 0.5 * x

    times = [float(t) for t in grid(schedule)[[5, 3, 2]]]
    end, noise = float(SCHEDULES[schedule].end), torch.randn(3, 2, dtype=torch.float64)
    for gamma in (0.0, 0.6, 1.0):
        told.clear()
        sample(Denoiser(Student(), SCHEDULES[schedule], "sample"), CTMSampler(timesteps=times, eta=gamma), noise)
        assert [t for t, _ in told] == times and told[-1][1] == end
        for (_, s), after in zip(told[:-1], times[1:], strict=True):
            low, level, landed = (float(SCHEDULES[schedule].noise_to_signal(time)) for time in (end, after, s))
            assert landed == pytest.approx(low + (1 - gamma**2) ** 0.5 * (level - low), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gamma_0_follows_the_exact_flow_map_pathwise(schedule):
    """A perfect student's steps without noise compose to the quantile map, whatever the times."""
    space, mixture = SCHEDULES[schedule], GaussianMixture([0.3, 0.7], [-1.2, 0.8], [0.25, 0.35])

    class Student:
        accepts = ("end",)

        def __call__(self, x, t, cond=None, *, end):
            t, s = float(t[0]), float(end[0])
            x_s = mixture.flow_map(x, space, t, s)
            (a, b), (c, d) = space.alpha_sigma(t), space.alpha_sigma(s)
            return (x_s - x * float(d / b)) / float(c - d * a / b)

    start = mixture.sample_at(200, space, space.start, torch.Generator().manual_seed(3))
    scale = float(space.sigma(space.start)) if schedule == "edm" else 1.0
    times = [float(space.start), *grid(schedule)[[4, 2, 1]].tolist()]
    got = sample(Denoiser(Student(), space, "sample"), CTMSampler(timesteps=times), start / scale).x0
    exact = mixture.flow_map(start, space, float(space.start), float(space.end))
    assert (got - exact).abs().max() < 1e-9


def test_without_its_weight_there_is_no_discriminator():
    assert [p.name for p in CTM(SCHEDULES["vp"]).players] == ["student"] and CTM(SCHEDULES["vp"]).heads() == ()
    game = CTM(SCHEDULES["vp"], adversarial_weight=1.0)
    assert [p.name for p in game.players] == ["student", "discriminator"] and len(game.heads()) == 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"eta": 0.3}, "CTM has no setting 'eta'"),
        ({"loss": "lpips"}, r"loss: input should be .*, not 'lpips'"),
        ({"solver": "euler"}, r"solver: input should be .*, not 'euler'"),
        ({"max_hops": 41}, r"max_hops must lie in 1 \.\.\. 40, the grid's solver steps, not 41"),
        ({"max_hops": 0}, "not 0"),
        ({"denoising_weight": -1.0}, "denoising_weight: input should be greater than or equal to 0, not -1.0"),
        ({"adversarial_weight": float("inf")}, "adversarial_weight: input should be a finite number, not inf"),
    ],
)
def test_wrong_settings_are_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        CTM(SCHEDULES["vp"], **settings)
