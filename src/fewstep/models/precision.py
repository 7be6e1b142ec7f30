"""Network arithmetic in bfloat16 while the weights that learn stay in float32.

A frozen network whose weights are all in bfloat16 needs no autocast: autocast would only move norms to float32 and
back. Weights that learn are float32 masters, and autocast would cast each of them anew in every call. Their layers
(`keep_shadows`) therefore keep a bfloat16 copy, a *shadow*, which is refreshed when the master has changed. A gradient
reaches the master as autocast's would: through the copy, then cast to float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

_ON_META: ContextVar[torch.dtype | None] = ContextVar("fewstep_autocast_on_meta", default=None)


@contextmanager
def autocast(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """`torch.autocast`, or nothing for None; the meta device has none, and `fewstep.planning` imitates it there.

    Its weight cache is off: copies made under no_grad carry no graph and would be reused where a gradient is wanted.
    """
    if dtype is None:
        yield
    elif device == "meta":
        with autocast_on_meta(dtype):
            yield
    else:
        with torch.autocast(device, dtype=dtype, cache_enabled=False):
            yield


@contextmanager
def autocast_on_meta(dtype: torch.dtype | None) -> Iterator[None]:
    """Within this block `autocast_dtype` of the meta device is ``dtype``."""
    token = _ON_META.set(dtype)
    try:
        yield
    finally:
        _ON_META.reset(token)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype in which matrix products on a kind of device are computed now; None: in that of their inputs."""
    if device == "meta":
        return _ON_META.get()
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def runs_without_autocast(network: Any, dtype: torch.dtype | None) -> bool:
    """Whether ``network`` computes in ``dtype`` by itself: it says so (``casts_inputs``) and holds nothing else.

    Adapters do not count, and neither do the packed weights of a quantised layer.
    """
    if dtype is None or not getattr(network, "casts_inputs", False):
        return False
    own = (p for name, p in network.named_parameters() if ".lora_" not in name and p.is_floating_point())
    return {p.dtype for p in own} == {dtype}


class Shadow:
    """A copy of a master in a lower dtype; ``tensor`` is None until it is first needed.

    The master's version counter tells when the copy is stale. PyTorch's fused optimisers do not count, and neither do
    changes through ``master.data``, so whoever makes one must count it (`torch.autograd.graph.increment_version`).
    """

    def __init__(self, master: nn.Parameter, dtype: torch.dtype) -> None:
        self.master, self.dtype = master, dtype
        self.tensor: Tensor | None = None
        self._copied: tuple[int, int, torch.device] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Shadow:
        """Of a copied master: empty, because a copied parameter counts its versions anew."""
        return Shadow(copy.deepcopy(self.master, memo), self.dtype)

    def _now(self) -> tuple[int, int, torch.device]:
        return self.master._version, self.master.data_ptr(), self.master.device

    @property
    def stale(self) -> bool:
        return self.tensor is None or self._copied != self._now()

    def get(self) -> Tensor:
        """The copy, with a graph to the master where one is recorded."""
        if not torch.compiler.is_compiling() and self.stale:
            refresh([self])
        tensor = self.tensor
        assert tensor is not None
        if torch.is_grad_enabled() and self.master.requires_grad:
            tensor = _Stands.apply(self.master, tensor)  # type: ignore[no-untyped-call]
        return tensor


@torch.inference_mode(False)  # whoever samples in it leaves copies of which a later gradient knows
@torch.no_grad()
def refresh(shadows: Iterable[Shadow]) -> None:
    """Copy the masters that have changed, in one call of the device."""
    stale = [shadow for shadow in shadows if shadow.stale]
    if not stale:
        return
    for shadow in stale:
        if shadow.tensor is None or shadow.tensor.device != shadow.master.device:
            shadow.tensor = torch.empty_like(shadow.master, dtype=shadow.dtype, requires_grad=False)
        shadow._copied = shadow._now()
    torch._foreach_copy_([s.tensor for s in stale], [s.master.detach() for s in stale])  # type: ignore[misc]


