"""Distances between two predictions, in float32 at least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.diffusion.schedule import Array, expand, working
from fewstep.diffusion.well_posed import LARGEST

Distance: TypeAlias = Literal["l2", "huber", "sample-huber"]


def distance(a: Tensor, b: Tensor, kind: Distance = "l2", huber_c: float = 1e-3, weight: Array | None = None) -> Tensor:
    """Mean over a batch [B, ...] of each sample's distance times its ``weight`` (host [B]; all 1 by default).

    ============  =====================================================================================
    l2            mean over the elements of (a - b)^2
    huber         mean over the elements of sqrt((a - b)^2 + c^2) - c: the LCM scripts' (c = 1e-3: nearly L1)
    sample-huber  sqrt(|a - b|^2 + c^2) - c of the whole sample, c = huber_c sqrt(d): iCT's (huber_c = 0.00054)
    ============  =====================================================================================
    """
    difference = (working(a) - working(b)).reshape(len(a), -1)
    if kind == "l2":
        each = difference.square().mean(1)
    elif kind == "huber":
        each = ((difference.square() + huber_c**2).sqrt() - huber_c).mean(1)
    else:
        c = huber_c * math.sqrt(difference.shape[1])
        each = (difference.square().sum(1) + c**2).sqrt() - c
    return each.mean() if weight is None else (expand(weight, each) * each).mean()


def bounded_gain(gain: Array, kind: Distance) -> Array | None:
    """Weights [B] of rows whose prediction's errors weigh ``gain`` (host [B], `Prediction.gain`); None: all are 1.

    Rows above `LARGEST` get the gradient at the network's output that they would have there. On a table that ends far
    below the signal they would otherwise be all that a batch teaches; on Stable Diffusion's, say, there are none.
    """
    if (gain <= LARGEST).all():
        return None
    share = np.asarray(LARGEST / np.maximum(gain, LARGEST))
    return share**2 if kind == "l2" else share


def feature_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Mean over layers, samples and positions of |u(a) - u(b)|^2 of features [B, C, ...], u the unit vector over C.

    LPIPS (Zhang et al. 2018, eq. 1) with all of its learned weights 1, and the mean over layers for its sum.
    """
    apart = [F.normalize(working(x), dim=1) - F.normalize(working(y), dim=1) for x, y in zip(a, b, strict=True)]
    return torch.stack([difference.square().sum(dim=1).mean() for difference in apart]).mean()


def with_gradient(value: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """``value`` as a loss whose gradient at x [B, ...] is ``gradient``, and that reaches nothing else.

    It joins what is differentiated in two pieces: the value's gradient at x is known, x goes on with its graph.
    """
    return value.detach() + ((x - x.detach()) * gradient).sum()
