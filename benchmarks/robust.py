"""Methods at their defaults on a teacher that nobody tuned for: sparse images, a network, a table far below the signal.

    python benchmarks/robust.py [--methods dmd2,tcd] [--rates 1e-5,5e-5,2e-4] [--schedule ddpm] [--size 16]
        [--out benchmarks/results/robust.json] [--label after]

The data are a mixture in closed form: images of SIZE x SIZE pixels, dark but for three spots, each with noise of 0.1.
The teacher is a small network that learns them from samples, as an outside teacher does: its prediction of the noise is
off by 0.08 at the first time of DDPM's table, where an error weighs 157 in clean data. Students are trained without
guidance and without discriminators, at a constant rate, and sampled at the four steps that their method asks for.

Printed: the Fréchet distance of 2,048 pixel images to the mixture's own mean and covariance (FD), half the sum of
absolute differences of the modes' shares, and the median distance to the nearest mode over that of the data. The floor
is that of 2,048 samples of the mixture. ``--label`` names the column of the file, so that two commits can be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.data.files import replace_text
from fewstep.data.pairs import PairSource, WithPairs, noise_of
from fewstep.data.sources import MixtureSource
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule, expand
from fewstep.methods.registry import find_method
from fewstep.models.denoiser import Denoiser
from fewstep.models.extras import sinusoid
from fewstep.models.roles import Roles, Weights
from fewstep.sampling import DDIMSampler, make_sampler, sample
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import NotFinite, Trainer, build_roles

SCHEDULES = {
    "ddpm": (Schedule.from_betas(np.linspace(1e-4, 0.02, 1000)), "epsilon"),
    "cosine": (Schedule.cosine(), "epsilon"),
    "sd": (Schedule.scaled_linear(), "epsilon"),
    "zero": (Schedule.scaled_linear().zero_terminal_snr(), "v_prediction"),
    "flow": (Schedule.flow(), "flow"),
}
STEPS = {"dmd2": 1500, "dmd": 400}  # of dmd2 every fifth is the student's
MODES, STD, SAMPLES, PAIRS, BATCH = 24, 0.1, 2048, 512, 64


class Net(nn.Module):
    """A residual MLP of images [B, D] with a path for the noise itself, as a UNet's skip connections are one."""

    def __init__(self, dim: int, span: float, width: int = 160, depth: int = 2) -> None:
        super().__init__()
        self.span, self.extra_width = span, width
        self.time, self.inlet, self.outlet = nn.Linear(64, width), nn.Linear(dim, width), nn.Linear(width, dim)
        self.gain = nn.Linear(width, 1)
        parts = [(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(depth)]
        self.blocks = nn.ModuleList(nn.Sequential(*part) for part in parts)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, extra: Tensor | None = None) -> Tensor:
        emb = self.time(sinusoid(t.float() * self.span, 64).to(x.dtype))
        emb = emb if extra is None else emb + extra
        h = self.inlet(x) + emb
        for block in self.blocks:
            h = h + block(h)
        return self.outlet(h) + self.gain(emb) * x


def sparse_images(size: int, seed: int = 0) -> GaussianMixture:
    """MODES dark images of [size * size] pixels in [-1, 1] with three bright spots each, and noise."""
    generator = torch.Generator().manual_seed(seed)
    place, images = torch.arange(size, dtype=torch.float64), []
    for _ in range(MODES):
        image = torch.zeros(size, size, dtype=torch.float64)
        for _ in range(3):
            y, x = (torch.rand(2, generator=generator, dtype=torch.float64) * (size - 6) + 3).tolist()
            radius = 1 + float(torch.rand(1, generator=generator, dtype=torch.float64))
            image += torch.exp(-((place[:, None] - y) ** 2 + (place - x) ** 2) / (2 * radius**2))
        images.append((2 * image.clamp(max=1) - 1).flatten())
    return GaussianMixture(np.full(MODES, 1 / MODES), torch.stack(images), np.full(MODES, STD))


