"""GPUs that people have: what fits into their memory, and how long they would take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

CONTEXT = 600_000_000
"""Bytes of a process's CUDA context, with the libraries that it loads. Assumed, not measured here."""
FRAGMENTATION = 0.05
"""Share of what a step allocates that the allocator holds beyond it. Assumed, not measured here."""
UTILISATION = 0.35
"""Share of the peak rate that training is assumed to reach; attention, norms and copies take the rest."""
SIZES = (12, 16, 24, 48, 80)
"""Common sizes of a GPU's memory, in GB."""


@dataclass(frozen=True)
class GPU:
    """A GPU.

    Attributes:
        gigabytes: its memory, in units of 2^30 bytes.
        tflops: peak rate of dense bf16 matrix products summed in float32, in 10^12 operations a second, as its
            maker's data sheet or architecture paper has it. tflops32: the same in float32 without tensor cores.
    """

    name: str
    gigabytes: int
    tflops: float
    tflops32: float


GPUS = (
    GPU("RTX 3060", 12, 25.5, 12.7),
    GPU("RTX 4060 Ti", 16, 44, 22),
    GPU("RTX 4090", 24, 165, 82.6),
    GPU("L40S", 48, 362, 91.6),
    GPU("A100", 80, 312, 19.5),
    GPU("H100", 80, 989, 67),
    GPU("H200", 141, 989, 67),
)


def usable(gigabytes: int) -> float:
    """Bytes that one process finds free on a GPU of that size; a display and the driver keep the rest."""
    return 0.97 * gigabytes * 2**30


def smallest(peak: float) -> int | None:
    """The smallest common size of memory, in GB, into which ``peak`` bytes fit; None where none is large enough."""
    return next((size for size in SIZES if peak <= usable(size)), None)


def durations(flops: float, peak: float, low: bool) -> Iterator[tuple[GPU, float]]:
    """(GPU, seconds) for ``flops`` operations on each GPU whose memory holds ``peak`` bytes.

    Args:
        low: whether the products are in bf16, not float32.
    """
    for gpu in GPUS:
        if peak <= usable(gpu.gigabytes):
            yield gpu, flops / (UTILISATION * 1e12 * (gpu.tflops if low else gpu.tflops32))
