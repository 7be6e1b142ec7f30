"""The random numbers that scenes-64 was trained with: version 1, normals drawn on the host for the global batch.

They are kept, so that training it again ends in the same weights. All other training draws those of
`fewstep.data.random.Rng`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.data.random import Rng, SampleRandom, stream_key


class _SampleRandom(SampleRandom):
    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        generator = torch.Generator().manual_seed(stream_key(*self._key, name))
        drawn = torch.randn(self.batch_size, *shape, generator=generator, dtype=self.dtype)[self.rows]
        return drawn.to(self.device, non_blocking=True)


class ScenesRng(Rng):
    """Arguments as of `Rng`."""

    version: ClassVar[int] = 1
    of_samples: ClassVar[type[SampleRandom]] = _SampleRandom
