"""A DMD2 step of both players worked out by hand, and the same step by the method."""

import copy
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import torch
from reference import (
    SCHEDULES,
    Network,
    Problem,
    alpha_sigma,
    ask,
    captioned,
    residual_head,
    roles_on,
    shake,
    waves,
    weights_of,
)
from reference import x0_epsilon as read

from fewstep.methods.dmd2 import DMD2, Draws
from fewstep.training.players import PlayerState
from fewstep.training.settings import TrainingSettings

ROWS = 5
SETTINGS = {
    "unguided, alone": dict(guidance_scale=1.0, adversarial_weight=0.0, weighting="kl"),
    "guided": dict(guidance_scale=4.0, adversarial_weight=0.7, discriminator_weight=0.3),
    "its own discriminator": dict(guidance_scale=1.0, adversarial_weight=0.7, discriminator_backbone="teacher"),
    "one step": dict(guidance_scale=8.0, adversarial_weight=0.2, head="residual", num_inference_steps=1),
    "ODE": dict(guidance_scale=3.0, adversarial_weight=0.2, rollout="ode"),
    "jumps": dict(guidance_scale=3.0, adversarial_weight=0.0, rollout="ode", match="x_s"),
    "jumps, exact score": dict(
        guidance_scale=1.0, adversarial_weight=0.2, rollout="ode", match="x_s", fake_target="score", weighting="kl"
    ),
    "guidance apart": dict(guidance_scale=4.0, adversarial_weight=0.0, guidance_apart=True),
    "guidance apart, kl": dict(
        guidance_scale=4.0, adversarial_weight=0.2, guidance_apart=True, weighting="kl", rollout="ode", match="x_s"
    ),
    "first step": dict(
        guidance_scale=3.0, adversarial_weight=0.2, rollout="ode", first_weight=0.3, first_solver_steps=(2, 5)
    ),
    "first step, jumps": dict(
        guidance_scale=1.0,
        adversarial_weight=0.0,
        rollout="ode",
        match="x_s",
        first_weight=0.3,
        first_solver_steps=(2, 5),
    ),
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


def segment(name, settings, exit):
    """The two times of the student's call at ``exit``: its own, and the next, None for clean data."""
    times = [*sampled_at(name, settings.get("num_inference_steps", 4)), None]
    return times[exit], times[exit + 1]


def times_of(name, variant, exit):
    """Five lists of times; those of jumps lie between the jump's two times, those of guidance below the student's."""
    settings = SETTINGS[variant]
    t, s = segment(name, settings, exit)
    low = 0.0 if s is None or settings.get("match") != "x_s" else s
    found = [low + (t - low) * np.array(share) for share in ([0.2, 0.4, 0.6, 0.8, 0.97], [0.9, 0.1, 0.5, 0.3, 0.7])]
    found = [np.ceil(x) for x in found] if name == "vp" else found
    return found if settings.get("match") == "x_s" else TIMES[name]


def drawn(name, variant, exit):
    settings = SETTINGS[variant]
    generator = torch.Generator().manual_seed(1)
    own = settings.get("rollout") == "ode" or settings.get("student_input") == "noised"
    first = torch.randn(ROWS, 1 if own else exit + 1, 2, 2, 2, generator=generator, dtype=torch.float64)
    noise = [torch.randn(ROWS, 2, 2, 2, generator=generator, dtype=torch.float64) for _ in range(6)]
    times = [torch.tensor(t, dtype=torch.float64) for t in times_of(name, variant, exit)]
    of_gan = [torch.tensor(t, dtype=torch.float64) for t in TIMES[name][2:]]
    names = ["fake", "matching"]
    if settings["adversarial_weight"]:
        times, names = [*times[:2], *of_gan], [*names, "played", "judged", "data"]
    found = {f"{name}_{what}": x for what, all_of in (("time", times), ("noise", noise))
             for name, x in zip(names, all_of, strict=False)}  # fmt: skip
    if settings.get("guidance_apart"):
        t = segment(name, settings, exit)[0] * torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1], dtype=torch.float64)
        found |= {"guidance_time": t.ceil() if name == "vp" else t, "guidance_noise": noise[5]}
    grid = tuple(sampled_at(name, settings.get("num_inference_steps", 4)).tolist())
    return Draws(times=grid, exit=exit, noise=first, **found)


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

    def pair(tensors, x, t, text=text):
        t = np.broadcast_to(np.asarray(t, dtype=np.float64), ROWS).copy()
        return read(p.name, p.kind, x, ask(p.base, tensors, p.name, x, t, text), t)

    def clean(tensors, x, t, text=text):
        return pair(tensors, x, t, text)[0]

    def guided(x, t):
        without, given = (pair({}, x, t, c) for c in (p.null.expand(ROWS, 3), text))
        return tuple(a + settings.guidance_scale * (b - a) for a, b in zip(without, given, strict=True))

    def landed(found, s):
        alpha, sigma = alpha_sigma(p.name, [s])
        return alpha * found[0] + sigma * found[1]

    times = sampled_at(p.name, settings.num_inference_steps)
    if settings.student_input == "noised":
        x_t = noised(x0, d.noise[:, 0], np.full(ROWS, times[d.exit]))
    else:
        x_t = start = d.noise[:, 0] * (80.0 if p.name == "edm" else 1.0)
        for i in range(d.exit):
            if settings.rollout == "ode":
                x_t = landed(pair(student, x_t, times[i]), times[i + 1]).detach()
            else:
                x_t = noised(clean(student, x_t, times[i]), d.noise[:, i + 1], np.full(ROWS, times[i + 1])).detach()
    found = pair(student, x_t, times[d.exit])
    x, s = found[0], None
    if settings.match == "x_s" and d.exit + 1 < len(times):
        s = times[d.exit + 1]
        x_s, low = landed(found, s).detach(), alpha_sigma(p.name, [s])

    def seen(x, noise, t):
        """What scores see, and the noise's share in it."""
        alpha, sigma = alpha_sigma(p.name, t)
        if s is None:
            return alpha * x + sigma * noise, sigma
        fresh = (sigma**2 - (alpha / low[0] * low[1]) ** 2).sqrt()
        return alpha / low[0] * x_s + fresh * noise, fresh

    at = d.matching_time.numpy()
    state = seen(x.detach(), d.matching_noise, at)[0]
    real = clean({}, state, at)
    compared = real if settings.guidance_apart else guided(state, at)[0]
    gap = clean(fake, state, at) - compared
    alpha, sigma = alpha_sigma(p.name, at)

    def scale(real):
        return (x - real).abs().mean(dim=(1, 2, 3), keepdim=True)

    g = gap / scale(compared) if settings.weighting == "l1" else (alpha / sigma) ** 2 * gap
    if settings.guidance_apart:
        at = d.guidance_time.numpy()
        state = noised(x.detach(), d.guidance_noise, at)
        given = clean({}, state, at)
        added = (settings.guidance_scale - 1) * (given - clean({}, state, at, p.null.expand(ROWS, 3)))
        g = g - (added / scale(given) if settings.weighting == "l1" else added)
    loss = 0.5 * ((x - (x - g).detach()) ** 2).mean()
    step = SimpleNamespace(
        x_t=x_t, x0_student=x, errors=[((fake_x0 - x) ** 2).mean() for fake_x0 in (gap + compared, real)]
    )
    if heads:
        said = logits(p, backbone, heads, noised(x, d.played_noise, d.played_time.numpy()), d.played_time, text)
        loss = loss + settings.adversarial_weight * softplus(-said).mean()
    if settings.first_weight:
        loss = loss + settings.first_weight * first_step(p, settings, start, pair, guided, landed, student)

    at, a = d.fake_time.numpy(), x.detach()
    alpha, sigma = alpha_sigma(p.name, at)
    state, fresh = seen(a, d.fake_noise, at)
    said = ask(p.base, fake, p.name, state, at, text)
    eps, more = d.fake_noise, 1.0
    if s is not None and settings.fake_target == "score":
        eps, more = sigma / fresh * d.fake_noise, (fresh / sigma) ** 2
        a = (state - sigma * eps) / alpha
    elif s is not None:
        eps = (state - alpha * a) / sigma
    wanted = {"epsilon": eps, "sample": a, "v_prediction": alpha * eps - sigma * a, "flow": eps - a}[p.kind]
    weight = (alpha / sigma) ** 2 + (4.0 if p.name == "edm" else 1.0) if p.kind == "sample" else 1.0
    critic = (more * weight * (said - wanted) ** 2).mean()
    if heads:
        a = x.detach()
        of_data = logits(p, backbone, heads, noised(x0, d.data_noise, d.data_time.numpy()), d.data_time, text)
        of_answers = logits(p, backbone, heads, noised(a, d.judged_noise, d.judged_time.numpy()), d.judged_time, text)
        critic = critic + settings.discriminator_weight * (softplus(-of_data).mean() + softplus(of_answers).mean())
    step.loss, step.critic, step.gradients = loss, critic, gradients(loss, student)
    step.fake, step.heads = gradients(critic, fake), gradients(critic, heads)
    return step


def first_step(p, settings, start, pair, guided, landed, student):
    """The first slope against the teacher's mean slope over K of M guided steps of Euler's method."""
    steps, total = settings.first_solver_steps
    times, z = sampled_at(p.name, total)[: steps + 1], start
    for t, s in pairwise(times):
        z = landed(guided(z, t), s).detach()
    x0, eps = pair(student, start, times[0])
    if p.name == "flow":
        return ((eps - x0 - (z - start) / (times[-1] - times[0])) ** 2).mean()
    (alpha_0, sigma_0), (alpha, sigma) = (alpha_sigma(p.name, [t]) for t in (times[0], times[-1]))
    mean_slope = (z / alpha - start / alpha_0) / (sigma / alpha - sigma_0 / alpha_0)
    return ((eps - mean_slope) ** 2).mean()


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
