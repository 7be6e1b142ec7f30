"""ADD's and LADD's games by hand: heads, their norms, DiffAugment, and small frozen helpers to look through."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import torch
from reference import SCHEDULES, Network, Problem, alpha_sigma, ask, captioned, roles_on, shake, x0_epsilon
from torch import nn

from fewstep.models.helpers import Helpers

ROWS = 6  # of a batch: groups of two
STARTS = {"vp": 1.0, "edm": 80.0, "flow": 1.0}  # the noise a student starts from


class Decoder(nn.Module):
    """[B, 2, 2, 2] -> pictures [B, 3, 8, 8]."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 192, dtype=torch.float64) / 3, requires_grad=False)

    def forward(self, latents):
        return torch.tanh(latents.flatten(1) @ self.matrix).reshape(-1, 3, 8, 8)


class Encoder(nn.Module):
    """Rows [B, 5, 16] and maps [B, 7, 4, 4] of pictures [B, 3, 8, 8], and a summary of four numbers."""

    tap_channels = {"rows": 5, "maps": 7}  # noqa: RUF012
    summary_width = 4

    def __init__(self):
        super().__init__()
        sizes = {"rows": (5, 12), "maps": (7, 12), "whole": (4, 192)}
        self.tensors = nn.ParameterDict(
            {k: nn.Parameter(torch.randn(*n, dtype=torch.float64) / 3, requires_grad=False) for k, n in sizes.items()}
        )

    def features(self, pictures, taps):
        patches = pictures.reshape(-1, 3, 4, 2, 4, 2).permute(0, 1, 3, 5, 2, 4).reshape(len(pictures), 12, 16)
        found = {tap: torch.tanh(self.tensors[tap] @ patches) for tap in ("rows", "maps")}
        found["maps"] = found["maps"].reshape(-1, 7, 4, 4)
        return [found[tap] for tap in taps]

    def summary(self, pictures):
        return torch.tanh(pictures.flatten(1) @ self.tensors["whole"].T)


def problem(cls, name, kind, weights="full", **settings):
    method = cls(SCHEDULES[name], **settings)
    torch.manual_seed(0)
    network, decoder, encoder = Network().double(), Decoder(), Encoder()
    base = copy.deepcopy(network)
    helpers = Helpers(decoder, encoder, lambda cond: cond["text"], 3, (decoder, encoder))
    roles = roles_on(network, name, kind, method, weights, helpers=helpers)
    shake(roles.tensors().values())
    with torch.no_grad():
        for p in roles.tensors_of("discriminator").values() if roles.heads else ():
            p.mul_(2)  # some logits past the hinge's margins, on both sides
    return Problem(name, kind, method, roles, base, *captioned(ROWS))


def student_times(name):
    """Four levels, the noisiest first."""
    if name == "vp":
        return np.array([999.0, 749, 499, 249])
    if name == "edm":
        low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
        return np.array([80.0, *((high + k / 3 * (low - high)) ** 7 for k in (1, 2)), 0.002])
    return 3 * (np.arange(4, 0, -1) / 4) / (1 + 2 * np.arange(4, 0, -1) / 4)


def student_answer(p, leaves, noise, level, terminal):
    """(x_s, the answer) of a student whose tensors are ``leaves``."""
    s = student_times(p.name)[level]
    alpha, sigma = alpha_sigma(p.name, s)
    x_s = alpha * p.batch.x0 + sigma * noise
    blind = (s == s.max()) & ((terminal == "noise") | (p.name == "flow"))
    for row in np.flatnonzero(level.numpy() == 0) if blind.any() else ():
        x_s[row] = STARTS[p.name] * noise[row]
    said = ask(p.base, leaves, p.name, x_s, s, p.batch.cond["text"])
    return x_s, x0_epsilon(p.name, p.kind, x_s, said, s)[0]


def teacher(p, x_t, t):
    """(x0, eps) of the frozen base, with the prompt and without."""
    texts = p.batch.cond["text"], p.null.expand(ROWS, 3)
    return [x0_epsilon(p.name, p.kind, x_t, ask(p.base, {}, p.name, x_t, t, text), t) for text in texts]


# ------------------------------------------------------------------ heads


def sized(vectors):
    """At a root mean square of 1."""
    return vectors / (vectors**2).sum(dim=1, keepdim=True).div(vectors.shape[1]).sqrt()


