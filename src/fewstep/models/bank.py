"""A bank of last layers: a role whose network ends in N of them in place of one, read in any mixture (PDD).

Layer i speaks for the interval between times[i] and times[i + 1]: asked at a state of an earlier time, it predicts the
slope that the solver will meet there. A mixture of layers gives the mixture of their outputs, so a jump over many
intervals costs one matrix product more than the network's own layer. The bank belongs to the role, like its extra
inputs. The base keeps its layer, and each of the bank is that one plus a difference that is trained from zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion.schedule import Array, Schedule, Time, host

LORA_RATE = 0.1
"""How fast the layers learn beside a LoRA, as a share of its rate: they are trained whole (VideoX-Fun: 1e-5, 1e-4)."""
_FEW = 9  # so many times are listed in a sentence
_SAME = 1e-6  # share of the noisiest time within which two times are one


def usual_rate(lora: bool) -> float:
    """How fast a bank learns, as a share of its role's rate, beside a LoRA or with all weights."""
    return LORA_RATE if lora else 1.0


class LayerBank(nn.Module):
    """N last layers as differences from the network's own, float32 at least and outside autocast.

    Args:
        layer: the network's own, Linear or Conv2d. schedule: of the network.
        times: N + 1 decreasing native times.
        rate: share of the learning rate at which layers move: a difference is ``rate`` times its parameter, which Adam
            moves as fast as any other.

    Attributes:
        times: [N + 1]. lengths: [N], of the intervals (`interval_lengths`).
        weight: [N, out, in, ...]. bias: [N, out], or None.

    Raises:
        ValueError: as `interval_lengths`.
    """

    def __init__(self, layer: nn.Module, schedule: Schedule, times: Sequence[float], rate: float = 1.0) -> None:
        super().__init__()
        self.times, self.lengths, self.rate = host(times), interval_lengths(schedule, times), rate
        own, count = _unwrapped(layer), len(self.lengths)
        dtype = torch.promote_types(own.weight.dtype, torch.float32)
        self.weight = nn.Parameter(own.weight.new_zeros(count, *own.weight.shape, dtype=dtype))
        self.bias = None if own.bias is None else nn.Parameter(own.bias.new_zeros(count, *own.bias.shape, dtype=dtype))

    def forward(self, h: Tensor, rows: Tensor, layer: nn.Module) -> Tensor:
        """What R mixtures of the layers make of h [B, ...]: [R B, ...], all rows of the first mixture first.

        Args:
            rows: [R, N] weights of the layers, of sum 1. layer: the network's own.
        """
        own = _unwrapped(layer)
        device = h.device.type
        with torch.autocast(device, enabled=False) if _autocasts(device) else nullcontext():
            h, rows = h.to(self.weight.dtype), rows.to(h.device, self.weight.dtype, non_blocking=True)
            weight = own.weight.to(h.dtype) + self.rate * torch.einsum("rn,n...->r...", rows, self.weight)
            bias = None if self.bias is None else (own.bias.to(h.dtype) + self.rate * (rows @ self.bias)).flatten()
            if weight.ndim == 3:
                made = F.linear(h, weight.flatten(0, 1), bias).unflatten(-1, (len(rows), -1)).movedim(-2, 0)
            else:
                made = F.conv2d(h, weight.flatten(0, 1), bias, own.stride, own.padding)
                made = made.unflatten(1, (len(rows), -1)).movedim(1, 0)
        return made.flatten(0, 1)

    def between(self, t: Time, end: Time) -> Array:
        """[1, N]: the mixture whose jump from t to ``end`` is the sum of all intervals between them.

        Raises:
            ValueError: one of them is no time of the bank, or they do not decrease.
        """
        first, last = self._place(t), self._place(end)
        if first == last:
            raise ValueError(
                "This student's last layers give no slope at the end of a step, which samplers such as heun ask for."
            )
        if first > last:
            raise ValueError(f"This student jumps to lower times alone, not from {_words(t)} to {_words(end)}.")
        return fused(self.lengths, first, last)[None]

    def _place(self, time: Time) -> int:
        wanted = np.unique(host(time))
        found = np.flatnonzero(np.isclose(self.times, wanted[0], rtol=0, atol=_SAME * self.times[0]))
        if len(wanted) != 1 or not len(found):
            few = len(self.times) <= _FEW
            raise ValueError(
                f"This student has last layers between {len(self.times)} times, and {_words(time)} is none of them: "
                f"leave timesteps and sampler out, or choose among "
                f"{', '.join(f'{t:g}' for t in self.times) if few else 'the times in its card'}."
            )
        return int(found[0])


def interval_lengths(schedule: Schedule, times: Sequence[float]) -> Array:
    """[N], how far the solver's variable goes in each interval of N + 1 decreasing native times; all negative.

    It is `Schedule.solver_level`: t on flow schedules, sigma/alpha elsewhere.

    Raises:
        ValueError: times that do not decrease, or where sigma/alpha is infinite.
    """
    grid = host(times)
    if len(grid) < 2 or not (np.diff(grid) < 0).all():
        raise ValueError(f"The times of a bank of last layers must decrease, not {', '.join(f'{t:g}' for t in grid)}.")
    way = schedule.solver_level(grid)
    if not np.isfinite(way).all():
        raise ValueError("This noise schedule begins at pure noise, where sigma/alpha is infinite: no sum reaches it.")
    return np.diff(way)


def fused(lengths: Array, first: int, last: int) -> Array:
    """[N], the mixture of the intervals ``first`` ... ``last`` - 1, each with the share of its length."""
    row = np.zeros(len(lengths))
    row[first:last] = lengths[first:last] / lengths[first:last].sum()
    return row


class Mixed:
    """A role's network (`fewstep.models.roles.RoleNetwork`) with mixtures of its bank in place of its last layer.

    The last layer gives all mixtures along the batch, so that what the network does behind it serves every one. A
    network that reshapes by the batch of its *input* would scramble them: it has ``from_last_layer(output, x)``.

    Args:
        rows: [R, N], as in `LayerBank`.
    """

    bank = None  # the choice is made

    def __init__(self, role: Any, rows: Array) -> None:
        self.role, self.rows = role, torch.from_numpy(np.ascontiguousarray(rows))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["role"], name)

    def __call__(self, x: Tensor, t: Tensor, cond: Any, **inputs: Tensor) -> Tensor:
        """[R B, ...], all rows of the first mixture first.

        Raises:
            ValueError: the network reshapes by the batch of its input.
        """
        network, bank = self.role.network, self.role.bank
        behind, made = getattr(network, "from_last_layer", None), []

        def mix(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            made.append(bank(args[0], self.rows, layer))
            return made[-1] if behind is None else None

        handle = network.get_submodule(network.last_layer).register_forward_hook(mix)
        try:
            output: Tensor = self.role(x, t, cond, **inputs)
        finally:
            handle.remove()
        if behind is not None:
            output = behind(made[0], x)
        if len(output) != len(self.rows) * len(x):
            raise ValueError(
                f"{type(network).__name__} reshapes what its last layer gives by the batch of its input, which would "
                f"scramble {len(self.rows)} mixtures of a bank of last layers: it needs a method from_last_layer."
            )
        return output


def _autocasts(device: str) -> bool:
    """Whether this kind of device has autocast, and it is on."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _unwrapped(layer: nn.Module) -> Any:
    """The layer itself, where other roles have adapters on it."""
    return getattr(layer, "base_layer", layer)


def _words(time: Time) -> str:
    times = np.unique(host(time))[::-1]
    return ", ".join(f"{t:g}" for t in times[:4]) + (", ..." if len(times) > 4 else "")
