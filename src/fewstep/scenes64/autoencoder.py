"""Stage one of the training of scenes-64: the autoencoder, whose latents follow a linear code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.data.sources import Source
from fewstep.methods.base import Loss, Progress
from fewstep.models.roles import Roles
from fewstep.scenes64.architecture import LATENT_SHAPE
from fewstep.scenes64.linear_code import LinearCode
from fewstep.scenes64.scenes import Scenes
from fewstep.scenes64.stage import Stage

CROWDED = (0.1, 0.2, 0.3, 0.4)
"""Frequencies of 1, 2, 3 and 4 things in the autoencoder's images: things are harder to reproduce than backgrounds."""
_BATCH = 64


def as_tensor(images: np.ndarray) -> Tensor:
    """uint8 [n, h, w, 3] -> float32 [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32).contiguous() / 127.5 - 1


@dataclass(frozen=True)
class RenderedScenes:
    """Batches of scenes that are rendered for the step and never used again, [B, 3, H, W] in [-1, 1]."""

    scenes: Scenes

    def batch(self, rng: Rng) -> Batch:
        first = rng.step * rng.batch_size
        indices = range(first, first + rng.batch_size)[rng.rows]
        return Batch(as_tensor(self.scenes.render(indices).images).to(rng.device))


@dataclass
class Draws:
    """Random numbers of one step.

    Attributes:
        noise: [B, C, h, w] unit normal, of the latents that are decoded.
        width: [B] float64, standard deviation of that noise beside the posterior's own.
    """

    noise: Tensor
    width: Tensor


class Autoencoding(Stage):
    """Trains the encoder to give the linear code, and the decoder to reconstruct images from noisy codes.

    loss = |D(z + s e) - x| + edges * |edges of D(z + s e) - edges of x| + |m - z|^2 / 2 + kl * KL(posterior's width)

    with z the linear code of x, (m, v) the encoder's posterior and s^2 = v + width^2. The decoder never sees m: at the
    optimum m = z.

    Args:
        code: the wanted mean of the posterior.
    """

    name = "vae"
    edges = 0.5  # weight of the error of pixel differences, which keeps edges and patterns crisp
    kl = 5e-4  # weight of the divergence of the posterior's width from 1, per latent element
    noise = 0.4  # largest width: it makes the decoder robust to a generator's errors; half of the images get none

    def __init__(self, vae: Any, source: Source, code: LinearCode) -> None:
        super().__init__(vae, source)
        self.code = code

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Draws:
        width = rng.sample.uniform("width", -self.noise, self.noise).clamp_min(0)
        return Draws(rng.sample.normal("posterior", LATENT_SHAPE), width)

    def terms(self, vae: Any, images: Tensor, draws: Draws) -> dict[str, Tensor]:
        """The terms of the loss for images [B, 3, H, W] in [-1, 1], scalars with a graph."""
        latents = self.code.encode(images)
        posterior = vae.encode(images).latent_dist
        spread = (posterior.var + draws.width.to(latents)[:, None, None, None].square()).sqrt()
        decoded = vae.decode(latents + spread * draws.noise).sample
        return {
            "pixels": (decoded - images).abs().mean(),
            "edges": edge_error(decoded, images),
            "code": (posterior.mean - latents).square().mean(),
            "kl": 0.5 * (posterior.var - 1 - posterior.logvar).mean(),
        }

    def student(self, roles: Roles, batch: Batch, draws: Draws, shared: None) -> Loss:
        terms = self.terms(self.trained(roles), batch.x0, draws)
        total = terms["pixels"] + self.edges * terms["edges"] + 0.5 * terms["code"]
        return Loss(total + self.kl * terms["kl"], {name: term.detach() for name, term in terms.items()})


def edge_error(a: Tensor, b: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute error of horizontal, vertical and diagonal differences at full, half, quarter ... size."""
    total = a.new_zeros(())
    difference = a - b
    for scale in range(scales):
        if scale:
            difference = F.avg_pool2d(difference, 2)
        total = total + difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
        total = total + (difference[..., 1:, 1:] - difference[..., :-1, :-1]).abs().mean()
    return total / (3 * scales)


@torch.no_grad()
def latent_std(vae: Any, seed: int, size: int = 1024, device: str = "cpu") -> float:
    """Standard deviation of unscaled latents over ``size`` scenes; its inverse is the scaling factor."""
    scenes = Scenes(seed)
    count, total, squares = 0, 0.0, 0.0
    for first in range(0, size, _BATCH):
        images = as_tensor(scenes.render(range(first, min(first + _BATCH, size))).images).to(device)
        latents = vae.encode(images).latent_dist.mean.double()
        count += latents.numel()
        total += float(latents.sum())
        squares += float(latents.square().sum())
    return math.sqrt(squares / count - (total / count) ** 2)