def normalised(weight):
    """Over its largest singular value, by eight power iterations from one fixed vector."""
    matrix = weight.reshape(len(weight), -1)
    u = torch.randn(len(weight), generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for _ in range(8):
            v = matrix.T @ u / (matrix.T @ u).norm()
            u = matrix @ v / (matrix @ v).norm()
    return weight / torch.einsum("i,ij,j->", u, matrix, v)


def convolved(weight, x):
    """1x1, or nine places around a closed row, or 3x3 with zeros around."""
    weight = normalised(weight)
    if weight.ndim == 3:
        reach = weight.shape[2] // 2
        turned = [x.roll(reach - j, dims=2) for j in range(weight.shape[2])]
        return sum(torch.einsum("oi,bil->bol", weight[:, :, j], turned[j]) for j in range(weight.shape[2]))
    reach = weight.shape[2] // 2
    wide = torch.zeros(*x.shape[:2], x.shape[2] + 2 * reach, x.shape[3] + 2 * reach, dtype=x.dtype)
    wide[:, :, reach : reach + x.shape[2], reach : reach + x.shape[3]] = x
    found = 0
    for i in range(2 * reach + 1):
        for j in range(2 * reach + 1):
            part = wide[:, :, i : i + x.shape[2], j : j + x.shape[3]]
            found = found + torch.einsum("oi,bihw->bohw", weight[:, :, i, j], part)
    return found


def normed(weight, bias, x):
    """Rows: pairs of samples, channel by channel. Maps: every sample, four channels at a time."""
    if x.ndim == 3:
        pairs = [x[i : i + 2] for i in range(0, len(x), 2)]
        centred = [pair - pair.mean(dim=(0, 2), keepdim=True) for pair in pairs]
        x = torch.cat([c / (c.square().mean(dim=(0, 2), keepdim=True) + 1e-5).sqrt() for c in centred])
        return weight[:, None] * x + bias[:, None]
    parts = [x[:, i : i + 4] for i in range(0, x.shape[1], 4)]
    centred = [part - part.mean(dim=(1, 2, 3), keepdim=True) for part in parts]
    x = torch.cat([c / (c.square().mean(dim=(1, 2, 3), keepdim=True) + 1e-5).sqrt() for c in centred], dim=1)
    return weight[:, None, None] * x + bias[:, None, None]


def head(weights, features, condition):
    def block(name, h):
        h = normed(weights[f"{name}.1.weight"], weights[f"{name}.1.bias"], convolved(weights[f"{name}.0.weight"], h))
        return torch.where(h > 0, h, 0.2 * h)

    h = block("inlet", features)
    h = (h + block("middle", h)) / 2**0.5
    said = convolved(weights["outlet.weight"], h).flatten(2)
    asked = condition @ weights["condition.weight"].T + weights["condition.bias"]
    return (said * asked[:, :, None]).sum(1) / 8


def heads(weights, features, condition):
    """Logits of every tap, features given by name."""
    own = {tap: {k.removeprefix(f"heads.{tap}."): w for k, w in weights.items() if k.startswith(f"heads.{tap}.")}
           for tap in features}  # fmt: skip
    return [head(own[tap], features[tap], condition) for tap in features]


def hinge(real, fake):
    pairs = zip(real, fake, strict=True)
    return sum((1 - r).clamp_min(0).mean() + (1 + f).clamp_min(0).mean() for r, f in pairs) / len(real)


def slopes_at_heads(weights, features, condition):
    """R1: mean over heads and samples of the squared slope of a head's logits, summed, along its features."""
    total = 0
    for tap, value in features.items():
        leaf = value.detach().clone().requires_grad_()
        (said,) = heads(weights, {tap: leaf}, condition)
        (slope,) = torch.autograd.grad(said.sum(), leaf, create_graph=True)
        total = total + (slope**2).sum() / len(leaf)
    return total / len(features)


# ------------------------------------------------------------------ pictures


def augmented(pictures, numbers, policies):
    """One picture after another."""
    done = []
    for picture, u in zip(pictures, numbers.tolist(), strict=True):
        x = picture
        if "color" in policies:
            x = x + u[0] - 0.5
            grey = sum(x) / 3
            x = torch.stack([2 * u[1] * (c - grey) + grey for c in x])
            x = (x - x.mean()) * (u[2] + 0.5) + x.mean()
        if "translation" in policies:
            for dim, v in ((1, u[3]), (2, u[4])):
                reach = math.floor(x.shape[dim] / 8 + 0.5)
                by = math.floor(v * (2 * reach + 1)) - reach  # a picture moved by -by
                moved = torch.zeros_like(x)
                for i in range(x.shape[dim]):
                    if 0 <= i + by < x.shape[dim]:
                        moved.select(dim, i).copy_(x.select(dim, i + by))
                x = moved
        if "cutout" in policies:
            mask = torch.ones_like(x)
            windows = []
            for dim, v in ((1, u[5]), (2, u[6])):
                size = math.floor(x.shape[dim] / 2 + 0.5)
                first = math.floor(v * (x.shape[dim] + 1 - size % 2)) - size // 2
                windows.append([i for i in range(first, first + size) if 0 <= i < x.shape[dim]])
            for i in windows[0]:
                for j in windows[1]:
                    mask[:, i, j] = 0
            x = x * mask
        done.append(x)
    return torch.stack(done)


def gradients(loss, leaves):
    found = torch.autograd.grad(loss, leaves.values(), retain_graph=True)
    return dict(zip(leaves, found, strict=True))


def actual(p, draws):
    """Both players' losses and gradients by the method."""
    shared = p.method.prepare(p.roles, p.batch, draws, {"student", "discriminator"})
    step = SimpleNamespace(**vars(shared), critic=None, heads={})
    step.loss = p.method.student(p.roles, p.batch, draws, shared).total
    step.gradients = gradients(step.loss, p.roles.tensors_of("student"))
    if p.roles.heads:
        step.critic = p.method.discriminator(p.roles, p.batch, draws, shared).total
        step.heads = gradients(step.critic, p.roles.tensors_of("discriminator"))
    return step
