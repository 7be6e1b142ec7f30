"""Data that stay where they are: shards are read while a run trains, and nothing of them is kept on disk.

Rows of the global batch are dealt to lanes, as many as divide it and as there are shards. A lane reads shards of its
own one after the other, each once an epoch in an order drawn from the seed, in blocks of entries that are shuffled
likewise. Which entry a row trains on follows from the seed, the step and the shards alone: for any number of processes,
of which each reads the lanes of its rows, and after any resume.

To go on at a step, a lane skips what was read before; the entries of whole shards were counted (`Counts`), so only the
beginning of one is read again. An entry that cannot be used leaves its place to the next of its block, and to one of
the blocks that follow where it has none.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.data.cache import in_order, loader_threads
from fewstep.data.captions import as_rows, encoder, null_of, split_captions
from fewstep.data.entries import Skipped, attempt, one_line
from fewstep.data.files import replace_text, text_hash
from fewstep.data.images import CaptionedImage, decode
from fewstep.data.random import Rng, stream_key
from fewstep.data.remote import Entry, Shards
from fewstep.data.rows import CAPTION, Ahead, Picked, Tensors, in_thread
from fewstep.data.sources import Null, pins
from fewstep.models.cond import Cond
from fewstep.models.families import Teacher
from fewstep.models.hub import short_error

PIXELS = "pixels"
_TRIES = 4  # of a shard that the network fails to give
_MOST_PASSED = 1024  # entries that cannot be used, one after another, before a run ends
_PAUSE = 2.0  # seconds before the second one; twice as many before each that follows


class Counts:
    """How many entries the shards have that were read to their end; kept in a file, for a resumed run.

    Args:
        folder: of the files, one for each process. names: of the shards. rank: of this process.
    """

    def __init__(self, folder: Path, names: Sequence[str], rank: int = 0) -> None:
        self._path, self._of = folder / f"shards-{rank}.json", text_hash("\n".join(names))
        self._known: dict[int, int] = {}
        self._lock = threading.Lock()
        for path in sorted(folder.glob("shards-*.json")):
            self._known |= self._read(path)

    def __getitem__(self, shard: int) -> int | None:
        return self._known.get(shard)

    def note(self, shard: int, entries: int) -> None:
        """A shard was read to its end."""
        with self._lock:
            if self._known.get(shard) != entries:
                self._known[shard] = entries
                self._path.parent.mkdir(parents=True, exist_ok=True)
                replace_text(self._path, json.dumps({"shards": self._of, "entries": self._known}) + "\n")

    def _read(self, path: Path) -> dict[int, int]:
        """What a file holds; nothing where it is damaged or of other shards, which only costs time."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return {int(shard): int(n) for shard, n in found["entries"].items()} if found["shards"] == self._of else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


