"""Sources of batches: pure functions of the step's random numbers, so that position and order resume exactly."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.data.random import Rng, stream_key
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.models.cond import Cond


class Order:
    """Shuffled epochs over ``size`` items: which items a step consumes, for any batch size and step.

    Every epoch is a permutation keyed by (seed, name, epoch), and batches run across the ends of epochs: the items of a
    step follow from its number alone, and nothing is carried along. Orders of different ``name`` are independent.

    Raises:
        ValueError: no items.
    """

    def __init__(self, size: int, name: str = "order") -> None:
        if size < 1:
            raise ValueError("The data set is empty.")
        self.size, self.name = size, name
        self._permutations: dict[tuple[int, int], npt.NDArray[np.int64]] = {}

    def rows(self, rng: Rng, number: int | None = None) -> npt.NDArray[np.int64]:
        """Item indices, int64, of the rows ``rng.rows`` of batch ``number`` (by default that of ``rng.step``)."""
        number = rng.step if number is None else number
        positions = number * rng.batch_size + np.arange(rng.batch_size)[rng.rows]
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
    """Encoded images with their conditions, sampled anew from each posterior at every visit.

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
        return self.of_rows(rng, self.order.rows(rng))

    def of_rows(self, rng: Rng, picked: npt.NDArray[np.int64]) -> Batch:
        """The items ``picked``, with the posterior noise of this step."""
        rows = torch.from_numpy(picked).to(self.mean.device)
        mean, std = (t.index_select(0, rows).to(rng.device, rng.dtype) for t in (self.mean, self.std))
        noise = rng.sample.normal("posterior", self.mean.shape[1:])
        cond = None if self.cond is None else self.cond[rows].to(rng.device)
        return Batch(torch.addcmul(mean, std, noise), cond)

    def content(self) -> Iterator[Tensor]:
        """The tensors that the batches are made of, beside the conditions: what a fingerprint is taken of."""
        yield from (self.mean, self.std)


class Buckets:
    """Images of several sizes: every batch is of one size, and all images are visited equally often.

    A round has about one batch for every ``batch_size`` images, shuffled. Before round r a size of n images has had
    floor(r n / batch_size) batches; so the fraction of a batch that is left over in one round counts in later ones, and
    the size of any step, and which batch of that size it is, follow from the step alone.

    Args:
        sources: the encoded images of each size.
    """

    def __init__(self, sources: Sequence[LatentSource]) -> None:
        self.sources = list(sources)
        self._round: tuple[tuple[int, int, int], list[tuple[int, int]]] | None = None
        for number, source in enumerate(self.sources):
            source.order = Order(len(source.mean), f"order {number}")

    def batch(self, rng: Rng) -> Batch:
        bucket, number = self.pick(rng)
        source = self.sources[bucket]
        return source.of_rows(rng, source.order.rows(rng, number))

    def pick(self, rng: Rng) -> tuple[int, int]:
        """(index of this step's size, how many batches of that size came before)."""
        each = rng.batch_size
        total = sum(source.order.size for source in self.sources)

        def before(n: int) -> int:
            """Steps before round n: a sum of floors, so it has no inverse in closed form."""
            return sum(self._before(n, source, each) for source in self.sources)

        # The round of this step is the last with before(round) <= step, found by bisection. Each floor takes off less
        # than one batch: n total / each - len(sources) < before(n) <= n total / each, which brackets the round.
        low = rng.step * each // total
        high = (rng.step + len(self.sources) + 1) * each // total + 2
        turn = low + bisect.bisect_right(range(low, high), rng.step, key=before) - 1
        return self._shuffled(rng.seed, turn, each)[rng.step - before(turn)]

    def _shuffled(self, seed: int, turn: int, batch_size: int) -> list[tuple[int, int]]:
        """(size, number) of the batches of a round in their shuffled order; the last round is remembered."""
        key = (seed, turn, batch_size)
        if self._round is None or self._round[0] != key:
            first, end = ([self._before(n, source, batch_size) for source in self.sources] for n in (turn, turn + 1))
            buckets = np.repeat(np.arange(len(first)), np.subtract(end, first))
            generator = np.random.Generator(np.random.Philox(stream_key(seed, "buckets", turn)))
            numbers = [iter(range(a, b)) for a, b in zip(first, end, strict=True)]
            self._round = key, [(int(b), next(numbers[b])) for b in generator.permutation(buckets)]
        return self._round[1]

    @staticmethod
    def _before(turn: int, source: LatentSource, batch_size: int) -> int:
        """How many batches of this size there were before round ``turn``."""
        return turn * source.order.size // batch_size

    def content(self) -> Iterator[Tensor]:
        for source in self.sources:
            yield from source.content()


class Prompts:
    """Prompts without images, for methods that need none: x0 is NaN, so that no method can use it unnoticed.

    Args:
        cond: of all prompts.
        shape: of one latent.
    """

    def __init__(self, cond: Cond, shape: Sequence[int]) -> None:
        self.cond, self.shape = cond, tuple(shape)
        self.order = Order(len(cond))

    def batch(self, rng: Rng) -> Batch:
        rows = torch.from_numpy(self.order.rows(rng)).to(next(iter(self.cond.tensors.values())).device)
        cond = self.cond[rows].to(rng.device)
        x0 = torch.full((), torch.nan, dtype=rng.dtype, device=rng.device).expand(len(rows), *self.shape)
        return Batch(x0, cond, has_data=False)

    def content(self) -> Iterator[Tensor]:
        yield from (self.cond[name] for name in sorted(self.cond))


class Source(Protocol):
    """A source of batches: a pure function of the step's random numbers."""

    def batch(self, rng: Rng) -> Batch:
        """The rows ``rng.rows`` of the global batch of step ``rng.step``."""


@dataclass(frozen=True)
class CaptionDropout:
    """Batches of ``data`` in which each row loses its condition with probability ``share``, drawn anew each step."""

    data: Source
    share: float

    def batch(self, rng: Rng) -> Batch:
        batch = self.data.batch(rng)
        dropped = rng.sample.uniform("caption_dropout") < self.share
        return batch if batch.cond is None else dataclasses.replace(batch, cond=batch.cond.drop(dropped))


@dataclass(frozen=True)
class WithPrompts:
    """Batches of ``data`` with the captions of their rows as text (`Batch.prompts`)."""

    data: LatentSource | Prompts
    captions: Sequence[str]

    def batch(self, rng: Rng) -> Batch:
        prompts = tuple(self.captions[i] for i in self.data.order.rows(rng))
        return dataclasses.replace(self.data.batch(rng), prompts=prompts)


class MixtureSource:
    """Fresh samples of a Gaussian mixture at every step, with class labels if it has classes.

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
