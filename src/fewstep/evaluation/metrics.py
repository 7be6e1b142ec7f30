"""Distances between sets of pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PATCH = 8


@dataclass
class Moments:
    """Mean [D] and covariance [D, D] of features, float64, and how many pictures they come from."""

    mean: Tensor
    covariance: Tensor
    pictures: int

    @classmethod
    def of(cls, features: Tensor, pictures: int) -> Moments:
        """From features [N, D], N at least 2."""
        if len(features) < 2:
            raise ValueError("Moments need at least two samples.")
        features = features.double()
        mean = features.mean(dim=0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1), pictures)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of two Gaussians: ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``.

    The trace of the root is that of ``(C_a^(1/2) C_b C_a^(1/2))^(1/2)``, which is symmetric and needs no complex
    arithmetic; eigenvalues that rounding made negative count as 0. Heusel et al. 2017, eq. 6.
    """
    root = _root(a.covariance)
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + traces - 2 * cross)


def detail_moments(pictures: Tensor) -> Moments:
    """Moments of all `PATCH` x `PATCH` patches of pictures [N, 3, H, W] in [0, 1].

    They see blur, grain and colour shifts that features of meaning overlook. Every patch counts once, at a stride of
    half a patch; features are the patch's pixels in units of 0.1.
    """
    if pictures.ndim != 4 or min(pictures.shape[2:]) < PATCH:
        raise ValueError(f"Pictures must be [N, C, H, W] of at least {PATCH} pixels, not {list(pictures.shape)}.")
    patches = pictures.double().unfold(2, PATCH, PATCH // 2).unfold(3, PATCH, PATCH // 2)
    features = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, pictures.shape[1] * PATCH * PATCH)
    return Moments.of(features * 10, len(pictures))


def detail_fd(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the patches of two sets of pictures [N, 3, H, W] in [0, 1]."""
    return frechet_distance(detail_moments(a), detail_moments(b))


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root
