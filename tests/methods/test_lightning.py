"""A Lightning step of both players against the same step by hand, on the same draws; its grids, draws, refusals."""

import copy
import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import (
    KINDS,
    SCHEDULES,
    Network,
    alpha_sigma,
    ask,
    assert_players_apart,
    captioned,
    corner_head,
    encoder_features,
    off,
    played,
    roles_on,
    shake,
    x0_epsilon,
)
from torch.nn import functional

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.methods.base import Progress
from fewstep.methods.lightning import Draws, Lightning
from fewstep.models.denoiser import Denoiser
from fewstep.models.roles import Weights
from fewstep.sampling import DDIMSampler
from fewstep.sampling.samplers import renoise
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import build_roles

CASES = [(name, kind) for name in ("vp", "flow") for kind in KINDS if (name, kind) != ("flow", "epsilon")]
SETTINGS = {
    "mse": dict(loss="mse", num_inference_steps=2, num_teacher_steps=6, num_start_times=2, guidance_scale=4.0),
    "conditional": dict(loss="conditional", num_inference_steps=2, num_teacher_steps=4, num_start_times=4),
    "unconditional": dict(
        loss="unconditional", num_inference_steps=4, num_teacher_steps=8, discriminator_weights="lora"
    ),
    "table": dict(loss="conditional", num_inference_steps=2, num_teacher_steps=2, num_start_times=2, terminal="table"),
    "one step": dict(loss="unconditional", num_inference_steps=1, num_teacher_steps=2, prediction_type="sample"),
    "convert": dict(loss="convert", num_inference_steps=2, num_teacher_steps=4),
}
STARTS = {"mse": [0, 1, 1, 0, 1, 0], "table": [0, 1, 0, 1, 1, 0]}  # others start from all four times
BATCH = 6


def time(name, share):
    """Native time of a share of the way from clean data to noise: index 1000 share - 1, or share, shifted by 3."""
    share = np.asarray(share, dtype=np.float64)
    if name == "vp":
        return np.round(1000 * share) - 1
    return 3 * share / (1 + 2 * share)


