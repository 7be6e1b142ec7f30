"""Aspect buckets: sizes of about one area, so that images need not all be cut to squares.

A bucket's sides are multiples of a step and its area is at most the square's. Every side comes with the longest other
side, in both orientations, up to an aspect ratio of four; at 1024 pixels in steps of 64 these are sizes that SDXL was
trained on (Podell et al. 2023, arXiv 2307.01952, appendix I).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Size = tuple[int, int]
"""(height, width) in pixels."""

_MAX_RATIO = 4.0  # largest ratio of the long side to the short one
_STEPS = 16  # steps along the side of the square, at most


def bucket_sizes(side: int, multiple: int) -> tuple[Size, ...]:
    """The buckets of a square of ``side`` pixels; their sides are multiples of ``multiple`` or of a coarser step."""
    step = multiple * max(1, round(side / _STEPS / multiple))
    found = {(side, side)}
    for one in range(step, int(side * math.sqrt(_MAX_RATIO)) + 1, step):
        other = side * side // one // step * step
        if other and max(one, other) <= _MAX_RATIO * min(one, other):
            found |= {(one, other), (other, one)}
    return tuple(sorted(found))


def nearest(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest, in the logarithm: an image of this size loses least by cropping to it.

    Between equally near ones the larger wins.
    """
    return min(sizes, key=lambda size: (abs(math.log(size[0] * width / (size[1] * height))), -size[0] * size[1], size))
