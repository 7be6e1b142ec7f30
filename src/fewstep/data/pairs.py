"""Samples of the teacher, generated once and kept: as pairs (noise, latent, condition), or as data.

<place>/pairs.json                the settings that decide every value; other settings, prompts or teachers are refused
        pairs-00000.safetensors   latents and conditions in float16, some rows a file; each exists whole or not at all

Noise is not kept: row i starts from unit normals keyed by (seed, i), the same on every machine.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.data.batch import Batch, Pairs
from fewstep.data.captions import Encode, as_bytes
from fewstep.data.files import replace_tensors, replace_text
from fewstep.data.random import Rng, stream_key
from fewstep.data.rows import HELD, LENGTH, NULL, Ahead, Held, Picked, Rows, Stored, checksum, cut_padding, joined
from fewstep.data.sources import Encoded, LatentSource, Order, Source, pins, prefetch
from fewstep.models.cond import Cond

ABOUT = "pairs.json"
TEXT_KEY = "text"
"""The setting that says whether captions are kept as text; sets that keep embeddings do not have it."""


def noise_of(seed: int, row: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The unit normals [*shape], float32, that pair number ``row`` of a set started from."""
    generator = torch.Generator().manual_seed(stream_key(seed, "pair", row))
    return torch.randn(*shape, generator=generator, dtype=torch.float32)


class PairSource(LatentSource):
    """The teacher's samples: `batch` gives them as data, `pairs` with their noise, in two independent orders.

    Args:
        x0: [N, ...] latents. cond: of all N items. seed: of their noise (`noise_of`).
        cost: forward passes that sampling them took.
    """

    def __init__(self, x0: Tensor, cond: Cond | None, seed: int, cost: float = 0.0) -> None:
        self._begin(Held({"x0": x0, **({} if cond is None else cond.given())}), seed, cost)

    @classmethod
    def of_pairs(cls, rows: Rows, seed: int, cost: float, encode: Encode | None = None) -> PairSource:
        """The samples whose "x0" and conditions, or captions, ``rows`` holds; ``encode`` as in `Encoded`."""
        source = cls.__new__(cls)
        source._begin(rows, seed, cost, encode)
        return source

    def _begin(self, rows: Rows, seed: int, cost: float, encode: Encode | None = None) -> None:
        Encoded.__init__(self, rows, encode)
        self.seed, self.cost = seed, cost
        self._pair_order, self._pairs_ahead = Order(len(rows), "pairs"), Ahead(self._with_noise)

    @property
    def mean(self) -> Tensor:
        return self._all()["x0"]

    @property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean)

    @property
    def shape(self) -> torch.Size:
        return self.rows.shape("x0")

    def of_rows(self, rng: Rng, picked: Picked) -> Batch:
        """The items ``picked``; a sample has no posterior, so no noise is added."""
        found, cond = self.fetch(rng, picked)
        return Batch(found["x0"].to(rng.dtype), cond)

    def prefetch_pairs(self, rng: Rng) -> None:
        """Begin to read the pairs of ``rng``'s batch, and to draw their noise, in a thread."""
        self._pairs_ahead.prefetch(self._pair_order.rows(rng), pins(rng))

    def pairs(self, rng: Rng) -> Pairs:
        """The pairs of the rows ``rng.rows`` of step ``rng.step``."""
        found, cond = self.place(rng, self._pairs_ahead.fetch(self._pair_order.rows(rng), pins(rng)))
        return Pairs(found["noise"].to(rng.dtype), found["x0"].to(rng.dtype), cond)

    def _with_noise(self, picked: Picked, pin: bool) -> dict[str, Tensor]:
        noise = torch.stack([noise_of(self.seed, int(i), self.shape) for i in picked])
        return {**self.rows.take(picked, pin), "noise": noise.pin_memory() if pin else noise}


@dataclass(frozen=True)
class WithPairs:
    """Batches of ``data`` that also hold as many ``pairs``."""

    data: Source
    pairs: PairSource

    def batch(self, rng: Rng) -> Batch:
        return dataclasses.replace(self.data.batch(rng), pairs=self.pairs.pairs(rng))

    def prefetch(self, rng: Rng) -> None:
        """As `Encoded.prefetch`, of both."""
        prefetch(self.data, rng)
        self.pairs.prefetch_pairs(rng)