class Lane:
    """Entries of some of the shards, epoch after epoch without an end, in shuffled blocks; the next is read ahead.

    Args:
        number, count: which of so many lanes. size: entries of a block.
    """

    def __init__(self, shards: Shards, counts: Counts, seed: int, number: int, count: int, size: int) -> None:
        self._shards, self._counts, self._seed, self.size = shards, counts, seed, size
        self._number, self._count = number, count
        self._entries: Iterator[Entry] = iter(())
        self._at = -1  # the number of the entry that `_entries` gives next
        self._lock = threading.Lock()
        self._blocks: dict[int, Future[list[Entry]]] = {}
        self._last: Future[list[Entry]] | None = None

    def from_place(self, place: int) -> Iterator[Entry]:
        """The entry at a place of the lane, whose block is waited for, then the others of that block, each once.

        After them come those of the blocks that follow, from the same place in each, for as long as they are asked for.
        """
        number, first = divmod(place, self.size)
        with self._lock:
            block = self._of(number)
        return itertools.chain(self._from(block, first), self._following(number, first))

    def _from(self, block: list[Entry], first: int) -> Iterator[Entry]:
        return (block[(first + i) % self.size] for i in range(self.size))

    def _following(self, number: int, first: int) -> Iterator[Entry]:
        for later in itertools.count(number + 1):
            with self._lock:
                block = self._begun(later).result()
            yield from self._from(block, first)

    def _of(self, number: int) -> list[Entry]:
        """A block; those before it are let go, and the next is begun."""
        block = self._begun(number).result()
        self._blocks = {each: future for each, future in self._blocks.items() if each >= number}
        self._begun(number + 1)
        return block

    def _begun(self, number: int) -> Future[list[Entry]]:
        if number not in self._blocks:
            self._blocks[number] = self._last = self._begin(number)
        return self._blocks[number]

    def _begin(self, number: int) -> Future[list[Entry]]:
        """Read a block in a thread, once the block that was begun before is there."""
        before = self._last

        def work() -> list[Entry]:
            if before is not None:
                before.exception()  # of which the entries were being read
            return self._read(number)

        return in_thread(work, "fewstep-shards", daemon=True)

    def _read(self, number: int) -> list[Entry]:
        first = number * self.size
        if self._at != first:
            self._entries = self._after(first)
        self._at = -1  # until all are read
        found = list(itertools.islice(self._entries, self.size))
        self._at = first + self.size
        generator = np.random.Generator(np.random.Philox(stream_key(self._seed, "block", self._number, number)))
        return [found[i] for i in generator.permutation(self.size)]

    def _after(self, first: int) -> Iterator[Entry]:
        """All entries from number ``first`` on; whole shards before that are skipped where their entries are known."""
        at = 0
        for epoch in itertools.count():
            began = at
            for shard in self._of_epoch(epoch):
                known = self._counts[shard]
                if known is not None and at + known <= first:
                    at += known
                    continue
                for entry in self._of_shard(shard):
                    if at >= first:
                        yield entry
                    at += 1
            if at == began and not any(self._counts[shard] != 0 for shard in range(len(self._shards.names))):
                raise ValueError(f"data.path: the shards hold no images, such as {self._shards.names[0]}.")

    def _of_epoch(self, epoch: int) -> list[int]:
        """This lane's shards in their order."""
        generator = np.random.Generator(np.random.Philox(stream_key(self._seed, "shards", epoch)))
        return [int(i) for i in generator.permutation(len(self._shards.names))[self._number :: self._count]]

    def _of_shard(self, shard: int) -> Iterator[Entry]:
        """The entries of a shard, which is opened again where the network fails.

        Raises:
            ValueError: one sentence: it is not there, or cannot be read.
        """
        name, done = self._shards.names[shard], 0
        for again in range(_TRIES):
            try:
                for entry in itertools.islice(self._shards.read(shard), done, None):
                    done += 1
                    yield entry
                break
            except FileNotFoundError:
                raise ValueError(f"data.path: there is no shard '{name}'.") from None
            except Exception as error:  # each kind of storage has errors of its own
                if again + 1 == _TRIES:
                    raise ValueError(
                        f"data.path: the shard {name} cannot be read any further ({short_error(error)}): "
                        "go on with --resume once it can."
                    ) from None
                time.sleep(_PAUSE * 2**again)
        self._counts.note(shard, done)


