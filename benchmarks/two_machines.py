"""Two machines that train as one, played by two agents of torchrun on this one; nothing but the CPU is needed.

    python -m benchmarks.two_machines                   # benchmarks/results/two-machines.json
    python -m benchmarks.two_machines shared killed-0   # these alone, printed only

``shared``: one run folder for both, against the same run in one process, which takes its batch as a whole or one half
after the other (`training.accumulation`). ``separate``: each agent in a folder of its own. ``killed-0``, ``killed-1``:
SIGKILL for that process in the middle, then the command that the other one prints.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fewstep.data.files import replace_text
from tests.fuzz.__main__ import tiny_teacher

RESULTS = Path(__file__).parent / "results" / "two-machines.json"
RECIPE = """
method: {name: tcd, num_grid_steps: 4}
teacher: TEACHER
student: {rank: 2}
data: {size: 64}
training: {steps: STEPS, batch_size: 2, log_every: 5, checkpoint_every: 5, learning_rate: 1.0e-3, precision: fp64}
sample: {every: 1000, teacher_steps: 2, num_inference_steps: 1, prompts: [a star]}
"""
CASES = ("shared", "separate", "killed-0", "killed-1")


def begin(words: list[str], folders: list[Path]) -> list[subprocess.Popen[str]]:
    """An agent with one process for every folder, its working one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = []
    for number, folder in enumerate(folders):
        launcher = ["--nnodes", str(len(folders)), "--node-rank", str(number), "--nproc-per-node", "1"]
        launcher += ["--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "fewstep"]
        command = [sys.executable, "-m", "torch.distributed.run", *launcher, *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        agents.append(subprocess.Popen(command, cwd=folder, env=environment, text=True, **quiet))
    return agents


def end(agents: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """(exit code, what it wrote on stderr) of every agent."""
    return [(agent.wait(), agent.stderr.read()) for agent in agents]  # type: ignore[union-attr]


def sentences(errors: str) -> list[str]:
    """What fewstep said, without torchrun's own lines."""
    return [line for line in errors.splitlines() if re.match(r"(process \d+: )?(Error: |.*ontinue with: )", line)]


def kill(agent: subprocess.Popen[str], log: Path) -> None:
    """SIGKILL the agent's process as soon as it has trained some steps."""
    while not (log.is_file() and log.read_text()):
        time.sleep(0.02)
        assert agent.poll() is None
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True, text=True).stdout
    os.kill(int(listed.split()[0]), signal.SIGKILL)


def difference(run: Path, whole: Path) -> float:
    """Largest difference of the students' weights, over the largest weight."""
    a, b = (load_file(path / "student" / "pytorch_lora_weights.safetensors") for path in (run, whole))
    return max(float((a[k] - b[k]).abs().max()) for k in b) / max(float(t.abs().max()) for t in b.values())


def one(case: str, recipe: Path, folder: Path) -> dict[str, Any]:
    """The row of one case."""
    homes = [folder / case / name for name in ("a", "b")]
    for home in homes:
        home.mkdir(parents=True)
    here = homes if case == "separate" else homes[:1] * 2
    words = ["distill", str(recipe), "--out", "run", "-q"]
    agents = begin(words, here)
    if case.startswith("killed"):
        kill(agents[int(case[-1])], homes[0] / "run" / "log.jsonl")
    row: dict[str, Any] = {"case": case, "ended": end(agents)}
    row |= {
        "codes": [code for code, _ in row["ended"]],
        "said": [
            s
            for _, e in row.pop("ended")
            for s in sentences(e.replace(str(folder), "FOLDER").replace(socket.gethostname(), "HOST"))
        ],
    }
    row["left"] = sorted(str(path.relative_to(home)) for home in homes for path in home.iterdir())
    if case.startswith("killed"):
        row["resumed"] = [code for code, _ in end(begin([*words, "--resume"], here))]
    if case != "separate":
        row["difference"] = difference(homes[0] / "run", folder / "whole")
        row["difference from micro-batches"] = difference(homes[0] / "run", folder / "parts")
    return row


def measure(cases: tuple[str, ...], steps: int = 30) -> list[dict[str, Any]]:
    """The rows of these cases."""
    torch.set_num_threads(1)
    with tiny_teacher() as teacher, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.yaml"
        recipe.write_text(RECIPE.replace("TEACHER", str(teacher)).replace("STEPS", str(steps)), encoding="utf-8")
        for alone, accumulation in {"whole": 1, "parts": 2}.items():
            words = ["distill", recipe, "--out", folder / alone, "--set", f"training.accumulation={accumulation}", "-q"]
            subprocess.run([sys.executable, "-m", "fewstep", *words], check=True)
        rows = []
        for case in cases:
            rows.append(one(case, recipe, folder))
            print(json.dumps(rows[-1], indent=1), flush=True)
        return rows


def main() -> None:
    wanted = tuple(sys.argv[1:])
    rows = measure(wanted or CASES)
    if not wanted:
        replace_text(RESULTS, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
