"""A frozen base in 8 or 4 bits, under LoRA: the linear layers of its blocks, a quarter or an eighth of their memory.

``int8``   torchao: a scale for each row, rounded to 255 steps
``nf4``    bitsandbytes: a scale for every 64 weights, 16 steps at the quantiles of a normal (Dettmers et al. 2023,
           arXiv 2305.14314)

Gradients pass through to the adapters; the weights themselves are not trained. Convolutions, norms, embeddings and what
stands outside the blocks stay as they are.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["int8", "nf4"]
_BLOCK = 64  # weights to a scale in nf4
_LIBRARY = {"int8": "torchao", "nf4": "bitsandbytes"}


def quantize(network: nn.Module, kind: Kind) -> None:
    """Quantise the linear layers in the blocks of ``network``, in place; they must be free of adapters.

    Raises:
        ValueError: one sentence when the library is not installed.
    """
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)  # warnings about kernels for other machines
    try:
        if kind == "int8":
            _to_int8(network)
        else:
            _to_nf4(network)
    except ImportError:
        raise ValueError(f"teacher.quantize {kind} needs {_LIBRARY[kind]}: pip install 'fewstep[lowmem]'.") from None
    network.quantized = kind  # type: ignore[assignment]


def is_quantized(network: nn.Module) -> bool:
    """Whether any part of ``network`` was quantised here."""
    return any(getattr(module, "quantized", "") for module in network.modules())


def quantizable(network: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name in it, layer) of every layer that `quantize` takes: those in lists of modules, the blocks."""
    lists = tuple(f"{path}." for path, module in network.named_modules() if isinstance(module, nn.ModuleList))
    for path, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear) and path.startswith(lists):
            parent, _, name = path.rpartition(".")
            yield network.get_submodule(parent), name, layer


def saved_bytes(network: nn.Module, kind: Kind) -> int:
    """How many bytes `quantize` takes off ``network``, by shapes alone."""
    return sum(saved_by_layer(network, kind).values())


def saved_by_layer(network: nn.Module, kind: Kind) -> dict[nn.Module, int]:
    """`saved_bytes` of every layer."""
    saved: dict[nn.Module, int] = {}
    for _, _, layer in quantizable(network):
        count, scales = layer.weight.numel(), layer.out_features
        held = count + layer.weight.element_size() * scales if kind == "int8" else count / 2 + 4 * count / _BLOCK
        saved[layer] = int(count * layer.weight.element_size() - held)
    return saved


def plain(weight: Tensor) -> Tensor:
    """The values that a weight stands for, quantised or not."""
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[attr-defined]
    return weight.dequantize() if type(weight).__module__.startswith("torchao") else weight


def whole_shape(weight: Tensor) -> tuple[int, ...]:
    """The shape of what a weight stands for; the tensor that holds nf4 is packed."""
    state = getattr(weight, "quant_state", None)
    return tuple(weight.shape if state is None else state.shape)


def moved(weight: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    """A weight, quantised or not, of which ``move`` has made every tensor: a parameter where it was one."""
    with torch.no_grad():
        state = getattr(weight, "quant_state", None)
        if state is not None:
            import bitsandbytes

            state = copy.copy(state)
            state.absmax, state.code = move(state.absmax), move(state.code)
            packed: Any = weight
            made: Tensor = bitsandbytes.nn.Params4bit(
                move(packed.data), False, state, packed.blocksize, packed.compress_statistics, packed.quant_type,
                packed.quant_storage, None, True,
            )  # fmt: skip
        elif type(weight).__module__.startswith("torchao"):
            names, context = weight.__tensor_flatten__()  # type: ignore[attr-defined]
            inner = {name: move(getattr(weight, name)) for name in names}
            made = type(weight).__tensor_unflatten__(inner, context, weight.shape, weight.stride())  # type: ignore[attr-defined]
        else:
            made = move(weight.detach())
    is_parameter = isinstance(weight, nn.Parameter) and not isinstance(made, nn.Parameter)
    return nn.Parameter(made, weight.requires_grad) if is_parameter else made


def let_go_between(layer: nn.Module) -> None:
    """Let a layer in 4 bits give its weight to the graph as a saved tensor; other layers do so already.

    bitsandbytes keeps it on the graph's node, where activation checkpointing cannot let it go until the backward.
    """
    if getattr(getattr(layer, "weight", None), "quant_state", None) is not None:
        layer.__class__ = _linear_in_4_bits()


@functools.cache
def _linear_in_4_bits() -> type[nn.Module]:
    import bitsandbytes
    from bitsandbytes.functional import dequantize_4bit

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, state: Any) -> Tensor:
            ctx.save_for_backward(packed, absmax)
            ctx.state = copy.copy(state)
            ctx.state.absmax = None
            return bitsandbytes.matmul_4bit(x, packed, quant_state=state, bias=bias)  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
            packed, absmax = ctx.saved_tensors
            state = copy.copy(ctx.state)
            state.absmax = absmax
            return gradient @ dequantize_4bit(packed.view(-1, 1), state).to(gradient.dtype), None, None, None, None

    class Linear4bit(bitsandbytes.nn.Linear4bit):
        def forward(self, x: Tensor) -> Tensor:
            weight: Any = self.weight  # with `quant_state`, which a type checker knows of no tensor
            dtype = self.compute_dtype or x.dtype
            bias = None if self.bias is None else self.bias.to(dtype)
            state = weight.quant_state
            found: Tensor = Product.apply(x.to(dtype), weight.data, state.absmax, bias, state)  # type: ignore[no-untyped-call]
            return found.to(x.dtype)

    return Linear4bit


def _to_int8(network: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    chosen = {id(layer) for _, _, layer in quantizable(network)}
    quantize_(network, Int8WeightOnlyConfig(), filter_fn=lambda layer, _: id(layer) in chosen)


def _to_nf4(network: nn.Module) -> None:
    import bitsandbytes

    for parent, name, layer in quantizable(network):
        made: Any = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None,
            compute_dtype=layer.weight.dtype, quant_type="nf4", compress_statistics=False, device="meta",
        )  # fmt: skip
        made.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data.contiguous(), requires_grad=False, quant_type="nf4", blocksize=_BLOCK,
            compress_statistics=False,
        )  # fmt: skip
        made.bias = layer.bias
        made.support_avx512bf16_for_cpu = False  # it would pack the weights anew in the first call without a graph
        setattr(parent, name, made.to(layer.weight.device).eval())
