"""A small network for low-dimensional students: what `fewstep verify` trains against closed-form teachers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.diffusion.schedule import Array, Schedule, expand, host
from fewstep.models.cond import Cond
from fewstep.models.denoiser import check_taps
from fewstep.models.extras import sinusoid
from fewstep.models.lora import checkpoint


class MLP(nn.Module):
    """Residual MLP for data [B, dim] with optional class labels and extra inputs.

    The noise level enters as features of atan(sigma/alpha), so one network serves every schedule; the input is
    brought to unit scale by 1/sqrt(alpha^2 std^2 + sigma^2).

    Args:
        schedule: gives times their noise level.
        dim: data dimension.
        width, depth: hidden size and number of residual blocks.
        num_classes: labels 0 ... num_classes - 1 and -1 for none; 0 for unconditional data.
        accepts: extra inputs, of "end" and "guidance_embed".
        mean: [dim] of the data, std: over all dimensions; the output is mean + std times the last layer, which
            suits "sample" networks (leave both alone for other prediction types).
    """

    mean: Tensor
    last_layer = "outlet"

    def __init__(
        self,
        schedule: Schedule,
        dim: int,
        width: int = 128,
        depth: int = 3,
        num_classes: int = 0,
        accepts: frozenset[str] = frozenset(),
        mean: Tensor | None = None,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        self.schedule, self.accepts = schedule, accepts
        self.gradient_checkpointing = False
        self.std = float(std)
        self.register_buffer("mean", torch.zeros(dim) if mean is None else mean.detach().clone().float())
        self.time = nn.Linear(_TIME_WIDTH, width)
        self.label = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.end = nn.Linear(_TIME_WIDTH, width) if "end" in accepts else None
        self.guidance = nn.Linear(_TIME_WIDTH, width) if "guidance_embed" in accepts else None
        self.inlet = nn.Linear(dim, width)
        # Flow maps of mixtures turn sharply between modes: steep first features, spread over the data, learn that
        # several times faster than the default initialisation.
        nn.init.normal_(self.inlet.weight, std=2.0)
        nn.init.uniform_(self.inlet.bias, -4.0, 4.0)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.outlet: nn.Module = nn.Linear(width, dim)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Cond | None = None,
        *,
        end: Tensor | None = None,
        guidance_embed: Tensor | None = None,
    ) -> Tensor:
        h = self._entered(x, t, cond, end, guidance_embed)
        for block in self.blocks:
            h = self._through(block, h)
        return cast(Tensor, self.mean + self.std * self.outlet(h))

    @property
    def tap_channels(self) -> dict[str, int]:
        """Taps for a discriminator: the output of every block, with its channels."""
        return {f"block{i}": self.inlet.out_features for i in range(len(self.blocks))}

    def features(self, x: Tensor, t: Tensor, cond: Cond | None, taps: Iterable[str]) -> list[Tensor]:
        """Activations [B, width] at the taps, in their order."""
        wanted = check_taps(taps, self.tap_channels)
        h, found = self._entered(x, t, cond), {}
        for i, block in enumerate(self.blocks):
            h = found[f"block{i}"] = self._through(block, h)
        return [found[tap] for tap in wanted]

    def drop_decoder(self) -> None:
        """Leave out the layers behind the last block: from then on only `features` make sense."""
        self.outlet = nn.Identity()

    def _entered(
        self,
        x: Tensor,
        t: Tensor,
        cond: Cond | None,
        end: Tensor | None = None,
        guidance_embed: Tensor | None = None,
    ) -> Tensor:
        alpha, sigma = self.schedule.alpha_sigma(host(t))
        scaled = (x - expand(alpha, x) * self.mean) * expand(1 / (alpha**2 * self.std**2 + sigma**2) ** 0.5, x)
        emb = self.time(self._level(t, x))
        if self.label is not None:
            label = cond["label"] if cond is not None else torch.full_like(t, -1, dtype=torch.int64)
            emb = emb + self.label(label + 1)
        if self.end is not None and end is not None:
            emb = emb + self.end(self._level(end, x))
        if self.guidance is not None and guidance_embed is not None:
            emb = emb + self.guidance(sinusoid(100 * guidance_embed, _TIME_WIDTH).to(x.dtype))
        return nn.functional.silu(self.inlet(scaled) + emb)

    def _through(self, block: nn.Module, h: Tensor) -> Tensor:
        checkpointed = self.gradient_checkpointing and torch.is_grad_enabled()
        return cast(Tensor, checkpoint(block, h) if checkpointed else block(h))

    def _level(self, t: Tensor, x: Tensor) -> Tensor:
        """Sinusoids of the noise angle atan(sigma/alpha), of the log noise ratio, [B, _TIME_WIDTH]."""
        alpha, sigma = self.schedule.alpha_sigma(host(t))
        angle = torch.from_numpy(200 * _angle(alpha, sigma)).to(x.device)
        return sinusoid(angle.reshape(-1), _TIME_WIDTH).to(x.dtype)


_TIME_WIDTH = 32


def _angle(alpha: Array, sigma: Array) -> Array:
    """Noise level as a number: an angle is finite at both ends, the logarithm keeps small levels apart."""
    return np.asarray(np.arctan2(sigma, alpha) + 0.1 * np.log(sigma / np.maximum(alpha, 1e-4) + 1e-4))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return cast(Tensor, h + nn.functional.silu(self.linear(h)))
