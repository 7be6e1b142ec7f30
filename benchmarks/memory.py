"""Estimated against measured memory: what `fewstep distill --dry-run` says, and what a real run then allocates.

A short run of scenes-64 goes through `fewstep.runs.distill` as any run does. On the CPU, PyTorch's profiler adds up
every allocation and release of the process, scratch memory of operators included; on CUDA the allocator's own peak is
read. The peak of the training steps is held against the estimate, and so is the least that is there between two
steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from fewstep.data.pairs import PairSource, WithPairs
from fewstep.recipe.load import load_recipe
from fewstep.recipe.schema import Recipe
from fewstep.runs.plan import plan
from fewstep.runs.setup import setup
from fewstep.scenes64.latents import scene_latents
from fewstep.training.trainer import Source, Trainer

CASES = {
    "lcm lora": ["scenes-64-lcm"],
    "lcm full": ["scenes-64-lcm", "student.weights=full"],
    "tcd lora": ["scenes-64-tcd"],
    "tcd full": ["scenes-64-tcd", "student.weights=full"],
    "tcd lora, batch 64": ["scenes-64-tcd", "training.batch_size=64"],
    "tcd lora, batch 64 in 4": ["scenes-64-tcd", "training.batch_size=64", "training.accumulation=4"],
    "tcd lora, checkpointing": ["scenes-64-tcd", "training.gradient_checkpointing=true"],
    "tcd lora, offload": ["scenes-64-tcd", "training.gradient_checkpointing=true", "training.offload=true"],
    "tcd lora, bf16": ["scenes-64-tcd", "training.precision=bf16"],
}


class CpuPeak:
    """Bytes allocated in this process since it was entered: a curve from PyTorch's profiler."""

    def __enter__(self) -> CpuPeak:
        self.marks: dict[str, int] = {}
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()
        return self

    def mark(self, name: str) -> None:
        self.marks[name] = time.time_ns()

    def __exit__(self, *error: object) -> None:
        self.profile.__exit__(None, None, None)

    def read(self) -> tuple[int, int]:
        """(peak of the steps, least between their first and last moment)."""
        events = self.profile.profiler.kineto_results.events()
        curve = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        held, inside = 0, []
        for moment, size in curve:
            held += size
            if self.marks["start"] <= moment <= self.marks["end"]:
                inside.append(held)
        return max(inside), min(inside)


class CudaPeak:
    """The CUDA allocator's peak over the steps."""

    def __enter__(self) -> CudaPeak:
        torch.cuda.empty_cache()
        self.before = torch.cuda.memory_allocated()
        return self

    def mark(self, name: str) -> None:
        if name == "start":
            torch.cuda.reset_peak_memory_stats()
            self.least = torch.cuda.memory_allocated() - self.before
        else:
            self.peak = torch.cuda.max_memory_allocated() - self.before

    def __exit__(self, *error: object) -> None:
        pass

    def read(self) -> tuple[int, int]:
        return self.peak, self.least


def trainer_of(recipe: Recipe, folder: Path) -> Trainer:
    """All that a run of ``recipe`` holds; its pairs, where it wants some, are its pictures: only their size counts."""
    job = setup(recipe, folder)
    source: Source = scene_latents(folder / "latents", job.teacher, recipe.data.size, 1)
    if "pairs" in job.method.streams:
        source = WithPairs(source, PairSource(source.mean, source.cond, seed=1))
    return Trainer(job.method, job.roles, source, recipe.training)


def measured(recipe: Recipe, steps: int = 3) -> tuple[int, int]:
    """Peak bytes of real steps, and the least that is held meanwhile."""
    cuda = torch.device(recipe.training.device).type == "cuda"
    with tempfile.TemporaryDirectory() as name, CudaPeak() if cuda else CpuPeak() as counter:
        trainer = trainer_of(recipe, Path(name))
        trainer.step(0)  # makes the optimiser's moments
        counter.mark("start")
        for step in range(1, steps):
            trainer.step(step)
        counter.mark("end")
        del trainer
    return counter.read()


def seconds_per_step(recipe: Recipe, steps: int = 5) -> float:
    """Of the quickest of a few steps, without the profiler."""
    taken = []
    with tempfile.TemporaryDirectory() as name:
        trainer = trainer_of(recipe, Path(name))
        for step in range(1 + steps):
            begun = time.perf_counter()
            trainer.step(step)
            trainer.players[0].grad_norm.item()
            taken.append(time.perf_counter() - begun)
    return min(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="parts of names of cases; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument(
        "--set", dest="sets", action="append", default=[], help="recipe overrides, as in fewstep distill"
    )
    options = parser.parse_args()
    for name, (shipped, *sets) in CASES.items():
        if options.cases and not any(part in name for part in options.cases):
            continue
        more = [f"training.device={options.device}", f"data.size={options.pictures}", *options.sets]
        recipe = load_recipe(shipped, [*sets, *more])
        planned = plan(recipe)
        guess = sum(planned.estimate.training.values())
        rest = guess - planned.estimate.step
        peak, least = measured(recipe)
        seconds = seconds_per_step(recipe)
        print(json.dumps({
            "case": name, "device": options.device, "torch": torch.__version__,
            "estimated_mb": round(guess / 1e6, 2), "measured_mb": round(peak / 1e6, 2),
            "ratio": round(guess / peak, 3),
            "estimated_between_mb": round(rest / 1e6, 2), "measured_between_mb": round(least / 1e6, 2),
            "estimated_step_s": planned.seconds and round(planned.seconds / recipe.training.steps, 3),
            "measured_step_s": round(seconds, 3),
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