class _Stands(torch.autograd.Function):
    """(master, its copy) -> the copy, whose gradient is the master's."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = master.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.to(ctx.dtype), None


class AddProduct(torch.autograd.Function):
    """``base + scale h up^T`` for base [..., out], h [..., r] and up [out, r], written into base's memory.

    One kernel in the place of a product, a scaling and a sum. ``base`` must be a fresh result which nothing else
    reads: the backward of a linear layer does not need what it gave.
    """

    @staticmethod
    def forward(ctx: Any, base: Tensor, h: Tensor, up: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(h, up)
        ctx.scale = scale
        total = base.data  # not a view of base for autograd: whoever gets it may change it in place
        total.view(-1, total.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), up.t(), alpha=scale)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h, up = ctx.saved_tensors
        scaled = gradient if ctx.scale == 1 else gradient * ctx.scale
        of_h = scaled @ up if ctx.needs_input_grad[1] else None
        of_up = None
        if ctx.needs_input_grad[2]:
            of_up = scaled.reshape(-1, scaled.shape[-1]).t() @ h.reshape(-1, h.shape[-1])
        return gradient, of_h, of_up, None


class ShadowedLinear(nn.Linear):
    """A linear layer that computes with its shadows where products are in their dtype; see `keep_shadows`."""

    shadows: dict[str, Shadow]

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, *weights_for(self, input))


class ShadowedConv2d(nn.Conv2d):
    """As `ShadowedLinear`."""

    shadows: dict[str, Shadow]

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, *weights_for(self, input))


_SHADOWED = {nn.Linear: ShadowedLinear, nn.Conv2d: ShadowedConv2d}


def weights_for(layer: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of a linear or convolutional layer for an input x: its shadows, or the masters."""
    if not computes_low(layer, x):
        return layer.weight, layer.bias
    bias = layer.shadows.get("bias")
    return layer.shadows["weight"].get(), None if bias is None else bias.get()


def computes_low(layer: Any, x: Tensor) -> bool:
    """Whether ``layer`` has shadows, and x meets them: it has their dtype, or autocast would give it that.

    Not where they would lose something: the copies are of the layer's own weights, which `torch.func.functional_call`
    replaces, and know the gradients of a backward alone.
    """
    shadows: dict[str, Shadow] = getattr(layer, "shadows", {})
    if not shadows or shadows["weight"].dtype not in (x.dtype, autocast_dtype(x.device.type)):
        return False
    if torch.compiler.is_compiling():
        return True
    return not _is_transformed() and all(s.master is layer._parameters.get(name) for name, s in shadows.items())


def _is_transformed() -> bool:
    """Whether forward-mode derivatives, or any transform of torch.func, are at work."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]


def keep_shadows(network: nn.Module, dtype: torch.dtype) -> None:
    """Let the plain linear and convolutional layers in ``network`` keep their weights in ``dtype`` too."""
    for layer in network.modules():
        if type(layer) in _SHADOWED:
            layer.__class__ = _SHADOWED[type(layer)]  # type: ignore[index]
            layer.shadows = {  # type: ignore[assignment]
                name: Shadow(p, dtype) for name, p in layer.named_parameters(recurse=False) if p.dtype != dtype
            }


def drop_shadows(network: nn.Module) -> None:
    """Let every layer in ``network`` compute with its masters alone."""
    for layer in network.modules():
        if isinstance(layer, ShadowedLinear | ShadowedConv2d):
            layer.shadows = {}


def shadows_of(modules: Iterable[nn.Module]) -> list[Shadow]:
    """All shadows of the layers in ``modules``."""
    return [shadow for module in modules for layer in module.modules() for shadow in _own(layer)]


def _own(layer: nn.Module) -> Iterable[Shadow]:
    return layer.shadows.values() if isinstance(layer, ShadowedLinear | ShadowedConv2d) else ()
