"""Random numbers of a training step, each stream keyed by (seed, step, name).

Nothing is carried from step to step, so resuming needs no generator state, and because per-sample numbers are
drawn for the whole global batch and sliced afterwards, one or many processes and any accumulation see the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


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

    Normals come as tensors in ``dtype`` on ``device``; whole numbers and uniforms stay on the host, because they
    become times and scales, whose coefficients are formed there.
    """

    def __init__(
        self, seed: int, step: int, batch_size: int, rows: slice, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._key = (seed, step, "sample")
        self.batch_size, self.rows, self.device, self.dtype = batch_size, rows, device, dtype

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Unit normal [rows, *shape]."""
        generator = torch.Generator().manual_seed(stream_key(*self._key, name))
        drawn = torch.randn(self.batch_size, *shape, generator=generator, dtype=self.dtype)[self.rows]
        return drawn.to(self.device, non_blocking=True)

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
    """

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
        self.sample = SampleRandom(seed, step, batch_size, self.rows, self.device, dtype)
