"""Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in integer operations of torch.

A counter-based generator: four 32-bit words are a function of a counter and a key, so that any number of a stream is
computed by its place, with nothing before it. The words are the same on every device, and those of Random123.

Normals follow by Box and Muller's transform, two from two words. In float32, devices differ by some units in the last
place, because logarithm and cosine are each device's own; on one kind of device a row has the same bits alone and among
others. In float64 the same words give the same numbers, with more digits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MULTIPLIERS, _WEYL, _WORD = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 0xFFFFFFFF
# Counters of one pass. A processor is fastest while its cache holds the words; a device waits for launches, about 120 a
# pass, so that there the bound is one of memory (60 MB).
_ON_HOST, _ON_DEVICE = 1 << 15, 1 << 20


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """The words 0 and 2, and the words 1 and 3, int64 [2, ...] each, at counters of four words.

    Args:
        c0, c1, c2, c3: int64, from 0 to 2^32 - 1, of shapes that broadcast.
        key: from 0 to 2^64 - 1.
    """
    for turn in range(10):
        k0, k1 = ((part + turn * step) & _WORD for part, step in zip((key, key >> 32), _WEYL, strict=True))
        # Products of two words may pass 2^63 and turn negative: their 64 bits are right, and no more are looked at.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # c1 and c3 keep the upper half of a product until the end: only what is multiplied next must be one word.
        c0, c1 = ((p1 >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(_WORD), p1
        c2, c3 = ((p0 >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(_WORD), p0
    return torch.stack([c0, c2]), torch.stack([c1, c3]).bitwise_and_(_WORD)


def unit_normals(key: int, rows: range, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Unit normals [len(rows), size], at most 6.7 in size: those of a row follow from ``key`` and its number alone.

    The counter is (block, row, 0, 0), with four numbers a block; those of the same words lie side by side.
    """
    blocks, exact = -(-size // 4), dtype if dtype == torch.float64 else torch.float32
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    drawn = torch.empty(len(rows), 2, 2, blocks, device=device, dtype=exact)
    each = max(1, (_ON_HOST if device.type == "cpu" else _ON_DEVICE) // max(1, len(rows)))
    for first in range(0, blocks, each):
        block = torch.arange(first, min(first + each, blocks), device=device)
        _box_muller(*philox(block, row, zero, zero, key), drawn[..., first : first + each])
    return drawn.flatten(1)[:, :size].to(dtype)


def _box_muller(radius: Tensor, angle: Tensor, out: Tensor) -> None:
    """Two independent unit normals from each two words, both [2, rows, blocks], into ``out`` [rows, 2, 2, blocks]."""
    # (word + 1/2) / 2^32 is never 0; where float32 rounds it to 1, the radius is 0
    r = radius.to(out.dtype).mul_(2.0**-32).add_(2.0**-33).log_().mul_(-2).sqrt_().transpose(0, 1)
    turned = angle.to(out.dtype).mul_(2 * math.pi * 2.0**-32).transpose(0, 1)
    torch.mul(r, turned.cos(), out=out[:, :, 0])
    torch.mul(r, turned.sin_(), out=out[:, :, 1])