class PairFiles:
    """The files of one set of pairs.

    Args:
        place: their folder.
        about: the settings that decide every value, as numbers and texts; among them ``size``, ``batch_size`` (rows of
            a file) and ``seed``.
    """

    def __init__(self, place: Path, about: Mapping[str, str | int | float]) -> None:
        self.place, self.about = place, dict(about)
        self.size, self.per_file, self.seed = (int(about[key]) for key in ("size", "batch_size", "seed"))

    def check(self) -> None:
        """Raises ValueError, in one sentence, when ``place`` holds another set or other files."""
        if self.place.exists() and not self.place.is_dir():
            raise ValueError(f"{self.place} is a file, no folder of the teacher's samples: choose another pairs.path.")
        stored = self._stored()
        if stored is None:
            if any(self.place.glob("*.safetensors")):
                raise ValueError(
                    f"{self.place} holds other files, or samples of unknown origin ({ABOUT} is missing or "
                    "damaged): delete the folder, or choose another pairs.path."
                )
            return
        for key in sorted(stored.keys() | self.about.keys()):
            if stored.get(key) != self.about.get(key):
                raise ValueError(
                    f"{self.place} holds the samples of {self._difference(key, stored.get(key))}: delete the folder to "
                    "have them made anew, or choose another pairs.path."
                )

    def _stored(self) -> dict[str, str | int | float] | None:
        try:
            stored = json.loads((self.place / ABOUT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return stored if isinstance(stored, dict) else None

    def _difference(self, key: str, old: object) -> str:
        if key in ("teacher", "prompts"):
            return {"teacher": "another teacher", "prompts": "other prompts"}[key]
        if key == TEXT_KEY:
            return f"a run with data.text = {old or 'cached'}"
        return f"pairs.{key} = {old}, not {self.about.get(key)}"

    def claim(self) -> None:
        """Create the folder and write what it is for."""
        self.place.mkdir(parents=True, exist_ok=True)
        if self._stored() is None:
            replace_text(self.place / ABOUT, json.dumps(self.about, indent=1, sort_keys=True) + "\n")

    def __len__(self) -> int:
        """How many files the whole set has."""
        return -(-self.size // self.per_file)

    def rows(self, number: int) -> range:
        """The pairs in file ``number``."""
        return range(number * self.per_file, min((number + 1) * self.per_file, self.size))

    def missing(self) -> list[int]:
        """Numbers of the files that do not exist yet; a damaged one counts as missing."""
        return [number for number in range(len(self)) if self._read(number) is None]

    def write(self, number: int, x0: Tensor, cond: Cond | None, cost: float, captions: Sequence[str] = ()) -> None:
        """Write file ``number``: x0 [rows, ...], their conditions, and the forward passes that they took.

        Values are kept in float16, and those of a condition in bfloat16 where they are given so.

        Args:
            captions: of the rows, to be kept in the place of the conditions.
        """
        given = {} if cond is None else cond.flat()
        if captions:
            given = as_bytes(captions) | {name: t for name, t in given.items() if name.startswith(NULL)}
        tensors = {"x0": x0} | given
        kept = {key: _half(t, key != "x0").cpu().contiguous() for key, t in tensors.items()}
        kept = cut_padding(kept) if LENGTH in kept else kept  # texts of no common length
        about = {"about": json.dumps(self.about, sort_keys=True), "cost": repr(cost), "checksum": checksum(kept)}
        replace_tensors(self._path(number), kept, about)

    def load(self, encode: Encode | None = None) -> PairSource:
        """The whole set, in memory if it is small.

        Args:
            encode: of captions, where the files hold these.

        Raises:
            ValueError: a file is missing.
        """
        files = [self._read(number) for number in range(len(self))]
        found = [file for file in files if file is not None]
        if len(found) < len(files):
            raise ValueError(f"{self.place} lacks {len(files) - len(found)} of its {len(files)} files.")
        checksums, costs = zip(*found, strict=True)
        stored = Stored([self._path(number) for number in range(len(self))], checksum=joined(checksums))
        rows = stored.held() if stored.nbytes <= HELD else stored
        return PairSource.of_pairs(rows, self.seed, sum(costs), encode)

    def _path(self, number: int) -> Path:
        return self.place / f"pairs-{number:05d}.safetensors"

    def _read(self, number: int) -> tuple[str, float] | None:
        """(hash of the values, cost) of a file; None where it is missing or damaged."""
        try:
            with safe_open(self._path(number), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("about") != json.dumps(self.about, sort_keys=True):
                    return None
                # files of versions up to 0.1 have no checksum
                found = metadata.get("checksum") or checksum({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
                return found, float(metadata["cost"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return None


def _half(t: Tensor, of_condition: bool) -> Tensor:
    """In float16; bfloat16 of a condition stays, for values beyond 65,504."""
    return t if not t.is_floating_point() or (of_condition and t.dtype == torch.bfloat16) else t.half()
