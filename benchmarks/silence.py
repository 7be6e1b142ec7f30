"""How long each command leaves its user without a word, on a terminal and into a pipe.

    python -m benchmarks.silence                  # all commands, on scenes-64: benchmarks/results/silence.json
    python -m benchmarks.silence sample export    # these alone, printed only

Every chunk of output is stamped with the time and with the CPU seconds that the command's processes have spent by
then: on a busy machine a gap in seconds is longer than on an idle one, a gap in CPU seconds is not. A terminal shows
something at least every 3 s; a pipe has its first line within 3 s and then one at least every 30 s.
"""

from __future__ import annotations

import itertools
import json
import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fewstep.data.files import replace_text

RESULTS = Path(__file__).parent / "results" / "silence.json"
PARTS = [
    "training.steps=30", "training.log_every=10", "training.checkpoint_every=15", "data.size=200", "sample.every=15",
    "student.rank=4",
]  # fmt: skip
SHORT = [word for part in PARTS for word in ("--set", part)]
COMMANDS = {  # in this order: later ones use what earlier ones have made
    "distill": ["distill", "scenes-64-tcd", "--out", "run", *SHORT],
    "distill --dry-run": ["distill", "scenes-64-tcd", "--dry-run"],
    "prepare": ["prepare", "scenes-64-dmd", "--from-teacher", "--out", "pairs", "--set", "pairs.size=32"],
    "sample": ["sample", "run", "-p", "a red star"],
    "export": ["export", "run", "--to", "lora"],
    "evaluate": ["evaluate", "run", "--steps", "1,4", "--count", "64"],
    "report": ["report", "run", "--count", "64"],
    "diagnose": ["diagnose", "run"],
    "benchmark": ["benchmark", "scenes-64-tcd", "--budget", "6000", "--steps", "4", "--count", "64", *SHORT],
    "verify": ["verify", "lcm", "--steps", "300"],
    "demo": ["demo", "--count", "64", *SHORT],
    "doctor": ["doctor"],
    "doctor --plan": ["doctor", "--plan", "scenes-64-tcd"],
    "methods": ["methods"],
    "scenes": ["scenes", "images", "--count", "3000"],
    "reward scenes": ["reward", "scenes", "choices", "--count", "200"],
    "reward train": ["reward", "train", "choices", "--steps", "100"],
    "app": ["app", "run", "--port", "17860"],
}
UNTIL = {"app": b"Open http"}  # what ends a command that serves until it is stopped
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(group: int) -> float:
    """CPU seconds of all processes of a group, and of their children that have ended."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group:
            total += sum(map(int, fields[11:15]))
    return total / _TICKS


def watched(words: list[str], folder: Path, terminal: bool, until: bytes = b"") -> dict[str, float | int | str]:
    """Run a command, and measure the longest gap between chunks of its output."""
    mine, theirs = pty.openpty() if terminal else os.pipe()
    command = [sys.executable, "-m", "fewstep", *words]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=folder, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL, env=environment,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    stamps, tail, spent = [(0.0, 0.0)], b"", 0.0
    while True:
        ready, _, _ = select.select([mine], [], [], 0.2)
        spent = max(spent, cpu_seconds(process.pid))
        if not ready:
            continue
        try:
            chunk = os.read(mine, 65536)
        except OSError:  # a terminal whose other side is closed
            chunk = b""
        if not chunk:
            break
        stamps.append((time.monotonic() - began, spent))
        tail = (tail + chunk)[-2000:]
        if until and until in tail:
            os.killpg(process.pid, signal.SIGINT)
            until = b""
    os.close(mine)
    code = process.wait()
    stamps.append((time.monotonic() - began, spent))
    gaps = [(b[0] - a[0], b[1] - a[1], a[0]) for a, b in itertools.pairwise(stamps)]
    ends = gaps.pop()  # the result is there, the program is leaving
    longest = max(gaps[1:], default=(0.0, 0.0, 0.0))
    return {
        "seconds": round(stamps[-1][0], 1),
        "cpu": round(stamps[-1][1], 1),
        "first": round(gaps[0][0], 2),
        "first_cpu": round(gaps[0][1], 2),
        "gap": round(longest[0], 2),
        "gap_cpu": round(longest[1], 2),
        "gap_at": round(longest[2], 1),
        "end": round(ends[0], 2),
        "end_cpu": round(ends[1], 2),
        "exit": code,
        "last": tail.decode(errors="replace").strip().splitlines()[-1][-100:] if tail.strip() else "",
    }


def main() -> None:
    chosen = sys.argv[1:] or list(COMMANDS)
    rows: dict[str, dict[str, dict[str, float | int | str]]] = {}
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(
        f"{'command':18} {'output':9} {'exit':>4} {'all s':>6} {'first s':>8} {'CPU':>5} {'gap s':>6} {'CPU':>5}   at s"
    )
    with tempfile.TemporaryDirectory(prefix="fewstep-silence-") as place:
        for mode in ("terminal", "pipe"):
            folder = Path(place) / mode
            folder.mkdir()
            for name in COMMANDS if sys.argv[1:] == [] else _needed(chosen):
                found = watched(COMMANDS[name], folder, mode == "terminal", UNTIL.get(name, b""))
                rows.setdefault(name, {})[mode] = found
                print(
                    f"{name:18} {mode:9} {found['exit']:4} {found['seconds']:6} {found['first']:8} "
                    f"{found['first_cpu']:5} {found['gap']:6} {found['gap_cpu']:5}   {found['gap_at']}",
                    flush=True,
                )
                if found["exit"] not in (0, 130, -2):
                    print(f"    {found['last']}")
    if not sys.argv[1:]:
        load = [round(value, 1) for value in os.getloadavg()]
        replace_text(RESULTS, json.dumps({"load": load, "cores": os.cpu_count(), "commands": rows}, indent=1) + "\n")


def _needed(chosen: list[str]) -> list[str]:
    """The chosen commands, after the run that they use."""
    needs = {"sample", "export", "evaluate", "report", "diagnose", "app"}
    return [*(["distill"] if needs & set(chosen) and "distill" not in chosen else []), *chosen]


if __name__ == "__main__":
    main()
