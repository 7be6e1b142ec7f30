"""Hyper-SD on one Gaussian: the slope of k steps is the product of all DDIM steps of the grid."""

from __future__ import annotations

import math

import torch

from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.hyper import Hyper
from fewstep.models.denoiser import Denoiser
from fewstep.sampling import PhasedSampler, sample
from fewstep.verification.fixed_points import CTMFixedPoint
from fewstep.verification.report import Row

MEAN, VARIANCE = 1.0, 0.6


def gaussian_row(stage: Hyper) -> Row:
    """For N(m, S) on Stable Diffusion's table: the slope of k steps is the product of N DDIM steps', written out."""
    schedule, hops = Schedule.scaled_linear(), stage.settings.num_grid_steps
    mixture = GaussianMixture([1.0], [MEAN], [math.sqrt(VARIANCE)])
    teacher = Denoiser(mixture.network(schedule, "sample"), schedule, "sample")
    student = CTMFixedPoint(teacher, schedule.training_grid(hops), 1.0, "ddim").denoiser()
    k = stage.settings.segments
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    sampler = PhasedSampler(num_inference_steps=k, original_inference_steps=hops)
    low, high = sample(student, sampler, ends).x0[:, 0].tolist()
    name = f"k = {k}, a Gaussian: slope of its steps to the product of all solver steps'"
    return Row(name, _product(hops), high - low, 1e-12)


def _product(hops: int) -> float:
    """Slope of DDIM down the grid for N(m, S), in plain arithmetic on Stable Diffusion's betas."""
    bars, bar = [], 1.0
    for i in range(1000):
        root = math.sqrt(0.00085) + i / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))
        bar *= 1 - root * root
        bars.append(bar)
    slope = 1.0
    for n in range(hops, 0, -1):
        t, u = round(1000 * n / hops) - 1, max(round(1000 * (n - 1) / hops) - 1, 0)
        alpha, sigma = math.sqrt(bars[t]), math.sqrt(1 - bars[t])
        gain = alpha * VARIANCE / (bars[t] * VARIANCE + 1 - bars[t])
        slope *= math.sqrt(bars[u]) * gain + math.sqrt(1 - bars[u]) / sigma * (1 - alpha * gain)
    return slope