def build(name, kind, variant, weights="full", **changes):
    settings = {**SETTINGS[variant], **changes}
    method = Lightning(SCHEDULES[name], **settings)
    torch.manual_seed(0)
    network, origin = Network().double(), Network().double()
    base, first = copy.deepcopy(network), copy.deepcopy(origin)
    roles = roles_on(network, name, kind, method, weights, origin=Denoiser(origin, SCHEDULES[name], kind))
    shake(roles.tensors().values())
    with torch.no_grad():
        for tensor in roles.tensors_of("heads").values() if method.gan else ():
            tensor.mul_(2)
    batch, null = captioned(BATCH)
    start = torch.tensor(STARTS.get(variant, [0, 1, 2, 3, 3, 0]))
    generator = torch.Generator().manual_seed(1)
    noise, level_noise = (torch.randn(BATCH, 2, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    level = torch.tensor([0.1, 0.3, 0.6, 0.8, 0.1, 0.99], dtype=torch.float64)
    draws = Draws(start, noise, *((level, level_noise) if method.gan else (None, None)))
    student = settings.get("prediction_type") or ("sample" if settings["loss"] == "convert" else kind)
    return SimpleNamespace(name=name, kind=kind, student_kind=student, method=method, roles=roles, base=base,
                           first=first, batch=batch, null=null, draws=draws)  # fmt: skip


def times_by_hand(p, variant):
    """Shares of the way: the student's start, then the teacher's, and never below 0."""
    settings = p.method.settings
    n, few = settings.num_teacher_steps, settings.num_inference_steps
    starts = {"mse": 2, "table": 2}.get(variant, 4)
    share = 1 - p.draws.start.numpy() / starts
    return [np.maximum(share - k / n, 0) for k in range(n // few + 1)]


def by_hand(p, variant):
    settings, text, w = p.method.settings, p.batch.cond["text"], p.method.settings.guidance_scale
    shares = times_by_hand(p, variant)
    clean = -1.0 if p.name == "vp" else 0.0
    times = [np.where(share == 0, clean, time(p.name, share)) for share in shares]
    t, u = times[0], times[-1]
    alpha, sigma = coefficients(p.name, t)
    x_t = alpha * p.batch.x0 + sigma * p.draws.noise
    if settings.terminal == "noise":
        x_t = torch.where(rows(shares[0] == 1), p.draws.noise, x_t)

    def teacher(x, t):
        answers = [
            x0_epsilon(p.name, p.kind, x, ask(p.base, {}, p.name, x, t, c), t) for c in (text, p.null.expand(BATCH, 3))
        ]
        return tuple(null + w * (with_ - null) for with_, null in zip(*answers, strict=True))

    x = x_t
    for here, there in pairwise(times):
        safe = np.where(here == clean, time(p.name, 0.5), here)
        x = torch.where(rows(here == there), x, landed(p.name, teacher(x, safe), there))
    student = {key: v.detach().clone().requires_grad_() for key, v in p.roles.tensors_of("student").items()}
    said = x0_epsilon(p.name, p.student_kind, x_t, ask(p.base, student, p.name, x_t, t, text), t)
    landing = landed(p.name, said, u)
    step = SimpleNamespace(x_t=x_t, x_u=x, x_student=landing, critic=None, players={})
    if settings.loss == "convert":
        step.loss = (said[0] - teacher(x_t, t)[0]).square().mean()
    elif settings.loss == "mse":
        step.loss = (landing - x).square().mean()
    else:
        judge(p, step, x_t, landing, x, t, shares[-1])
    step.gradients = dict(
        zip(student, torch.autograd.grad(step.loss, student.values(), retain_graph=True), strict=True)
    )
    return step


def judge(p, step, x_t, landing, x, t, share):
    """Both players' losses, every gradient of the discriminator's."""
    noised = np.array([0.01, 0.25, 0.5, 0.75])[(4 * p.draws.level.numpy()).astype(int)]
    on_clean = share == 0
    at = time(p.name, np.where(on_clean, noised, share))
    alpha, sigma = alpha_sigma(p.name, at)
    fake, real = (torch.where(rows(on_clean), alpha * x + sigma * p.draws.level_noise, x) for x in (landing, x))
    mine = {f"{role}/{key}": v.detach().clone().requires_grad_()
            for role in ("discriminator", "heads") for key, v in p.roles.tensors_of(role).items()}  # fmt: skip
    backbone = {key.removeprefix("discriminator/"): v for key, v in mine.items() if key.startswith("discriminator/")}
    head = {key.removeprefix("heads/heads.second."): v for key, v in mine.items() if key.startswith("heads/")}

    def says(x):
        f = encoder_features(p.first, backbone, x, at, p.batch.cond["text"])
        if p.method.settings.loss == "conditional":
            f = torch.cat([f, encoder_features(p.first, backbone, x_t, t, p.batch.cond["text"])], dim=1)
        return corner_head(head, f)

    step.loss = functional.softplus(-says(fake)).mean()
    step.critic = (functional.softplus(-says(real)) + functional.softplus(says(fake.detach()))).mean()
    step.players = dict(zip(mine, torch.autograd.grad(step.critic, mine.values(), retain_graph=True), strict=True))


def rows(mask):
    return torch.from_numpy(mask).reshape(-1, 1, 1, 1)


def coefficients(name, t):
    alpha, sigma = alpha_sigma(name, np.maximum(t, 0))
    return torch.where(rows(t < 0), 1.0, alpha), torch.where(rows(t < 0), 0.0, sigma)


def landed(name, pair, u):
    alpha, sigma = coefficients(name, u)
    return alpha * pair[0] + sigma * pair[1]


@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("variant", SETTINGS)
@pytest.mark.parametrize(("schedule", "kind"), CASES)
def test_both_players_steps_are_the_papers(schedule, kind, variant, weights):
    p = build(schedule, kind, variant, weights)
    mine, theirs = played(p), by_hand(p, variant)
    for field in ("x_t", "x_u", "x_student"):
        if variant != "convert" or field != "x_u":  # a conversion looks at where it starts alone
            pairs = zip(getattr(mine, field), getattr(theirs, field), strict=True)
            assert max(off(row, wanted) for row, wanted in pairs) <= 1e-9, field
    assert off(mine.loss, theirs.loss) <= 1e-9
    assert mine.gradients.keys() == theirs.gradients.keys() and mine.players.keys() == theirs.players.keys()
    if theirs.critic is not None:
        assert off(mine.critic, theirs.critic) <= 1e-9
        assert abs(mine.critic.item() - 2 * math.log(2)) > 0.05
        assert mine.stats["landing_error"] == pytest.approx((theirs.x_student - theirs.x_u).square().mean().item())
    for key, wanted in {**theirs.gradients, **theirs.players}.items():
        assert wanted.abs().max() > 0, key
        assert off({**mine.gradients, **mine.players}[key], wanted) <= 1e-9, key


def test_no_graph_leads_from_the_discriminators_loss_to_the_student_nor_back():
    p = build("vp", "epsilon", "conditional")
    shared = assert_players_apart(p)
    assert not shared.x_u.requires_grad


@pytest.mark.parametrize("name", ["vp", "flow"])
@pytest.mark.parametrize("stage", [(128, 32), (32, 8), (8, 4), (4, 2), (2, 1), (8, 2), (4, 1), (48, 16)])
def test_a_student_learns_where_it_will_be_sampled_and_its_teacher_was(name, stage):
    """Trailing grids, the 128 rounded once; the way starts at a time of the student's and ends at its next one."""
    many, few = stage
    method = Lightning(
        SCHEDULES[name], num_teacher_steps=many, num_inference_steps=few, num_start_times=few, loss="mse"
    )
    ways = torch.stack(method.teacher_times(torch.arange(few)), dim=1)
    sampled = DDIMSampler(num_inference_steps=few).times(SCHEDULES[name])
    assert ways[:, 0].tolist() == sampled[:-1].tolist() and ways[:, -1].tolist() == sampled[1:].tolist()
    taught = DDIMSampler(num_inference_steps=many).times(SCHEDULES[name])
    steps = torch.cat([ways[:, :-1].flatten(), ways[-1:, -1]])
    if stage == (48, 16):  # 937.5 is 938 in sixteen steps, and 937 in 48, from 62.5 and three times 20.83
        assert (steps - torch.from_numpy(taught)).abs().max() == (1 if name == "vp" else 0)
    else:
        assert steps.tolist() == taught.tolist()


def test_students_of_one_and_two_steps_start_from_four_times():
    """250, 500, 750 and 1000 of 1,000; a way that would pass clean data ends there."""
    two = Lightning(SCHEDULES["vp"], num_teacher_steps=4, num_inference_steps=2)
    assert [t.tolist() for t in two.teacher_times(torch.arange(4))] == [
        [999, 749, 499, 249],
        [749, 499, 249, -1],
        [499, 249, -1, -1],
    ]
    one = Lightning(SCHEDULES["vp"], num_teacher_steps=2, num_inference_steps=1)
    assert [t.tolist() for t in one.teacher_times(torch.arange(4))] == [
        [999, 749, 499, 249],
        [499, 249, -1, -1],
        [-1, -1, -1, -1],
    ]
    assert [Lightning(SCHEDULES["vp"], num_teacher_steps=2 * n, num_inference_steps=n).starts for n in (3, 4, 8)] == [
        3,
        4,
        8,
    ]


@pytest.mark.parametrize(("name", "times"), [("vp", [9, 249, 499, 749]), ("flow", [3 / 102, 0.5, 0.75, 0.9])])
def test_landings_on_clean_data_are_judged_where_the_paper_says(name, times):
    method = Lightning(SCHEDULES[name], renoise_weights=(5, 1, 1, 1))
    assert method.gan.levels.tolist() == pytest.approx(times)
    draws = method.draw(Batch(torch.zeros(20_000, 2)), Rng(3, 0, 20_000), Progress(0, 1))
    assert (torch.bincount(draws.start, minlength=4) - 5000).abs().max() < 5 * 5000**0.5
    above = method.gan.judged_at(
        torch.full((20_000,), 0.3 if name == "flow" else 249.0, dtype=torch.float64), draws.level
    )
    assert above.unique().tolist() == [0.3 if name == "flow" else 249.0]
    at = method.gan.judged_at(torch.full((20_000,), method.schedule.clean, dtype=torch.float64), draws.level)
    counts = torch.stack([(at == t).sum() for t in method.gan.levels]).double()
    assert counts.sum() == 20_000 and (counts / 2500 - torch.tensor([5.0, 1, 1, 1])).abs().max() < 0.12
    noises = torch.stack([draws.noise, draws.level_noise]).flatten(1)
    assert abs(torch.corrcoef(noises)[0, 1]) < 0.02 and (noises.std(dim=1) - 1).abs().max() < 0.02


def test_both_landings_have_one_noise_and_those_above_clean_data_none():
    p = build("vp", "epsilon", "unconditional")
    shared = p.method.prepare(p.roles, p.batch, p.draws, {"student"})
    fake, judged = shared.judged.seen, shared.judged
    real = renoise(p.method.schedule, shared.x_u, shared.u, judged.at, judged.noise)
    clean = shared.u == -1
    assert clean.any() and not clean.all()
    assert torch.equal(fake[~clean], shared.x_student[~clean]) and torch.equal(real[~clean], shared.x_u[~clean])
    kept = alpha_sigma("vp", judged.at)[0]
    torch.testing.assert_close(
        (fake - real)[clean], (kept * (shared.x_student - shared.x_u))[clean], rtol=1e-10, atol=1e-12
    )


def test_without_a_discriminator_there_is_one_player():
    for loss in ("mse", "convert"):
        quiet = Lightning(SCHEDULES["vp"], loss=loss)
        assert [p.name for p in quiet.players] == ["student"] and quiet.heads() == () and len(quiet.roles()) == 1
    loud = Lightning(SCHEDULES["vp"])
    assert [p.roles for p in loud.players] == [("student",), ("discriminator", "heads")]
    assert loud.sampling(loud.settings).no_other_steps


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_the_discriminator_begins_as_the_first_model_and_leaves_it_alone(weights):
    p = build("vp", "epsilon", "conditional", weights)
    method = Lightning(SCHEDULES["vp"], loss="conditional", discriminator_weights=weights)
    first, teacher = Network().double(), Network().double()
    before = {key: t.clone() for key, t in first.state_dict().items()}
    roles = build_roles(Denoiser(teacher, SCHEDULES["vp"]), method, TrainingSettings(precision="fp64"),
                        Weights("lora", rank=2), origin=Denoiser(first, SCHEDULES["vp"]))  # fmt: skip
    t = np.full(BATCH, 499)
    mine = roles.discriminator.features(p.batch.x0, torch.from_numpy(t), p.batch.cond, ["second"])[0]
    assert off(mine, first.features(p.batch.x0, torch.from_numpy(t), p.batch.cond, ["second"])[0]) <= 1e-12
    trained = roles.tensors_of("discriminator")
    assert all((".lora_" in key) == (weights == "lora") for key in trained)
    assert not any(key.startswith("outlet") for key in trained)
    with torch.no_grad():
        for tensor in trained.values():
            tensor.add_(1)
    assert all(torch.equal(t, before[key]) for key, t in first.state_dict().items())
    assert not any(w.requires_grad for w in teacher.parameters() if w.shape[0] != 2 and w.shape[-1] != 2)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"loss": "gan"}, r"loss: input should be .*, not 'gan'"),
        ({"terminal": "zero"}, r"terminal: input should be .*, not 'zero'"),
        ({"discriminator_weights": "half"}, r"discriminator_weights: input should be .*, not 'half'"),
        ({"num_teacher_steps": 6}, r"num_teacher_steps \(6\) must be a multiple of num_inference_steps \(4\)"),
        ({"num_teacher_steps": 2}, r"num_teacher_steps \(2\) must be a multiple of num_inference_steps \(4\)"),
        ({"num_inference_steps": 0}, "num_inference_steps: input should be greater than or equal to 1, not 0"),
        ({"num_start_times": 6}, r"num_start_times \(6\) must be a multiple of num_inference_steps \(4\)"),
        ({"num_start_times": -4}, "num_start_times: input should be greater than or equal to 1, not -4"),
        ({"renoise_times": (0.0, 0.5)}, r"renoise_times\.0: input should be greater than 0, not 0.0"),
        ({"renoise_weights": (1.0,)}, "renoise_weights must be as many as renoise_times"),
        ({"renoise_weights": (0.0, 0.0, 0.0, 0.0)}, "renoise_weights must be as many"),
        ({"guidance_scale": -1.0}, "guidance_scale: input should be greater than or equal to 0"),
        ({"halvings": -1}, "halvings: input should be greater than or equal to 0, not -1"),
        ({"num_inference_steps": 500, "num_teacher_steps": 2000}, "exceeds the 1000 training timesteps"),
    ],
)
def test_wrong_settings_are_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Lightning(SCHEDULES["vp"], **settings)


def test_edm_schedules_have_no_such_grids():
    with pytest.raises(ValueError, match="EDM schedules have none"):
        Lightning(SCHEDULES["edm"])


def test_an_epsilon_network_is_not_asked_for_x0_at_pure_noise():
    with pytest.raises(ValueError, match="cannot start from pure noise"):
        build("flow", "flow", "one step", prediction_type="epsilon")
