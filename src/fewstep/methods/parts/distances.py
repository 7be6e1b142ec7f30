"""Distances between two predictions, in float32 at least."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor

from fewstep.diffusion.schedule import working

Distance: TypeAlias = Literal["l2", "huber"]
DISTANCES = ("l2", "huber")


def distance(a: Tensor, b: Tensor, kind: Distance = "l2", huber_c: float = 1e-3) -> Tensor:
    """Mean over all elements of (a - b)^2, or of the element-wise pseudo-Huber sqrt((a - b)^2 + c^2) - c.

    The element-wise form is that of the LCM scripts; with c = 1e-3 it is close to L1. (iCT's pseudo-Huber is
    another: per sample, over the whole norm.)
    """
    difference = working(a) - working(b)
    if kind == "l2":
        return difference.square().mean()
    return ((difference.square() + huber_c**2).sqrt() - huber_c).mean()


def check_distance(kind: str) -> None:
    """Raises ValueError for a distance this library does not know."""
    if kind not in DISTANCES:
        raise ValueError(f"Unknown loss '{kind}': use {', '.join(DISTANCES)}.")
