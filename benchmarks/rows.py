"""Memory, start and waiting of rows that are read from disk while a step trains: SDXL- and FLUX-shaped data sets.

    python benchmarks/rows.py [--seconds 0.05] [--folder /tmp]

Files of random values are written as `fewstep.data.cache` writes them (20,000 SDXL rows, 11.6 GB; 4,000 FLUX rows,
21 GB whole), read over a whole epoch in batches of four with steps that take ``--seconds``, and removed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from fewstep.data.random import Rng
from fewstep.data.rows import Stored
from fewstep.data.sources import LatentSource, prefetch

SHAPES = {
    "sdxl": (20_000, 512, (4, 128, 128), {"prompt_embeds": (77, 2048), "pooled_embeds": (1280,), "time_ids": (6,)}),
    "flux": (4_000, 64, (16, 128, 128), {"prompt_embeds": (512, 4096), "pooled_embeds": (768,)}),
}
BATCH = 4


def resident() -> tuple[int, int]:
    """Resident bytes of this process: now, and at most so far."""
    found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(found[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))


def write(folder: Path, name: str) -> list[Path]:
    """The files of a data set of random values."""
    count, per_file, latent, texts = SHAPES[name]
    paths = []
    noise = {key: torch.randn(per_file, *shape).half() for key, shape in texts.items()}
    for first in range(0, count, per_file):
        rows = min(per_file, count - first)
        tensors = {"mean": torch.randn(1, *latent).half().expand(rows, *latent).contiguous()}
        tensors["std"] = tensors["mean"].abs()
        tensors |= {f"cond.{key}": t[:rows].contiguous() for key, t in noise.items()}
        tensors |= {f"null.{key}": t[:1].clone() for key, t in noise.items()}
        paths.append(folder / f"latents-{len(paths):05d}.safetensors")
        save_file({f"1024x1024/{key}": t for key, t in tensors.items()}, paths[-1])
    return paths


def measure(paths: list[Path], seconds: float, most: float) -> dict[str, float]:
    """Figures of an epoch, or of as much of it as ``most`` seconds allow."""
    before = resident()[0]
    began = time.perf_counter()
    source = LatentSource.of(Stored(paths, "1024x1024/"))
    source.batch(Rng(0, 0, BATCH))
    start = time.perf_counter() - began
    waits, peak = [], 0
    for step in range(1, len(source.rows) // BATCH):
        prefetch(source, Rng(0, step, BATCH))
        time.sleep(seconds)  # the step
        asked = time.perf_counter()
        source.fetch(Rng(0, step, BATCH), source.order.rows(Rng(0, step, BATCH)))
        waits.append(time.perf_counter() - asked)
        peak = max(peak, resident()[0])
        if time.perf_counter() - began > most:
            break
    waits.sort()
    return {
        "rows": len(source.rows), "start s": start, "resident MB": (peak - before) / 1e6, "steps": len(waits),
        "wait ms, median": 1e3 * statistics.median(waits), "wait ms, 99 %": 1e3 * waits[int(0.99 * len(waits))],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.05, help="Seconds of a step beside the data (default 0.05).")
    parser.add_argument("--most", type=float, default=60, help="Seconds per data set at most (default 60).")
    parser.add_argument("--folder", default=None, help="Where to write the files (default: the temporary folder).")
    given = parser.parse_args()
    LatentSource(torch.zeros(2, 4), torch.zeros(2, 4), None).batch(Rng(0, 0, 2))  # what torch loads at its first call
    for name in SHAPES:
        folder = Path(tempfile.mkdtemp(dir=given.folder))
        try:
            found = measure(write(folder, name), given.seconds, given.most)
            size = sum(path.stat().st_size for path in folder.iterdir())
        finally:
            shutil.rmtree(folder)
        figures = ", ".join(f"{key} {value:.3g}" for key, value in found.items())
        print(f"{name}: {size / 1e9:.3g} GB on disk, {size / found['rows'] / 1e6:.3g} MB a row; {figures}")


if __name__ == "__main__":
    main()
