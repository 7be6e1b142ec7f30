"""A TSCD step of both players against the same step by hand, on the same draws; its segments, draws and refusals."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from reference import (
    CASES,
    SCHEDULES,
    Network,
    alpha_sigma,
    ask,
    assert_players_apart,
    captioned,
    corner_head,
    encoder_features,
    grid,
    off,
    played,
    roles_on,
    row_scales,
    shake,
    x0_epsilon,
)
from torch.nn import functional

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.methods.base import Progress
from fewstep.methods.dmd import DMD
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.hyper import Draws, Hyper
from fewstep.methods.tcd import TCD
from fewstep.models.denoiser import Denoiser
from fewstep.models.roles import Weights
from fewstep.sampling import DDIMSampler, PhasedSampler
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, build_roles

GRID = 8
SETTINGS = {
    "first": dict(segments=4, guidance_scale=4.0, adversarial_weight=0.0, target_decay=0.9),
    "guided game": dict(
        segments=4, guidance_scale=(2.0, 6.0), mse_weight=0.5, adversarial_weight=0.7, target_decay=0.0
    ),
    "later": dict(segments=2, hop_by="beginning", mse_weight=0.3, adversarial_weight=0.9),
    "last": dict(segments=1, hop_by="beginning", mse_weight=0.0, adversarial_weight=0.2, discriminator_weights="lora"),
    "told": dict(segments=2, guidance_scale=3.0, mse_weight=0.6, adversarial_weight=0.4, tell_end=True),
}
HOPS = [8, 7, 4, 2, 1, 6]  # n: t = t_n; 8, 4, 2 and 6 are boundaries of four segments
ENDS = {  # from the lowest that each may have, in grid times: its segment's floor, u, or between
    4: [6, 6, 2, 1, 0, 4],
    2: [4, 5, 0, 1, 0, 5],
    1: [0, 6, 2, 1, 0, 3],
}
LEVEL = [0.1, 0.3, 0.6, 0.8, 0.1, 0.99]


def build(name, kind, variant, weights="full"):
    settings = SETTINGS[variant]
    method = Hyper(SCHEDULES[name], num_grid_steps=GRID, **settings)
    torch.manual_seed(0)
    network = Network(("end",) if settings.get("tell_end") and weights == "full" else ()).double()
    origin = Network().double()
    base, first = copy.deepcopy(network), copy.deepcopy(origin)
    roles = roles_on(network, name, kind, method, weights, origin=Denoiser(origin, SCHEDULES[name], kind))
    shake(roles.tensors().values())
    with torch.no_grad():
        for tensor in roles.tensors_of("heads").values() if method.gan else ():
            tensor.mul_(2)
    batch, null = captioned(6)
    scale = settings.get("guidance_scale", 1.0)
    scales = row_scales(scale)
    generator = torch.Generator().manual_seed(1)
    noise, level_noise = (torch.randn(6, 2, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    game = (torch.tensor(LEVEL, dtype=torch.float64), level_noise) if method.gan else (None, None)
    draws = Draws(torch.tensor(HOPS) - 1, torch.tensor(ENDS[settings["segments"]]), noise, scales.double(), *game)
    return SimpleNamespace(name=name, kind=kind, method=method, roles=roles, base=base, first=first, batch=batch,
                           null=null, draws=draws, settings=settings)  # fmt: skip


def judged(name, level):
    """t* of 10, 250, 500 and 750 of 1,000 levels: of the table, Karras' of EDM, or shifted by 3."""
    number = np.array([10, 250, 500, 750])[(4 * level).astype(int)]
    if name == "vp":
        return number - 1.0
    if name == "edm":
        low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
        return (low + (number - 1) / 999 * (high - low)) ** 7
    return 3 * (number / 1000) / (1 + 2 * (number / 1000))


