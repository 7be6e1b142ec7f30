"""The last layers of a student that has one for every step (`fewstep.models.bank`), as other programs hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.models.bank import fused, interval_lengths
from fewstep.models.families import Teacher
from fewstep.students.card import Card


def refuse_bank(card: Card) -> None:
    """Refuse a student whose last layer changes from step to step, where a program has one for all steps.

    Raises:
        ValueError: one sentence: it takes more than one step.
    """
    if card.bank and card.num_inference_steps > 1:
        raise ValueError(
            "This student has a last layer for every step, which no pipeline of diffusers exchanges: sample it with "
            "fewstep sample."
        )


@torch.no_grad()
def fused_layers(teacher: Teacher, card: Card, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The last layer of each of the card's steps: ``weight`` [steps, out, in, ...] and ``bias`` [steps, out], float32.

    Args:
        tensors: of the student's file, in which its layers are differences from the teacher's.
    """
    network: Any = teacher.denoiser.network
    layer = network.get_submodule(network.last_layer)
    lengths, steps = interval_lengths(teacher.denoiser.schedule, card.bank), card.num_inference_steps
    edges = np.linspace(0, len(lengths), steps + 1).astype(int)
    rows = torch.from_numpy(np.stack([fused(lengths, edges[i], edges[i + 1]) for i in range(steps)])).float()
    names = [name for name in ("weight", "bias") if f"bank.{name}" in tensors]
    return {
        name: getattr(layer, name).detach().float().cpu()
        + torch.einsum("sn,n...->s...", rows, tensors[f"bank.{name}"].float().cpu())
        for name in names
    }


@torch.no_grad()
def put_last_layer(teacher: Teacher, card: Card, tensors: Mapping[str, Tensor]) -> None:
    """Put the last layer of a student's only step into the teacher's network, in place.

    Raises:
        ValueError: as `refuse_bank`.
    """
    refuse_bank(card)
    network: Any = teacher.denoiser.network
    layer = network.get_submodule(network.last_layer)
    for name, layers in fused_layers(teacher, card, tensors).items():
        getattr(layer, name).copy_(layers[0])
