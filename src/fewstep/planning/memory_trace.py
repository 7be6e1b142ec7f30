"""Memory trace of a training step without values: on the meta device, every allocation counted from birth to death.

The step is the real one (`fewstep.training.step`, with the recipe's method, roles, micro-batches and backward pass), so
its peak is the real one's. Workspaces inside single operators (a convolution's scratch memory) are not seen.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from fewstep.data.random import Rng
from fewstep.data.sources import Source
from fewstep.methods.base import Loss, Method, Progress
from fewstep.models.roles import Roles
from fewstep.training.settings import TrainingSettings
from fewstep.training.step import learn, losses, trained_by

_BLOCK = 512  # bytes; an accelerator's allocator rounds up to it


def size_of(tensor: Tensor, device: str) -> int:
    """Bytes of a tensor's storage as ``device``'s allocator counts them."""
    block = 1 if device == "cpu" else _BLOCK
    return -(-tensor.untyped_storage().nbytes() // block) * block


class MemoryTracker(TorchDispatchMode):
    """Bytes of all storages on the meta device that operators allocate while this mode is on.

    Args:
        device: whose rounding to apply.
        known: tensors that exist already, and are not counted.

    Attributes:
        live, peak: bytes held now, and at most so far.
    """

    def __init__(self, device: str, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.device, self.live, self.peak = device, 0, 0
        self._known = list(known)
        self._seen = {t.untyped_storage()._cdata for t in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in tree_iter(result):
            if isinstance(item, Tensor) and item.is_meta:
                self._note(item)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, size_of(tensor, self.device)
        if key not in self._seen:  # views and in-place results share a storage
            self._seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


class DeviceRules(TorchFunctionMode):
    """Imitates on the meta device what ``device`` does and meta does not: fused attention and autocast.

    Attention on meta would allocate the whole [queries, keys] matrix, which no real device keeps.
    """

    _LOWER = (F.linear, F.conv2d, F.conv1d, torch.conv2d, torch.matmul, torch.bmm, torch.baddbmm)
    _HIGHER = (F.layer_norm, F.group_norm, F.softmax)  # on an accelerator; the CPU leaves their input as it is

    def __init__(self, device: str, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.autocast = autocast
        self.higher = () if device == "cpu" else self._HIGHER

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is torch.autograd.grad:
            return self._grad(*args, **kwargs)
        if self.autocast is not None:
            if func in self._LOWER:
                args, kwargs = tree_map(lambda x: _cast(x, self.autocast), (args, kwargs))
            elif func in self.higher:
                args, kwargs = tree_map(lambda x: _cast(x, torch.float32), (args, kwargs))
        return func(*args, **kwargs)

    def _grad(
        self,
        outputs: Sequence[Tensor] | Tensor,
        inputs: Sequence[Tensor],
        grad_outputs: Sequence[Tensor] | Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        allow_unused: bool | None = None,
        **_: Any,
    ) -> tuple[Tensor, ...]:
        """A loss's own `torch.autograd.grad`, with this mode on: activation checkpointing recomputes in it."""
        ends = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        given = (grad_outputs,) if isinstance(grad_outputs, Tensor) else grad_outputs
        starts = tuple(torch.ones_like(end) for end in ends) if given is None else tuple(given)
        keep = create_graph if retain_graph is None else retain_graph
        with self:
            found: tuple[Tensor, ...] = _engine_run_backward(
                ends, starts, keep, create_graph, tuple(inputs), bool(allow_unused), accumulate_grad=False
            )
        return found

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if self.autocast is not None:
            query, key, value = (_cast(x, self.autocast) for x in (query, key, value))
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output: Tensor = fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return output


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def peak_memory(method: Method, roles: Roles, source: Source, settings: TrainingSettings) -> int:
    """Peak bytes of one step of `fewstep.training.trainer.Trainer`, every player due, beyond those between steps.

    Activations, temporaries and gradients count; weights, moments and data do not.

    Args:
        roles, source: on the meta device. The roles' denoisers count the step's network calls.
    """
    networks = [roles.base, *roles.helpers.networks]
    known = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    known += roles.tensors().values()
    tracker = MemoryTracker(torch.device(settings.device).type, known)
    number = _mean_step(method, source, settings)
    with DeviceRules(tracker.device, settings.autocast), tracker:
        _trace(method, roles, source, settings, number, {player.name for player in method.players})
    _drop_gradients(roles)
    return tracker.peak


def mean_cost(method: Method, roles: Roles, source: Source, settings: TrainingSettings) -> float:
    """Compute cost of a training step per image, in forward passes (forward 1, backward 2).

    It is the mean over a round of the players (`Player.every`). Where the number of network calls is random, a step
    with nearly the mean number stands for all. Arguments as for `peak_memory`.
    """
    number, count = _mean_step(method, source, settings), math.lcm(*(player.every for player in method.players))
    rounds = Counter(frozenset(p.name for p in method.players if p.due(step)) for step in range(count))
    images = settings.batch_size // settings.accumulation * min(settings.accumulation, 2)
    spent = 0.0
    for due, times in rounds.items():
        before = roles.cost().forward_equivalents
        with DeviceRules(torch.device(settings.device).type, settings.autocast):
            _trace(method, roles, source, settings, number, due)
        spent += times * (roles.cost().forward_equivalents - before)
        _drop_gradients(roles)
    return spent / count / images


def _drop_gradients(roles: Roles) -> None:
    for tensor in roles.tensors().values():
        tensor.grad = None


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


def _trace(
    method: Method, roles: Roles, source: Source, settings: TrainingSettings, number: int, due: Collection[str]
) -> None:
    """`Trainer.step` number ``number`` up to its updates; from the third micro-batch on, nothing new is held."""
    size = settings.batch_size // settings.accumulation
    for i in range(min(settings.accumulation, 2)):
        rng = Rng(0, number, settings.batch_size, slice(i * size, (i + 1) * size), "meta", settings.dtype)
        batch = source.batch(rng)
        draws = method.draw(batch, rng, Progress(number, settings.steps))
        for player, loss in losses(method, roles, batch, draws, due):
            learn(loss, partial(_backward, inputs=trained_by(player, roles)))


def _backward(loss: Loss, inputs: Sequence[Tensor]) -> None:
    """``backward(inputs=inputs)`` of a loss and its balanced terms without its front door: function modes step aside
    there, and `DeviceRules` must stay for what activation checkpointing recomputes.
    """
    terms = [loss.total, *(balance.term for balance in loss.balanced.values())]
    for term in terms:
        _engine_run_backward(
            (term,), (torch.ones_like(term),), term is not terms[-1], False, tuple(inputs),
            allow_unreachable=True, accumulate_grad=True,
        )  # fmt: skip
