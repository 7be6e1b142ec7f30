"""Extra inputs of a role — the guidance scale w, the target time s — as zero-initialised embeddings.

They belong to the role, not to the base network: the base takes one more vector [B, width] that joins its time
embedding, and the role's own small layers make that vector. Zero at the start, so the student begins as the
teacher, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from fewstep.diffusion.schedule import Schedule

EMBED_WIDTH = 256


class ExtraInputs(nn.Module):
    """Sum of the embeddings of the named extra inputs.

    ``guidance_embed``: sinusoid of 1000 (w - 1) through one bias-free layer, LCM's ``cond_proj`` (w counts 1 as
    off; LCM's own w is w - 1). ``end``: sinusoid of the target time on the 1000-step scale of the network.

    Args:
        names: any of "guidance_embed" and "end".
        width: channels of the network's time embedding input.
        schedule: gives target times their scale.
    """

    def __init__(self, names: Iterable[str], width: int, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.project = nn.ModuleDict()
        for name in sorted(names):
            layer = nn.Linear(EMBED_WIDTH, width, bias=False)
            nn.init.zeros_(layer.weight)
            self.project[name] = layer

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.project)

    def forward(self, guidance_embed: Tensor | None = None, end: Tensor | None = None) -> Tensor | None:
        """[B] inputs -> [B, width] in the layers' own dtype, or None when nothing was given."""
        total: Tensor | None = None
        for name, value in (("guidance_embed", guidance_embed), ("end", end)):
            if value is not None and name in self.project:
                layer = cast(nn.Linear, self.project[name])
                phase = 1000 * (value - 1) if name == "guidance_embed" else self._index(value)
                part = layer(sinusoid(self._precise(phase, layer), EMBED_WIDTH).to(layer.weight.dtype))
                total = part if total is None else total + part
        return total

    @staticmethod
    def _precise(phase: Tensor, layer: nn.Linear) -> Tensor:
        """``phase`` in the layer's precision, at least float32: `sinusoid` would take integers to float32 alone."""
        least = torch.promote_types(layer.weight.dtype, torch.float32)
        return phase.to(torch.promote_types(phase.dtype, least))

    def _index(self, t: Tensor) -> Tensor:
        if self.schedule.family == "flow":
            return t * self.schedule.num_train_timesteps
        return 250 * t.clamp_min(1e-8).log() if self.schedule.family == "edm" else t


def sinusoid(value: Tensor, width: int) -> Tensor:
    """[B] -> [B, width] sines then cosines, frequencies 10000^(-i/(width/2 - 1)); float32 at least.

    Half precision cannot hold these phases: near 10,000 its spacing is 8.
    """
    half = width // 2
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    frequency = torch.arange(half, device=value.device, dtype=value.dtype) * (-math.log(10000.0) / (half - 1))
    phase = value[:, None] * frequency.exp()[None]
    return torch.cat([phase.sin(), phase.cos()], dim=1)
