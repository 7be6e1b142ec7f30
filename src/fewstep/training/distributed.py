"""Several processes that train as one: each takes its rows of every batch, gradients are averaged in one message.

torchrun starts them. In a single process every function here does nothing and costs nothing.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_PATIENCE = timedelta(hours=12)  # the first process may encode a whole data set while the others wait
_HOST: dict[str, Any] = {}  # the group for host numbers, where the default one is the GPUs'


def join(device: str = "cpu") -> None:
    """Join the processes that torchrun started; do nothing in a single one.

    Args:
        device: what they train on; on "cuda" each takes the GPU of its own local rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    # Its functions take the group of that moment as their default and keep it alive: imported later, as optimisers do,
    # it would leave gloo's threads running while Python ends, and now and then one of them aborts the process.
    import torch.distributed.nn.functional

    # before the rendezvous, which waits for ever for a process that was killed
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl", timeout=_PATIENCE)
        _HOST["group"] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    atexit.register(leave)


def leave() -> None:
    """Leave the other processes and end the communication threads; do nothing in a single process."""
    _HOST.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def _die_with(parent: int) -> None:
    """End this process soon after torchrun: an orphan would go on writing into a folder that another run may use."""
    while os.getppid() == parent:
        time.sleep(0.3)
    os._exit(1)


def rank() -> int:
    """Rank of this process; 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rows(batch_size: int) -> slice:
    """This process's part of a batch.

    Raises:
        ValueError: when the batch cannot be split evenly.
    """
    if batch_size % count():
        raise ValueError(f"A batch of {batch_size} cannot be split evenly over {count()} processes.")
    each = batch_size // count()
    return slice(rank() * each, (rank() + 1) * each)


def wait() -> None:
    """Wait until every process has come here."""
    if count() > 1:
        dist.barrier(group=_HOST.get("group"))


@contextmanager
def first_goes_first() -> Iterator[None]:
    """The first process runs this block; then the others run it and find its files."""
    if not first():
        wait()
    yield
    if first():
        wait()


def agree(flag: bool) -> bool:
    """Whether ``flag`` is True in any process; waits for all processes, not for their devices."""
    if count() == 1:
        return flag
    flags = torch.tensor([flag], dtype=torch.uint8)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=_HOST.get("group"))
    return bool(flags.item())


def from_first(value: Any) -> Any:
    """The first process's ``value``, in every process."""
    if count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_HOST.get("group"))
    return values[0]


def means(values: Mapping[str, float]) -> dict[str, float]:
    """Means over processes of host numbers; all must give the same names."""
    if count() == 1 or not values:
        return dict(values)
    numbers = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(numbers, group=_HOST.get("group"))
    return dict(zip(values, (numbers / count()).tolist(), strict=True))


def total(value: Tensor) -> Tensor:
    """Sum over processes of a tensor on their device."""
    if count() == 1:
        return value
    summed = value.clone()
    dist.all_reduce(summed)
    return summed


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all processes, by one flat all-reduce."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if count() == 1 or not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= count()
    parts = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
