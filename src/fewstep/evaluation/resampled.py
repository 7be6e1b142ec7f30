"""Distances as functions of how often each group of images counts: what a bootstrap over groups resamples.

Images are divided into G groups of neighbours. Whatever is costly is computed once for all groups, at the first
resampling; each, given as weights [G], then only sums it up. Weights of None count every group once and give the plain
figure, which needs none of that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fewstep.evaluation.metrics import GroupedMoments, Moments, distance_to, kernel, kid, neighbour, overlap, within

Curve = Callable[[Tensor | None], float]
"""Weights [G] of the groups, or None -> the figure."""

SMALL = 512
"""Up to so many features, moments are cheap whatever the number of images."""
NEIGHBOURS = 5
"""Balls of `overlap` reach to this neighbour."""


def row_weights(weights: Tensor | None, counts: Tensor) -> Tensor:
    """The weight [N] of each image from those of the groups [G], whose sizes are ``counts`` [G]; float64."""
    weights = torch.ones(len(counts)) if weights is None else weights
    return weights.double().repeat_interleave(counts)


def mean_curve(values: Tensor, counts: Tensor) -> Curve:
    """The mean of a value [N] of each image."""
    return share_curve(values.double(), torch.ones(len(values), dtype=torch.float64), counts)


def root_mean_curve(squares: Tensor, counts: Tensor) -> Curve:
    """The root of the mean of a square [N] of each image."""
    mean = mean_curve(squares, counts)
    return lambda w: float(mean(w) ** 0.5)


def share_curve(right: Tensor, stated: Tensor, counts: Tensor) -> Curve:
    """The sum of ``right`` over that of ``stated``, both [N]."""
    parts = counts.tolist()
    rights, all_stated = (torch.stack([part.sum() for part in t.split(parts)]) for t in (right, stated))

    def share(weights: Tensor | None) -> float:
        if weights is None:
            return float(right.sum() / stated.sum())
        w = weights.double()
        return float((w @ rights) / (w @ all_stated))

    return share


def frechet_curve(features: Tensor, real: Tensor, counts: Tensor) -> Curve:
    """`frechet_distance` of features [N, D] to those of real images [M, D].

    The moments of groups are summed up; where there are fewer images than features, matrices [D, D] would be large and
    singular, and inner products of the images give the same number.
    """
    if features.shape[1] > max(len(features), SMALL):
        return _by_inner_products(features, real, counts)
    grouped, distance = GroupedMoments.join(features.split(counts.tolist())), distance_to(Moments.of(real))
    return lambda w: distance(grouped.moments(w))


def _by_inner_products(features: Tensor, real: Tensor, counts: Tensor) -> Curve:
    """With centred rows A [N, D] and B [M, D], tr (C_a C_b)^(1/2) is the sum of singular values of A B^T over the root
    of (n - 1)(m - 1); a row that counts w times is the row times the root of w.
    """
    a, b = features.double(), real.double()
    mean_b = b.mean(dim=0)
    b = (b - mean_b) / (len(b) - 1) ** 0.5
    products, trace_b = a @ b.T, float(b.square().sum())
    own = a.square().sum(dim=1)

    def distance(weights: Tensor | None) -> float:
        w = row_weights(weights, counts)
        n = w.sum()
        mean_a = w @ a / n
        centred = (products - mean_a @ b.T) * (w / (n - 1)).sqrt()[:, None]
        trace_a = (w @ own - n * mean_a.square().sum()) / (n - 1)
        cross = torch.linalg.svdvals(centred).sum()
        return float((mean_a - mean_b).square().sum() + trace_a + trace_b - 2 * cross)

    return distance


def kid_curve(features: Tensor, real: Tensor, counts: Tensor, within_real: float | None = None) -> Curve:
    """`kid` of features [N, D] to those of real images [M, D], of which `within` may be known.

    Resampled, it takes pairs of images of different groups alone: an image that counts twice is no pair with itself.
    """
    a, b, sizes, m = features.double(), real.double(), counts.double(), len(real)
    within_real = within(real) if within_real is None else within_real

    @cache
    def sums() -> tuple[Tensor, Tensor]:
        """Of the kernel: over pairs of each two groups [G, G], and of each group with the real images [G]."""
        groups = torch.arange(len(counts)).repeat_interleave(counts)
        blocks = torch.zeros(len(counts), len(b), dtype=torch.float64)
        across = blocks.index_add(0, groups, kernel(a, b)).sum(dim=1)
        by_group = torch.zeros(len(counts), len(a), dtype=torch.float64).index_add(0, groups, kernel(a, a))
        pairs = torch.zeros(len(counts), len(counts), dtype=torch.float64).index_add(0, groups, by_group.T)
        pairs.fill_diagonal_(0)
        return pairs, across

    def distance(weights: Tensor | None) -> float:
        if weights is None:
            return kid(features, real, within_real)
        pairs, across = sums()
        w, n = weights.double(), weights.double() @ sizes
        different = n**2 - (w * sizes).square().sum()
        if different == 0:  # one group drawn again and again
            return float("nan")
        return float(w @ pairs @ w / different + within_real - 2 * (w @ across) / (n * m))

    return distance


def overlap_curves(features: Tensor, real: Tensor, counts: Tensor, k: int = NEIGHBOURS) -> dict[str, Curve]:
    """`overlap` of features [N, D] with those of real images [M, D]: precision, recall, density and coverage.

    The balls stay those of all images; a resampling changes which images are there to lie in them.
    """

    @cache
    def plain() -> dict[str, float]:
        return overlap(features, real, k)

    @cache
    def resampled() -> dict[str, Callable[[Tensor], float]]:
        a, b = features.double(), real.double()
        distances = torch.cdist(b, a)
        around_real, around_generated = neighbour(b, k), neighbour(a, k)
        inside = (distances <= around_real[:, None]).double()
        reached = (distances <= around_generated[None, :]).double()
        parts = counts.tolist()
        nearest = torch.stack([part.min(dim=1).values for part in distances.split(parts, dim=1)])
        recalled = torch.stack([part.amax(dim=1) for part in reached.split(parts, dim=1)])

        def share(found: Callable[[Tensor], Tensor]) -> Callable[[Tensor], float]:
            return lambda w: float(found(w > 0).double().mean())

        return {
            "precision": mean_curve(inside.amax(dim=0), counts),
            "recall": share(lambda there: recalled[there].amax(dim=0)),
            "density": mean_curve(inside.sum(dim=0) / k, counts),
            "coverage": share(lambda there: nearest[there].amin(dim=0) <= around_real),
        }

    def curve(name: str) -> Curve:
        return lambda w: plain()[name] if w is None else resampled()[name](w)

    return {name: curve(name) for name in ("precision", "recall", "density", "coverage")}