def by_hand(p):
    text, draws, settings = p.batch.cond["text"], p.draws, p.settings
    t, u, s = (grid(p.name, GRID)[i] for i in (np.array(HOPS), np.array(HOPS) - 1, draws.end_index.numpy()))
    alpha, sigma = alpha_sigma(p.name, t)
    x_t = alpha * p.batch.x0 + sigma * draws.noise

    def pair(tensors, x, t, text=text, end=None):
        return x0_epsilon(p.name, p.kind, x, ask(p.base, tensors, p.name, x, t, text, end), t)

    def landed(said, s):
        alpha, sigma = alpha_sigma(p.name, s)
        return alpha * said[0] + sigma * said[1]

    if settings.get("hop_by") == "beginning":
        hop = pair(p.roles.tensors_of("beginning"), x_t, t)
    else:
        w = draws.guidance_scale.reshape(-1, 1, 1, 1)
        both = [pair({}, x_t, t, c) for c in (text, p.null.expand(6, 3))]
        hop = tuple(null + w * (with_ - null) for with_, null in zip(*both, strict=True))
    x_u = landed(hop, u)
    conditioned = {"end": torch.from_numpy(s)} if settings.get("tell_end") else None
    student = {key: v.detach().clone().requires_grad_() for key, v in p.roles.tensors_of("student").items()}
    follower = p.roles.tensors_of("target" if settings.get("target_decay", 0.95) else "student")
    landing = landed(pair(student, x_t, t, end=conditioned), s)
    still = torch.from_numpy(s == u).reshape(-1, 1, 1, 1)
    target = torch.where(still, x_u, landed(pair(follower, x_u, u, end=conditioned), s)).detach()
    step = SimpleNamespace(x_t=x_t, x_u=x_u, x_s=landing, target=target, critic=None, players={})
    step.error = (landing - target).square().mean()
    step.loss = settings.get("mse_weight", 1.0) * step.error  # of four segments: 1
    if settings["adversarial_weight"]:
        judge(p, step, s)
    names = student.values()
    step.gradients = dict(zip(student, torch.autograd.grad(step.loss, names, retain_graph=True), strict=True))
    return step


def judge(p, step, s):
    """Adds the game to the student's loss; the discriminator's loss and every gradient of its."""
    low = torch.from_numpy(s == grid(p.name, GRID)[0]).reshape(-1, 1, 1, 1)
    at = np.where(s == grid(p.name, GRID)[0], judged(p.name, p.draws.level.numpy()), s)
    (alpha_s, sigma_s), (alpha, sigma) = alpha_sigma(p.name, s), alpha_sigma(p.name, at)
    kept = alpha / alpha_s
    added = (sigma**2 - (kept * sigma_s) ** 2).clamp_min(0).sqrt()
    fake, real = (torch.where(low, kept * x + added * p.draws.level_noise, x) for x in (step.x_s, step.target))
    mine = {f"{role}/{key}": v.detach().clone().requires_grad_()
            for role in ("discriminator", "heads") for key, v in p.roles.tensors_of(role).items()}  # fmt: skip
    backbone = {key.removeprefix("discriminator/"): v for key, v in mine.items() if key.startswith("discriminator/")}
    head = {key.removeprefix("heads/heads.second."): v for key, v in mine.items() if key.startswith("heads/")}

    def says(x):
        return corner_head(head, encoder_features(p.first, backbone, x, at, p.batch.cond["text"]))

    step.seen = fake
    step.loss = step.loss + p.settings["adversarial_weight"] * functional.softplus(-says(fake)).mean()
    step.critic = (functional.softplus(-says(real)) + functional.softplus(says(fake.detach()))).mean()
    step.players = dict(zip(mine, torch.autograd.grad(step.critic, mine.values(), retain_graph=True), strict=True))


