"""Every method on a tiny pipeline of every family, LoRA and full: what a training step makes a GPU's host wait for.

    PYTHONPATH=. python benchmarks/fake_cuda.py [sdxl-tcd-lora ...] [--text live] [--results FILE]

Needs a CUDA build of torch and no GPU, its driver or memory: `tests.fake_cuda` pretends the device. A row is the second
step of a run: its operators on the device, copies to it that do not wait, and what waits (`waits`: blocking copies and
reads by the line of fewstep that asks). A pipeline that mixes devices fails (`failed`); what a method refuses is said.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from fewstep.data.files import replace_text
from tests.fake_cuda.cases import CASES, measure
from tests.fake_cuda.device import pretend
from tests.fake_cuda.launch import missing, start_again

RESULTS = Path(__file__).parent / "results" / "fake-cuda.json"


def row_of(family: str, method: str, weights: str, text: str) -> dict[str, Any]:
    """One row of the table."""
    case, began = {"family": family, "method": method, "weights": weights, "text": text}, time.perf_counter()
    try:
        found = measure(family, method, weights, text)
    except ValueError as error:
        found = {"refused": str(error)}
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/src/fewstep/" in f.filename]
        where = f"{frames[-1].filename.partition('/src/fewstep/')[2]}:{frames[-1].lineno}" if frames else "elsewhere"
        found = {"failed": f"{type(error).__name__} at {where}: {str(error).splitlines()[0][:200]}"}
    return {**case, **found, "seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="families, methods, or both as sdxl-tcd-lora; all by default")
    parser.add_argument("--text", choices=("cached", "live"), default="cached", help="As data.text (default cached).")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file; rows of other cases in it stay.")
    given = parser.parse_args()
    if lacks := missing():
        parser.error(lacks)
    start_again()
    pretend()
    known = json.loads(given.results.read_text())["rows"] if given.results.is_file() else []
    rows = {tuple(row[key] for key in ("family", "method", "weights", "text")): row for row in known}
    for case in CASES:
        if given.cases and not any(set(name.split("-")) <= set(case) for name in given.cases):
            continue
        rows[*case, given.text] = row = row_of(*case, given.text)
        print(json.dumps(row), flush=True)
        about = {"torch": torch.__version__, "rows": list(rows.values())}
        replace_text(given.results, json.dumps(about, indent=1) + "\n")
    bad = ["-".join(case) for case, row in rows.items() if row.get("waits") or "failed" in row]
    refused = sum("refused" in row for row in rows.values())
    print(f"{len(rows)} cases, {refused} of them refused; not as they must be: {', '.join(bad) or 'none'}")


if __name__ == "__main__":
    main()
