"""Waiting, memory and resuming of shards that are streamed while a step trains.

    python benchmarks/streamed.py [--seconds 0.3] [--steps 200] [--folder /tmp]

Tar shards of random JPEG images (256 x 256 pixels) are written, read in batches of sixteen with steps that take
``--seconds``, and removed. Encoders are not part of it: what is measured is reading, shuffling and decoding ahead. Then
a second reader begins at the last step, as a resumed run does, and must give its rows.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fewstep.data.cache import loader_threads
from fewstep.data.captions import as_text
from fewstep.data.find import Place
from fewstep.data.images import CaptionedImage, decode
from fewstep.data.remote import open_shards
from fewstep.data.rows import CAPTION, Ahead, Picked
from fewstep.data.streamed import Counts, Stream

SIDE, BATCH, SHARDS, EACH = 256, 16, 32, 400


def write(folder: Path) -> int:
    """The shards of random images; returns their bytes."""
    generator, size = np.random.default_rng(0), 0
    images = []
    for _ in range(64):
        data = io.BytesIO()
        small = generator.integers(0, 255, (SIDE // 4, SIDE // 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((SIDE, SIDE)).save(data, "JPEG", quality=95)
        images.append(data.getvalue())
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for i in range(EACH):
                for suffix, content in (("jpg", images[i % 64]), ("txt", f"image {i} of shard {shard}".encode())):
                    entry = tarfile.TarInfo(f"{i:05d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
        size += (folder / f"{shard:03d}.tar").stat().st_size
    return size


def resident() -> int:
    """Resident bytes of this process."""
    found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(found["VmRSS"].split()[0]) * 1024


def reader(folder: Path, buffer: int) -> Ahead:
    shards = open_shards(Place("webdataset", str(folder)))

    def decoded(image: CaptionedImage) -> torch.Tensor:
        return decode(image, lambda height, width: (SIDE, SIDE))

    counts = Counts(folder / "counts", shards.names)
    return Ahead(Stream(shards, counts, 0, BATCH, buffer, decoded, lambda entry: None, loader_threads(1)).take)


def rows(step: int) -> Picked:
    return np.arange(step * BATCH, (step + 1) * BATCH)


def measure(folder: Path, seconds: float, steps: int, buffer: int) -> dict[str, float | bool]:
    ahead, before, began = reader(folder, buffer), resident(), time.perf_counter()
    read, waits, peak = ahead.fetch(rows(0), False), [], 0
    start = time.perf_counter() - began
    for step in range(1, steps):
        ahead.prefetch(rows(step), False)
        time.sleep(seconds)  # the step
        asked = time.perf_counter()
        read = ahead.fetch(rows(step), False)
        waits.append(time.perf_counter() - asked)
        peak = max(peak, resident())
    began, captions = time.perf_counter(), as_text(read[CAPTION])
    again = as_text(reader(folder, buffer).fetch(rows(steps - 1), False)[CAPTION])
    waits.sort()
    return {
        "rows": steps * BATCH, "start_s": start, "resident_mb": (peak - before) / 1e6,
        "wait_ms_median": 1e3 * statistics.median(waits), "wait_ms_99": 1e3 * waits[int(0.99 * len(waits))],
        "resume_s": time.perf_counter() - began, "same_rows": again == captions,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.3, help="Seconds of a step beside the data (default 0.3).")
    parser.add_argument("--steps", type=int, default=200, help="How many steps (default 200).")
    parser.add_argument("--buffer", type=int, default=512, help="Images that are shuffled together (default 512).")
    parser.add_argument("--folder", default=None, help="Where to write the shards (default: the temporary folder).")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        size = write(folder)
        found = {"shards_mb": size / 1e6, **measure(folder, given.seconds, given.steps, given.buffer)}
    finally:
        shutil.rmtree(folder)
    print(json.dumps({key: value if isinstance(value, bool) else round(value, 3) for key, value in found.items()}))
    median, most = found["wait_ms_median"], found["wait_ms_99"]
    print(
        f"A step waits {median:.2f} ms for its {BATCH} images (99 %: {most:.1f} ms) and the process grows by "
        f"{found['resident_mb']:.0f} MB; a resumed run has its rows after {found['resume_s']:.1f} s."
    )


if __name__ == "__main__":
    main()
