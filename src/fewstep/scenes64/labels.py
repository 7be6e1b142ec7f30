"""What is drawn in scenes, as tensors, and the loss of a network that tells it for each cell of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.scenes64.scenes import ATTRIBUTES, Scene

MOST = 4
"""Things in a scene."""

ANSWERS: dict[str, int] = {"near": 1, "geometry": 3, **{name: len(values) for name, values in ATTRIBUTES.items()}}
"""What a cell tells, and by how many numbers."""


class Labels(NamedTuple):
    """What is drawn in B scenes.

    Attributes:
        centres: [B, MOST, 2], x and y in sides; radii: [B, MOST] in sides.
        classes: int64 [B, MOST, attributes], in the order of ATTRIBUTES.
        present: bool [B, MOST].
    """

    centres: Tensor
    radii: Tensor
    classes: Tensor
    present: Tensor

    @classmethod
    def of(cls, scenes: Sequence[Scene]) -> Labels:
        centres, radii = torch.zeros(len(scenes), MOST, 2), torch.full((len(scenes), MOST), 0.1)
        classes = torch.zeros(len(scenes), MOST, len(ATTRIBUTES), dtype=torch.int64)
        present = torch.zeros(len(scenes), MOST, dtype=torch.bool)
        for i, scene in enumerate(scenes):
            for j, thing in enumerate(scene.things):
                centres[i, j] = torch.tensor([thing.x, thing.y])
                radii[i, j] = thing.radius
                values = [names.index(getattr(thing, name)) for name, names in ATTRIBUTES.items()]
                classes[i, j] = torch.tensor(values)
                present[i, j] = True
        return cls(centres, radii, classes, present)

    def rows(self, indices: Tensor) -> Labels:
        return Labels(*(t[indices] for t in self))

    @classmethod
    def cat(cls, parts: Sequence[Labels]) -> Labels:
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def reading_loss(answers: dict[str, Tensor], labels: Labels) -> dict[str, Tensor]:
    """Loss of a network's answers: centres, places and radii, and each attribute's cross entropy.

    ``answers`` are those of `ANSWERS` for a grid of any size: ``near`` [B, n, n], the others [B, n, n, numbers]. Every
    cell answers for the thing nearest to it; only cells within about one and a half of its centre count, so that a
    maximum found one cell off still says the right things. Every picture counts alike, however much it shows, so the
    loss of a batch is the mean of its parts' losses.
    """
    owner, distance = nearest(labels, answers["near"].shape[-1])
    target = (-0.5 * distance.square()).exp()
    near = F.binary_cross_entropy_with_logits(answers["near"], target, reduction="none")
    entropy = F.binary_cross_entropy(target, target, reduction="none")  # so that a perfect answer costs nothing
    weight = (-distance.square()).exp() * (distance < 1.6)
    weight = weight / weight.sum(dim=(1, 2), keepdim=True)
    offset = geometry(labels, owner) - answers["geometry"]
    errors = {"geometry": F.smooth_l1_loss(offset, torch.zeros_like(offset), reduction="none").sum(-1)}
    for i, name in enumerate(ATTRIBUTES):
        classes = labels.classes[..., i].gather(1, owner.flatten(1)).view_as(owner)
        errors[name] = F.cross_entropy(answers[name].permute(0, 3, 1, 2), classes, reduction="none")
    parts = {"near": ((near - entropy).sum(dim=(1, 2)) / labels.present.sum(dim=1)).mean()}
    parts |= {name: (weight * error).sum(dim=(1, 2)).mean() for name, error in errors.items()}
    return {"loss": torch.stack(list(parts.values())).sum(), **parts}


def cell_middles(cells: int, device: torch.device | str = "cpu") -> Tensor:
    """[n, n, 2], x and y in sides."""
    middle = (torch.arange(cells, device=device) + 0.5) / cells
    return torch.stack(torch.meshgrid(middle, middle, indexing="xy"), dim=-1)


def nearest(labels: Labels, cells: int) -> tuple[Tensor, Tensor]:
    """For every cell of n x n the nearest thing's index, int64 [B, n, n], and its distance in cells."""
    between = cell_middles(cells, labels.centres.device)[None, :, :, None] - labels.centres[:, None, None]
    distances = between.norm(dim=-1) * cells
    distances = distances.masked_fill(~labels.present[:, None, None], float("inf"))
    distance, owner = distances.min(dim=-1)
    return owner, distance


def geometry(labels: Labels, owner: Tensor) -> Tensor:
    """What the ``geometry`` answer should be, [B, n, n, 3]: x and y from the cell's middle in cells, log radius."""
    cells = owner.shape[-1]
    flat = owner.flatten(1)
    centres = labels.centres.gather(1, flat[..., None].expand(-1, -1, 2)).view(*owner.shape, 2)
    radii = labels.radii.gather(1, flat).view_as(owner)
    return torch.cat([(centres - cell_middles(cells, owner.device)) * cells, radii.log()[..., None]], dim=-1)
