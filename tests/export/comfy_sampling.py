"""ComfyUI's sampling as it is written there (0.3.64), in float64: a printed line of settings is read and run.

Tables and nodes are those of model_sampling.py and nodes_model_advanced.py, samplers those of k_diffusion/sampling.py,
the custom node is ComfyUI-TCD's. States are ComfyUI's own: x / alpha for tables of betas, x for flow models.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

BETAS = {"sd": ("sqrt", 0.00085, 0.012), "pixart": ("straight", 0.0001, 0.02)}
PURE = 4.8973451890853435e-08


def table(kind):
    """sigma / alpha of the 1,000 indices."""
    form, first, last = BETAS[kind]
    betas = np.linspace(first**0.5, last**0.5, 1000) ** 2 if form == "sqrt" else np.linspace(first, last, 1000)
    bar = np.cumprod(1 - betas)
    return np.sqrt((1 - bar) / bar)


def rescaled(sigmas):
    """rescale_zero_terminal_snr_sigmas."""
    root = np.sqrt(1 / (sigmas**2 + 1))
    first, last = root[0], root[-1]
    bar = ((root - last) * first / (first - last)) ** 2
    bar[-1] = PURE
    return np.sqrt((1 - bar) / bar)


@dataclass
class Discrete:
    """ModelSamplingDiscrete: ``timestep`` is the nearest index."""

    sigmas: np.ndarray
    kind: str = "eps"
    skip: int = 1

    def timestep(self, sigma):
        place = int(np.abs(np.log(sigma) - np.log(self.sigmas)).argmin())
        return place * self.skip + self.skip - 1

    def sigma(self, timestep):
        place = min(max((timestep - (self.skip - 1)) / self.skip, 0), len(self.sigmas) - 1)
        low, high = math.floor(place), math.ceil(place)
        w = place - low
        return math.exp((1 - w) * math.log(self.sigmas[low]) + w * math.log(self.sigmas[high]))

    def denoised(self, network, x, sigma):
        t = self.timestep(sigma)
        out = network(x / math.sqrt(sigma**2 + 1), t)
        if self.kind == "x0":
            return out
        if self.kind == "v_prediction":
            return x / (sigma**2 + 1) - out * sigma / math.sqrt(sigma**2 + 1)
        x0 = x - out * sigma
        if self.kind == "lcm":
            q = t * 10.0
            return q / math.sqrt(q**2 + 0.25) * x0 + 0.25 / (q**2 + 0.25) * x
        return x0

    def noised(self, sigma, noise, x0, most=False):
        return x0 + noise * (math.sqrt(1 + sigma**2) if most else sigma)


@dataclass
class Flow:
    """ModelSamplingDiscreteFlow and ModelSamplingFlux, with CONST."""

    shift: float
    length: int
    multiplier: float
    sigmas: np.ndarray = field(init=False)

    def __post_init__(self):
        self.sigmas = np.array([self.sigma(k / self.length * self.multiplier) for k in range(1, self.length + 1)])

    def timestep(self, sigma):
        return sigma * self.multiplier

    def sigma(self, timestep):
        t = timestep / self.multiplier
        return self.shift * t / (1 + (self.shift - 1) * t)

    def denoised(self, network, x, sigma):
        return x - network(x, self.timestep(sigma) / self.multiplier) * sigma  # toys take flow's own time

    def noised(self, sigma, noise, x0, most=False):
        return sigma * noise + (1 - sigma) * x0


def schedule(name, sampling, n):
    """calculate_sigmas for ``simple``, ``normal``, ``sgm_uniform`` and ``ddim_uniform``."""
    levels = sampling.sigmas
    if name == "simple":
        return [levels[-(1 + int(i * (len(levels) / n)))] for i in range(n)] + [0.0]
    if name == "ddim_uniform":
        return [0.0, *levels[1 :: max(len(levels) // n, 1)]][::-1]
    start, end = sampling.timestep(levels[-1]), sampling.timestep(levels[0])
    if name == "sgm_uniform":
        return [sampling.sigma(t) for t in np.linspace(start, end, n + 1)[:-1]] + [0.0]
    assert name == "normal"
    if math.isclose(sampling.sigma(end), 0, abs_tol=1e-5):
        return [sampling.sigma(t) for t in np.linspace(start, end, n + 1)]
    return [sampling.sigma(t) for t in np.linspace(start, end, n)] + [0.0]


# ---------------------------------------------------------------- samplers


def sample_euler(sampling, network, x, sigmas, draw, eta):
    for a, b in pairwise(sigmas):
        x = x + (x - sampling.denoised(network, x, a)) / a * (b - a)
        yield x


sample_ddim = sample_euler  # ksampler("euler", inpaint_options={"random": True})


def sample_heun(sampling, network, x, sigmas, draw, eta):
    for a, b in pairwise(sigmas):
        slope = (x - sampling.denoised(network, x, a)) / a
        ahead = x + slope * (b - a)
        if b > 0:
            slope = (slope + (ahead - sampling.denoised(network, ahead, b)) / b) / 2
        x = x + slope * (b - a)
        yield x


def sample_dpmpp_2m(sampling, network, x, sigmas, draw, eta):
    before = None  # (sigma, x0) of the step before; t = -log(sigma), also of a flow model's sigma
    for a, b in pairwise(sigmas):
        x0 = slope = sampling.denoised(network, x, a)
        if before is not None and b > 0:
            r = math.log(before[0] / a) / math.log(a / b)
            slope = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before[1]
        x = b / a * x + (1 - b / a) * slope
        before = a, x0
        yield x


def sample_lcm(sampling, network, x, sigmas, draw, eta):
    for a, b in pairwise(sigmas):
        x = sampling.denoised(network, x, a)
        x = sampling.noised(b, draw(), x) if b > 0 else x
        yield x


def sample_euler_ancestral(sampling, network, x, sigmas, draw, eta):
    for a, b in pairwise(sigmas):
        x0 = sampling.denoised(network, x, a)
        if b == 0:
            x = x0
        elif isinstance(sampling, Flow):  # sample_euler_ancestral_RF
            down = b * (1 + (b / a - 1) * eta)
            x = down / a * x + (1 - down / a) * x0
            x = (1 - b) / (1 - down) * x + draw() * math.sqrt(b**2 - down**2 * (1 - b) ** 2 / (1 - down) ** 2)
        else:
            up = min(b, eta * math.sqrt(b**2 * (a**2 - b**2) / a**2))
            x = x + (x - x0) / a * (math.sqrt(b**2 - up**2) - a) + draw() * up
        yield x


def sample_tcd(sampling, network, x, sigmas, draw, eta, bar):
    """ComfyUI-TCD's: ``bar`` is the whole table of alphas_cumprod."""
    below = [math.floor((1 - eta) * sampling.timestep(s)) if s else 0 for s in sigmas]
    below[-1] = 0
    for i, a in enumerate(sigmas[:-1]):
        b, kept = sigmas[i + 1], bar[below[i + 1]]
        x0 = sampling.denoised(network, x, a)
        x = math.sqrt(kept) * x0 + math.sqrt(1 - kept) * (x - x0) / a
        if eta > 0 and b > 0:
            x = x / math.sqrt(kept) + draw() * math.sqrt(b**2 + 1 - 1 / kept)
        else:
            x = x * math.sqrt(b**2 + 1)
        yield x


