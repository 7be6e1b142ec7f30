"""A network's prediction at (x_t, t), and the only place where prediction types are converted.

Every prediction type is a mix of the two unknowns, ``output = p x0 + q eps``, beside ``x_t = alpha x0 + sigma eps``:

=============  =======  ======
type           p        q
=============  =======  ======
epsilon        0        1
sample         1        0
v_prediction   -sigma   alpha
flow           -1       1
=============  =======  ======

So any target ``A x0 + S eps`` — x0 itself, eps, v, flow, or the state at another time — is one 2x2 solve with
determinant ``D = alpha q - sigma p``:  ``[(A q - S p) x_t + (S alpha - A sigma) output] / D``.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fewstep.diffusion.schedule import Array, Schedule, Time, expand, host, working

PredictionType: TypeAlias = Literal["epsilon", "v_prediction", "sample", "flow"]
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")


def check_prediction_type(kind: str) -> PredictionType:
    """``kind``, with diffusers' ``flow_prediction`` as ``flow``.

    Raises:
        ValueError: an unknown prediction type.
    """
    kind = "flow" if kind == "flow_prediction" else kind
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"Unknown prediction_type '{kind}': use {', '.join(PREDICTION_TYPES)}.")
    return kind  # type: ignore[return-value]


def mix(kind: PredictionType, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """(p, q) of ``output = p x0 + q eps``, the table above, in the shape of alpha and sigma."""
    one, zero = np.ones_like(alpha), np.zeros_like(alpha)
    return {"epsilon": (zero, one), "sample": (one, zero), "v_prediction": (-sigma, alpha), "flow": (-one, one)}[kind]


class Prediction:
    """A network's output at (x_t, t), convertible to every prediction type.

    Args:
        x: the state x_t, [B, ...].
        output: the network's output, same shape; promoted to max(dtype, float32) before any conversion.
        t: native time, a number or [B].
        schedule: the forward process.
        prediction_type: of ``output``.
    """

    def __init__(self, x: Tensor, output: Tensor, t: Time, schedule: Schedule, prediction_type: PredictionType):
        dtype = torch.promote_types(working(x).dtype, output.dtype)
        self.x, self.output = x.to(dtype), output.to(dtype)
        self.t, self.schedule = host(t), schedule
        self.prediction_type = prediction_type
        self._alpha, self._sigma = schedule.alpha_sigma(self.t)
        self._p, self._q = mix(prediction_type, self._alpha, self._sigma)
        self._determinant = self._alpha * self._q - self._sigma * self._p

    @property
    def x0(self) -> Tensor:
        """Clean data, the posterior mean for an exact network. Raises ValueError for epsilon where alpha = 0."""
        return self.combine(1.0, 0.0)

    @property
    def epsilon(self) -> Tensor:
        """The noise. Raises ValueError where sigma = 0: clean data holds none."""
        if (self._sigma == 0).any():
            raise ValueError("Epsilon is undefined where sigma is 0: clean data holds no noise to predict.")
        return self.combine(0.0, 1.0)

    @property
    def v(self) -> Tensor:
        """v = alpha eps - sigma x0 (Salimans and Ho 2022)."""
        return self.combine(-self._sigma, self._alpha)

    @property
    def flow(self) -> Tensor:
        """flow = eps - x0, the velocity of rectified flow."""
        return self.combine(-1.0, 1.0)

    @property
    def slope(self) -> Tensor:
        """The slope of solver steps on this schedule (`Schedule.slope_mix`): flow or epsilon."""
        return self.combine(*self.schedule.slope_mix)

    def at(self, s: Time) -> Tensor:
        """The jump alpha(s) x0 + sigma(s) eps to native time ``s`` (number or [B]): DDIM's step.

        Rows whose ``s`` equals their own ``t`` are x_t bit for bit.
        """
        target = host(s)
        still = target == self.t
        if still.all():
            return self.x
        alpha, sigma = self.schedule.alpha_sigma(target)
        jump = self.combine(alpha, sigma, unused=still)
        if not still.any():
            return jump
        mask = torch.from_numpy(np.atleast_1d(still)).reshape(-1, *[1] * (self.x.ndim - 1))
        return torch.where(mask.to(self.x.device, non_blocking=True), self.x, jump)

    def gain(self, a: Array | float = 1.0, s: Array | float = 0.0) -> Array:
        """How much an error of the output weighs in ``a x0 + s eps``, at least 0, numbers or [B]; 0 where singular."""
        determinant, of_output = self._determinant, s * self._alpha - a * self._sigma
        return np.abs(np.divide(of_output, determinant, out=np.zeros_like(of_output), where=determinant != 0))

    def combine(self, a: Array | float, s: Array | float, unused: Array | None = None) -> Tensor:
        """``a x0 + s eps`` from (x_t, output); ``a``, ``s`` are host coefficients, numbers or [B].

        Rows marked ``unused`` may be singular (the caller discards their values).

        Raises:
            ValueError: a singular row: epsilon where alpha = 0, sample where sigma = 0.
        """
        if np.all(a == self._p) and np.all(s == self._q):
            return self.output  # the network's own output: exact, and defined even at a singular time
        determinant = self._determinant
        if unused is not None:
            determinant = np.where(unused & (determinant == 0), 1.0, determinant)
        if (determinant == 0).any():
            where = "alpha is 0 (pure noise)" if self.prediction_type == "epsilon" else "sigma is 0 (clean data)"
            raise ValueError(
                f"A network that predicts {self.prediction_type} cannot be converted where {where}: "
                "use a v_prediction or flow network there."
            )
        of_x = np.asarray((a * self._q - s * self._p) / determinant)
        of_output = np.asarray((s * self._alpha - a * self._sigma) / determinant)
        if not of_x.any():
            return expand(of_output, self.x) * self.output
        return torch.addcmul(expand(of_x, self.x) * self.x, expand(of_output, self.x), self.output)
