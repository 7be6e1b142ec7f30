"""Memory of full weights that are spread over processes: at the build, in a checkpoint and when the student is saved.

    python -m benchmarks.sharded                         # of 2.15 GB: benchmarks/results/sharded.json; 13 GB in all
    python -m benchmarks.sharded --width 256 --depth 8   # printed only
    python -m benchmarks.sharded --width 256 --depth 8 --background    # checkpoints are written while training goes on

Each of four processes (gloo, CPU) builds a teacher from its file and a student of full weights, trains a step, writes a
checkpoint and the student. Peaks are of PyTorch's own allocations, by its profiler; pages of mapped files do not count.
Then one process is killed while the next checkpoint is written, and two processes continue.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fewstep.data.files import replace_text
from fewstep.data.sources import MixtureSource
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.lcm import LCM
from fewstep.models.denoiser import Denoiser
from fewstep.models.mlp import MLP
from fewstep.models.roles import Weights
from fewstep.models.sharding import meta_parameters, wait_for_rows
from fewstep.models.tensor_files import StoredFiles
from fewstep.students.card import Card
from fewstep.students.student import OWN_FILE, save_student
from fewstep.training import checkpoint, distributed
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, build_roles

RESULTS = Path(__file__).parent / "results" / "sharded.json"
VP = Schedule.scaled_linear()
SOURCE = MixtureSource(GaussianMixture.ring(6, 1.0, 0.3, num_classes=3), range(3))
METHOD = LCM(VP, guidance_scale=3.0)


def network(width: int, depth: int) -> MLP:
    """The teacher, and the student."""
    torch.manual_seed(0)
    return MLP(VP, 2, width=width, depth=depth, num_classes=3)


def built(file: Path, width: int, depth: int, run: Path | None, precision: str) -> Trainer:
    """A trainer of full weights whose teacher's weights stay in their file until they are spread."""
    with meta_parameters():
        teacher = network(width, depth).to(torch.float64 if precision == "fp64" else torch.float32)
    if distributed.count() > 1:
        wait_for_rows(teacher, StoredFiles([file]), torch.device("cpu"))
    else:
        teacher.load_state_dict(load_file(file), assign=True)
    settings = TrainingSettings(
        steps=3, batch_size=4, learning_rate=1e-4, checkpoint_every=1, precision=precision, fsdp=True, log_every=1
    )
    roles = build_roles(Denoiser(teacher, VP, "epsilon"), METHOD, settings, Weights("full"))
    return Trainer(METHOD, roles, SOURCE, settings, run_dir=run)


def peak(call: Callable[[], Any]) -> tuple[int, Any]:
    """(the bytes that a call allocates at its peak, what it returns)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    held = most = 0
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += size
        most = max(most, held)
    return most, result


def _first(folder: Path, shape: tuple[int, int], precision: str, background: bool) -> None:
    """Build, one step, save both; then the first process's neighbour dies while it writes the next checkpoint."""
    building, trainer = peak(lambda: built(folder / "teacher.safetensors", *shape, folder / "run", precision))
    trainer.step(0)
    trainer.done = 1
    saving, _ = peak(lambda: trainer.save(wait=not background))
    trainer.complete_checkpoint()
    card = Card(method="lcm", sampler="lcm", num_inference_steps=4, weights="full", teacher="toy")
    student, _ = peak(lambda: save_student(folder / "student", trainer.roles, card))
    found = distributed.everywhere({"build": building, "checkpoint": saving, "student": student})
    if distributed.first():
        (folder / "peaks.json").write_text(json.dumps({key: max(row[key] for row in found) for key in found[0]}))
    saved = checkpoint.write_parts

    def dies(path: Path, parts: Any) -> None:
        saved(path, parts)
        if distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.write_parts = dies  # type: ignore[attr-defined]
    trainer.step(1)
    trainer.done = 2
    trainer.save(wait=not background)
    trainer.complete_checkpoint()


def _second(folder: Path, shape: tuple[int, int], precision: str) -> None:
    """Continue from what the others left: save the same step elsewhere, and train another one."""
    trainer = built(folder / "teacher.safetensors", *shape, folder / "run", precision)
    trainer.resume()
    trainer.run_dir = folder / "again"
    trainer.save()
    trainer.step(1)
    trainer.done = 2
    trainer.save()


def _enter(rank: int, count: int, port: int, job: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.join()
    job(*arguments)
    distributed.leave()


def together(count: int, job: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Run a job in so many processes; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what is freed goes back to the system at once: else four heaps with holes take four times the memory
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=_enter, args=(rank, count, port, job, arguments)) for rank in range(count)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    return [process.exitcode for process in running]


def difference(a: Path, b: Path) -> float:
    """Largest difference between two checkpoints."""
    one, other = checkpoint.load(a)[0], checkpoint.load(b)[0]
    assert one.keys() == other.keys()
    return max((float((one[key] - other[key]).abs().max()) for key in one), default=0.0)


def measure(width: int, depth: int, precision: str = "fp32", background: bool = False) -> dict[str, Any]:
    """All figures for one size; in fp64 also the difference from one process that was left alone.

    Args:
        background: the checkpoints of the four are written while training goes on.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        teacher = network(width, depth).to(torch.float64 if precision == "fp64" else torch.float32)
        save_file(teacher.state_dict(), place / "teacher.safetensors")
        sizes = [p.nbytes for p in teacher.parameters()]
        del teacher
        codes = together(4, _first, place, (width, depth), precision, background)
        row: dict[str, Any] = {"network": sum(sizes), "largest tensor": max(sizes), "precision": precision}
        row |= json.loads((place / "peaks.json").read_text()) | {"killed while saving": codes}
        left = checkpoint.latest(place / "run" / "checkpoints")
        assert left is not None
        row["last checkpoint"], row["in a checkpoint"] = left.name, sum(f.stat().st_size for f in left.iterdir())
        row["resumed by two"] = together(2, _second, place, (width, depth), precision)
        row["difference of the resumed step"] = difference(left, place / "again" / "checkpoints" / left.name)
        if precision == "fp64":
            alone = built(place / "teacher.safetensors", width, depth, place / "alone", precision)
            alone.step(0)
            alone.step(1)
            alone.done = 2
            path = alone.save()
            assert path is not None
            row["difference from one process"] = difference(path, place / "again" / "checkpoints" / path.name)
        student = load_file(place / "student" / OWN_FILE)
        kept = checkpoint.split(checkpoint.load(left)[0], "roles/student")
        row["difference of the student"] = max(float((kept[key].float() - student[key]).abs().max()) for key in student)
        return row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded", description=__doc__)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--background", action="store_true")
    given = parser.parse_args()
    row = measure(given.width, given.depth, background=given.background)
    print(json.dumps(row, indent=1))
    if (given.width, given.depth, given.background) == (4096, 32, False):
        replace_text(RESULTS, json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
