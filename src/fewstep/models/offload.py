"""Frozen weights of a network's repeated blocks in host memory, on the device only while their block computes.

A block's weights come before its forward and go when another block needs its own; the weights of the block that is
expected next come meanwhile, on a CUDA stream of their own. So two blocks are on the device at any time. Where a graph
is recorded, a block is one checkpointed unit: its forward runs again just before its backward, and fetches the weights
again. What a graph holds of a weight is therefore gone before the weight is.

A fetched weight is another `nn.Parameter` in its layer's table, not other memory in the same one: whatever still holds
it holds its values too.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.compiled import repeated_blocks, with_forward
from fewstep.models.lora import checkpoint, checkpointed
from fewstep.models.quantize import let_go_between, moved

_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
_SIDE: dict[torch.device, Any] = {}  # the CUDA stream of copies to a device


class Streamer:
    """Brings the weights of a network's blocks to a device, block by block.

    Attributes:
        kept: of every block its layers' tables, the names of frozen weights in them, and those weights on the host.
        shared: ids of modules that several blocks have: their weights stay on the device.
    """

    def __init__(self, blocks: list[nn.Module], device: torch.device) -> None:
        self.device = device
        of_blocks = Counter(id(module) for block in blocks for module in block.modules())
        self.shared = {module for module, count in of_blocks.items() if count > 1}
        self.kept = [self._kept(block) for block in blocks]
        self._here: set[int] = set()
        self._seen: dict[tuple[int, int], int] = {}  # which block came after two others
        self._last, self._before = -1, -1

    def _kept(self, block: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
        found = []
        for module in block.modules():
            if id(module) in self.shared:  # what one block lets go another one may need
                continue
            let_go_between(module)
            for name, weight in module._parameters.items():
                if weight is not None:
                    on_host: Any = moved(weight, functools.partial(_on_host, pinned=self.device.type == "cuda"))
                    module._parameters[name] = on_host
                    found.append((module, name, on_host))
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
        return found

    def use(self, block: nn.Module) -> None:
        """Have the weights of ``block`` on the device, and those of the block after it on their way."""
        index = block.streamed_as
        assert isinstance(index, int)
        if self.device.type == "meta":  # a plan counts two blocks (`fewstep.planning.estimate`)
            return
        if self.device.type == "cuda" and self._here:
            torch.cuda.current_stream(self.device).wait_stream(_side(self.device))
        for other in self._here - {index}:
            self.free(other)
        self._fetch(index)
        self._seen[self._before, self._last] = index
        self._before, self._last = self._last, index
        ahead = self._seen.get((self._before, index), index + (1 if index > self._before or not index else -1))
        if 0 <= ahead < len(self.kept):
            self._fetch(ahead, early=True)

    def free(self, index: int) -> None:
        """Let the device's copy of a block's weights go."""
        if index in self._here:
            for module, name, on_host in self.kept[index]:
                module._parameters[name] = on_host
            self._here.remove(index)

    def _fetch(self, index: int, early: bool = False) -> None:
        if index in self._here:
            return
        for module, name, on_host in self.kept[index]:
            here: Any = moved(on_host, functools.partial(_copied, device=self.device, early=early))
            module._parameters[name] = here
        self._here.add(index)


def offload(network: nn.Module, device: torch.device | str) -> None:
    """Keep the weights of the repeated blocks of ``network`` on the host, and move all else to ``device``, in place.

    The blocks are those of `fewstep.models.compiled.repeated_blocks`. Call it before adapters are added; they and
    everything else that is trained stays on the device.

    Raises:
        ValueError: there are no repeated blocks.
    """
    device, blocks = torch.device(device), repeated_blocks(network)
    nested = {id(module) for block in blocks for module in block.modules() if module is not block}
    blocks = list({id(block): block for block in blocks if id(block) not in nested}.values())
    if not blocks:
        raise ValueError(f"{type(network).__name__} has no repeated blocks to stream: leave training.offload out.")
    streamer = Streamer(blocks, device)
    for index, block in enumerate(blocks):
        block.streamer, block.streamed_as, block.computes_on = streamer, index, device  # type: ignore[assignment]
        block.__class__ = _streamed(type(block))
    inside = {id(module) for block in blocks for module in block.modules()} - streamer.shared
    for module in network.modules():
        if id(module) not in inside:
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None and tensor.device != device:
                        table[name] = moved(tensor, lambda t: t.to(device))  # type: ignore[assignment]


def restore(network: nn.Module) -> None:
    """Undo `offload`: all weights are on the device."""
    for block in list(network.modules()):
        streamer = getattr(block, "streamer", None)
        if streamer is None:
            continue
        streamer.free(block.streamed_as)
        for module, name, on_host in streamer.kept[block.streamed_as]:
            here: Any = moved(on_host, functools.partial(torch.Tensor.to, device=streamer.device))
            module._parameters[name] = here
        block.__class__ = type(block).__base__  # type: ignore[assignment]
        del block.streamer, block.streamed_as, block.computes_on


def is_offloaded(network: nn.Module) -> bool:
    """Whether `offload` was called for ``network``."""
    return any(hasattr(module, "streamer") for module in network.modules())


def _streamed(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass that fetches its weights, the same one for all blocks of the class."""
    if cls not in _CLASSES:

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() and checkpointed() is not self:
                return checkpoint(functools.partial(_compute, self, cls, **kwargs), *args)
            return _compute(self, cls, *args, **kwargs)

        _CLASSES[cls] = with_forward(cls, call)
    return _CLASSES[cls]


def _compute(block: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
    block.streamer.use(block)
    return cls.forward(block, *args, **kwargs)


def _on_host(tensor: Tensor, pinned: bool) -> Tensor:
    if tensor.is_meta:
        return tensor
    return tensor.cpu().pin_memory() if pinned else tensor.cpu()


def _copied(tensor: Tensor, device: torch.device, early: bool) -> Tensor:
    """A copy on the device. An early one is made beside what the device computes now.

    Its memory belongs to the stream that computes. The copy waits for what that stream has been given so far, which
    may still read that memory, and the stream waits for the copy before its next block.
    """
    made = torch.empty_like(tensor, device=device)
    if device.type != "cuda" or not early:
        return made.copy_(tensor, non_blocking=True)
    side = _side(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        return made.copy_(tensor, non_blocking=True)


def _side(device: torch.device) -> Any:
    if device not in _SIDE:
        _SIDE[device] = torch.cuda.Stream(device)
    return _SIDE[device]
