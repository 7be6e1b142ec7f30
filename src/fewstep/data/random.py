"""Random numbers of a training step, keyed by (seed, step, name), and those of a sample by its row in the global batch.

Nothing is carried from step to step, so resuming needs no generator state; and a row has the same numbers in one or
many processes, and in any micro-batch.

Normals are drawn for the local rows alone, where they are used, by Philox (`fewstep.data.philox`): its cost depends on
the numbers drawn, not on the global batch, and on a device not on the rows. One torch generator a row was measured too
(``benchmarks/draws.py``): on the CPU three times faster for two large rows, seven times slower for 512 small ones; on a
device three launches a row; and numbers that only devices of one kind share. Whole numbers and uniforms are drawn on
the host for the global batch and sliced: 0.03 ms for 4,096 rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fewstep.data.philox import unit_normals


def stream_key(*parts: object) -> int:
    """A stable 63-bit number for any key."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class SharedRandom:
    """Host numbers that decide control flow: the same on every rank and in every micro-batch."""

    def __init__(self, seed: int, step: int) -> None:
        self._key = (seed, step, "shared")

    def integer(self, name: str, low: int, high: int) -> int:
        """A whole number in low ... high - 1."""
        return int(self._generator(name).integers(low, high))

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        return float(self._generator(name).uniform(low, high))

    def choice(self, name: str, weights: Sequence[float]) -> int:
        """An index drawn in proportion to ``weights``."""
        p = np.asarray(weights, dtype=np.float64)
        return int(self._generator(name).choice(len(p), p=p / p.sum()))

    def _generator(self, name: str) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(stream_key(*self._key, name)))


class SampleRandom:
    """Per-sample numbers of the rows of one micro-batch.

    Normals are made on ``device`` in ``dtype``; whole numbers and uniforms stay on the host, because they become times
    and scales, whose coefficients are formed there.
    """

    def __init__(
        self, seed: int, step: int, batch_size: int, rows: slice, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._key = (seed, step, "sample")
        self.batch_size, self.rows, self.device, self.dtype = batch_size, rows, device, dtype

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Unit normal [rows, *shape]: those of a row, for its number in the global batch."""
        rows = range(self.batch_size)[self.rows]
        if self.device.type == "meta":
            return torch.empty(len(rows), *shape, device=self.device, dtype=self.dtype)
        key = stream_key(*self._key, name)
        return unit_normals(key, rows, math.prod(shape), self.device, self.dtype).view(len(rows), *shape)

    def integers(self, name: str, low: int, high: int) -> Tensor:
        """Whole numbers in low ... high - 1, int64 [rows] on the host."""
        return torch.from_numpy(self._generator(name).integers(low, high, self.batch_size)[self.rows].copy())

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Numbers in [low, high), float64 [rows] on the host."""
        return torch.from_numpy(self._generator(name).uniform(low, high, self.batch_size)[self.rows].copy())

    def _generator(self, name: str) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(stream_key(*self._key, name)))


class Rng:
    """The random numbers of one step, or of the rows of one of its micro-batches.

    Args:
        seed, step: the key.
        batch_size: of the whole global batch, over all ranks and micro-batches.
        rows: which of its rows this micro-batch holds (all by default).

    Attributes:
        version: of the numbers. Runs record it, because one that began with others cannot be resumed exactly. Those of
            version 1 drew the normals of the whole batch on the host.
    """

    version: ClassVar[int] = 2
    of_samples: ClassVar[type[SampleRandom]] = SampleRandom

    def __init__(
        self,
        seed: int,
        step: int,
        batch_size: int,
        rows: slice | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.seed, self.step, self.batch_size = seed, step, batch_size
        self.rows = slice(0, batch_size) if rows is None else rows
        self.device, self.dtype = torch.device(device), dtype
        self.shared = SharedRandom(seed, step)
        self.sample = self.of_samples(seed, step, batch_size, self.rows, self.device, dtype)

    def numbers(self, batch: int | None = None) -> npt.NDArray[np.int64]:
        """Numbers of these rows in global batch ``batch``, by default that of this step, counted over all batches."""
        batch = self.step if batch is None else batch
        return batch * self.batch_size + np.arange(self.batch_size)[self.rows]
