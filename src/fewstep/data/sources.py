"""Sources of batches: pure functions of a step's random numbers, so position and order resume exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fewstep.diffusion.mixture import GaussianMixture
from fewstep.methods.base import Batch
from fewstep.methods.random import Rng, stream_key
from fewstep.models.cond import Cond


class Order:
    """Shuffled passes over ``size`` items: which items a step consumes, for any batch size and step.

    Orders of different ``name`` have nothing to do with each other.
    """

    def __init__(self, size: int, name: str = "order") -> None:
        if size < 1:
            raise ValueError("The data set is empty.")
        self.size, self.name = size, name
        self._permutations: dict[tuple[int, int], npt.NDArray[np.int64]] = {}

    def rows(self, rng: Rng) -> npt.NDArray[np.int64]:
        """Item indices of the rows ``rng.rows`` of step ``rng.step``."""
        positions = rng.step * rng.batch_size + np.arange(rng.batch_size)[rng.rows]
        epochs, places = positions // self.size, positions % self.size
        return np.array([self._permutation(rng.seed, int(e))[p] for e, p in zip(epochs, places, strict=True)])

    def _permutation(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        key = (seed, epoch)
        if key not in self._permutations:
            if len(self._permutations) > 2:  # a step touches neighbouring epochs only
                self._permutations.clear()
            generator = np.random.Generator(np.random.Philox(stream_key(seed, self.name, epoch)))
            self._permutations[key] = generator.permutation(self.size)
        return self._permutations[key]


class LatentSource:
    """Encoded pictures with their conditions, sampled anew from each posterior at every visit.

    Args:
        mean, std: [N, ...] of the scaled latents' posterior.
        cond: of all N items.
    """

    def __init__(self, mean: Tensor, std: Tensor, cond: Cond | None) -> None:
        if cond is not None and len(cond) != len(mean):
            raise ValueError(f"{len(mean)} latents but {len(cond)} conditions.")
        self.mean, self.std, self.cond = mean, std, cond
        self.order = Order(len(mean))

    def batch(self, rng: Rng) -> Batch:
        rows = torch.from_numpy(self.order.rows(rng)).to(self.mean.device)
        mean, std = (t.index_select(0, rows).to(rng.device, rng.dtype) for t in (self.mean, self.std))
        noise = rng.sample.normal("posterior", self.mean.shape[1:])
        cond = None if self.cond is None else self.cond[rows].to(rng.device)
        return Batch(torch.addcmul(mean, std, noise), cond)


class MixtureSource:
    """Endless samples of a Gaussian mixture, with class labels if it has classes.

    Args:
        labels: classes to draw from, uniformly; None for unconditional data.
    """

    def __init__(self, mixture: GaussianMixture, labels: Sequence[int] | None = None) -> None:
        self.mixture, self.labels = mixture, labels

    def batch(self, rng: Rng) -> Batch:
        generator = torch.Generator().manual_seed(stream_key(rng.seed, rng.step, "mixture"))
        if self.labels is None:
            return Batch(self._place(self.mixture.sample(rng.batch_size, generator=generator), rng))
        picked = torch.randint(len(self.labels), (rng.batch_size,), generator=generator)
        label = torch.tensor(self.labels)[picked]
        x0 = self._place(self.mixture.sample(rng.batch_size, generator=generator, label=label), rng)
        cond = Cond({"label": label[rng.rows].to(rng.device)}, null={"label": torch.tensor([-1])})
        return Batch(x0, cond)

    @staticmethod
    def _place(x0: Tensor, rng: Rng) -> Tensor:
        return x0[rng.rows].to(rng.device, rng.dtype)