@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("variant", SETTINGS)
@pytest.mark.parametrize(("schedule", "kind"), CASES)
def test_both_players_steps_are_the_papers(schedule, kind, variant, weights):
    p = build(schedule, kind, variant, weights)
    mine, theirs = played(p), by_hand(p)
    for field in ("x_t", "x_u", "x_s", "target"):
        pairs = zip(getattr(mine, field), getattr(theirs, field), strict=True)
        assert max(off(row, wanted) for row, wanted in pairs) <= 1e-9, field
    assert off(mine.loss, theirs.loss) <= 1e-9 and off(mine.parts["consistency"], theirs.error) <= 1e-9
    assert mine.gradients.keys() == theirs.gradients.keys() and mine.players.keys() == theirs.players.keys()
    if theirs.critic is not None:
        assert off(mine.critic, theirs.critic) <= 1e-9
        assert abs(mine.critic.item() - 2 * math.log(2)) > 0.01
    for key, wanted in {**theirs.gradients, **theirs.players}.items():
        assert wanted.abs().max() > 0, key
        assert off({**mine.gradients, **mine.players}[key], wanted) <= 1e-9, key


def test_ending_where_the_hop_landed_the_target_is_its_landing_point_to_the_bit():
    step = played(build("vp", "epsilon", "guided game"))
    same = (step.target == step.x_u).flatten(1).all(1)
    assert same.tolist() == [False, True, False, True, True, False]


def test_no_graph_leads_from_one_players_loss_to_the_other_nor_through_the_target():
    p = build("vp", "epsilon", "guided game")
    shared = assert_players_apart(p)
    assert not shared.x_u.requires_grad and not shared.target.requires_grad


def test_both_pulls_are_the_norms_of_the_terms_gradients():
    p = build("vp", "epsilon", "later")
    shared = p.method.prepare(p.roles, p.batch, p.draws, {"student", "discriminator"})
    loss, theirs = p.method.student(p.roles, p.batch, p.draws, shared), by_hand(p)
    (of_error,) = torch.autograd.grad(0.3 * theirs.error, theirs.x_s, retain_graph=True)
    (of_game,) = torch.autograd.grad(theirs.loss - 0.3 * theirs.error, theirs.seen, retain_graph=True)
    assert loss.stats["consistency_pull"] == pytest.approx(of_error.norm().item())
    assert loss.stats["adversarial_pull"] == pytest.approx(of_game.norm().item())


# ---------------------------------------------------------------- segments


@pytest.mark.parametrize("segments", [1, 2, 3, 4, 6, 12])
def test_no_boundary_is_its_own_floor(segments):
    """The paper's floor(t / (T / k)) T / k would leave t = T, and every other boundary, no end at all."""
    method = Hyper(SCHEDULES["vp"], segments=segments, num_grid_steps=12, adversarial_weight=0.0)
    length = 12 // segments
    for n in range(1, 13):
        floor = int(method.floor(torch.tensor(n - 1)))
        assert floor == max(edge for edge in range(0, 13, length) if edge < n)
        assert floor <= n - 1


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("segments", [8, 4, 2, 1])
def test_segments_begin_where_the_student_is_sampled(name, segments):
    """VP: DDIM's trailing steps; flow: the shifted k/N; EDM: Karras' ramp in equal parts."""
    method = Hyper(SCHEDULES[name], segments=segments)
    floors = method.grid[method.floor(torch.arange(40)).unique()]
    sampled = PhasedSampler(num_inference_steps=segments, original_inference_steps=40).times(SCHEDULES[name])
    assert floors.tolist() == sampled[:0:-1].tolist() and method.grid[-1] == sampled[0]
    if name == "vp":
        assert sampled[:-1].tolist() == DDIMSampler(num_inference_steps=segments).times(SCHEDULES[name])[:-1].tolist()
    if name == "flow":
        share = np.arange(segments) / segments
        assert floors.tolist() == pytest.approx((3 * share / (1 + 2 * share)).tolist(), abs=1e-12)
    wanted = method.sampling(method.settings)
    assert (wanted.num_inference_steps, wanted.guidance_scale) == (segments, 1.0)
    assert (method.sampler, wanted.no_other_steps) == (("phased", True) if segments > 1 else ("tcd", False))


