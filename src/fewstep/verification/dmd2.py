"""DMD2 trained on the bench: student and fake score start as the teacher, and every mode of the data must come out."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch

from fewstep.data.random import Rng, stream_key
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.dmd2 import DMD2
from fewstep.models.denoiser import Denoiser
from fewstep.models.roles import Roles
from fewstep.sampling import make_sampler, sample
from fewstep.training.trainer import Trainer
from fewstep.verification.bench import Bench, training_settings
from fewstep.verification.consistency import RING_WIDTH
from fewstep.verification.report import Row
from fewstep.verification.sizes import spread

FIT, STEPS, BATCH, SAMPLES = 800, 8_000, 2048, 10_000
# Scores are matched from table index 20 on, at a noise of 0.14: on the ring of radius 1 nine samples in ten carry no
# information about a mode's shape, on a ring four times as large half of them do.
RING = GaussianMixture.ring(8, 4.0, 0.4)
# One step begins where SDXL's published one-step student does, at 399 of 1,000: at 999 the fitted teacher's
# predictions lie in the middle of the ring, and separating two modes takes longer.
START = 0.4


def one_step_start(schedule: Schedule, given: Collection[str]) -> dict[str, Any]:
    """Settings of a one-step student on a table, unless steps or times are ``given``."""
    asked = "timesteps" in given or "num_inference_steps" in given
    return {} if asked or schedule.family != "vp" else {"timesteps": (START * schedule.num_train_timesteps - 1,)}


def train(bench: Bench, method: DMD2, steps: int, show_progress: bool = False) -> Trainer:
    """``steps`` of DMD2 from a network fitted to the teacher."""
    fitted = fit_teacher(bench)
    roles = Roles(bench.teacher, seed=bench.seed)
    for spec in method.roles():
        network: Any = copy.deepcopy(fitted.network)
        roles.add_network(spec.name, network, fitted.prediction_type)
    for heads in method.heads():
        roles.add_heads(heads.name, heads.build, heads.backbone).float()
    settings = training_settings(steps, batch_size=BATCH, critic_learning_rate=4e-3)
    return bench.train(method, settings, show_progress, roles)


def fit_teacher(bench: Bench) -> Denoiser:
    """A small network fitted to the exact teacher's predictions, in v (VP), flow or x0 (EDM)."""
    kind = {"vp": "v_prediction", "flow": "flow", "edm": "sample"}[bench.schedule.family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_key(bench.seed, "student"))
        network = bench.network()
    fitted = Denoiser(network, bench.schedule, kind)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, fused=True)
    generator = torch.Generator().manual_seed(stream_key(bench.seed, "fit"))
    start, end = bench.schedule.start, bench.schedule.end
    for step in range(FIT):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / FIT)
        batch = bench.source.batch(Rng(bench.seed, step, BATCH))
        t = end + (start - end) * torch.rand(BATCH, generator=generator, dtype=torch.float64)
        t = t.floor() if bench.schedule.family == "vp" else t
        noise = torch.randn(batch.x0.shape, generator=generator)
        x = bench.schedule.add_noise(batch.x0, noise, t)
        with torch.no_grad():
            wanted = bench.teacher(x, t, batch.cond)
        predicted = fitted(x, t, batch.cond).output
        loss = (predicted - {"v_prediction": wanted.v, "flow": wanted.flow, "sample": wanted.x0}[kind]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return fitted


def trained_rows(bench: Bench, method: DMD2, roles: Roles) -> list[Row]:
    """Mass, mean and standard deviation of every mode of 10,000 samples, the worst of them, to the data's own.

    Guided samples follow no mixture: there are no rows then.
    """
    if bench.guidance_scale != 1.0:
        return []
    mixture = bench.mixture
    generator = torch.Generator().manual_seed(stream_key(bench.seed, "matched"))
    noise = torch.randn(SAMPLES, mixture.dim, generator=generator)
    _, cond = bench.starts
    cond = None if cond is None else cond[torch.arange(SAMPLES) % len(cond)]
    sampler = make_sampler(method.sampler, timesteps=method.rollout.timesteps)
    x = sample(roles.student, sampler, noise, cond, generator=generator).x0.double()
    which = mixture.assign(x, None if cond is None else cond["label"])
    mass, mean, std = [], [], []
    for k, weight in enumerate(mixture.weights.tolist()):
        mine = x[which == k]
        mass.append(abs(len(mine) / len(x) / weight - 1))
        mean.append(float((mine.mean(dim=0) - mixture.means[k]).norm()) if len(mine) else float("inf"))
        width = float(mixture.components.variances[k].expand(mixture.dim).mean().sqrt())
        std.append(abs(spread(mine) / width - 1) if len(mine) > 1 else float("inf"))
    steps = len(method.rollout.timesteps)
    name = f"{steps} step{'s' if steps > 1 else ''}, worst mode:"
    return [
        Row(f"{name} mass, relative", 0.0, max(mass), 0.2),
        Row(f"{name} mean", 0.0, max(mean), 0.05 * bench.width / RING_WIDTH),
        Row(f"{name} std, relative", 0.0, max(std), 0.15),
    ]
