"""Statistics of a set of images, computed in one pass: every figure and its interval follow from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.data.files import replace_tensors
from fewstep.evaluation.metrics import GroupedMoments, Moments, detail_features, distance_to, kid, overlap

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
        features: [N, D]; moments, detail: grouped moments of features and patches.
        right, stated: float64 [N], 1 where everything that a prompt states is shown, and where it states anything.
        attributes: per attribute (how often right, how often stated).
    """

    features: Tensor
    moments: GroupedMoments
    detail: GroupedMoments
    right: Tensor
    stated: Tensor
    attributes: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, images: Tensor, features: Features, judge: Judge | None = None) -> Measured:
        """Measure images [N, 3, H, W] in [0, 1]; without a judge there is no accuracy."""
        found = features(images)
        groups = min(GROUPS, len(images))
        detail = GroupedMoments.join([detail_features(part) for part in images.tensor_split(groups)])
        judged = [] if judge is None else judge(images)
        attributes: dict[str, tuple[int, int]] = {}
        for judgement in judged:
            for name, counts in judgement.counts.items():
                before = attributes.get(name, (0, 0))
                attributes[name] = (before[0] + counts[0], before[1] + counts[1])
        right = torch.tensor([j.all_right and j.stated for j in judged], dtype=torch.float64)
        stated = torch.tensor([j.stated for j in judged], dtype=torch.float64)
        return cls(found, GroupedMoments.of(found, groups), detail, right, stated, attributes)

    def figures(self, real: Reference) -> dict[str, float]:
        """Distances to ``real``, overlap with it, and accuracy: all and per attribute."""
        found = {name: float(curve(None)) for name, curve in self._curves(real).items()}
        found["KID"] = kid(self.features, real.features)
        equal = real.features[: len(self.features)]  # neighbourhoods shrink with the number: compare as many
        if len(equal) > 5:
            found |= overlap(self.features, equal)
        for name, (right, stated) in self.attributes.items():
            found[f"accuracy of {name}"] = right / stated
        return found

    def resampled(self, real: Reference, seed: int = 0) -> dict[str, Tensor]:
        """FD, detail FD and accuracy over resamplings of the groups, [RESAMPLINGS] each.

        The draws depend only on the seed and the number of images: sets that were generated from the same prompts and
        the same noise are resampled together, so that differences and ratios can be taken resampling by resampling.
        """
        groups = len(self.moments.counts)
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randint(groups, (RESAMPLINGS, groups), generator=generator)
        weights = torch.zeros(RESAMPLINGS, groups, dtype=torch.float64).scatter_add_(
            1, draws, torch.ones(RESAMPLINGS, groups, dtype=torch.float64)
        )
        return {
            name: torch.tensor([float(curve(w)) for w in weights], dtype=torch.float64)
            for name, curve in self._curves(real).items()
        }

    def _curves(self, real: Reference) -> dict[str, Callable[[Tensor | None], float]]:
        """Figures as functions of how often each group counts (None: once)."""
        by_features, by_detail = distance_to(Moments.of(real.features)), distance_to(real.detail)
        found: dict[str, Callable[[Tensor | None], float]] = {
            "FD": lambda w: by_features(self.moments.moments(w)),
            "detail FD": lambda w: by_detail(self.detail.moments(w)),
        }
        if self.stated.sum() > 0:
            groups = len(self.moments.counts)
            right, stated = (
                torch.stack([part.sum() for part in t.tensor_split(groups)]) for t in (self.right, self.stated)
            )
            found["accuracy"] = lambda w: float(right.sum() / stated.sum() if w is None else (w @ right) / (w @ stated))
        return found


def gap_closed(few: Tensor, many: Tensor, student: Tensor) -> Tensor:
    """Share of the gap between the teacher at few and at many steps that the student closes: 1 is all of it, 0 none.

    Elementwise on figures or on resampled ones, of distances that are better when they are small.
    """
    return (few - student) / (few - many)