def learn(mixture: GaussianMixture, schedule: Schedule, kind: str, steps: int = 4000) -> Net:
    """A teacher by ordinary training on samples."""
    torch.manual_seed(0)
    net = Net(mixture.dim, 1.0 if schedule.family == "vp" else 1000.0)
    optimizer = torch.optim.AdamW(net.parameters())
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        x0 = mixture.sample(128, generator).float()
        noise, t = torch.randn(x0.shape, generator=generator), torch.rand(128, generator=generator, dtype=torch.float64)
        t = (t * schedule.num_train_timesteps).floor() if schedule.family == "vp" else t
        alpha, sigma = (expand(c, x0) for c in schedule.alpha_sigma(t))
        wanted = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "flow": noise - x0}[kind]
        loss = (Denoiser(net, schedule, kind)(alpha * x0 + sigma * noise, t).output - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


class Judge:
    """The three figures of samples [N, D] of a mixture."""

    def __init__(self, mixture: GaussianMixture) -> None:
        self.mixture, self.mean = mixture, mixture.weights @ mixture.means
        centred = mixture.means - self.mean
        self.cov = (centred.T * mixture.weights) @ centred + STD**2 * torch.eye(mixture.dim, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(self.cov)
        self.root = vectors * values.clamp_min(0).sqrt() @ vectors.T

    def __call__(self, x: Tensor) -> list[float]:
        x = x.double()
        if not x.isfinite().all():
            return [math.inf] * 3
        cov = torch.cov(x.T)
        common = torch.linalg.eigvalsh(self.root @ cov @ self.root).clamp_min(0).sqrt().sum()
        fd = (x.mean(0) - self.mean).square().sum() + torch.trace(cov) + torch.trace(self.cov) - 2 * common
        away, mode = torch.cdist(x, self.mixture.means).min(1)
        shares = torch.bincount(mode, minlength=MODES) / len(x)
        lost = 0.5 * (shares - self.mixture.weights).abs().sum()
        return [float(fd), float(lost), float(away.median() / (STD * self.mixture.dim**0.5))]


def settings_of(cls: Any) -> dict[str, Any]:
    """No guidance and no discriminator, which are the teacher's and the data's matter; all else at its default."""
    wanted = {"guidance_scale": 1.0, "adversarial_weight": 0.0}
    return {name: value for name, value in wanted.items() if name in cls.setting_names()}


class Bench:
    """The teacher and its data; trains students of it and judges them."""

    def __init__(self, schedule: Schedule, kind: str, size: int) -> None:
        self.mixture, self.schedule, self.kind = sparse_images(size), schedule, kind
        self.net, self.judge = learn(self.mixture, schedule, kind), Judge(self.mixture)
        self.noise = torch.randn(SAMPLES, size**2, generator=torch.Generator().manual_seed(7))
        self.data = MixtureSource(self.mixture, None)
        self.floor = self.judge(self.mixture.sample(SAMPLES, torch.Generator().manual_seed(5)))

    @property
    def teacher(self) -> Denoiser:
        return Denoiser(self.net, self.schedule, self.kind)

    def of_teacher(self, steps: int) -> list[float]:
        return self.judge(sample(self.teacher, DDIMSampler(num_inference_steps=steps), self.noise).x0)

    def source(self, method: Any) -> Any:
        """Data, with pairs of the teacher's 50 steps where the method learns from these."""
        if "pairs" not in method.streams:
            return self.data
        noise = torch.stack([noise_of(0, i, (self.mixture.dim,)) for i in range(PAIRS)])
        x0 = sample(self.teacher, DDIMSampler(num_inference_steps=50), noise).x0
        return WithPairs(self.data, PairSource(x0, None, 0))

    def train(self, name: str, rate: float) -> list[float]:
        cls = find_method(name)
        method = cls(self.schedule, **settings_of(cls))
        settings = TrainingSettings(
            steps=STEPS.get(name, 600), batch_size=BATCH, learning_rate=rate, warmup_steps=20, log_every=100
        )
        roles = build_roles(self.teacher, method, settings, Weights("full"))
        try:
            Trainer(method, roles, self.source(method), settings).run()
        except NotFinite:
            return [math.inf] * 3
        return self.judge(self.samples(method, roles))

    def samples(self, method: Any, roles: Roles) -> Tensor:
        """2,048 images at the number of steps, times and eta that the method's students are sampled with."""
        wanted = method.sampling(method.settings)
        options: dict[str, Any] = {"eta": wanted.eta} if wanted.eta else {}
        options |= {"timesteps": wanted.timesteps} if wanted.timesteps else {
            "num_inference_steps": wanted.num_inference_steps if wanted.no_other_steps else 4
        }  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        return sample(roles.student, make_sampler(method.sampler, **options), self.noise, generator=generator).x0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="dmd2,dmd,tcd,lcm,ctm,pcm,hyper")
    parser.add_argument("--rates", default="1e-5,5e-5,2e-4")
    parser.add_argument("--schedule", default="ddpm", choices=SCHEDULES)
    parser.add_argument("--size", type=int, default=16, help="pixels on a side (32: 1,024 dimensions)")
    parser.add_argument("--label", default="after", help="what the figures are called in the file")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "robust.json")
    given = parser.parse_args()
    warnings.simplefilter("once")
    torch.set_num_threads(1)
    bench = Bench(*SCHEDULES[given.schedule], given.size)
    key = f"{given.schedule}, {given.size} x {given.size}"
    found = {"floor": bench.floor, "teacher, 4 steps": bench.of_teacher(4), "teacher, 50 steps": bench.of_teacher(50)}
    for row, figures in found.items():
        print(f"{key:16} {row:24} FD {figures[0]:8.2f}  shares {figures[1]:.2f}  away {figures[2]:.2f}", flush=True)
    for name in given.methods.split(","):
        for rate in map(float, given.rates.split(",")):
            row = f"{name}, {rate:g}, {given.label}"
            found[row] = figures = bench.train(name, rate)
            print(f"{key:16} {row:24} FD {figures[0]:8.2f}  shares {figures[1]:.2f}  away {figures[2]:.2f}", flush=True)
            keep(given.out, key, found)


def keep(path: Path, key: str, found: dict[str, list[float]]) -> None:
    """Add the rows to the file."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rounded = {row: [float(f"{value:.3g}") for value in figures] for row, figures in found.items()}
    known[key] = known.get(key, {}) | rounded
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
