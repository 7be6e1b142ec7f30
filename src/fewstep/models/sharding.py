"""Weights sharded over processes by PyTorch's FSDP2, handled as plain tensors.

Each process keeps its rows of every weight (a `DTensor`); whole weights exist only while a layer runs. Optimiser, EMA
and guard work element by element, so each process runs them on its own rows; only norms and files need all rows. These
functions also take plain tensors, which every process holds whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def shard(network: nn.Module, ignored: set[nn.Parameter]) -> dict[nn.Parameter, nn.Parameter]:
    """Spread ``network`` over all processes, repeated blocks one by one; returns old -> new parameters.

    Args:
        ignored: parameters that every process keeps whole (adapters).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    before = dict(network.named_parameters())
    device = next(iter(before.values())).device.type
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    for part in (*blocks_of(network), network):
        # True for the root too: kept whole until a backward, a target would go on with the weights of its last call
        fully_shard(part, mesh=mesh, ignored_params=ignored, reshard_after_forward=True)
    if hasattr(network, "features"):
        register_fsdp_forward_method(network, "features")
    after = dict(network.named_parameters())
    return {parameter: after[name] for name, parameter in before.items() if parameter not in ignored}


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


def rows_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The rows of a whole ``tensor`` that this process has of ``like``: FSDP2 splits dimension 0 as `torch.chunk`."""
    if not isinstance(like, DTensor):
        return tensor
    parts = tensor.chunk(like.device_mesh.size())
    mine = like.device_mesh.get_local_rank()
    return parts[mine] if mine < len(parts) else tensor[:0]


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
