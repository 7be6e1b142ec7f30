"""Distances between two sets of images, given their features [N, D].

A distance is only as good as its features: `detail_features` are sensitive to blur, grain and colour, those of a
trained network to meaning. Every distance of finite sets has a floor above 0 (or, unbiased, a spread around it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

PATCH = 8
"""Side of the patches whose moments are compared, in pixels."""


# ---------------------------------------------------------------- Frechet distance


@dataclass
class Moments:
    """Mean [D] and covariance [D, D] of features, float64, and how many samples they come from."""

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """From features [N, D], N at least 2."""
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"Moments need features [N, D] of at least two samples, not {list(features.shape)}.")
        features = features.double()
        mean = features.mean(dim=0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1), len(features))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of two Gaussians: ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``.

    The trace of the root is that of ``(C_a^(1/2) C_b C_a^(1/2))^(1/2)``, which is symmetric and needs no complex
    arithmetic; eigenvalues that rounding made negative count as 0. Biased upwards for small N. Heusel et al. 2017.
    """
    return distance_to(a)(b)


def distance_to(reference: Moments) -> Callable[[Moments], float]:
    """`frechet_distance` to one reference, whose root is computed once: half the work for many others."""
    root = _root(reference.covariance)

    def distance(other: Moments) -> float:
        cross = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp_min(0).sqrt().sum()
        traces = reference.covariance.trace() + other.covariance.trace()
        return float((reference.mean - other.mean).square().sum() + traces - 2 * cross)

    return distance


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


@dataclass
class GroupedMoments:
    """Sums over groups of images: the moments of any resampling of the groups follow without the features.

    Attributes:
        counts: [G], samples in each group; sums: [G, D]; squares: [G, D, D], sums of outer products; all float64.
    """

    counts: Tensor
    sums: Tensor
    squares: Tensor

    @classmethod
    def of(cls, features: Tensor, groups: int) -> GroupedMoments:
        """From features [N, D], divided into ``groups`` groups of neighbours."""
        return cls.join(features.tensor_split(groups))

    @classmethod
    def join(cls, groups: Iterable[Tensor]) -> GroupedMoments:
        """From the features [n, D] of each group, which are taken one after the other."""
        found = [(float(len(group)), group.double().sum(dim=0), group.double().T @ group.double()) for group in groups]
        counts, sums, squares = zip(*found, strict=True)
        return cls(torch.tensor(counts, dtype=torch.float64), torch.stack(sums), torch.stack(squares))

    def moments(self, weights: Tensor | None = None) -> Moments:
        """With each group counted ``weights`` [G] times (once by default)."""
        weights = torch.ones_like(self.counts) if weights is None else weights
        count = float(weights @ self.counts)
        mean = weights @ self.sums / count
        squares = torch.einsum("g,gij->ij", weights, self.squares)
        covariance = (squares - count * mean[:, None] * mean) / (count - 1)
        return Moments(mean, covariance, round(count))


# ---------------------------------------------------------------- kernel distance


def kid(a: Tensor, b: Tensor, within_b: float | None = None) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel ``(x y / D + 1)^3`` (Binkowski et al. 2018).

    Around 0, and sometimes below it, for two sets of one distribution.

    Args:
        a, b: features [N, D] and [M, D]. within_b: `within` of ``b``, where it is known.
    """
    if a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"KID compares features [N, D] of equal D, not {list(a.shape)} and {list(b.shape)}.")
    within_b = within(b) if within_b is None else within_b
    return float(within(a) + within_b - 2 * kernel(a.double(), b.double()).mean())


def within(x: Tensor) -> float:
    """Mean of `kernel` over all pairs of different rows of x [N, D]."""
    k, n = kernel(x.double(), x.double()), len(x)
    return float((k.sum() - k.diagonal().sum()) / (n * (n - 1)))


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """``(x y / D + 1)^3`` of all pairs of rows [N, D] and [M, D]: [N, M]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


# ---------------------------------------------------------------- precision, recall, density, coverage


def overlap(generated: Tensor, real: Tensor, k: int = 5) -> dict[str, float]:
    """Overlap of two sets of features, [N, D] and [M, D], by balls around samples that reach to their k-th neighbour.

    Returns:
        precision: share of generated samples inside a ball of a real one (Kynkaanniemi et al. 2019).
        recall: share of real samples inside a ball of a generated one.
        density: how many real balls a generated sample lies in, over k; may exceed 1 (Naeem et al. 2020).
        coverage: share of real balls that hold a generated sample.

    Raises:
        ValueError: there are no more than k samples on a side.
    """
    if min(len(generated), len(real)) <= k:
        raise ValueError(f"Overlap with k = {k} needs more than {k} samples on both sides.")
    generated, real = generated.double(), real.double()
    distances = torch.cdist(real, generated)
    real_radius, generated_radius = neighbour(real, k), neighbour(generated, k)
    in_real = distances <= real_radius[:, None]
    in_generated = distances <= generated_radius[None, :]
    return {
        "precision": float(in_real.any(dim=0).double().mean()),
        "recall": float(in_generated.any(dim=1).double().mean()),
        "density": float(in_real.double().sum(dim=0).mean() / k),
        "coverage": float((distances.min(dim=1).values <= real_radius).double().mean()),
    }


def neighbour(x: Tensor, k: int) -> Tensor:
    """Distance of each sample to its k-th nearest other one."""
    return torch.cdist(x, x).kthvalue(k + 1, dim=1).values


# ---------------------------------------------------------------- diversity


def spread(features: Tensor, per_prompt: int) -> float:
    """Diversity within a prompt: the mean of `spreads` over all prompts."""
    return float(spreads(features, per_prompt).mean())


def spreads(features: Tensor, per_prompt: int) -> Tensor:
    """Mean distance of two images of each prompt, float64 [P].

    Args:
        features: [P * per_prompt, D], the images of a prompt side by side; ``per_prompt`` at least 2.
    """
    if per_prompt < 2 or len(features) % per_prompt:
        raise ValueError(f"{len(features)} images are not {per_prompt} (two or more) of each prompt.")
    by_prompt = features.double().unflatten(0, (-1, per_prompt))
    total: Tensor = torch.cdist(by_prompt, by_prompt).sum(dim=(1, 2))
    return total / (per_prompt * (per_prompt - 1))


# ---------------------------------------------------------------- intervals


def centred_interval(values: Tensor, plain: float, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap ``values`` [times], shifted so that its middle is the plain value.

    Resampled sets repeat samples and so have less spread; a distance that counts spread is higher on them.
    """
    tail = (1 - level) / 2
    shift = plain - float(values.median())
    return float(values.quantile(tail)) + shift, float(values.quantile(1 - tail)) + shift


# ---------------------------------------------------------------- detail


def detail_features(images: Tensor) -> Tensor:
    """All `PATCH` x `PATCH` patches of images [N, C, H, W] in [0, 1] at a stride of half a patch, float64 [M, D].

    Pixels are in units of 0.1. The patches' moments show blur, grain and colour shifts, which semantic features miss.
    """
    if images.ndim != 4 or min(images.shape[2:]) < PATCH:
        raise ValueError(f"Images must be [N, C, H, W] of at least {PATCH} pixels, not {list(images.shape)}.")
    patches = images.double().unfold(2, PATCH, PATCH // 2).unfold(3, PATCH, PATCH // 2)
    return patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, images.shape[1] * PATCH * PATCH) * 10
