"""Several processes that train as one: each takes its rows of every batch, gradients are averaged in one message."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn


def join() -> None:
    """Join the processes that torchrun started; alone, do nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def rank() -> int:
    """Number of this process, 0 for the one that writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


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
    """Until every process is here."""
    if count() > 1:
        dist.barrier()


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all processes, by one flat all-reduce."""
    if count() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= count()
    parts = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
