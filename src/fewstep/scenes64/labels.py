"""The content of scenes as tensors, and the loss of a network that detects it in each cell of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.models.cond import Cond
from fewstep.scenes64.scenes import ATTRIBUTES, Scene

MOST = 4
"""Most things in a scene."""

CELL_CHANNELS: dict[str, int] = {"near": 1, "geometry": 3, **{name: len(values) for name, values in ATTRIBUTES.items()}}
"""The predictions of a cell, and how many numbers each has."""


class Labels(NamedTuple):
    """The things in B scenes.

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
    def from_cond(cls, cond: Cond | None) -> Labels:
        """The labels among the tensors of a batch's condition."""
        assert cond is not None
        return cls(**{name: cond[name] for name in cls._fields})

    @classmethod
    def cat(cls, parts: Sequence[Labels]) -> Labels:
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def detection_loss(cells: dict[str, Tensor], labels: Labels) -> dict[str, Tensor]:
    """``loss`` and its terms: centres, places and radii, and the cross entropy of each attribute.

    Every cell predicts the thing nearest to it; only cells within about one and a half of its centre count, so that a
    maximum that is one cell off still has the right attributes. Every image has the same weight, however many things
    it shows, so that the loss of a batch is the mean of its parts' losses.

    Args:
        cells: the predictions `CELL_CHANNELS` on a grid of any size: ``near`` [B, n, n], others [B, n, n, numbers].
    """
    owner, distance = nearest(labels, cells["near"].shape[-1])
    target = (-0.5 * distance.square()).exp()
    near = F.binary_cross_entropy_with_logits(cells["near"], target, reduction="none")
    entropy = F.binary_cross_entropy(target, target, reduction="none")  # so that a perfect prediction costs nothing
    weight = (-distance.square()).exp() * (distance < 1.6)
    weight = weight / weight.sum(dim=(1, 2), keepdim=True)
    offset = geometry(labels, owner) - cells["geometry"]
    errors = {"geometry": F.smooth_l1_loss(offset, torch.zeros_like(offset), reduction="none").sum(-1)}
    for i, name in enumerate(ATTRIBUTES):
        classes = labels.classes[..., i].gather(1, owner.flatten(1)).view_as(owner)
        errors[name] = F.cross_entropy(cells[name].permute(0, 3, 1, 2), classes, reduction="none")
    parts = {"near": ((near - entropy).sum(dim=(1, 2)) / labels.present.sum(dim=1)).mean()}
    parts |= {name: (weight * error).sum(dim=(1, 2)).mean() for name, error in errors.items()}
    return {"loss": torch.stack(list(parts.values())).sum(), **parts}


def cell_middles(cells: int, device: torch.device | str = "cpu") -> Tensor:
    """[n, n, 2], x and y in sides."""
    middle = (torch.arange(cells, device=device) + 0.5) / cells
    return torch.stack(torch.meshgrid(middle, middle, indexing="xy"), dim=-1)


def nearest(labels: Labels, cells: int) -> tuple[Tensor, Tensor]:
    """The index of the thing nearest to every cell of n x n, int64 [B, n, n], and its distance in cells."""
    between = cell_middles(cells, labels.centres.device)[None, :, :, None] - labels.centres[:, None, None]
    distances = between.norm(dim=-1) * cells
    distances = distances.masked_fill(~labels.present[:, None, None], float("inf"))
    distance, owner = distances.min(dim=-1)
    return owner, distance


def geometry(labels: Labels, owner: Tensor) -> Tensor:
    """The target of ``geometry``, [B, n, n, 3]: x and y from the cell's middle in cells, log radius."""
    cells = owner.shape[-1]
    flat = owner.flatten(1)
    centres = labels.centres.gather(1, flat[..., None].expand(-1, -1, 2)).view(*owner.shape, 2)
    radii = labels.radii.gather(1, flat).view_as(owner)
    return torch.cat([(centres - cell_middles(cells, owner.device)) * cells, radii.log()[..., None]], dim=-1)
