"""One dropout mask for two forwards, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def dropout_seed(seed: int, device: torch.device) -> Iterator[None]:
    """torch's generators of the CPU and of ``device`` start from ``seed`` inside, and go on as before outside.

    A network in train mode draws the same masks in every such block, as iCT needs for its two forwards. Saving the
    CPU's generator alone, as the reference code of consistency models does, leaves an accelerator's masks unequal.
    """
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield
