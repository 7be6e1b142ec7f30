"""An endless, indexable set of captioned scenes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from random import Random
from typing import NamedTuple

import numpy as np

from fewstep.data.random import stream_key
from fewstep.scenes64.scenes.caption import DEFAULT_STATED, describe
from fewstep.scenes64.scenes.content import FILLS, NUMBERS, Scene, draw_scene
from fewstep.scenes64.scenes.render import Bytes, render


class Rendered(NamedTuple):
    """Images uint8 [n, size, size, 3], their captions, and the scenes with contents and statements."""

    images: Bytes
    captions: list[str]
    scenes: list[Scene]


class Scenes:
    """Scene number ``index`` of set ``seed``, the same whatever is rendered beside it.

    Args:
        seed: of the set; sets of different seeds have nothing in common.
        size: side of the images in pixels.
        numbers, fills: how often 1, 2, 3 and 4 things come, and each kind of fill.
    """

    def __init__(
        self, seed: int, size: int = 64, numbers: Sequence[float] = NUMBERS, fills: Mapping[str, float] = FILLS
    ) -> None:
        self.seed, self.size, self.numbers, self.fills = seed, size, tuple(numbers), fills

    def scene(self, index: int, telling: int = 0, stated: float = DEFAULT_STATED) -> Scene:
        """Content and caption; ``telling`` gives other captions of the same image, ``stated`` fuller ones."""
        scene = draw_scene(Random(stream_key(self.seed, "scene", index)), self.numbers, self.fills)
        return describe(scene, Random(stream_key(self.seed, "caption", index, telling)), stated)

    def render(self, indices: Iterable[int]) -> Rendered:
        """The scenes ``indices``, in their order."""
        scenes = [self.scene(i) for i in indices]
        images = np.empty((len(scenes), self.size, self.size, 3), dtype=np.uint8)
        for image, scene in zip(images, scenes, strict=True):
            image[:] = render(scene, self.size)
        return Rendered(images, [s.caption for s in scenes], scenes)
