"""How large errors are: the numbers that rows of a report are made of."""

from __future__ import annotations

from torch import Tensor


def rms(x: Tensor) -> float:
    """Root mean square length of the samples [B, ...]."""
    return float(x.reshape(len(x), -1).square().sum(dim=1).mean().sqrt())


def lengths(x: Tensor) -> Tensor:
    """The Euclidean length of every sample [B, ...]: [B]."""
    return x.reshape(len(x), -1).norm(dim=1)


def spread(x: Tensor) -> float:
    """Standard deviation of samples [B, ...] about their mean, root mean square over all places."""
    return float((x - x.mean(dim=0)).square().mean().sqrt())


def standard_errors(x: Tensor) -> float:
    """By how many standard errors the mean of these numbers is off 0."""
    return float(x.mean() / (x.std() / x.numel() ** 0.5))
