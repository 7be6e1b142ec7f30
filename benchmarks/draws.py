"""What the random numbers of a training step cost, and what they depend on.

    OMP_NUM_THREADS=1 python benchmarks/draws.py [--repeats 10] [--device cpu]

Three tables, each row one line of JSON. The largest step of dmd2 (all players due, the fourth of the student's times:
nine noises of a latent's shape in six draws, and its times) with two local rows of a growing global batch, beside
numbers of version 1, which drew the global batch on the host. One noise by Philox and by one torch generator a row, for
few large rows and many small ones. And what a draw asks of a device: operator calls, and bytes that they write, counted
on tensors without values. On the CPU time is CPU time; how long a GPU takes is measured with ``--device cuda`` alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.data.batch import Batch
from fewstep.data.philox import unit_normals
from fewstep.data.random import Rng, stream_key
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Progress
from fewstep.methods.dmd2 import DMD2
from fewstep.scenes64.random import ScenesRng

LATENTS = {"SDXL": (4, 128, 128), "FLUX": (16, 128, 128)}
ROWS = 2
LARGEST = 1.5e8  # numbers of a draw of version 1, beyond which it is left out: 600 MB


def seconds(draw: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median over repeats, after one that does not count."""
    clock, taken = time.process_time if device.type == "cpu" else time.perf_counter, []
    for _ in range(repeats + 1):
        begun = clock()
        draw()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(clock() - begun)
    return statistics.median(taken[1:])


def step_of_dmd2(kind: type[Rng], shape: tuple[int, ...], batch_size: int, device: torch.device) -> Callable[[], Any]:
    """The draws of two rows of a step at which the student takes its fourth time."""
    method = DMD2(Schedule.scaled_linear())
    step = next(i for i in range(100) if method.rollout.draw_exit(Rng(0, i, 1), 4) == 3)
    batch = Batch(torch.empty(ROWS, *shape, device="meta"))

    def draw() -> Any:
        rows = slice(batch_size - ROWS, batch_size)
        return method.draw(batch, kind(0, step, batch_size, rows, device), Progress(step, 100))

    return draw


def by_generators(rows: range, size: int, device: torch.device) -> Tensor:
    """One torch generator a row: what the numbers could be instead."""
    drawn, generator = torch.empty(len(rows), size, device=device), torch.Generator(device)
    for place, row in zip(drawn, rows, strict=True):
        place.normal_(generator=generator.manual_seed(stream_key(0, 0, "noise", row)))
    return drawn


class Calls(TorchDispatchMode):
    """Counts operator calls and the bytes of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.written = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.count += 1
        if isinstance(found, Tensor) and not func.is_view:
            self.written += found.numel() * found.element_size()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    about = {"device": options.device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    for model, shape in LATENTS.items():
        for batch_size in (8, 64, 512, 4096):
            row = {"what": f"dmd2's draws, {model}", "global batch": batch_size}
            for name, kind in (("ms", Rng), ("ms of version 1", ScenesRng)):
                if kind is Rng or 4 * batch_size * math.prod(shape) <= LARGEST:
                    taken = seconds(step_of_dmd2(kind, shape, batch_size, device), options.repeats, device)
                    row[name] = round(1e3 * taken, 2)
            print(json.dumps(row | about), flush=True)
    for rows, size in ((2, 65536), (2, 262144), (64, 65536), (64, 1024), (512, 2)):
        ways = {
            "philox ms": lambda rows=rows, size=size: unit_normals(1, range(rows), size, device, torch.float32),
            "generators ms": lambda rows=rows, size=size: by_generators(range(rows), size, device),
        }
        taken = {name: round(1e3 * seconds(way, options.repeats, device), 3) for name, way in ways.items()}
        print(json.dumps({"what": "one draw", "rows": rows, "numbers a row": size} | taken | about), flush=True)
    for rows, size in ((2, 65536), (2, 262144), (64, 65536)):
        with Calls() as calls:
            unit_normals(1, range(rows), size, torch.device("meta"), torch.float32)
        found = {"operator calls": calls.count, "MB written": round(calls.written / 1e6, 1)}
        print(json.dumps({"what": "one draw on a device", "rows": rows, "numbers a row": size} | found), flush=True)


if __name__ == "__main__":
    main()
