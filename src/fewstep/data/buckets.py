"""Aspect buckets: sizes of about one area, so that images need not all be cut to squares.

A bucket's sides are multiples of a step and its area is at most the square's. For every side there is the longest other
one, both ways round, down to four times as long as wide; at 1024 pixels in steps of 64 that gives sizes which SDXL was
trained on (Podell et al. 2023, arXiv 2307.01952, appendix I).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Size = tuple[int, int]
"""(height, width) in pixels."""

_LONGEST = 4.0
_STEPS = 16  # of a square's side, at most


def bucket_sizes(side: int, multiple: int) -> tuple[Size, ...]:
    """The buckets of a square of ``side`` pixels; sides are multiples of a multiple of ``multiple``."""
    step = multiple * max(1, round(side / _STEPS / multiple))
    found = {(side, side)}
    for one in range(step, int(side * math.sqrt(_LONGEST)) + 1, step):
        other = side * side // one // step * step
        if other and max(one, other) <= _LONGEST * min(one, other):
            found |= {(one, other), (other, one)}
    return tuple(sorted(found))


def nearest(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """The bucket of the nearest shape, of which an image of this size loses least: by the ratio of the ratios."""
    return min(sizes, key=lambda size: (abs(math.log(size[0] * width / (size[1] * height))), -size[0] * size[1], size))
