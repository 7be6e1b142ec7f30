"""How far an export's latents may be from fewstep's: as far as rounding explains, and no further."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion.prediction import Prediction, check_prediction_type, mix
from fewstep.diffusion.schedule import Schedule
from fewstep.sampling import Sampler

LIMITS = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}
"""Largest gap by the weights' dtype where the last step does not let an error grow: beyond it a file is wrong."""
_ROUNDING = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
_SUMS = 32  # float32 roundings of a network's output in other orders of its sums: 8 to 10 measured at one step
_WEIGHTS = 8  # roundings that half-precision weights leave in an output: 1 to 6 measured
NUDGE = 2.0**-12
"""A relative error of the first noise by which `carried` is measured: far above rounding, and still a small one."""
_NOISE = 4.5  # the largest of a few hundred thousand unit normals


@dataclass(frozen=True)
class Limit:
    """The largest gap of an export, as a part of the largest latent.

    Attributes:
        dtype: of the weights. growth: how much a relative error grows in the latents (`growth`, `carried`).
    """

    dtype: str
    growth: float = 1.0

    @property
    def most(self) -> float:
        """That of the dtype, or 32 roundings of float32 times the growth where that is more."""
        return max(LIMITS[self.dtype], _SUMS * _ROUNDING["fp32"] * self.growth)

    def check(self, gap: float, where: str) -> None:
        """Refuse an export of a larger gap.

        Args:
            where: who sampled from it, as "in diffusers".

        Raises:
            ValueError: one sentence; where rounded weights explain the gap, it says so.
        """
        if gap <= self.most:
            return
        rounded = self.dtype != "fp32" and gap <= _WEIGHTS * _ROUNDING[self.dtype] * self.growth
        why = f", for the rounding of {self.dtype} weights grows {self.growth:.0f} times: export --dtype fp32"
        raise ValueError(
            f"The export's samples {where} are not fewstep's: the gap is {gap:.1e}{why if rounded else ''}."
        )


def growth(sampler: Sampler, schedule: Schedule, prediction_type: str, latents: Tensor) -> float:
    """How much a relative error of the last prediction grows in the latents, at least 1.

    The output p x0 + q eps weighs w in x0 (`Prediction.gain`), and w |p| is at most 1; so an error of u of its largest
    value is u (1 + w |q| max|eps| / max|x0|) of the largest latent. w |q| is sigma/alpha for epsilon, alpha sigma for v
    on VP schedules, t for flow, 0 for sample. Errors of earlier calls are corrected by later ones.
    """
    kind, last = check_prediction_type(prediction_type), float(sampler.times(schedule)[-2])
    alpha, sigma = schedule.alpha_sigma(last)
    empty = torch.zeros(1)
    weight = float(Prediction(empty, empty, last, schedule, kind).gain()) * abs(float(mix(kind, alpha, sigma)[1]))
    return 1 + weight * _NOISE / max(float(latents.abs().max()), 1e-30)


def carried(latents: Tensor, nudged: Tensor) -> float:
    """How much a relative error of the first state grows in the latents, from those of a noise that is off by `NUDGE`.

    A student that decides early what it generates carries an error of its first state on. One of scenes-64, in four
    steps of float32, was 2.5e-5 from its samples in float64, where diffusers and fewstep agree to 1e-6.
    """
    return float((nudged - latents).abs().max()) / max(float(latents.abs().max()), 1e-30) / NUDGE
