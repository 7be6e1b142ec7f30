"""The data of an evaluation: prompts, reference images, and what judges and rates the images of the prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from fewstep.evaluation.measured import Features, Judge, Measured, Reference, Score


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
        noise: latents [N, ...] of unit normals that every model starts from; None: those of a seed.
        teacher: the teacher's image of every caption from the noise that students start from, [N, 3, H, W] in [0, 1].
        scores: by name what rates an image of each caption, such as its similarity to the caption.
        about: the prompts and the reference in words.
        perceptual: perceptual distance [N] of two sets of images, for `teacher`.
    """

    captions: Sequence[str]
    features: Features
    reference: Reference | None = None
    judge: Judge | None = None
    real: Callable[[range], Tensor] | None = None
    noise: Tensor | None = None
    teacher: Tensor | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    about: str = "unseen prompts"
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None

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

    def measure(self, images: Tensor) -> Measured:
        """Measure images [N, 3, H, W] in [0, 1], image i generated from caption i.

        With ``teacher``, each is also compared with the teacher's image of its caption.
        """
        measured = Measured.of(images, self.features, self.judge, self.scores)
        if self.teacher is not None:
            measured.compare_with("teacher", images, self.teacher, self._teacher_features)
            if self.perceptual is not None:
                measured.scores["perceptual"] = self.perceptual(images, self.teacher)
        return measured

    @cached_property
    def _teacher_features(self) -> Tensor:
        assert self.teacher is not None
        return self.features(self.teacher)