@pytest.mark.parametrize("segments", [4, 1])
def test_draws_cover_every_hop_and_every_end_of_its_segment(segments):
    method = Hyper(SCHEDULES["vp"], segments=segments, num_grid_steps=8, adversarial_weight=0.0)
    random = method.draw(Batch(torch.zeros(30_000, 2)), Rng(3, 0, 30_000), Progress(0, 1))
    assert random.level is None and random.level_noise is None
    for hop in range(8):
        floor = hop // (8 // segments) * (8 // segments)
        ends = torch.bincount(random.end_index[random.index == hop], minlength=8)
        wanted = 30_000 / 8 / (hop + 1 - floor)
        assert not ends[:floor].any() and not ends[hop + 1 :].any()  # in the segment, never above u
        assert (ends[floor : hop + 1] - wanted).abs().max() < 5 * wanted**0.5  # uniform, u and the floor included


def test_noise_may_have_one_more_normal_to_each_channel():
    batch, rng = Batch(torch.zeros(4000, 3, 2, 2)), Rng(3, 0, 4000, dtype=torch.float64)
    plain, offset = (Hyper(SCHEDULES["vp"], offset_noise=c).draw(batch, rng, Progress(0, 1)).noise for c in (0.0, 0.5))
    more = offset - plain
    assert (more - more[..., :1, :1]).abs().max() < 1e-12 and more.std().item() == pytest.approx(0.5, rel=0.03)
    assert abs(torch.corrcoef(more[..., 0, 0].T)[0, 1]) < 0.05


# ---------------------------------------------------------------- beside its relatives


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_of_one_segment_and_without_a_game_it_is_tcd(kind):
    torch.manual_seed(0)
    network, (batch, _) = Network().double(), captioned(6)
    losses = []
    for cls, settings in ((TCD, {}), (Hyper, {"segments": 1, "mse_weight": 1.0, "adversarial_weight": 0.0})):
        method = cls(SCHEDULES["vp"], num_grid_steps=8, guidance_scale=3.0, target_decay=0.9, **settings)
        roles = roles_on(copy.deepcopy(network), "vp", "epsilon", method, kind)
        torch.manual_seed(1)
        shake(roles.tensors().values())
        draws = method.draw(batch, Rng(0, 0, 6, dtype=torch.float64), Progress(0, 1))
        losses.append(method.student(roles, batch, draws, method.prepare(roles, batch, draws, {"student"})).total)
    assert torch.equal(*losses)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_stage_hops_by_what_its_student_was_when_it_began(kind):
    """Not by the teacher, and not by what the student becomes."""
    torch.manual_seed(0)
    method = Hyper(SCHEDULES["vp"], segments=2, num_grid_steps=8, hop_by="beginning", adversarial_weight=0.0)
    settings = TrainingSettings(precision="fp64", steps=2, batch_size=6, learning_rate=1e-2, warmup_steps=1)
    source = SimpleNamespace(batch=lambda rng: batch)
    batch, _ = captioned(6)
    network = Network().double()
    first = build_roles(Denoiser(copy.deepcopy(network), SCHEDULES["vp"]), method, settings, Weights(kind, rank=4))
    shake(first.tensors_of("student").values())
    init = {key: t.detach().clone() for key, t in first.tensors_of("student").items()}
    roles = build_roles(Denoiser(network, SCHEDULES["vp"]), method, settings, Weights(kind, rank=4), init=init)

    def said(role):
        return getattr(roles, role)(batch.x0, 500, batch.cond).x0.detach()

    before = said("student")
    assert torch.equal(said("beginning"), before) and not torch.allclose(said("teacher"), before, atol=1e-3)
    Trainer(method, roles, source, settings).run()
    assert torch.equal(said("beginning"), before) and not torch.allclose(said("student"), before, atol=1e-4)