SAMPLERS = {
    "euler": sample_euler, "ddim": sample_ddim, "lcm": sample_lcm, "euler_ancestral": sample_euler_ancestral,
    "heun": sample_heun, "dpmpp_2m": sample_dpmpp_2m,
}  # fmt: skip


# ---------------------------------------------------------------- a line of settings


@dataclass
class Settings:
    """A printed line, read word by word; what is not understood is an error."""

    steps: int = 0
    cfg: float = 0.0
    sampler: str = ""
    eta: float = 1.0
    scheduler: str = ""
    sigmas: list = field(default_factory=list)
    discrete: str = ""
    zsnr: bool = False
    flow: tuple = ()
    guidance: float | None = None
    remark: str = ""


def read(line):
    line, _, remark = line.partition(". ")
    made = Settings(remark=remark)
    forms = {
        r"(\d+) steps?": lambda n: setattr(made, "steps", int(n)),
        r"cfg (\S+)": lambda x: setattr(made, "cfg", float(x)),
        r"sampler (\w+)": lambda x: setattr(made, "sampler", x),
        r"eta (\S+)": lambda x: setattr(made, "eta", float(x)),
        r"scheduler (\w+)": lambda x: setattr(made, "scheduler", x),
        r"sigmas ([\d. e+-]+)": lambda x: setattr(made, "sigmas", [float(s) for s in x.split()]),
        r"ModelSamplingDiscrete (\w+)": lambda x: setattr(made, "discrete", x),
        r"ModelSamplingDiscrete (\w+) zsnr": lambda x: (setattr(made, "discrete", x), setattr(made, "zsnr", True)),
        r"ModelSampling(?:SD3|AuraFlow) shift (\S+)": lambda x: setattr(made, "flow", (float(x),)),
        r"ModelSamplingFlux max_shift (\S+) base_shift (\S+) width (\d+) height (\d+)":
            lambda *x: setattr(made, "flow", tuple(map(float, x))),
        r"FluxGuidance (\S+)": lambda x: setattr(made, "guidance", float(x)),
        r"TCDModelSamplingDiscrete of ComfyUI-TCD scheduler (\w+) eta (\S+)":
            lambda *x: made.__dict__.update(sampler="tcd", scheduler=x[0], eta=float(x[1])),
        r"ConditioningZeroOut for the negative prompt": lambda: None,
    }  # fmt: skip
    for word in line.split(", "):
        found = [(put, match) for form, put in forms.items() if (match := re.fullmatch(form, word))]
        assert len(found) == 1, word
        found[0][0](*found[0][1].groups())
    return made


