"""LoRA roles on one base: peft's layers, but *which* adapter is live is captured per call.

peft keeps the live adapter as mutable state of every layer (`set_adapter`, which also flips requires_grad). With
several roles on one base that is a silent trap: activation checkpointing re-runs a forward during backward, under
whichever adapter happens to be live *then* — wrong gradients and no error. Here the layers read a context
variable, and `checkpoint` re-enters the context in which its forward ran.

They also compute in fewer kernels than peft's, which casts the input of every adapter to float32 although autocast
casts it back: the input is cast once, for the base and the adapters together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.precision import AddProduct, autocast_dtype, autocast_on_meta, computes_low, weights_for
from fewstep.models.sharding import local, rows_in, rows_of, streamed_to

_LIVE: ContextVar[tuple[str, ...]] = ContextVar("fewstep_live_adapters", default=())
_CHECKPOINTED: ContextVar[Any] = ContextVar("fewstep_checkpointed", default=None)
_TRACED: tuple[str, ...] = ()  # what `_LIVE` holds, for compiled code: it can read and guard a constant alone


@contextmanager
def live(adapters: Iterable[str]) -> Iterator[None]:
    """Within this block (and only in this thread's context) exactly these adapters act; ``()`` is the base alone."""
    token = _LIVE.set(tuple(adapters))
    try:
        yield
    finally:
        _LIVE.reset(token)


@contextmanager
def traced() -> Iterator[None]:
    """Within this block compiled code sees the adapters that are live now."""
    global _TRACED
    before, _TRACED = _TRACED, _LIVE.get()
    try:
        yield
    finally:
        _TRACED = before


def _live_now() -> tuple[str, ...]:
    return _TRACED if torch.compiler.is_compiling() else _LIVE.get()


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """Activation checkpointing that recomputes under the adapters of its own forward, whatever is live by then.

    Fits diffusers' ``enable_gradient_checkpointing(gradient_checkpointing_func=checkpoint)``. Needed as well
    because an accelerator's backward runs in threads that know nothing of this thread's context.
    """
    # Taken now, in the forward: when `replay` runs, backward has long left the block in which these were live. PyTorch
    # itself remembers the autocast of every device but meta.
    adapters, on_meta = _LIVE.get(), autocast_dtype("meta")

    def replay(*inputs: Any) -> Any:
        token = _CHECKPOINTED.set(function)
        try:
            with live(adapters), autocast_on_meta(on_meta):
                return function(*inputs)
        finally:
            _CHECKPOINTED.reset(token)

    return torch.utils.checkpoint.checkpoint(replay, *args, use_reentrant=False)


def checkpointed() -> Any:
    """The function that the innermost `checkpoint` calls now; None outside of one."""
    return _CHECKPOINTED.get()


class _ReadsContext:
    """Mixed in before a peft layer's own class: the live adapters come from the context, not from the layer."""

    @property
    def active_adapters(self) -> list[str]:
        return list(_LIVE.get())

    @property
    def disable_adapters(self) -> bool:
        return False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        names = [name for name in _live_now() if name in layer.lora_A]
        if names and (low := autocast_dtype(x.device.type)) is not None:
            x = x.to(low)
        result: Tensor = layer.base_layer(x, *args, **kwargs)
        in_place = not layer.base_layer._forward_hooks  # a hook may keep what it was shown
        for name in names:
            result = _adapted(result, x, layer.lora_A[name], layer.lora_B[name], float(layer.scaling[name]), in_place)
            in_place = True
        return result


def _adapted(result: Tensor, x: Tensor, down: Any, up: Any, scale: float, in_place: bool) -> Tensor:
    """``result`` of a base layer at x plus ``scale`` up(down(x)), in the dtype of result.

    Args:
        in_place: the sum may take the memory of ``result``, which nothing else reads.
    """
    h = down(x if computes_low(down, x) else x.to(down.weight.dtype))
    if isinstance(up, nn.Linear) and computes_low(up, h) and result.dtype == h.dtype:
        weight, _ = weights_for(up, h)
        if torch.compiler.is_compiling() or not in_place:
            return result + torch.nn.functional.linear(h, weight) * scale
        return AddProduct.apply(result, h, weight, scale)  # type: ignore[no-any-return, no-untyped-call]
    added = up(h)
    return (result + (added if scale == 1 else added * scale)).to(result.dtype)


def add_adapter(
    module: nn.Module, name: str, *, rank: int, alpha: float | None = None, targets: Iterable[str] | None = None
) -> None:
    """Give ``module`` a LoRA adapter ``name``, in place; it starts as the identity (B = 0) and is not live.

    Args:
        rank: LoRA rank r.
        alpha: scale is alpha / r; ``None`` means alpha = rank (peft alone would silently take 8).
        targets: module names or their endings; ``None`` adapts every Linear and Conv2d.

    Raises:
        ValueError: when no module matches ``targets``, or rank is not positive.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1:
        raise ValueError(f"LoRA rank must be at least 1, not {rank}.")
    names = matching(module, targets)
    scale: Any = rank if alpha is None else alpha
    config = LoraConfig(r=rank, lora_alpha=scale, target_modules=names, bias="none")
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with warnings.catch_warnings():  # peft warns of a second adapter on one layer; roles are just that
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")  # it is never merged
        inject_adapter_in_model(config, module, adapter_name=name)
    device = streamed_to(module)  # peft puts adapters where the weights of their layers are: on the host
    for layer in lora_layers(module):
        _read_context(layer)
        for part in (layer.lora_A, layer.lora_B):
            if name in part:  # adapters are masters: never below float32, whatever the base holds
                dtype = torch.promote_types(part[name].weight.dtype, torch.float32)
                part[name].to(device=device)
                part[name].to(dtype=dtype).requires_grad_(True)
    for parameter in trained:  # peft below 0.21 freezes the adapters that were there
        parameter.requires_grad_(True)
    for parameter in base_parameters(module):
        parameter.requires_grad_(False)


@torch.no_grad()
def merge(weights: Mapping[str, Tensor], lora: Mapping[str, Tensor], scale: float = 1.0) -> None:
    """Add ``scale`` B A of every layer of ``lora`` to that layer's weight, in place.

    Args:
        weights: ``<layer>.weight`` of the un-adapted network, Linear or Conv2d.
        lora: ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight``, alpha folded in.

    Raises:
        ValueError: ``lora`` is of another network.
    """
    for name in lora:
        if not name.endswith(".lora_A.weight"):
            continue
        layer = name.removesuffix(".lora_A.weight")
        weight = weights.get(f"{layer}.weight")
        down, up = lora[name].to(torch.float32), lora[f"{layer}.lora_B.weight"].to(torch.float32)
        delta = up.flatten(1) @ down.flatten(1)
        if weight is None or delta.numel() != weight.numel():
            raise ValueError(f"This LoRA belongs to another network: its layer {layer} does not fit.")
        mine = local(weight)
        mine += rows_of((scale * delta).view(weight.shape), weight).to(mine)


def scaled(lora: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A LoRA at another strength."""
    return {key: t * scale if ".lora_B" in key else t for key, t in lora.items()}


def matching(module: nn.Module, targets: Iterable[str] | None) -> list[str]:
    """Names of the layers that an adapter with these targets wraps, as the un-adapted module spells them."""
    wanted = None if targets is None else tuple(targets)
    found = []
    for name, layer in module.named_modules():
        if ".lora_" in name or not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        name = name.removesuffix(".base_layer")
        if wanted is None or any(name == t or name.endswith(f".{t}") for t in wanted):
            found.append(name)
    if not found:
        raise ValueError(f"No layer of {type(module).__name__} matches the LoRA targets {list(wanted or [])}.")
    return found


def lora_layers(module: nn.Module) -> list[Any]:
    """The peft layers inside ``module``, in order."""
    return [layer for layer in module.modules() if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")]


def base_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Every parameter of ``module`` that belongs to no adapter."""
    return [p for name, p in module.named_parameters() if ".lora_" not in name]


def adapter_layers(module: nn.Module, name: str) -> list[nn.Module]:
    """The layers A and B of one adapter."""
    layers = [layer for layer in lora_layers(module) if name in layer.lora_A]
    return [part[name] for layer in layers for part in (layer.lora_A, layer.lora_B)]


def adapter_tensors(module: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """``<layer>.lora_A.weight`` and ``.lora_B.weight`` of one adapter, keyed by the un-adapted layer name."""
    tensors: dict[str, nn.Parameter] = {}
    for path, layer in module.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer") and name in layer.lora_A:
            tensors[f"{path}.lora_A.weight"] = layer.lora_A[name].weight
            tensors[f"{path}.lora_B.weight"] = layer.lora_B[name].weight
    return tensors


def adapter_scale(module: nn.Module, name: str) -> float:
    """alpha / rank of an adapter."""
    return next(float(layer.scaling[name]) for layer in lora_layers(module) if name in layer.lora_A)


@torch.no_grad()
def copy_tensors(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy values between two dictionaries of equal keys; of whole tensors in a file each process reads its rows."""
    for key, value in target.items():
        local(value).copy_(rows_in(source, key, value))


def _read_context(layer: Any) -> None:
    cls = type(layer)
    if not issubclass(cls, _ReadsContext):
        layer.__class__ = _subclass(cls)


_SUBCLASSES: dict[type, type] = {}


def _subclass(cls: type) -> type:
    """One subclass per peft class, so that isinstance checks inside peft go on holding."""
    if cls not in _SUBCLASSES:
        _SUBCLASSES[cls] = type(cls.__name__, (_ReadsContext, cls), {"__module__": cls.__module__})
    return _SUBCLASSES[cls]
