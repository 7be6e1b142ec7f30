"""Sources of batches: pure functions of the step's random numbers, so that position and order resume exactly."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.data.captions import Encode, split_captions
from fewstep.data.random import Rng, stream_key
from fewstep.data.rows import Ahead, Held, Picked, Rows, joined
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.models.cond import Cond, on_host


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
        positions = rng.numbers(number)
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


class Null:
    """The null condition of a data set, which is copied to each device once; lengths stay on the host.

    Args:
        tensors: [1, ...] each, as `Cond.flat` names them.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._there: dict[torch.device, dict[str, Tensor]] = {}

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors on ``device``."""
        if device not in self._there:
            self._there[device] = {name: t if on_host(name) else t.to(device) for name, t in self._tensors.items()}
        return self._there[device]


class Encoded:
    """Rows of encoded data, and which of them a step consumes; those of the next batch may be read ahead.

    Args:
        rows: named tensors of all N items, the condition's as `Cond.flat` names them.
        encode: of captions, where the rows hold these in the place of their conditions.
    """

    def __init__(self, rows: Rows, encode: Encode | None = None) -> None:
        self.rows, self.encode = rows, encode
        self.order = Order(len(rows))
        self._ahead = Ahead(rows.take)
        self._null = Null(rows.null)

    @property
    def cond(self) -> Cond | None:
        """The condition of all items, for small data: every row is read."""
        return _cond({**self._encoded(self._all()), **self.rows.null})

    def checksum(self) -> str:
        """A short hash of all values."""
        return self.rows.checksum

    def prefetch(self, rng: Rng) -> None:
        """Begin to read the rows of ``rng``'s batch in a thread."""
        self.prefetch_rows(rng, self.order.rows(rng))

    def prefetch_rows(self, rng: Rng, picked: Picked) -> None:
        """Begin to read the items ``picked``; those in memory are worth a thread only where it pins them."""
        if pins(rng) or not isinstance(self.rows, Held):
            self._ahead.prefetch(picked, pins(rng))

    def fetch(self, rng: Rng, picked: Picked) -> tuple[dict[str, Tensor], Cond | None]:
        """The items ``picked`` on the device of ``rng``, in their own dtype: tensors by name, and the condition.

        Nothing here waits for the device: rows come from pinned memory, and the null condition is copied there once.
        Tensors become the step's dtype there, which halves the bytes to copy.
        """
        return self.place(rng, self._ahead.fetch(picked, pins(rng)))

    def place(self, rng: Rng, read: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Cond | None]:
        """As `fetch`, of rows that were read."""
        read = self._encoded(read)
        found = {name: t if on_host(name) else t.to(rng.device, non_blocking=True) for name, t in read.items()}
        return found, _cond({**found, **self._null.on(rng.device)})

    def _encoded(self, read: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Rows that were read, with conditions in the place of their captions."""
        if self.encode is None:
            return read
        others, captions = split_captions(read)
        return {**others, **self.encode(captions)}

    def _all(self) -> dict[str, Tensor]:
        return self.rows.take(np.arange(len(self.rows)))


def pins(rng: Rng) -> bool:
    """Whether rows for this device should be read into pinned memory."""
    return rng.device.type == "cuda"


def _cond(tensors: Mapping[str, Tensor]) -> Cond | None:
    """The condition among these tensors, if there is one."""
    found = Cond.from_flat(tensors)
    return found if found.tensors else None


class LatentSource(Encoded):
    """Encoded images with their conditions, sampled anew from each posterior at every visit.

    Args:
        mean, std: [N, ...] of the scaled latents' posterior.
        cond: of all N items.
    """

    def __init__(self, mean: Tensor, std: Tensor, cond: Cond | None) -> None:
        super().__init__(Held({"mean": mean, "std": std, **({} if cond is None else cond.given())}))

    @classmethod
    def of(cls, rows: Rows, encode: Encode | None = None) -> LatentSource:
        """The images whose "mean", "std" and conditions, or captions, ``rows`` holds; ``encode`` as in `Encoded`."""
        source = cls.__new__(cls)
        Encoded.__init__(source, rows, encode)
        return source

    @property
    def mean(self) -> Tensor:
        """[N, ...], for small data: every row is read."""
        return self._all()["mean"]

    @property
    def std(self) -> Tensor:
        """As `mean`."""
        return self._all()["std"]

    @property
    def shape(self) -> torch.Size:
        """Shape of one latent."""
        return self.rows.shape("mean")

    def batch(self, rng: Rng) -> Batch:
        return self.of_rows(rng, self.order.rows(rng))

    def of_rows(self, rng: Rng, picked: Picked) -> Batch:
        """The items ``picked``, with the posterior noise of this step."""
        found, cond = self.fetch(rng, picked)
        noise = rng.sample.normal("posterior", self.shape)
        return Batch(torch.addcmul(found["mean"].to(rng.dtype), found["std"].to(rng.dtype), noise), cond)


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
            source.order = Order(len(source.rows), f"order {number}")

    def batch(self, rng: Rng) -> Batch:
        bucket, number = self.pick(rng)
        source = self.sources[bucket]
        return source.of_rows(rng, source.order.rows(rng, number))

    def prefetch(self, rng: Rng) -> None:
        """As `Encoded.prefetch`."""
        bucket, number = self.pick(rng)
        source = self.sources[bucket]
        source.prefetch_rows(rng, source.order.rows(rng, number))

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

    def checksum(self) -> str:
        """A short hash of all values."""
        return joined(source.checksum() for source in self.sources)


class Prompts(Encoded):
    """Prompts without images, for methods that need none: x0 is NaN, so that no method can use it unnoticed.

    Args:
        cond: of all prompts, or the rows that hold it.
        shape: of one latent. encode: as in `Encoded`.
    """

    def __init__(self, cond: Cond | Rows, shape: Sequence[int], encode: Encode | None = None) -> None:
        super().__init__(Held(cond.given()) if isinstance(cond, Cond) else cond, encode)
        self.shape = tuple(shape)

    def batch(self, rng: Rng) -> Batch:
        picked = self.order.rows(rng)
        _, cond = self.fetch(rng, picked)
        x0 = torch.full((), torch.nan, dtype=rng.dtype, device=rng.device).expand(len(picked), *self.shape)
        return Batch(x0, cond, has_data=False)


class Source(Protocol):
    """A source of batches: a pure function of the step's random numbers."""

    def batch(self, rng: Rng) -> Batch:
        """The rows ``rng.rows`` of the global batch of step ``rng.step``."""


def prefetch(source: Source, rng: Rng) -> None:
    """Tell ``source`` which batch will be asked for next; sources that have nothing to read need not know."""
    begin = getattr(source, "prefetch", None)
    if begin is not None:
        begin(rng)


@dataclass(frozen=True)
class CaptionDropout:
    """Batches of ``data`` in which each row loses its condition with probability ``share``, drawn anew each step."""

    data: Source
    share: float

    def batch(self, rng: Rng) -> Batch:
        batch = self.data.batch(rng)
        dropped = rng.sample.uniform("caption_dropout") < self.share
        return batch if batch.cond is None else dataclasses.replace(batch, cond=batch.cond.drop(dropped))

    def prefetch(self, rng: Rng) -> None:
        """As `Encoded.prefetch`."""
        prefetch(self.data, rng)


@dataclass(frozen=True)
class WithPrompts:
    """Batches of ``data`` with the captions of their rows as text (`Batch.prompts`)."""

    data: LatentSource | Prompts
    captions: Sequence[str]

    def batch(self, rng: Rng) -> Batch:
        prompts = tuple(self.captions[i] for i in self.data.order.rows(rng))
        return dataclasses.replace(self.data.batch(rng), prompts=prompts)

    def prefetch(self, rng: Rng) -> None:
        """As `Encoded.prefetch`."""
        self.data.prefetch(rng)


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
