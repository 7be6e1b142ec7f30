"""A Gaussian mixture as a network: the exact output of every prediction kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fewstep.diffusion.prediction import check_prediction_type
from fewstep.diffusion.schedule import Schedule, Time

if TYPE_CHECKING:
    from fewstep.diffusion.mixture import GaussianMixture


class MixtureNetwork:
    """A mixture's exact output as ``network(x, t, cond=None)``, for `Denoiser`.

    The class is read from ``cond["label"]``, int [B], where -1 means "no condition"; so a condition that can be
    guided is ``Cond({"label": labels}, null={"label": torch.tensor([-1])})``. Without cond (or without that
    name in it) the mixture is unconditional. Other inputs (``end``) are ignored: the posterior mean does not
    depend on where the jump ends.
    """

    def __init__(self, mixture: GaussianMixture, schedule: Schedule, prediction_type: str = "epsilon") -> None:
        self.mixture, self.schedule = mixture, schedule
        self.prediction_type = check_prediction_type(prediction_type)

    def __call__(self, x: Tensor, t: Time, cond: Any = None, **extras: Any) -> Tensor:
        """Output at x [B, ...] and native time ``t`` (number or [B]), shaped like x, at least float32."""
        label = cond["label"] if cond is not None and "label" in cond else None
        alpha, sigma = self.schedule.alpha_sigma(t)
        x0, epsilon = self.mixture.posterior(x.to(torch.float64), alpha, sigma, label)
        shape = (-1, *[1] * (x.ndim - 1))
        a, s = (torch.from_numpy(np.atleast_1d(c)).to(x.device).reshape(shape) for c in (alpha, sigma))
        output = {
            "epsilon": lambda: epsilon,
            "sample": lambda: x0,
            "v_prediction": lambda: a * epsilon - s * x0,
            "flow": lambda: epsilon - x0,
        }[self.prediction_type]()
        return output.to(torch.promote_types(x.dtype, torch.float32))
