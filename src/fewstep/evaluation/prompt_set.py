"""The data of an evaluation: prompts, real images as reference, and the judge of prompt accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fewstep.evaluation.measured import Features, Judge, Reference


@dataclass(frozen=True)
class PromptSet:
    """Prompts, and how the images that are generated from them are measured.

    Attributes:
        captions: the prompts, in a fixed order.
        features: the features in which distances between sets of images are measured.
        reference: statistics of real images; None: they are computed from ``real`` when they are needed.
        judge: gives the prompt accuracy of images, of which image i was generated from caption i; None: there is none.
        real: real images [n, 3, H, W] in [0, 1] by their numbers, as the teacher's autoencoder reproduces them; the
            first ``len(captions)`` belong to the captions.
    """

    captions: Sequence[str]
    features: Features
    reference: Reference | None = None
    judge: Judge | None = None
    real: Callable[[range], Tensor] | None = None

    def reference_from(self, first: int) -> Reference:
        """``reference``, else the statistics of as many real images as captions, from number ``first`` on.

        Raises:
            ValueError: this prompt set has neither.
        """
        return self.reference or self.statistics(first)

    def statistics(self, first: int) -> Reference:
        """Statistics of as many real images as there are captions, from number ``first`` on.

        Raises:
            ValueError: this prompt set has no real images.
        """
        if self.real is None:
            raise ValueError("This prompt set has no real images to measure distances to: give it a reference.")
        return Reference.of(self.real(range(first, first + len(self.captions))), self.features)
