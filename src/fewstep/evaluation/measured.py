"""What is known of a set of pictures after it was looked at once: every figure, and its interval, follows from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.data.files import replace_tensors
from fewstep.evaluation.metrics import (
    GroupedMoments,
    Moments,
    centred_interval,
    detail_features,
    distance_to,
    kid,
    overlap,
)
from fewstep.scenes64.detector import Detector, judge
from fewstep.scenes64.scenes import Scene

GROUPS = 32
"""Into so many runs of neighbours pictures are divided; intervals come from drawing runs again."""

RESAMPLINGS = 200

Features = Callable[[Tensor], Tensor]
"""Pictures [N, 3, H, W] in [0, 1] -> [N, D]: the reader's, the encoder's, or those of a network of one's own."""


@dataclass
class Reference:
    """Real pictures, to which distances are measured.

    Attributes:
        features: [N, D]; detail: moments of their patches.
    """

    features: Tensor
    detail: Moments

    @classmethod
    def of(cls, pictures: Tensor, features: Features) -> Reference:
        return cls(features(pictures), Moments.of(detail_features(pictures)))

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write a safetensors file; features in float16."""
        detail = {"mean": self.detail.mean, "covariance": self.detail.covariance}
        tensors = {"features": self.features.half(), **{f"detail_{n}": t.float() for n, t in detail.items()}}
        count = {"detail_count": str(self.detail.count)}
        replace_tensors(path, {name: t.contiguous() for name, t in tensors.items()}, {**(metadata or {}), **count})

    @classmethod
    def load(cls, path: Path) -> Reference:
        """What `save` wrote.

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
    """A set of pictures as the metrics see it.

    Attributes:
        features: [N, D]; moments, detail: grouped moments of features and patches.
        right, stated: bool [N], whether all that a caption states is shown, and whether it states anything.
        attributes: per attribute (how often right, how often stated).
    """

    features: Tensor
    moments: GroupedMoments
    detail: GroupedMoments
    right: Tensor
    stated: Tensor
    attributes: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, pictures: Tensor, scenes: Sequence[Scene], features: Features, reader: Detector | None) -> Measured:
        """Look at pictures [N, 3, H, W] that were drawn for the captions of ``scenes``; no reader, no accuracy."""
        seen = features(pictures)
        groups = min(GROUPS, len(pictures))
        detail = GroupedMoments.join([detail_features(part) for part in pictures.tensor_split(groups)])
        judged = [] if reader is None else [judge(f, s) for f, s in zip(reader.read(pictures), scenes, strict=True)]
        attributes: dict[str, tuple[int, int]] = {}
        for judgement in judged:
            for name, counts in judgement.counts.items():
                before = attributes.get(name, (0, 0))
                attributes[name] = (before[0] + counts[0], before[1] + counts[1])
        right = torch.tensor([j.all_right and j.stated for j in judged], dtype=torch.float64)
        stated = torch.tensor([j.stated for j in judged], dtype=torch.float64)
        return cls(seen, GroupedMoments.of(seen, groups), detail, right, stated, attributes)

    def figures(self, real: Reference) -> dict[str, float]:
        """Distances to ``real``, overlap with it, and accuracy: all and per attribute."""
        found = {name: float(curve(None)) for name, curve in self._curves(real).items()}
        found["KID"] = kid(self.features, real.features)
        equal = real.features[: len(self.features)]  # neighbourhoods shrink with the number: compare as many
        if len(equal) > 5:
            found |= vars(overlap(self.features, equal))
        for name, (right, stated) in self.attributes.items():
            found[f"accuracy of {name}"] = right / stated
        return found

    def resampled(self, real: Reference, seed: int = 0) -> dict[str, Tensor]:
        """FD, detail FD and accuracy over resamplings of the groups, [RESAMPLINGS] each.

        The draws depend on the seed and on how many pictures there are alone: sets made from the same prompts and the
        same noise are resampled together, so their differences and ratios can be taken one by one.
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
        """Figures as functions of how often each group counts."""
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


def interval(values: Tensor, plain: float) -> tuple[float, float]:
    """95 % interval of a figure from its `Measured.resampled` values."""
    return centred_interval(values, plain)


def gap_closed(few: Tensor, many: Tensor, student: Tensor) -> Tensor:
    """Part of the teacher's loss between many and few steps that the student does not have: 1 is all, 0 none.

    Elementwise on figures or on resampled ones, of distances that are better when small.
    """
    return (few - student) / (few - many)
