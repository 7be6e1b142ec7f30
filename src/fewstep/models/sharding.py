"""Weights sharded over processes by PyTorch's FSDP2, handled as plain tensors.

Each process keeps its rows of every weight (a `DTensor`); whole weights exist only while a layer runs. Optimiser, EMA
and guard work element by element, so each process runs them on its own rows; only norms and other programs' files need
all rows. These functions also take plain tensors, which every process holds whole.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def shard(network: nn.Module, ignored: set[nn.Parameter], device: torch.device) -> dict[nn.Parameter, nn.Parameter]:
    """Spread ``network`` over all processes, repeated blocks one by one; returns old -> new parameters.

    What is on the meta device has memory for this process's rows afterwards, with any values, and never for more.

    Args:
        ignored: parameters that every process keeps whole (adapters).
        device: where the rows are.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    before = dict(network.named_parameters())
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for part in (*blocks_of(network), network):
        # True for the root too: kept whole until a backward, a target would go on with the weights of its last call
        fully_shard(part, mesh=mesh, ignored_params=ignored, reshard_after_forward=True)
    if hasattr(network, "features"):
        register_fsdp_forward_method(network, "features")
    if any(parameter.is_meta for parameter in network.parameters()):
        network._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    after = dict(network.named_parameters())
    return {parameter: after[name] for name, parameter in before.items() if parameter not in ignored}


def outline(network: nn.Module) -> nn.Module:
    """A copy of a network whose parameters are on the meta device: its values come when it has been spread."""
    memory: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in network.parameters()
    }
    return copy.deepcopy(network, memory)


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Within this block parameters of new modules are on the meta device; what they compute, such as tables, is not."""
    cls: Any = nn.Module
    register = cls.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    cls.register_parameter = on_meta
    try:
        yield
    finally:
        cls.register_parameter = register


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The modules to gather, or compile, one at a time: the entries of the outermost ModuleLists, a network's blocks.

    The finer the units, the less memory whole weights take at once, and the more messages there are.
    """
    found: list[nn.Module] = []
    for child in network.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks_of(child)
    return found


def is_spread(network: nn.Module) -> bool:
    """Whether `shard` has spread ``network``."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(network, FSDPModule)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has only its rows of ``tensor``."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's rows, sharing memory with ``tensor``."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """All rows, from all processes (each must call this).

    Args:
        like: when ``tensor`` itself is plain: the parameter to whose rows its own correspond (an optimiser's moment).
    """
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if isinstance(like, DTensor) and tensor.shape == local(like).shape:
        spread: Any = DTensor.from_local(
            tensor, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        return spread.full_tensor()  # type: ignore[no-any-return]
    return tensor


@dataclass(frozen=True)
class Part:
    """This process's rows of a tensor.

    Attributes:
        rows: [r, ...]; none where there are fewer rows than processes.
        shape: of the whole tensor.
        first: the number of its first row in the whole.
    """

    rows: Tensor
    shape: torch.Size
    first: int


def part(tensor: Tensor, like: Tensor | None = None) -> Tensor | Part:
    """This process's `Part` of a sharded tensor, without a copy; a plain one as it is. Arguments as of `whole`."""
    like = tensor if like is None else like
    if not isinstance(like, DTensor) or local(tensor).shape != local(like).shape:
        return tensor
    return Part(local(tensor), like.shape, _rows(like)[0])


def _rows(like: DTensor, rank: int | None = None) -> tuple[int, int]:
    """(first row, row behind the last) of a process: FSDP2 splits dimension 0 as `torch.chunk`."""
    mesh, count = like.device_mesh, like.shape[0]
    each = -(-count // mesh.size())
    first = min((mesh.get_local_rank() if rank is None else rank) * each, count)
    return first, min(first + each, count)


def rows_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The rows of a whole ``tensor`` that this process has of ``like``; those of a sharded one are here already."""
    if isinstance(tensor, DTensor):
        return tensor._local_tensor
    return tensor[slice(*_rows(like))] if isinstance(like, DTensor) else tensor


class Stored(Mapping[str, Tensor]):
    """Tensors that are read from their files when they are asked for, whole or some rows of them."""

    def __deepcopy__(self, memory: dict[int, Any]) -> Stored:
        return self  # files do not change

    def shape(self, name: str) -> torch.Size:
        """The shape of a whole tensor."""
        raise NotImplementedError

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows ``first`` ... ``last`` - 1 of a tensor."""
        raise NotImplementedError


def shape_in(saved: Mapping[str, Tensor], name: str) -> torch.Size:
    """The shape of a tensor in memory or in a file."""
    return saved.shape(name) if isinstance(saved, Stored) else saved[name].shape


def rows_in(saved: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """`rows_of` a tensor in memory or in a file, of which no more is read than that."""
    if isinstance(saved, Stored) and isinstance(like, DTensor):
        return saved.rows(name, *_rows(like))
    return rows_of(saved[name], like)


def wait_for_rows(network: nn.Module, stored: Stored, device: torch.device) -> None:
    """Note where the weights of a network on the meta device are, and where its rows of them will be."""
    network.waits = stored, device  # type: ignore[assignment]


def device_of(network: nn.Module) -> torch.device:
    """The device of a network's weights, or the one where they will be: its rows are waited for, or blocks streamed."""
    for module in network.modules():
        own = vars(module)  # `hasattr` takes ten times as long, and networks have a thousand modules
        if "waits" in own:
            return own["waits"][1]
        if "computes_on" in own:
            return own["computes_on"]
    return next(network.parameters()).device


def streamed_to(network: nn.Module) -> torch.device | None:
    """The device to which weights come from the host (`fewstep.models.offload`); None where they do not."""
    found = (module.computes_on for module in network.modules() if hasattr(module, "computes_on"))
    return next(found, None)  # type: ignore[return-value, arg-type]


def waiting(network: nn.Module) -> dict[nn.Parameter, tuple[Stored, str]]:
    """The parameters that have no values yet, each with the tensor that holds them."""
    found: dict[nn.Parameter, tuple[Stored, str]] = {}
    for module in network.modules():
        if hasattr(module, "waits"):
            found |= {p: (module.waits[0], name) for name, p in module.named_parameters()}  # type: ignore[index, misc]
    return found


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """All rows of a sharded tensor in turn, process by process, in the first one; nothing in the others.

    Each must call this and exhaust it. No process ever holds more than its own rows and those of one other. A plain
    tensor is one piece, everywhere.
    """
    if not isinstance(tensor, DTensor):
        yield tensor
        return
    mine, mesh = tensor._local_tensor.contiguous(), tensor.device_mesh
    if mesh.get_local_rank() != 0:
        if mine.numel():
            torch.distributed.send(mine, 0, group=mesh.get_group())
        return
    yield mine
    for rank in range(1, mesh.size()):
        first, last = _rows(tensor, rank)
        if last > first:
            theirs = mine.new_empty(last - first, *tensor.shape[1:])
            torch.distributed.recv(theirs, rank, group=mesh.get_group())
            yield theirs


def gathered(network: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Sharded parameter -> its gathered weight, the leaf that stands for it in a graph, once a forward has made it.

    PyTorch has no public way to these.
    """
    from torch.distributed.fsdp import FSDPModule

    found: dict[nn.Parameter, Tensor] = {}
    for module in network.modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            for entry in group.fsdp_params if group else ():
                if hasattr(entry, "_unsharded_param"):
                    found[entry.sharded_param] = entry._unsharded_param
    return found