class Stream:
    """Rows of global batches: entry ``place`` of the lane that the row belongs to.

    Args:
        batch_size: of the global batch. buffer: entries that are shuffled together, over all lanes.
        decoded: returns the pixels [3, side, side] of an image. threads: how many decode at once.
        skipped: is told of every entry that cannot be used.
    """

    def __init__(
        self, shards: Shards, counts: Counts, seed: int, batch_size: int, buffer: int,
        decoded: Callable[[CaptionedImage], Tensor], skipped: Callable[[Skipped], None], threads: int = 1,
    ) -> None:  # fmt: skip
        count = max(n for n in range(1, batch_size + 1) if batch_size % n == 0 and n <= len(shards.names))
        self._batch_size, self._each = batch_size, batch_size // count
        size = max(1, buffer // count)
        self._lanes = [Lane(shards, counts, seed, number, count, size) for number in range(count)]
        self._decoded, self._skipped, self._threads = decoded, skipped, threads

    def take(self, picked: Picked, pin: bool = False) -> Tensors:
        """The rows ``picked``, counted from the first step's: pixels [rows, 3, side, side] in uint8, and captions."""
        entries = [self._entries(*divmod(int(row), self._batch_size)) for row in picked]
        rows = list(in_order(self._first, entries, self._threads))
        pixels = torch.stack([image for image, _ in rows])
        return {PIXELS: pixels.pin_memory() if pin else pixels, CAPTION: as_rows([caption for _, caption in rows])}

    def _entries(self, step: int, row: int) -> Iterator[Entry]:
        return self._lanes[row // self._each].from_place(step * self._each + row % self._each)

    def _first(self, entries: Iterator[Entry]) -> tuple[Tensor, str]:
        """The pixels and the caption of the first of them that can be used."""
        passed = []
        for entry in itertools.islice(entries, _MOST_PASSED):
            found = entry if isinstance(entry, Skipped) else attempt(entry.name, self._decoded, entry)
            if not isinstance(found, Skipped):
                assert isinstance(entry, CaptionedImage)
                return found, entry.caption
            passed.append(found)
            self._skipped(found)
        raise ValueError(f"data.path: none of {len(passed)} images in a row could be used, the first: {passed[0]}.")


class StreamSource:
    """Batches of a stream, encoded by the teacher's autoencoder and text encoders on the device that trains.

    Args:
        counts: of the shards' entries. buffer: as in `Stream`.
        skipped: a file that lists what was passed over. processes: how many train together.
    """

    def __init__(
        self, shards: Shards, teacher: Teacher, counts: Counts, buffer: int, skipped: Path, processes: int = 1
    ) -> None:
        self._shards, self._teacher, self._counts, self._buffer = shards, teacher, counts, buffer
        self._threads = loader_threads(processes)
        self._encode, self._null = encoder(teacher), Null(null_of(teacher))
        self._skipped = _Listed(skipped)
        self._of: tuple[tuple[int, int], Ahead] | None = None

    def prefetch(self, rng: Rng) -> None:
        """Begin to read and decode the images of ``rng``'s batch in a thread."""
        self._ahead(rng).prefetch(rng.numbers(), pins(rng))

    def batch(self, rng: Rng) -> Batch:
        """The rows of ``rng``, with the posterior noise of this step; latents and conditions are rounded to float16."""
        others, captions = split_captions(self._ahead(rng).fetch(rng.numbers(), pins(rng)))
        images = others[PIXELS].to(rng.device, non_blocking=True).float() / 127.5 - 1
        mean, std = (t.half().to(rng.dtype) for t in self._teacher.posterior(images))
        x0 = torch.addcmul(mean, std, rng.sample.normal("posterior", mean.shape[1:]))
        cond = Cond.from_flat({**self._encode(captions), **self._null.on(rng.device)})
        return Batch(x0, cond, prompts=tuple(captions))

    def checksum(self) -> str:
        """A short hash of the shards' names: their values are not read before they are trained on."""
        return text_hash("\n".join(self._shards.names))

    def _ahead(self, rng: Rng) -> Ahead:
        key = (rng.seed, rng.batch_size)
        if self._of is None or self._of[0] != key:
            side = self._teacher.image_size

            def decoded(image: CaptionedImage) -> Tensor:
                return decode(image, lambda height, width: (side, side))

            stream = Stream(
                self._shards, self._counts, *key, self._buffer, decoded, self._skipped.add, self._threads
            )  # fmt: skip
            self._of = key, Ahead(stream.take)
        return self._of[1]


class _Listed:
    """A file of what was passed over, each entry once; several processes may write it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = set(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else set()
        self._lock = threading.Lock()

    def add(self, entry: Skipped) -> None:
        line = one_line(str(entry))
        with self._lock:
            if line not in self._known:
                self._known.add(line)
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write(f"{line}\n")
