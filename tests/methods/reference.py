"""One step of LCM, TCD, PCM, DMD2 and others worked out from their papers' formulas; no mathematics of the library."""

import copy
import math
from dataclasses import dataclass
from functools import reduce
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from fewstep.data.batch import Batch
from fewstep.diffusion.schedule import Schedule
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.roles import Weights
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import build_roles

KINDS = ("epsilon", "v_prediction", "sample", "flow")
SCHEDULES = {"vp": Schedule.scaled_linear(), "edm": Schedule.edm(), "flow": Schedule.flow(shift=3.0)}
CASES = [(name, kind) for name in SCHEDULES for kind in KINDS if (name, kind) != ("flow", "epsilon")]  # alpha = 0 there
HOPS, RANK, SCALE = 5, 4, 2.0


class Network(nn.Module):
    """x [B, 2, 2, 2] with a text vector; extra inputs natively (``accepts``) or as the role's embedding (``extra``).

    A discriminator may look at its first layer, [B, 16], and at its second as a map, [B, 4, 2, 2].
    """

    extra_width = 16
    tap_channels: ClassVar = {"first": 16, "second": 4}

    def __init__(self, accepts=()):
        super().__init__()
        self.accepts = frozenset(accepts)
        self.inlet, self.time, self.text = nn.Linear(8, 16), nn.Linear(2, 16), nn.Linear(3, 16)
        self.told = nn.ModuleDict({name: nn.Linear(2, 16) for name in sorted(accepts)})
        self.hidden, self.outlet = nn.Linear(16, 16), nn.Linear(16, 8)

    def drop_decoder(self):
        self.outlet = nn.Identity()

    def features(self, x, t, cond, taps):
        first = torch.tanh(self.inlet(x.flatten(1)) + self.time(waves(t)) + self.text(cond["text"]))
        found = {"first": first, "second": self.hidden(first).reshape(-1, 4, 2, 2)}
        return [found[tap] for tap in taps]

    def forward(self, x, t, cond, *, end=None, guidance_embed=None, extra=None):
        h = self.inlet(x.flatten(1)) + self.time(waves(t)) + self.text(cond["text"])
        for name, value in (("end", end), ("guidance_embed", guidance_embed)):
            if value is not None:
                h = h + self.told[name](waves(value))
        if extra is not None:
            h = h + extra
        return self.outlet(nn.functional.silu(self.hidden(torch.tanh(h)))).reshape(x.shape)


def waves(t):
    t = t.double()[:, None]
    return torch.cat([torch.sin(t / 50), torch.cos(3 * t)], dim=1)


# ------------------------------------------------------------------ schedules and predictions, by the formulas


def log_ratios():
    """log(sigma / alpha) at the indices of Stable Diffusion's table."""
    bar = np.cumprod(1 - np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2)
    return np.log((1 - bar) / bar) / 2


def alpha_sigma(name, t):
    """Coefficients at times [B], to broadcast over x."""
    t = np.asarray(t, dtype=np.float64)
    if name == "vp":  # between two indices linear in log(sigma / alpha)
        bar = np.exp(-np.logaddexp(0, 2 * np.interp(t, np.arange(1000), log_ratios())))
        pair = np.sqrt(bar), np.sqrt(1 - bar)
    else:
        pair = (np.ones_like(t) if name == "edm" else 1 - t), t
    return tuple(torch.from_numpy(c).reshape(-1, 1, 1, 1) for c in pair)


