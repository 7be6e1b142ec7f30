"""One Lightning step of both players against the same step by hand, on the same draws; its grids, draws and refusals."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import KINDS, RANK, SCALE, SCHEDULES, Network, alpha_sigma, ask, jump, off, waves, x0_epsilon
from torch.nn import functional

from fewstep.methods.base import Batch, Progress
from fewstep.methods.lightning import Draws, Lightning
from fewstep.methods.random import Rng
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.roles import Weights
from fewstep.sampling import DDIM
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import build_roles

CASES = [(name, kind) for name in ("vp", "flow") for kind in KINDS if (name, kind) != ("flow", "epsilon")]
SETTINGS = {
    "mse": dict(loss="mse", num_inference_steps=2, num_teacher_steps=6, num_start_times=2, guidance_scale=4.0),
    "conditional": dict(loss="conditional", num_inference_steps=2, num_teacher_steps=4, num_start_times=4),
    "unconditional": dict(loss="unconditional", num_inference_steps=4, num_teacher_steps=8, discriminator_weights="lora"),
    "table": dict(loss="conditional", num_inference_steps=2, num_teacher_steps=2, num_start_times=2, terminal="table"),
    "one step": dict(loss="unconditional", num_inference_steps=1, num_teacher_steps=2, prediction_type="sample"),
    "convert": dict(loss="convert", num_inference_steps=1, num_teacher_steps=2),
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
    roles = build_roles(
        Denoiser(network, SCHEDULES[name], kind), method, TrainingSettings(precision="fp64"),
        Weights(weights, rank=RANK, alpha=SCALE * RANK), origin=Denoiser(origin, SCHEDULES[name], kind),
    )  # fmt: skip
    with torch.no_grad():
        for tensor in roles.tensors().values():
            tensor.add_(0.1 * torch.randn_like(tensor))
        for tensor in roles.tensors_of("heads").values() if method.game else ():
            tensor.mul_(2)
    x0, text, null = torch.randn(BATCH, 2, 2, 2).double(), torch.randn(BATCH, 3).double(), torch.randn(1, 3).double()
    batch = Batch(x0, Cond({"text": text}, null={"text": null}))
    start = torch.tensor(STARTS.get(variant, [0, 1, 2, 3, 3, 0]))
    generator = torch.Generator().manual_seed(1)
    noise, level_noise = (torch.randn(BATCH, 2, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    level = torch.tensor([0.1, 0.3, 0.6, 0.8, 0.1, 0.99], dtype=torch.float64)
    draws = Draws(start, noise, *((level, level_noise) if method.game else (None, None)))
    student = settings.get("prediction_type") or ("sample" if settings["loss"] == "convert" else kind)
    return SimpleNamespace(name=name, kind=kind, student_kind=student, method=method, roles=roles, base=base,
                           first=first, batch=batch, null=null, draws=draws)  # fmt: skip


def head_by_hand(weights, f):
    """4x4 convolution of all there is, group norm, SiLU, one logit; a 2x2 map lies in a corner of zeros."""
    room = torch.zeros(*f.shape[:2], 4, 4, dtype=f.dtype)
    room = torch.cat([torch.cat([f, room[:, :, :2, 2:]], 3), room[:, :, 2:]], 2)
    h = torch.einsum("ocij,bcij->bo", weights["last.0.weight"], room) + weights["last.0.bias"]
    grouped = h.reshape(len(h), max(h.shape[1] // 4, 1), -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    h = (centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()).reshape(h.shape)
    h = functional.silu(weights["last.1.weight"] * h + weights["last.1.bias"])
    return h @ weights["outlet.weight"][0, :, 0, 0] + weights["outlet.bias"]


def features_by_hand(p, tensors, x, t):
    """The second layer, [B, 4, 2, 2], of the first model under the discriminator's weights, all of them or a LoRA."""
    weights = {key: w.detach() for key, w in p.first.named_parameters()}
    for key, value in tensors.items():
        layer, lora, part = key.rpartition(".lora_")
        if part == "A.weight":
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + SCALE * tensors[f"{layer}.lora_B.weight"] @ value
        elif not lora:
            weights[key] = value

    def layer(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    h = layer("inlet", x.flatten(1)) + layer("time", waves(torch.from_numpy(t))) + layer("text", p.batch.cond["text"])
    return layer("hidden", torch.tanh(h)).reshape(-1, 4, 2, 2)


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
        answers = [x0_epsilon(p.name, p.kind, x, ask(p.base, {}, p.name, x, t, c), t) for c in (text, p.null.expand(BATCH, 3))]
        return tuple(null + w * (with_ - null) for with_, null in zip(*answers, strict=True))

    x = x_t
    for here, there in zip(times[:-1], times[1:], strict=True):
        safe = np.where(here == clean, time(p.name, 0.5), here)
        x = torch.where(rows(here == there), x, landed(p.name, teacher(x, safe), there))
    student = {key: v.detach().clone().requires_grad_() for key, v in p.roles.tensors_of("student").items()}
    said = x0_epsilon(p.name, p.student_kind, x_t, ask(p.base, student, p.name, x_t, t, text), t)
    landing = landed(p.name, said, u)
    step = SimpleNamespace(x_t=x_t, x_u=x, landing=landing, critic=None, players={})
    if settings.loss == "convert":
        step.loss = (said[0] - teacher(x_t, t)[0]).square().mean()
        step.x_u = None
    elif settings.loss == "mse":
        step.loss = (landing - x).square().mean()
    else:
        judge(p, step, x_t, landing, x, t, shares[-1])
    step.gradients = dict(zip(student, torch.autograd.grad(step.loss, student.values(), retain_graph=True), strict=True))
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
        f = features_by_hand(p, backbone, x, at)
        if p.method.settings.loss == "conditional":
            f = torch.cat([f, features_by_hand(p, backbone, x_t, t)], dim=1)
        return head_by_hand(head, f)

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


def actual(p):
    shared = p.method.prepare(p.roles, p.batch, p.draws, {"student", "discriminator"})
    loss = p.method.student(p.roles, p.batch, p.draws, shared)
    step = SimpleNamespace(**vars(shared), loss=loss.total, stats=loss.stats, critic=None, players={})
    step.gradients = gradients(loss.total, p.roles, "student")
    if p.method.game:
        step.critic = p.method.discriminator(p.roles, p.batch, p.draws, shared).total
        for role in ("discriminator", "heads"):
            found = gradients(step.critic, p.roles, role)
            step.players |= {f"{role}/{key}": v for key, v in found.items()}
    return step


def gradients(total, roles, role):
    tensors = roles.tensors_of(role)
    return dict(zip(tensors, torch.autograd.grad(total, tensors.values(), retain_graph=True), strict=True))


@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("variant", SETTINGS)
@pytest.mark.parametrize(("schedule", "kind"), CASES)
def test_both_players_steps_are_the_papers(schedule, kind, variant, weights):
    p = build(schedule, kind, variant, weights)
    mine, theirs = actual(p), by_hand(p, variant)
    for field in ("x_t", "x_u", "landing"):
        for row, wanted in zip(getattr(mine, field), getattr(theirs, field) if getattr(theirs, field) is not None else (), strict=False):
            assert off(row, wanted) <= 1e-9, field
    assert off(mine.loss, theirs.loss) <= 1e-9
    assert mine.gradients.keys() == theirs.gradients.keys() and mine.players.keys() == theirs.players.keys()
    if theirs.critic is not None:
        assert off(mine.critic, theirs.critic) <= 1e-9 and mine.critic.item() != pytest.approx(2 * math.log(2), abs=0.05)
        assert mine.stats["landing_error"] == pytest.approx((theirs.landing - theirs.x_u).square().mean().item())
    for key, wanted in {**theirs.gradients, **theirs.players}.items():
        assert wanted.abs().max() > 0, key
        assert off({**mine.gradients, **mine.players}[key], wanted) <= 1e-9, key
