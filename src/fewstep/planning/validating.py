"""Memory of validation during training: what is held for it between measurements, and what one adds at its peak."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.evaluation.compare import rows_at_once
from fewstep.models.cond import Cond
from fewstep.models.meta_pipeline import MetaPipeline
from fewstep.models.roles import Roles
from fewstep.planning.memory_trace import DeviceRules, MemoryTracker, size_of
from fewstep.planning.peaks import tensors_of

Seen = tuple[nn.Module, Callable[[Tensor], Any], int]
"""A network on the meta device, its call on images [n, 3, H, W], and how many it is given together."""


@dataclass(frozen=True)
class Measuring:
    """How students are measured during training, as far as memory goes.

    Attributes:
        count: prompts. steps: of the student. guidance_scale: of the student; 1 is off.
        networks: all that see its images.
        paired: whether the teacher's image of each prompt is kept.
    """

    count: int
    steps: int
    guidance_scale: float
    networks: tuple[Seen, ...]
    paired: bool


def held_between(measuring: Measuring, pipeline: MetaPipeline, device: str) -> int:
    """Bytes that stay on the device during training: the networks and the encoded prompts.

    On a CPU also the noise, and the teacher's images, which never leave the host.
    """
    networks = {id(network): network for network, _, _ in measuring.networks}  # one may give several figures
    tensors = [t for network in networks.values() for t in tensors_of(network)]
    kept = list(_prompts(measuring.count, pipeline).flat().values())
    if device == "cpu":
        kept.append(torch.empty(measuring.count, *pipeline.latent_shape, device="meta"))
        if measuring.paired:
            kept.append(_images(measuring.count, pipeline))
    return sum(size_of(tensor, device) for tensor in (*tensors, *kept))


@torch.no_grad()
def peak_beyond(measuring: Measuring, pipeline: MetaPipeline, roles: Roles, device: str, decoding: int) -> int:
    """Bytes that a measurement adds at its peak: while it samples, decodes, or shows images to a network.

    Args:
        decoding: those that the autoencoder adds.
    """
    view = roles.views()["ema" if "ema" in roles else "student"].uncounted()
    together = min(measuring.count, rows_at_once(pipeline.latent_shape))
    x = torch.empty(together, *pipeline.latent_shape, device="meta")
    cond, states = (
        _prompts(together, pipeline),
        (measuring.steps + 2) * measuring.count * size_of(x[:1].clone(), device),
    )
    known = [*tensors_of(roles.base), *roles.tensors().values(), x, *cond.tensors.values()]
    sampling = _peak(device, known, lambda: view(x, view.schedule.start, cond, measuring.guidance_scale))
    images = size_of(_images(measuring.count, pipeline), device)
    seen = [
        _peak(device, tensors_of(network), partial(call, _images(min(n, measuring.count), pipeline)))
        for network, call, n in measuring.networks
    ]
    return states + max(sampling, images + max([decoding, images, *seen]))


def _peak(device: str, known: Iterable[Tensor], call: Callable[[], Any]) -> int:
    tracker = MemoryTracker(device, known)
    with DeviceRules(device, None), tracker:
        call()
    return tracker.peak


def _prompts(count: int, pipeline: MetaPipeline) -> Cond:
    return pipeline.prompts(count, next(pipeline.base.parameters()).dtype)


def _images(count: int, pipeline: MetaPipeline) -> Tensor:
    side = pipeline.image_size or 0
    return torch.empty(count, 3, side, side, device="meta")