@pytest.mark.parametrize(("cls", "settings"), [(DMD, {"timestep": 800}), (DMD2, {"timesteps": (800,)})])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_fake_score_may_begin_as_the_student(cls, settings, kind):
    """Of the one-step stage: student and fake score are the consistency student, the real score is the teacher."""
    torch.manual_seed(0)
    network, training = Network().double(), TrainingSettings(precision="fp64", ema_decay=0.0)
    began = {}
    for begins in ("teacher", "student"):
        method = cls(SCHEDULES["vp"], fake_init_from=begins, **settings)

        def build_on(init, method=method):
            return build_roles(Denoiser(copy.deepcopy(network), SCHEDULES["vp"]), method, training,
                               Weights(kind, rank=4), init=init)  # fmt: skip

        torch.manual_seed(1)
        shake((first := build_on(None)).tensors_of("student").values())
        roles = build_on({key: t.detach().clone() for key, t in first.tensors_of("student").items()})
        batch, _ = captioned(3)
        began[begins] = [getattr(roles, name)(batch.x0, 500, batch.cond).x0 for name in ("student", "fake", "teacher")]
        assert method.sampling(method.settings).timesteps == (800,)
    student, fake, teacher = began["teacher"]
    assert torch.allclose(fake, teacher, atol=1e-12) and not torch.allclose(student, teacher, atol=1e-3)
    student, fake, teacher = began["student"]
    assert torch.equal(fake, student) and not torch.allclose(fake, teacher, atol=1e-3)
    with pytest.raises(ValueError, match=r"fake_init_from: input should be .*, not 'noise'"):
        cls(SCHEDULES["vp"], fake_init_from="noise")


# ---------------------------------------------------------------- settings


def test_the_mean_square_leads_first_and_the_game_at_last():
    stages = {k: Hyper(SCHEDULES["vp"], segments=k) for k in (8, 4, 2, 1)}
    assert {k: (m.mse_weight, m.adversarial_weight) for k, m in stages.items()} == {
        8: (1.0, 0.0), 4: (1.0, 0.005), 2: (0.5, 0.01), 1: (0.3, 0.02),
    }  # fmt: skip
    assert [p.name for p in stages[8].players] == ["student"] and stages[8].heads() == ()
    assert [p.roles for p in stages[4].players] == [("student",), ("discriminator", "heads")]
    own = Hyper(SCHEDULES["vp"], segments=1, mse_weight=0.4, adversarial_weight=0.0)
    assert (own.mse_weight, own.adversarial_weight, own.gan) == (0.4, 0.0, None)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"segments": 3}, r"num_grid_steps \(40\) must be a multiple of segments \(3\)"),
        ({"segments": 0}, "segments: input should be greater than or equal to 1, not 0"),
        ({"segments": 80}, r"num_grid_steps \(40\) must be a multiple of segments \(80\)"),
        ({"hop_by": "student"}, r"hop_by: input should be .*, not 'student'"),
        ({"hop_by": "beginning", "guidance_scale": 3.0}, "hop_by beginning takes guidance_scale 1"),
        ({"hop_by": "beginning", "tell_end": True}, "students without an end input"),
        ({"mse_weight": -1.0}, "mse_weight: input should be greater than or equal to 0, not -1.0"),
        ({"adversarial_weight": math.inf}, "adversarial_weight: input should be a finite number, not inf"),
        ({"offset_noise": -0.1}, "offset_noise: input should be greater than or equal to 0, not -0.1"),
        ({"segments": 1, "halvings": -1}, "halvings: input should be greater than or equal to 0, not -1"),
        ({"segments": 1, "discriminator_weights": "half"}, r"discriminator_weights: input should be .*, not 'half'"),
        ({"guidance_scale": (2.0, 1.0)}, r"one number or \[low, high\]"),
    ],
)
def test_wrong_settings_are_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Hyper(reference.SCHEDULES["vp"], **settings)


def test_flow_models_have_no_offset_noise():
    with pytest.raises(ValueError, match="offset_noise is for VP and EDM schedules"):
        Hyper(SCHEDULES["flow"], offset_noise=0.05)
