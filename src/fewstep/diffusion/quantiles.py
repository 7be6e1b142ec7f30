"""One-dimensional mixtures by their distribution function: the monotone map from one noise level to another.

In one dimension the probability-flow map is the quantile map F_s^-1(F_t(x)): no integrator, no step size. Its
precision depends on how F is written. With components in the order of their means and a pivot j,

    G_j(x) = F(x) - (w_0 + ... + w_{j-1}) = sum_{k >= j} w_k Phi(z_k) - sum_{k < j} w_k Phi(-z_k)

is free of cancellation in the gap between components j-1 and j (where F is flat and its digits are lost), in the
left tail (j = 0, G = F) and in the right one (j = K, G = -survival). Each x takes the pivot whose terms are smallest.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MAX_ITERATIONS = 200


class Line(NamedTuple):
    """A noised 1-D mixture, components in the order of their clean means; each [1 or B, K], float64."""

    log_weight: Tensor
    mean: Tensor
    std: Tensor

    def standard(self, x: Tensor) -> Tensor:
        """z_k = (x - mean_k) / std_k for x [B, 1]."""
        return (x - self.mean) / self.std


def noised(weights: Tensor, means: Tensor, variances: Tensor, alpha: Tensor, sigma: Tensor) -> Line:
    """A one-dimensional mixture at one noise level, its components in the order of their clean means.

    Args:
        weights: mixing weights, [K] or one row per state, [B, K].
        means, variances: of the clean components, [K].
        alpha, sigma: [1 or B, 1], float64 like all others.
    """
    order = means.argsort()
    variance = alpha**2 * variances[order] + sigma**2
    return Line(weights[..., order].log().reshape(-1, len(order)), alpha * means[order], variance.sqrt())


def transport(source: Line, target: Line, x: Tensor) -> Tensor:
    """The monotone map y [B, 1] of x [B, 1] with F_target(y) = F_source(x)."""
    z = source.standard(x)
    # Where x would go if it belonged to component k alone, y_k has the same z_k. Both mixtures share their weights, so
    # F_target(max_k y_k) >= sum_k w_k Phi(z_k) = F_source(x), and likewise for the minimum: these enclose y.
    each = target.mean + target.std * z
    pivot = _best_pivot(source, z)
    above, below = _sides(source, x, pivot)
    scale = torch.maximum(above, below)
    count = z.shape[1]
    # In the tails the target is a logarithm, log F or log(1 - F), which never underflows. Between components it is the
    # difference of two sums over their larger one, e^scale: both may be 1e-300 there, their ratio is not.
    goal = torch.where(pivot == 0, above, torch.where(pivot == count, below, 0.0))
    goal = torch.where((pivot == 0) | (pivot == count), goal, (above - scale).exp() - (below - scale).exp())
    return _solve(target, each.amin(1, True), each.amax(1, True), pivot, goal, scale)


def _best_pivot(line: Line, z: Tensor) -> Tensor:
    """The j [B, 1] in 0 ... K whose G_j has the smallest sum of its terms' sizes: rounding is relative to that sum."""
    right = line.log_weight + torch.special.log_ndtr(z)
    left = line.log_weight + torch.special.log_ndtr(-z)
    nothing = torch.full_like(z[:, :1], -math.inf)
    from_j = torch.cat([right.flip(1).logcumsumexp(1).flip(1), nothing], dim=1)
    until_j = torch.cat([nothing, left.logcumsumexp(1)], dim=1)
    return torch.logaddexp(from_j, until_j).argmin(dim=1, keepdim=True)


def _sides(line: Line, x: Tensor, pivot: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms [B, 1] of G's positive part (components from the pivot on) and of its negative part."""
    z = line.standard(x)
    before = torch.arange(z.shape[1], device=z.device) < pivot
    terms = line.log_weight + torch.special.log_ndtr(torch.where(before, -z, z))
    above = torch.logsumexp(terms.masked_fill(before, -math.inf), dim=1, keepdim=True)
    below = torch.logsumexp(terms.masked_fill(~before, -math.inf), dim=1, keepdim=True)
    return above, below


def _residual(line: Line, y: Tensor, pivot: Tensor, goal: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An increasing function of y that is 0 at the solution, its slope, and the size of its rounding errors.

    In the tails log F - goal and goal - log(1 - F); between components G - goal e^scale over its own largest
    term, which Newton's step does not see and which keeps gaps of any depth within floating point.
    """
    above, below = _sides(line, y, pivot)
    z = line.standard(y)
    log_density = torch.logsumexp(line.log_weight - line.std.log() - z.square() / 2, dim=1, keepdim=True)
    log_density = log_density - math.log(2 * math.pi) / 2
    first, last = pivot == 0, pivot == line.mean.shape[1]
    largest = torch.maximum(torch.maximum(above, below), scale)
    plus, minus, wanted = (above - largest).exp(), (below - largest).exp(), goal * (scale - largest).exp()
    value = torch.where(first, above - goal, torch.where(last, goal - below, plus - minus - wanted))
    slope = (log_density - torch.where(first, above, torch.where(last, below, largest))).exp()
    size = torch.where(first | last, goal.abs().clamp(min=1), plus + minus + wanted.abs())
    return value, slope, 2e-16 * size


def _solve(line: Line, low: Tensor, high: Tensor, pivot: Tensor, goal: Tensor, scale: Tensor) -> Tensor:
    """Newton's method inside a shrinking bracket, halving it where Newton leaves it or is slow."""
    y, last = (low + high) / 2, high - low
    done = torch.zeros_like(y, dtype=torch.bool)
    for _ in range(MAX_ITERATIONS):
        value, slope, rounding = _residual(line, y, pivot, goal, scale)
        low, high = torch.where(value <= 0, y, low), torch.where(value >= 0, y, high)
        newton = y - value / slope
        good = (newton >= low) & (newton <= high) & ((newton - y).abs() <= last / 2)
        following = torch.where(good, newton, (low + high) / 2)
        # within rounding the sign of the value means nothing: stop there, or halving would start over
        done = done | (value.abs() <= rounding)
        following = torch.where(done, y, following)
        last = (following - y).abs()
        done = done | (last <= 2e-16 * y.abs().clamp(min=1e-3))
        y = following
        if bool(done.all()):
            break
    return y
