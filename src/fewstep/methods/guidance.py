"""Classifier-free guidance of a teacher: one scale, or a range of scales."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fewstep.data.random import Rng


def off_is_one(scale: float) -> float:
    """A guidance scale as all code reads it, where 1 is off; people and cards of published files also write 0 for off.

    By the formula ``null + w (cond - null)`` a 0 would be the answer to no prompt, which nobody asks for in this way.
    """
    return scale or 1.0


@dataclass(frozen=True)
class Guidance:
    """A guidance scale w (1 = off, and 0 as a single number too): one number, or drawn per sample from [low, high].

    Published LCM ranges count from 0; add one to each end.
    """

    low: float
    high: float

    @classmethod
    def of(cls, value: float | tuple[float, float] | list[float]) -> Guidance:
        """From a number or a pair; raises ValueError for anything else."""
        pair = [value, value] if isinstance(value, int | float) else list(value)
        if len(pair) != 2 or pair[0] > pair[1]:
            raise ValueError(f"guidance_scale must be one number or [low, high], not {pair}.")
        if not all(0 <= scale < math.inf for scale in pair):
            raise ValueError(f"guidance_scale must be at least 0 and finite (1 is off), not {value}.")
        low, high = map(float, pair)
        return cls(off_is_one(low), off_is_one(high)) if low == high else cls(low, high)

    @property
    def fixed(self) -> bool:
        return self.low == self.high

    @property
    def mean(self) -> float:
        return (self.low + self.high) / 2

    def draw(self, rng: Rng) -> Tensor:
        """[rows] host float64."""
        return rng.sample.uniform("guidance_scale", self.low, self.high)

    def scale(self, drawn: Tensor) -> float | Tensor:
        """The guidance scale of the teacher's calls: the fixed number, or the scales drawn for each sample."""
        return self.low if self.fixed else drawn


OFF = Guidance(1.0, 1.0)
