"""Statistics of a set of images, computed in one pass: every figure and its interval follow from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fewstep.data.files import replace_tensors
from fewstep.evaluation.metrics import GroupedMoments, Moments, detail_features, distance_to, within
from fewstep.evaluation.resampled import (
    NEIGHBOURS,
    Curve,
    frechet_curve,
    kid_curve,
    mean_curve,
    overlap_curves,
    root_mean_curve,
    share_curve,
)

GROUPS = 32
"""Images are divided into this many groups of neighbours; intervals come from resampling the groups."""

RESAMPLINGS = 200

Features = Callable[[Tensor], Tensor]
"""Images [N, 3, H, W] in [0, 1] -> features [N, D]: a detector's, an encoder's, or those of any other network."""


@dataclass(frozen=True)
class Judgement:
    """How one image agrees with its prompt.

    Attributes:
        counts: per attribute that the prompt states: (how often right, how often stated).
        all_right: whether everything stated holds, and everything mentioned is there.
        stated: whether the prompt states anything.
    """

    counts: dict[str, tuple[int, int]]
    all_right: bool
    stated: bool


Judge = Callable[[Tensor], Sequence[Judgement]]
"""Images [N, 3, H, W] in [0, 1], one of each of N prompts in their order -> a judgement of each."""

Score = Callable[[Tensor], Tensor]
"""Images as a `Judge` sees them -> a number [N] for each, such as its similarity to its prompt."""


@dataclass
class Reference:
    """Statistics of real images, to which distances are measured.

    Attributes:
        features: [N, D]; detail: moments of the images' patches.
    """

    features: Tensor
    detail: Moments

    @classmethod
    def of(cls, images: Tensor, features: Features) -> Reference:
        """From images [N, 3, H, W] in [0, 1]."""
        return cls(features(images), Moments.of(detail_features(images)))

    @classmethod
    def of_batches(cls, batches: Iterable[Tensor], features: Features) -> Reference:
        """As `of`, from batches [n, 3, H, W]: of many or large images the patches alone would fill the memory."""
        found: list[Tensor] = []

        def details() -> Iterator[Tensor]:
            for images in batches:
                found.append(features(images))
                yield detail_features(images)

        detail = GroupedMoments.join(details()).moments()
        return cls(torch.cat(found), detail)

    @cached_property
    def within(self) -> float:
        """KID's mean over pairs of these images: the costliest part of all figures where there are many."""
        return within(self.features)

    @cached_property
    def detail_distance(self) -> Callable[[Moments], float]:
        """The Frechet distance of other moments to ``detail``."""
        return distance_to(self.detail)

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write a safetensors file, features in float16."""
        detail = {"mean": self.detail.mean, "covariance": self.detail.covariance}
        tensors = {"features": self.features.half(), **{f"detail_{n}": t.float() for n, t in detail.items()}}
        count = {"detail_count": str(self.detail.count)}
        replace_tensors(path, {name: t.contiguous() for name, t in tensors.items()}, {**(metadata or {}), **count})

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read a file that `save` wrote.

        Raises:
            ValueError: when the file is missing, damaged or something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                mean, covariance = (file.get_tensor(f"detail_{n}").double() for n in ("mean", "covariance"))
                detail = Moments(mean, covariance, int(file.metadata()["detail_count"]))
                return cls(file.get_tensor("features").float(), detail)
        except (OSError, SafetensorError, KeyError, TypeError):
            raise ValueError(f"{path} holds no reference statistics: make them by 'fewstep teacher measure'.") from None


@dataclass
class Measured:
    """A set of images as the metrics see it.

    Attributes:
        features: [N, D]; detail: grouped moments of patches. counts: [G], images in each group that is resampled.
        right, stated: float64 [N], 1 where everything that a prompt states is shown, and where it states anything.
        attributes: per attribute (how often right, how often stated).
        scores: name -> a score [N] of each image, whose mean is a figure; squares: whose root mean is one.
    """

    features: Tensor
    detail: GroupedMoments
    counts: Tensor
    right: Tensor
    stated: Tensor
    attributes: dict[str, tuple[int, int]] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, images: Tensor, features: Features, judge: Judge | None = None, scores: Mapping[str, Score] | None = None
    ) -> Measured:
        """Measure images [N, 3, H, W] in [0, 1]; without a judge there is no accuracy."""
        parts = images.tensor_split(min(GROUPS, len(images)))
        counts = torch.tensor([len(part) for part in parts])
        detail = GroupedMoments.join(detail_features(part) for part in parts)
        judged = [] if judge is None else judge(images)
        attributes: dict[str, tuple[int, int]] = {}
        for judgement in judged:
            for name, found in judgement.counts.items():
                before = attributes.get(name, (0, 0))
                attributes[name] = (before[0] + found[0], before[1] + found[1])
        right = torch.tensor([j.all_right and j.stated for j in judged], dtype=torch.float64)
        stated = torch.tensor([j.stated for j in judged], dtype=torch.float64)
        scored = {name: score(images) for name, score in (scores or {}).items()}
        return cls(features(images), detail, counts, right, stated, attributes, scored)

    def compare_with(self, name: str, images: Tensor, others: Tensor, features: Tensor) -> None:
        """Add the figures "to <name>" and "unlike <name>": differences of each image and its counterpart in ``others``.

        Args:
            images, others: [N, 3, H, W] in [0, 1]; features: [N, D] of ``others``.
        """
        self.squares[f"to {name}"] = (images - others).double().square().flatten(1).mean(dim=1)
        self.scores[f"unlike {name}"] = 1 - cosine_similarity(self.features.double(), features.double(), dim=1)

    def figures(self, real: Reference) -> dict[str, float]:
        """Distances to ``real``, overlap with it, accuracy (all and per attribute), and the mean of every score."""
        found = {name: curve(None) for name, curve in self._curves(real).items()}
        for name, (right, stated) in self.attributes.items():
            found[f"accuracy of {name}"] = right / stated
        return found

    def resampled(self, real: Reference, seed: int = 0) -> dict[str, Tensor]:
        """Every figure but the accuracy of single attributes over resamplings of the groups, [RESAMPLINGS] each.

        The draws depend only on the seed and the number of images: sets that were generated from the same prompts and
        the same noise are resampled together, so that differences and ratios can be taken resampling by resampling.
        """
        weights = resamplings(len(self.counts), seed)
        return {
            name: torch.tensor([curve(w) for w in weights], dtype=torch.float64)
            for name, curve in self._curves(real).items()
        }

    def _curves(self, real: Reference) -> dict[str, Curve]:
        """Figures as functions of how often each group counts (None: once)."""
        found: dict[str, Curve] = {
            "FD": frechet_curve(self.features, real.features, self.counts),
            "detail FD": lambda w: real.detail_distance(self.detail.moments(w)),
        }
        if self.stated.sum() > 0:
            found["accuracy"] = share_curve(self.right, self.stated, self.counts)
        found["KID"] = kid_curve(self.features, real.features, self.counts, real.within)
        equal = real.features[: len(self.features)]  # neighbourhoods shrink with the number: compare as many
        if len(equal) > NEIGHBOURS:
            found |= overlap_curves(self.features, equal, self.counts)
        found |= {name: root_mean_curve(values, self.counts) for name, values in self.squares.items()}
        return found | {name: mean_curve(values, self.counts) for name, values in self.scores.items()}


def resamplings(groups: int, seed: int = 0) -> Tensor:
    """How often each group counts in each resampling: float64 [RESAMPLINGS, groups]."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(groups, (RESAMPLINGS, groups), generator=generator)
    ones = torch.ones(RESAMPLINGS, groups, dtype=torch.float64)
    return torch.zeros(RESAMPLINGS, groups, dtype=torch.float64).scatter_add_(1, draws, ones)


def gap_closed(few: Tensor, many: Tensor, student: Tensor) -> Tensor:
    """Share of the gap between the teacher at few and at many steps that the student closes: 1 is all of it, 0 none.

    Elementwise on figures or on resampled ones, of distances that are better when they are small.
    """
    return (few - student) / (few - many)