def model_sampling(settings, family):
    """What the nodes of a line make of a family's model; ``family`` is sd, pixart, sd3 or flux."""
    if len(settings.flow) == 1:
        return Flow(settings.flow[0], 1000, 1000)
    if settings.flow:
        high, low, width, height = settings.flow
        slope = (high - low) / (4096 - 256)
        mu = (width * height / (8 * 8 * 2 * 2)) * slope + low - slope * 256
        return Flow(math.exp(mu), 10000, 1)
    if family in ("sd3", "flux"):
        return Flow(3.0, 1000, 1000) if family == "sd3" else Flow(math.exp(1.15), 10000, 1)
    sigmas = table(family)
    if settings.discrete == "lcm" or settings.sampler == "tcd":
        valid = np.zeros(50)
        for x in range(50):
            valid[49 - x] = sigmas[999 - x * 20]
        return Discrete(valid, settings.discrete or "eps", 20)
    return Discrete(rescaled(sigmas) if settings.zsnr else sigmas, settings.discrete or "eps")


def run(line, family, network, noise, noises):
    """All states of a run by a printed line, in ComfyUI's coordinates, and their sigmas."""
    settings = read(line)
    sampling = model_sampling(settings, family)
    sigmas = settings.sigmas or schedule(settings.scheduler, sampling, settings.steps)
    assert len(sigmas) == settings.steps + 1
    most = math.isclose(sigmas[0], sampling.sigmas[-1], rel_tol=1e-5) or sigmas[0] > sampling.sigmas[-1]
    x = sampling.noised(sigmas[0], noise, torch.zeros_like(noise), most)
    draws = iter(noises)
    if settings.sampler == "tcd":
        walk = sample_tcd(sampling, network, x, sigmas, draws.__next__, settings.eta, 1 / (table(family) ** 2 + 1))
    else:
        walk = SAMPLERS[settings.sampler](sampling, network, x, sigmas, draws.__next__, settings.eta)
    return [x, *walk], sigmas
