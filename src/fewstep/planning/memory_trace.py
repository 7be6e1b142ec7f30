"""What operators need, traced without values on the meta device: every allocation from birth to death, and FLOPs.

Workspaces inside single operators (a convolution's scratch memory) are not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fewstep.models.precision import autocast_dtype

_BLOCK = 512  # bytes; an accelerator's allocator rounds up to it


def size_of(tensor: Tensor, device: str) -> int:
    """Bytes of a tensor's storage as ``device``'s allocator counts them."""
    block = 1 if device == "cpu" else _BLOCK
    return -(-tensor.untyped_storage().nbytes() // block) * block


class MemoryTracker(TorchDispatchMode):
    """Bytes of all storages on the meta device that operators allocate while this mode is on, and what they compute.

    Args:
        device: whose rounding to apply.
        known: tensors that exist already, and are not counted.

    Attributes:
        live, peak: bytes held now, and at most so far.
        flops: floating-point operations of matrix products, convolutions and attention, a multiply-add being two.
    """

    def __init__(self, device: str, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.device, self.live, self.peak, self.flops = device, 0, 0, 0
        self._known = list(known)
        self._seen = {t.untyped_storage()._cdata for t in self._known}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and the guard would cost as much as a cached call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # else `DeviceRules` is asked for every shape that is read here
            result, flops = _called(func, args, kwargs or {})
            self.flops += flops
            for item in (result,) if isinstance(result, Tensor) else tree_iter(result):
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


_Shapes = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype] | None, ...]
_CALLS: dict[Any, tuple[_Shapes | None, int]] = {}
"""Calls of operators that were made before: what they made, and their operations. A network repeats its layers, and
PyTorch finds the shapes of most operators in Python, at a hundred times the cost of an empty tensor."""


def _called(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int]:
    """The result of ``func(*args, **kwargs)`` on meta tensors, and its floating-point operations."""
    key = (func, _described(args), _described(kwargs.items()) if kwargs else None)
    try:
        shapes, flops = _CALLS.get(key, (None, -1))
    except TypeError:  # an argument that cannot be hashed
        return func(*args, **kwargs), 0
    if shapes is not None:
        made = [s and torch.empty_strided(s[0], s[1], dtype=s[2], device="meta") for s in shapes]
        return made[0] if len(made) == 1 else tuple(made), flops
    result = func(*args, **kwargs)
    if flops < 0:
        count = _FLOPS.get(func._overloadpacket)
        flops = 0 if count is None else int(count(*args, **kwargs, out_val=result))
        _CALLS[key] = _new_shapes(func, args, result), flops
    return result, flops


def _described(values: Iterable[Any]) -> tuple[Any, ...]:
    """What a result's shape depends on; 1, 1.0 and True are equal, and give other types."""
    return tuple([
        (v.dtype, v.shape, v.stride(), v.device) if isinstance(v, Tensor)
        else _described(v) if isinstance(v, (list, tuple))  # a union is slower
        else (type(v), v)
        for v in values
    ])  # fmt: skip


def _new_shapes(func: Any, args: tuple[Any, ...], result: Any) -> _Shapes | None:
    """Of each tensor that an operator made; None where it has to be called: it returns what it was given, or numbers.

    A schema does not tell all: `_unsafe_view` returns its argument's storage.
    """
    schema, found = func._schema, result if isinstance(result, tuple) else (result,)
    given = {t.untyped_storage()._cdata for t in tree_iter(args) if isinstance(t, Tensor)}
    makes = all(part.alias_info is None for part in (*schema.arguments, *schema.returns))
    if not makes or not all(t is None or (isinstance(t, Tensor) and t.is_meta) for t in found):
        return None
    if any(t is not None and t.untyped_storage()._cdata in given for t in found):
        return None
    return tuple(None if t is None else (t.shape, t.stride(), t.dtype) for t in found)


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward_flops(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


_FLOPS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


class DeviceRules(TorchFunctionMode):
    """Imitates on the meta device what ``device`` does and meta does not: fused attention and autocast.

    Attention on meta would allocate the whole [queries, keys] matrix, which no real device keeps. Autocast is that of
    `fewstep.models.precision.autocast_dtype`, which roles turn on around their networks, or ``autocast``.
    """

    _LOWER = frozenset({F.linear, F.conv2d, F.conv1d, torch.conv2d, torch.matmul, torch.bmm, torch.baddbmm})
    _HIGHER = frozenset({F.layer_norm, F.group_norm, F.softmax})  # on an accelerator; the CPU leaves inputs as they are

    def __init__(self, device: str, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self._always = autocast
        self.higher = frozenset[Any]() if device == "cpu" else self._HIGHER

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of matrix products now."""
        return self._always or autocast_dtype("meta")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is torch.autograd.grad:
            return self._grad(*args, **kwargs)
        if (low := self.autocast) is not None:
            if func in self._LOWER:
                args, kwargs = _all_cast(args, kwargs, low)
            elif func in self.higher:
                args, kwargs = _all_cast(args, kwargs, torch.float32)
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
        if (low := self.autocast) is not None:
            query, key, value = (_cast(x, low) for x in (query, key, value))
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output: Tensor = fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return output


def _all_cast(args: Iterable[Any], kwargs: dict[str, Any], dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
    return [_cast(value, dtype) for value in args], {name: _cast(value, dtype) for name, value in kwargs.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    cast = isinstance(value, Tensor) and value.dtype != dtype and value.is_floating_point()
    return value.to(dtype) if cast else value
