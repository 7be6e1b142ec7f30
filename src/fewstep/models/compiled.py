"""The repeated blocks of a network compiled by torch.compile, one graph for all blocks of a class.

A block's own forward is compiled, and nothing around it: hooks, gradient checkpointing, autocast and the choice of the
live adapters stay outside, where they work as they do without. Compiled code cannot read a context variable, so each
call tells it which adapters are live (`fewstep.models.lora.traced`).
"""

from __future__ import annotations

import functools
import shutil
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from fewstep.models.lora import traced
from fewstep.models.sharding import blocks_of

_GRAPHS = 64  # of one forward: roles, with a graph or without, shapes; torch's own limit is 8

_CLASSES: dict[tuple[type, str], type[nn.Module]] = {}


def check_compiler(device: str) -> None:
    """Raises ValueError, one sentence, where torch.compile finds no compiler for this kind of device."""
    kind = torch.device(device).type
    if kind == "cuda" and find_spec("triton") is None:
        raise ValueError("training.compile needs triton on CUDA: pip install triton, or leave training.compile out.")
    if kind == "cpu" and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        raise ValueError("training.compile needs a C++ compiler on a CPU: install g++, or leave training.compile out.")
    if kind not in ("cuda", "cpu"):
        raise ValueError(f"training.compile was tried on cpu and cuda alone, not on {kind}: leave it out.")


def compile_blocks(network: nn.Module, backend: str = "inductor") -> int:
    """Compile the repeated blocks of ``network``, in place, at their first call; returns how many there are.

    They are those whose classes diffusers lists as repeated, else the entries of the outermost lists of modules.

    Raises:
        ValueError: there are none.
    """
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, _GRAPHS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * _GRAPHS)
    blocks = repeated_blocks(network)
    if not blocks:
        raise ValueError(f"{type(network).__name__} has no repeated blocks to compile: leave training.compile out.")
    for block in blocks:
        block.__class__ = _compiled(type(block), backend)
    return len(blocks)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks to compile, in order."""
    named = {name for module in network.modules() for name in getattr(module, "_repeated_blocks", None) or ()}
    found = [module for module in network.modules() if type(module).__name__ in named]
    return found or blocks_of(network)


def _compiled(cls: type[nn.Module], backend: str) -> type[nn.Module]:
    """A subclass with a compiled forward, the same one for all blocks of the class."""
    if (cls, backend) in _CLASSES:
        return _CLASSES[cls, backend]
    forward: Any = torch.compile(cls.forward, backend=backend)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with traced(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Dynamo detected a call to a `functools.lru_cache`")
            return forward(self, *args, **kwargs)

    _CLASSES[cls, backend] = with_forward(cls, call)
    return _CLASSES[cls, backend]


def with_forward(cls: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    """A subclass whose forward is this one: of a class, not of an object, so that a copied block calls its own."""
    functools.update_wrapper(forward, cls.forward)
    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