def grid(name, hops=HOPS):
    """The N + 1 times, increasing."""
    i = np.arange(hops + 1)
    if name == "vp":
        return np.maximum(1000 // hops * i - 1, 0)
    if name == "edm":
        low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
        return np.where(i == hops, 80.0, np.where(i == 0, 0.002, (low + i / hops * (high - low)) ** 7))
    return 3 * (i / hops) / (1 + 2 * (i / hops))


def x0_epsilon(name, kind, x, output, t):
    """What a network output means (spec of predictions, one line each)."""
    alpha, sigma = alpha_sigma(name, t)
    if kind == "epsilon":
        return (x - sigma * output) / alpha, output
    if kind == "sample":
        return output, (x - alpha * output) / sigma
    if kind == "v_prediction":
        norm = alpha**2 + sigma**2
        return (alpha * x - sigma * output) / norm, (sigma * x + alpha * output) / norm
    return (x - sigma * output) / (alpha + sigma), (x + alpha * output) / (alpha + sigma)


def jump(name, pair, s):
    alpha, sigma = alpha_sigma(name, s)
    return alpha * pair[0] + sigma * pair[1]


def consistency(name, x, x0, t):
    """f(x, t): LCM's scalings with 10 t (vp), x0 itself (flow), CM's with sigma shifted by its minimum (edm)."""
    t = torch.from_numpy(np.asarray(t, dtype=np.float64)).reshape(-1, 1, 1, 1)
    if name == "vp":
        return 0.25 / ((10 * t) ** 2 + 0.25) * x + 10 * t / ((10 * t) ** 2 + 0.25).sqrt() * x0
    if name == "flow":
        return x0
    root = (t**2 + 0.25).sqrt()
    raw = (x0 - 0.25 / root**2 * x) / (0.5 * t / root)  # the network F behind the denoised x0
    return 0.25 / ((t - 0.002) ** 2 + 0.25) * x + (t - 0.002) * 0.5 / root * raw


def distance(a, b, kind, c, gain=None):
    each = (a - b) ** 2 if kind == "l2" else ((a - b) ** 2 + c**2).sqrt() - c
    if gain is not None:  # a row's gradient at the network's output is that of a gain of 15 at most
        over = (gain / 15.0).clamp(min=1.0)
        each = each / (over**2 if kind == "l2" else over)
    return each.mean()


# ------------------------------------------------------------------ a network under any weights


def ask(base, tensors, name, x, t, text, told=None):
    """The output of ``base`` with a role's tensors (all weights, or a LoRA, and extra inputs) in their places."""
    extra = None
    for key, value in tensors.items():
        if key.startswith("extras."):
            part = embedding(name, **told) @ value.T
            extra = part if extra is None else extra + part
    weights = weights_of(base, tensors)
    inputs = {"extra": extra} if extra is not None else (told or {})
    return functional_call(base, weights, (x, torch.from_numpy(t), Cond({"text": text})), inputs)


def weights_of(base, tensors):
    """The weights of ``base`` with a role's tensors in their places."""
    weights = {key: p.detach() for key, p in base.named_parameters()}
    for key, value in tensors.items():
        layer, _, part = key.rpartition(".lora_")
        if part == "A.weight":
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + SCALE * tensors[f"{layer}.lora_B.weight"] @ value
        elif not part.startswith("B") and not key.startswith("extras."):
            weights[key] = value
    return weights


def residual_head(weights, features):
    """1x1 convolution, group norm (groups of four channels here), leaky ReLU; once more with a shortcut; one logit."""
    f = features.reshape(*features.shape[:2], -1)

    def block(name, h):
        h = torch.einsum("oi,bip->bop", weights[f"{name}.0.weight"][..., 0], h) + weights[f"{name}.0.bias"][:, None]
        grouped = h.reshape(len(h), 8, -1)  # 32 channels in eight groups
        centred = grouped - grouped.mean(dim=2, keepdim=True)
        h = (centred / (centred.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()).reshape(h.shape)
        h = weights[f"{name}.1.weight"][:, None] * h + weights[f"{name}.1.bias"][:, None]
        return torch.where(h > 0, h, 0.2 * h)

    h = block("inlet", f)
    h = h + block("middle", h)
    return torch.einsum("i,bip->bp", weights["outlet.weight"][0, :, 0], h)


def corner_head(weights, f):
    """4x4 convolution of all there is, group norm, SiLU, one logit; a 2x2 map lies in a corner of zeros."""
    room = torch.zeros(*f.shape[:2], 4, 4, dtype=f.dtype)
    room = torch.cat([torch.cat([f, room[:, :, :2, 2:]], 3), room[:, :, 2:]], 2)
    h = torch.einsum("ocij,bcij->bo", weights["last.0.weight"], room) + weights["last.0.bias"]
    grouped = h.reshape(len(h), max(h.shape[1] // 4, 1), -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    h = (centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()).reshape(h.shape)
    h = nn.functional.silu(weights["last.1.weight"] * h + weights["last.1.bias"])
    return h @ weights["outlet.weight"][0, :, 0, 0] + weights["outlet.bias"]


def encoder_features(first, tensors, x, t, text):
    """The second layer, [B, 4, 2, 2], of network ``first`` under a discriminator's weights, all or a LoRA."""
    weights = weights_of(first, tensors)

    def layer(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    h = layer("inlet", x.flatten(1)) + layer("time", waves(torch.from_numpy(t))) + layer("text", text)
    return layer("hidden", torch.tanh(h)).reshape(-1, 4, 2, 2)


def embedding(name, end=None, guidance_embed=None):
    """256 sines and cosines: of 1000 w_LCM = 1000 (w - 1), or of the end time on the networks' 1000-step scale."""
    if end is None:
        phase = 1000 * (guidance_embed - 1)
    else:
        phase = {"vp": end, "edm": 250 * end.double().clamp_min(1e-8).log(), "flow": 1000 * end}[name]
    angle = phase.double()[:, None] / 10000 ** (torch.arange(128, dtype=torch.float64) / 127)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


# ------------------------------------------------------------------ one step


@dataclass
class Problem:
    """A method with roles shaken off the teacher, a batch, and what the reference needs of both."""

    name: str
    kind: str
    method: object
    roles: object
    base: nn.Module
    batch: Batch
    null: torch.Tensor

    def leaves(self, role):
        """The role's tensors as leaves of their own."""
        return {key: p.detach().clone().requires_grad_() for key, p in self.roles.tensors_of(role).items()}

    def tensors(self, role):
        """The same; those of the student for a target that is the student itself."""
        return self.leaves(role if role in self.roles._tensors else "student")


def roles_on(network, name, kind, method, weights="full", **others):
    """What ``method`` asks for on this network, in float64."""
    return build_roles(
        Denoiser(network, SCHEDULES[name], kind),
        method,
        TrainingSettings(precision="fp64"),
        Weights(weights, rank=RANK, alpha=SCALE * RANK),
        **others,
    )


def student_on(method, name, kind, weights, *inputs):
    """Roles whose student has moved from its teacher, and a copy of the network; ``inputs`` are for full weights."""
    torch.manual_seed(0)
    network = Network(inputs if weights == "full" else ()).double()
    base = copy.deepcopy(network)
    roles = roles_on(network, name, kind, method, weights)
    shake(roles.tensors_of("student").values())
    return roles, base


def row_scales(scale, rows=6):
    """The guidance scale of each row: the number, or from the first of two to the second."""
    return torch.linspace(*scale, rows) if isinstance(scale, tuple) else torch.full((rows,), scale)


def noises(count):
    """Noise of six rows, ``count`` times."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 2, 2, 2, generator=generator, dtype=torch.float64) for _ in range(count)]


def every_step(variants):
    """Marks a test of a step: all weights, or a LoRA on a network without inputs of its own; variants; cases."""
    marks = (
        pytest.mark.parametrize(("schedule", "kind"), CASES),
        pytest.mark.parametrize("variant", variants),
        pytest.mark.parametrize(("weights", "native"), [("full", True), ("lora", False)]),
    )
    return lambda test: reduce(lambda marked, mark: mark(marked), marks, test)


def shake(tensors):
    """Move trained tensors off what they start from."""
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(0.1 * torch.randn_like(tensor))


def captioned(rows):
    """A batch of so many pictures with texts, and what stands for no text."""
    x0, text, null = torch.randn(rows, 2, 2, 2).double(), torch.randn(rows, 3).double(), torch.randn(1, 3).double()
    return Batch(x0, Cond({"text": text}, null={"text": null})), null


def problem(cls, name, kind, weights="full", native=True, **settings):
    """Everything in float64; a target with an EMA lags behind the student, as in training."""
    method = cls(SCHEDULES[name], num_grid_steps=HOPS, **settings)
    asked = {extra for spec in method.roles() for extra in spec.extra_inputs}
    torch.manual_seed(0)
    network = Network(asked if native else ()).double()
    base = copy.deepcopy(network)
    roles = roles_on(network, name, kind, method, weights)
    for role in ("target", "student"):
        shake(roles.tensors_of(role).values() if role in roles._tensors else ())
    return Problem(name, kind, method, roles, base, *captioned(6))


@dataclass
class Step:
    """What a step must come to."""

    x_t: torch.Tensor
    x_u: torch.Tensor
    target: torch.Tensor
    loss: torch.Tensor
    gradients: dict


def expected(p, draws, function, told=None, detach_target=True):
    """The step by hand. ``function(pair, x, t)`` reads an (x0, eps) pair as the method's answer."""
    text, x0, w = p.batch.cond["text"], p.batch.x0, draws.guidance_scale.reshape(-1, 1, 1, 1)
    t, u = grid(p.name)[draws.index + 1], grid(p.name)[draws.index]
    alpha, sigma = alpha_sigma(p.name, t)
    x_t = alpha * x0 + sigma * draws.noise
    teacher = [
        x0_epsilon(p.name, p.kind, x_t, ask(p.base, {}, p.name, x_t, t, c), t) for c in (text, p.null.expand(6, 3))
    ]
    guided = tuple(with_ + (w - 1) * (with_ - without) for with_, without in zip(*teacher, strict=True))
    x_u = jump(p.name, guided, u)
    student = p.tensors("student")
    followed = p.tensors("target") if p.method.settings.target_decay else student
    said = ask(p.base, student, p.name, x_t, t, text, told)
    answer = function(x0_epsilon(p.name, p.kind, x_t, said, t), x_t, t)
    moved = function(x0_epsilon(p.name, p.kind, x_t, said.detach() + 1.0, t), x_t, t)
    gain = (moved - answer.detach()).abs()  # linear in the output
    said = ask(p.base, followed, p.name, x_u, u, text, told)
    target = function(x0_epsilon(p.name, p.kind, x_u, said, u), x_u, u)
    target = target.detach() if detach_target else target
    loss = distance(answer, target, p.method.settings.loss, p.method.settings.huber_c, gain)
    loss.backward()
    return Step(x_t, x_u, target, loss, {key: leaf.grad for key, leaf in student.items()})


def actual(p, draws):
    """The same step by the method."""
    shared = p.method.prepare(p.roles, p.batch, draws, {"student"})
    loss = p.method.student(p.roles, p.batch, draws, shared).total
    loss.backward(inputs=p.roles.parameters("student"))
    gradients = {key: leaf.grad for key, leaf in p.roles.tensors_of("student").items()}
    return Step(shared.x_t, shared.x_u, shared.target, loss, gradients)


def assert_same(mine, theirs, limit=1e-10):
    """Rows of the intermediates, the loss and every gradient agree to ``limit``, relative."""
    for field in ("x_t", "x_u", "target"):
        for row, wanted in zip(getattr(mine, field), getattr(theirs, field), strict=True):
            assert off(row, wanted) <= limit, field
    assert off(mine.loss, theirs.loss) <= limit
    assert mine.gradients.keys() == theirs.gradients.keys()
    for key, wanted in theirs.gradients.items():
        assert wanted.abs().max() > 0, key
        assert off(mine.gradients[key], wanted) <= limit, key


def played(p):
    """One step of student and discriminator by the method: what both share, losses, statistics, every gradient."""
    shared = p.method.prepare(p.roles, p.batch, p.draws, {"student", "discriminator"})
    loss = p.method.student(p.roles, p.batch, p.draws, shared)
    step = SimpleNamespace(**vars(shared), loss=loss.total, parts=loss.parts, stats=loss.stats, critic=None, players={})
    step.gradients = gradients(loss.total, p.roles, "student")
    if p.method.gan:
        step.critic = p.method.discriminator(p.roles, p.batch, p.draws, shared).total
        for role in ("discriminator", "heads"):
            step.players |= {f"{role}/{key}": v for key, v in gradients(step.critic, p.roles, role).items()}
    return step


def gradients(total, roles, role):
    """Of a loss to all tensors of a role."""
    tensors = roles.tensors_of(role)
    return dict(zip(tensors, torch.autograd.grad(total, tensors.values(), retain_graph=True), strict=True))


def assert_players_apart(p):
    """No graph leads from one player's loss to the other's weights; returns what they share."""
    shared = p.method.prepare(p.roles, p.batch, p.draws, {"student", "discriminator"})
    students = p.method.student(p.roles, p.batch, p.draws, shared).total
    critics = p.method.discriminator(p.roles, p.batch, p.draws, shared).total
    others = [*p.roles.parameters("discriminator"), *p.roles.parameters("heads")]
    for loss, weights in ((students, others), (critics, p.roles.parameters("student"))):
        assert not any(g is not None for g in torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True))
    return shared


def off(value, wanted):
    """Largest difference relative to the largest number wanted."""
    assert value.dtype == wanted.dtype == torch.float64
    return float((value - wanted).detach().abs().max() / wanted.detach().abs().max())
