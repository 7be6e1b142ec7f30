"""What a training step of every method costs beside LoRA fine-tuning of the same network on the same batch.

    OMP_NUM_THREADS=1 python benchmarks/step_cost.py [NAME-PART ...] [--set KEY=VALUE ...] [--rounds 5] [--device cpu]

Each shipped recipe's method on one teacher, with one rank and batch, as `scenes-64-tcd` has them; of a chain every
stage. Time is that of a whole round of the players (dmd2's student plays once in three steps), a step; all take turns,
and the median of the ratios to fine-tuning is reported. Memory is counted as in memory.py, each method alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from memory import measured, trainer_of

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.methods.base import Loss, Method, Progress
from fewstep.models.roles import Roles
from fewstep.recipe.chain import Chain, load
from fewstep.recipe.load import load_recipe
from fewstep.recipe.schema import Recipe
from fewstep.recipe.shipped import shipped_recipes
from fewstep.training.trainer import Trainer

PLAIN = "fine-tuning"


class FineTuning(Method):
    """Ordinary training of a LoRA: the noise of noised data."""

    name = PLAIN

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Any:
        return rng.sample.integers("time", 0, 1000), rng.sample.normal("noise", batch.x0.shape[1:])

    def student(self, roles: Roles, batch: Batch, draws: Any, shared: None) -> Loss:
        t, noise = draws
        said = roles.student(self.schedule.add_noise(batch.x0, noise, t), t, batch.cond)
        return Loss((said.epsilon - noise).square().mean())

    def calls_per_step(self) -> dict[str, float]:
        return {"student": 1}


def recipes(overrides: list[str]) -> Iterator[tuple[str, Recipe]]:
    """Fine-tuning first, then every method as its shipped recipe for scenes-64 sets it."""
    common = load_recipe("scenes-64-tcd", overrides)
    yield PLAIN, common.model_copy(update={"method": {"name": f"{__file__}:FineTuning"}})
    for name in sorted(shipped_recipes()):
        if not name.startswith("scenes-64-"):
            continue
        job = load(name)
        stages = [(f"{name}: {s.name}", s.recipe) for s in job.stages] if isinstance(job, Chain) else [(name, job)]
        for title, recipe in stages:
            if recipe is not None and recipe.method:
                yield title.removeprefix("scenes-64-"), common.model_copy(update={"method": recipe.method})


class Timed:
    """A method's trainer, timed by rounds of its players."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.trainer: Trainer = trainer_of(recipe, folder)
        self.round = math.lcm(*(player.every for player in self.trainer.method.players))
        self.done = 0
        self.seconds()  # moments, caches

    def seconds(self) -> float:
        """Of one step, in the mean over a round."""
        begun = time.perf_counter()
        for _ in range(self.round):
            self.trainer.step(self.done)
            self.done += 1
        self.trainer.players[0].grad_norm.item()
        return (time.perf_counter() - begun) / self.round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of names of recipes; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--set", dest="sets", action="append", default=[], help="overrides of what all share")
    options = parser.parse_args()
    common = [f"training.device={options.device}", f"data.size={options.pictures}", *options.sets]
    picked = {
        name: recipe for name, recipe in recipes(common)
        if name == PLAIN or not options.names or any(part in name for part in options.names)
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        timed = {name: Timed(recipe, Path(folder)) for name, recipe in picked.items()}
        taken = [{name: one.seconds() for name, one in timed.items()} for _ in range(options.rounds)]
        rounds = {name: one.round for name, one in timed.items()}
        del timed
    peaks = {name: measured(recipe, steps=rounds[name] + 2)[0] for name, recipe in picked.items()}
    for name in picked:
        ratio = statistics.median(row[name] / row[PLAIN] for row in taken)
        print(json.dumps({
            "method": name, "device": options.device, "torch": torch.__version__, "set": options.sets,
            "time_ratio": round(ratio, 2), "seconds": round(statistics.median(row[name] for row in taken), 4),
            "memory_ratio": round(peaks[name] / peaks[PLAIN], 2), "peak_mb": round(peaks[name] / 1e6, 1),
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
