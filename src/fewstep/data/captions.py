"""Captions that are kept as text, and encoded when their batch is trained on, by the teacher's own text encoders.

A caption of 60 letters takes 64 bytes; its embeddings take 0.3 MB for SDXL and 4.2 MB for FLUX. Batches have the same
conditions as with kept embeddings: both are rounded to `Family.text_dtype`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fewstep.data.rows import CAPTION, LENGTH, MASK, NULL, TEXT, TEXT_LENGTHS, TOKENS
from fewstep.models.families import Teacher

Encode = Callable[[Sequence[str]], dict[str, Tensor]]
"""Turns captions into their condition's tensors, as `Cond.given` names them; the null is not among them."""


def as_bytes(captions: Sequence[str]) -> dict[str, Tensor]:
    """Captions as a file of rows holds them."""
    texts = [caption.encode() for caption in captions]
    values = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)
    return {TEXT: values, TEXT_LENGTHS: torch.tensor([len(text) for text in texts], dtype=torch.int32)}


def as_rows(captions: Sequence[str]) -> Tensor:
    """Captions as `as_text` reads them, [N, bytes] in uint8."""
    texts = [caption.encode() for caption in captions]
    longest = max(map(len, texts))
    filled = b"".join(text.ljust(longest, b"\0") for text in texts)
    return torch.frombuffer(bytearray(filled), dtype=torch.uint8).view(len(texts), longest)


def as_text(rows: Tensor) -> list[str]:
    """The captions of rows [N, bytes] that were read; none holds a NUL, which fills the shorter ones."""
    return [bytes(row).rstrip(b"\0").decode() for row in rows.numpy()]


def split_captions(read: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(the other tensors of rows that were read, their captions)."""
    return {name: t for name, t in read.items() if name != CAPTION}, as_text(read[CAPTION])


def null_of(teacher: Teacher, size: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """The null condition, [1, ...] each, as a file holds it; ``size`` as in `Teacher.encode_prompts`."""
    cond = teacher.encode_prompts([""], size=size).to(teacher.family.text_dtype)
    return {name: t for name, t in cond.flat().items() if name.startswith(NULL)}


def encoder(teacher: Teacher, size: tuple[int, int] | None = None) -> Encode:
    """Encodes captions on the teacher's device, to the values that files of embeddings hold."""

    def encode(captions: Sequence[str]) -> dict[str, Tensor]:
        with _Staged():
            cond = teacher.encode_prompts(captions, size=size, guided=False)
            return _without_padding(cond.to(teacher.family.text_dtype).given())

    return encode


def _without_padding(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Zeros in the place of padding that the network is told of, as where `cut_padding` left it out of a file."""
    tokens, mask, lengths = tensors[TOKENS], tensors.get(MASK), tensors.get(LENGTH)
    if mask is None and lengths is None:
        return tensors
    places = torch.arange(tokens.shape[1], device=tokens.device)
    kept = places < lengths.to(tokens.device)[:, None] if mask is None else mask.bool()  # type: ignore[union-attr]
    return tensors | {TOKENS: tokens.masked_fill(~kept.reshape(*kept.shape, *[1] * (tokens.ndim - 2)), 0)}


class _Staged(TorchFunctionMode):
    """Within this block, copies of tokens from the host do not wait for the device: the driver stages them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to and args[0].device.type == "cpu" and not any(isinstance(a, bool) for a in args):
            kwargs = {**kwargs, "non_blocking": True}
        return func(*args, **kwargs)
