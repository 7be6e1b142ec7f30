"""A run killed again and again at random moments, against one that was left alone.

    python -m tests.kills [--count 50] [--processes 1] [--seed 0]

Every time the process (of several: any of them, torchrun included) gets SIGKILL, and the same command continues the
run. At the end all weights must be those of the undisturbed run, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from fewstep.training import checkpoint
from tests.fuzz.__main__ import tiny_teacher

RECIPE = """
method: {name: tcd, num_grid_steps: 4}
teacher: TEACHER
student: {rank: 2}
data: {size: 64}
training: {steps: 40, batch_size: 2, log_every: 5, checkpoint_every: 1, ema_decay: 0.9, learning_rate: 1.0e-3}
sample: {every: 10, teacher_steps: 2, num_inference_steps: 1, prompts: [a star]}
"""


def start(recipe: Path, run: Path, processes: int) -> subprocess.Popen[bytes]:
    words = ["fewstep", "distill", str(recipe), "--out", str(run), "-q", *(["--resume"] if run.exists() else [])]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone", "-m"]
    command = [sys.executable, *(launcher if processes > 1 else ["-m"]), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, start_new_session=True
    )


def family(pid: int) -> list[int]:
    """A process and its children, as far as they run now."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [pid, *map(int, listed.split())]


def kill_somewhere(process: subprocess.Popen[bytes], after: float, rng: random.Random) -> bool:
    """SIGKILL one of its processes ``after`` so many seconds; False if it had ended by itself."""
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        os.kill(rng.choice(family(process.pid)), signal.SIGKILL)
        try:
            process.wait(90)  # torchrun ends the others
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        for pid in family(process.pid)[1:]:
            os.kill(pid, signal.SIGKILL)  # torchrun itself was killed: its workers are orphans
        _reap(process)
        return True
    if process.returncode != 0:
        raise SystemExit(f"A resumed run ended by itself: {process.stderr.read().decode()[-2000:]}")  # type: ignore[union-attr]
    return False


def _reap(process: subprocess.Popen[bytes]) -> None:
    """Nobody of its session may write on."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
    time.sleep(0.1)


def weights(run: Path) -> dict[str, torch.Tensor]:
    trained = checkpoint.load(run / "checkpoints" / "step-0000040")[0]
    return trained | load_file(run / "student" / "pytorch_lora_weights.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, kills, finished, different, unreadable, steps = random.Random(given.seed), 0, 0, 0, 0, []
    with tiny_teacher() as teacher, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.yaml"
        recipe.write_text(RECIPE.replace("TEACHER", str(teacher)), encoding="utf-8")
        began = time.monotonic()
        assert start(recipe, folder / "whole", given.processes).wait() == 0
        length, expected = time.monotonic() - began, weights(folder / "whole")
        while kills < given.count or (folder / "run").exists():
            process = start(recipe, folder / "run", given.processes)
            wait = rng.uniform(0.1, 1.0) * length if kills < given.count else 600.0
            if kill_somewhere(process, wait, rng):
                kills += 1
                steps.append(_last_step(folder / "run"))
                unreadable += steps[-1] is None
            else:
                finished += 1
                different += not checkpoint.same(weights(folder / "run"), expected)
                print(f"{kills} kills, {finished} finished, {different} different, {unreadable} unreadable", flush=True)
                shutil.rmtree(folder / "run")
    print(f"{given.processes} process(es): {kills} kills, last checkpoints then at {steps}")
    print(f"{finished} runs finished: {different} with other weights; {unreadable} checkpoints unreadable")
    sys.exit(bool(different or unreadable))


def _last_step(run: Path) -> int | None:
    """Step of the newest checkpoint, 0 before the first; None if it cannot be read."""
    newest = checkpoint.latest(run / "checkpoints")
    if newest is None:
        return 0
    try:
        return int(checkpoint.load(newest)[1]["step"])
    except ValueError:
        return None


if __name__ == "__main__":
    main()
