"""A training step rehearsed without values: its peak memory, its cost and its floating-point operations.

The step is the real one (`fewstep.training.step`, with the recipe's method, roles, micro-batches and backward pass), so
its peak is the real one's.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

from fewstep.data.random import Rng
from fewstep.data.sources import Source
from fewstep.methods.base import Loss, Method, Progress
from fewstep.models.precision import refresh
from fewstep.models.roles import Roles
from fewstep.planning.memory_trace import DeviceRules, MemoryTracker
from fewstep.training import distributed
from fewstep.training.settings import TrainingSettings
from fewstep.training.step import learn, losses, trained_by


@dataclass(frozen=True)
class Rehearsal:
    """What one step of `fewstep.training.trainer.Trainer` needs.

    Attributes:
        peak: bytes of activations, temporaries and gradients at most, every player due; weights, moments and data are
            not in it.
        equivalents: compute cost per image in forward passes (forward 1, backward 2).
        flops: floating-point operations of the whole batch, a multiply-add being two; without the updates.

    Cost and operations are means over a round of the players (`Player.every`). Where the number of network calls is
    random, a step with nearly the mean number stands for all.
    """

    peak: int
    equivalents: float
    flops: float


def rehearse(
    method: Method, roles: Roles, source: Source, settings: TrainingSettings, memory_alone: bool = False
) -> Rehearsal:
    """Trace one micro-batch for every set of players that are due together.

    One micro-batch is enough: the first finds no gradients yet, all others find the same. So it is traced as a later
    one where there are several.

    Args:
        roles, source: on the meta device. The roles' denoisers count the step's network calls.
        memory_alone: trace the step alone in which every player is due; its cost stands for the mean.
    """
    number, count = _mean_step(method, source, settings), math.lcm(*(player.every for player in method.players))
    everyone = frozenset(player.name for player in method.players)
    first = max(player.start for player in method.players)  # from here on all of them take part
    rounds = Counter(frozenset(p.name for p in method.players if p.due(first + step)) for step in range(count))
    if memory_alone:
        rounds, count = Counter({everyone: 1}), 1
    images = settings.batch_size // settings.accumulation
    peak, spent, flops = 0, 0.0, 0.0
    for due, times in rounds.items():
        before = roles.cost().forward_equivalents
        tracker = _traced(method, roles, source, settings, number, due)
        peak = max(peak, tracker.peak)
        spent += times * (roles.cost().forward_equivalents - before)
        flops += times * tracker.flops
    return Rehearsal(peak, spent / count / images, flops / count * settings.accumulation)


def _traced(
    method: Method, roles: Roles, source: Source, settings: TrainingSettings, number: int, due: Collection[str]
) -> MemoryTracker:
    """The last micro-batch of `Trainer.step` number ``number``, up to the step's updates."""
    networks = [roles.base, *roles.helpers.networks]
    known = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    refresh(roles.shadows())
    known += [shadow.tensor for shadow in roles.shadows() if shadow.tensor is not None]
    tracker = MemoryTracker(torch.device(settings.device).type, [*known, *roles.tensors().values()])
    size, last = settings.batch_size // settings.accumulation, settings.accumulation - 1
    rng = Rng(0, number, settings.batch_size, slice(last * size, (last + 1) * size), "meta", settings.dtype)
    with _no_collections(), DeviceRules(tracker.device), tracker:
        if last:
            for p in (p for player in method.players if player.name in due for p in trained_by(player, roles)):
                p.grad = torch.empty_like(p)
        batch = source.batch(rng)
        draws = method.draw(batch, rng, Progress(number, settings.steps))
        kept: dict[str, _Gradients] = {}
        for player, loss in losses(method, roles, batch, draws, due):
            kept[player.name] = _Gradients(trained_by(player, roles))
            learn(loss, kept[player.name].backward)
        del batch, draws, loss
        for gradients in kept.values():
            gradients.update(distributed.count())
    for tensor in roles.tensors().values():
        tensor.grad = None
    return tracker


@contextmanager
def _no_collections() -> Iterator[None]:
    """Within this block objects go with their last reference alone: the peak does not depend on when cycles go."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _mean_step(method: Method, source: Source, settings: TrainingSettings) -> int:
    """The step, of the first fifty, whose network calls are nearest to the mean; 0 unless their number is random."""
    if type(method).calls is Method.calls:
        return 0
    mean = sum(method.calls_per_step().values())

    def off(number: int) -> float:
        rng = Rng(0, number, 2, None, "meta", settings.dtype)
        draws = method.draw(source.batch(rng), rng, Progress(number, settings.steps))
        return abs(sum(method.calls(draws).values()) - mean)

    return min(range(50), key=off)


class _Gradients:
    """One player's gradients, kept as `fewstep.training.players` keeps them: those of balanced terms apart."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.apart: dict[str, list[Tensor | None]] = {}

    def backward(self, loss: Loss) -> None:
        left = len(loss.balanced)
        self._backward(loss.total, left > 0)
        for name, balance in loss.balanced.items():
            left -= 1
            of_others = self._exchange(self.apart.get(name, [None] * len(self.parameters)))
            self._backward(balance.term, left > 0)
            self.apart[name] = self._exchange(of_others)

    def update(self, processes: int) -> None:
        """What the update copies: all gradients in a row for the other processes, and the sums of balanced terms."""
        for term in self.apart.values():
            held = [p.grad for p in self.parameters]
            pairs = zip(held, term, strict=True)
            self._exchange([a if b is None else b if a is None else a + b for a, b in pairs])
        if processes > 1:
            torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])

    def _backward(self, term: Tensor, retain: bool) -> None:
        """``backward(inputs=...)`` without its front door: function modes step aside there, and `DeviceRules` must
        stay for what activation checkpointing recomputes.
        """
        _engine_run_backward(
            (term,), (torch.ones_like(term),), retain, False, tuple(self.parameters),
            allow_unreachable=True, accumulate_grad=True,
        )  # fmt: skip

    def _exchange(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        before = [p.grad for p in self.parameters]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return before
