"""Conditions: named tensors that accompany a batch, and their values for "no condition"."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_GIVEN, _NULL = "cond.", "null."
_TEXT, _MASK, _LENGTH = "prompt_embeds", "prompt_mask", "prompt_length"


def on_host(name: str) -> bool:
    """Whether the tensor ``name`` of a condition stays on the host: lengths [B], which a network needs as numbers."""
    return name.endswith("_length")


class Cond:
    """Named tensors [B, ...] and, optionally, their null counterparts [1, ...] or [B, ...].

    What "no condition" is (an encoded empty prompt, zeros, a spare class label) depends on the teacher's family, which
    passes it here. Indexing and slicing act on the batch.

    Texts may differ in length where the condition says which tokens are real, by ``prompt_mask`` [B, tokens] or
    ``prompt_length`` [B]: then the shorter ones of ``prompt_embeds`` [B, tokens, ...] get zeros behind them wherever
    two batches are joined.

    Args:
        tensors: name -> [B, ...].
        null: name -> the value that means "no condition"; needed for guidance and caption dropout.

    Raises:
        ValueError: tensors of different batch sizes.
    """

    def __init__(self, tensors: Mapping[str, Tensor], null: Mapping[str, Tensor] | None = None) -> None:
        self.tensors = dict(tensors)
        self._null = None if null is None else dict(null)
        sizes = {t.shape[0] for t in self.tensors.values()}
        if len(sizes) > 1:
            raise ValueError(f"The tensors of a condition must share one batch size, not {sorted(sizes)}.")

    def __getitem__(self, key: str | slice | Tensor | Sequence[int]) -> Any:
        """A tensor by name, or the condition of part of the batch."""
        if isinstance(key, str):
            return self.tensors[key]
        return self._map(lambda t: t[key.to(t.device) if isinstance(key, Tensor) and t.device.type == "cpu" else key])

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        """Batch size."""
        return next(iter(self.tensors.values())).shape[0] if self.tensors else 0

    def null(self) -> Cond:
        """The same batch without its condition; its texts have the null's own length.

        Raises:
            ValueError: when this condition was built without a null.
        """
        if self._null is None:
            raise ValueError("This condition has no null counterpart: build it as Cond(tensors, null=...).")
        for name in self.tensors.keys() - self._null.keys():
            raise ValueError(f"The null of this condition lacks '{name}': it has {', '.join(self._null)}.")
        texts = _texts(self)
        null = {k: (self._null_of(k), t) for k, t in self.tensors.items()}
        wide = {k: n.expand(len(t), *n.shape[1:]) if k in texts else n.expand_as(t) for k, (n, t) in null.items()}
        return Cond(wide, self._null)

    def with_negative(self, other: Cond) -> Cond:
        """The same condition, with ``other`` [B, ...] in place of its null: a negative prompt."""
        return Cond(self.tensors, other.tensors)

    def flat(self) -> dict[str, Tensor]:
        """All tensors under the names of files: "cond.NAME" [B, ...], and the null's as "null.NAME" [1, ...].

        Raises:
            ValueError: when this condition was built without a null.
        """
        null = self[:1].null()
        return {_GIVEN + name: self[name] for name in self} | {_NULL + name: null[name] for name in null}

    def given(self) -> dict[str, Tensor]:
        """As `flat`, with the null as it was given, [1, ...] or [B, ...], and none where there is none."""
        return {_GIVEN + name: t for name, t in self.tensors.items()} | {
            _NULL + name: t for name, t in (self._null or {}).items()
        }

    @classmethod
    def from_flat(cls, tensors: Mapping[str, Tensor]) -> Cond:
        """The condition of a file that holds its `flat` tensors, maybe among others."""
        given, null = (
            {name.removeprefix(kind): t for name, t in tensors.items() if name.startswith(kind)}
            for kind in (_GIVEN, _NULL)
        )
        return cls(given, null or None)

    @staticmethod
    def cat_flat(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Rows of several files one after the other, `flat` tensors and others; the null [1, ...] is the first's."""
        texts = {_GIVEN + name for name in _texts({name.removeprefix(_GIVEN) for name in parts[0]})}
        return {
            name: first if name.startswith(_NULL) else _joined([part[name] for part in parts], name in texts)
            for name, first in parts[0].items()
        }

    def drop(self, mask: Tensor) -> Cond:
        """Rows where ``mask`` [B] is True without their condition (caption dropout)."""
        null = self.null().tensors
        rows = {
            k: mask.to(t.device, non_blocking=True).reshape(-1, *[1] * (t.ndim - 1)) for k, t in self.tensors.items()
        }
        both = {k: padded([null[k], t]) if k in _texts(self) else [null[k], t] for k, t in self.tensors.items()}
        return Cond({k: torch.where(rows[k], n, t) for k, (n, t) in both.items()}, self._null)

    def _null_of(self, name: str) -> Tensor:
        assert self._null is not None
        value, like = self._null[name], self.tensors[name]
        return value.to(device=like.device, dtype=like.dtype)

    def to(self, *args: Any, **kwargs: Any) -> Cond:
        """Like `torch.Tensor.to`; integer tensors keep their dtype, and lengths stay on the host."""

        def move(name: str, t: Tensor) -> Tensor:
            if on_host(name):
                return t
            moved = t.to(*args, **kwargs)
            return moved if t.is_floating_point() else moved.to(t.dtype)

        null = None if self._null is None else {k: move(k, t) for k, t in self._null.items()}
        return Cond({k: move(k, t) for k, t in self.tensors.items()}, null)

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """Batches one after the other.

        Raises:
            ValueError: when their names differ.
        """
        names = set(conds[0])
        if any(set(c) != names for c in conds):
            raise ValueError("Conditions with different names cannot be joined into one batch.")
        null, texts = conds[0]._null, _texts(conds[0])
        if null is not None and all(c._null is not None for c in conds):  # a null of one row serves every batch
            null = {
                k: n if n.shape[0] == 1 else _joined([c._null_of(k) for c in conds], k in texts)
                for k, n in null.items()
            }
        return Cond({k: _joined([c.tensors[k] for c in conds], k in texts) for k in conds[0]}, null)

    def _map(self, pick: Any) -> Cond:
        null = self._null
        if null is not None:  # a null of one row serves every slice
            null = {k: t if t.shape[0] == 1 else pick(t) for k, t in null.items()}
        return Cond({k: pick(t) for k, t in self.tensors.items()}, null)


def _texts(names: Iterable[str]) -> set[str]:
    """Those tensors of a condition whose second dimension is the length of a text that may be padded."""
    there = set(names)
    return there & {_TEXT, _MASK} if there & {_MASK, _LENGTH} else set()


def _joined(parts: Sequence[Tensor], text: bool) -> Tensor:
    return torch.cat(padded(parts) if text else list(parts))


def padded(texts: Sequence[Tensor]) -> list[Tensor]:
    """Tensors [B, tokens, ...] with zeros behind the tokens of the shorter ones."""
    longest = max(t.shape[1] for t in texts)
    return [
        t if t.shape[1] == longest else torch.cat([t, t.new_zeros(len(t), longest - t.shape[1], *t.shape[2:])], dim=1)
        for t in texts
    ]
