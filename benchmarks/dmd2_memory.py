"""What DMD2 holds beside LoRA fine-tuning of the same network on the same batch: peaks of real training steps.

    OMP_NUM_THREADS=1 python benchmarks/dmd2_memory.py [--set KEY=VALUE ...] [--device cuda]

The bar is 1.6: student, fake score and teacher are one base with two LoRAs, and what a player differentiates is run
through one term after the other. Counted as in benchmarks/memory.py: every allocation of the process, at its peak.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from memory import measured

from fewstep.methods.base import Batch, Loss, Method, Progress
from fewstep.methods.random import Rng
from fewstep.models.roles import Roles
from fewstep.recipe import load_recipe


class FineTuning(Method):
    """Ordinary training of a LoRA: the noise of noised data."""

    name = "fine-tuning"

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Any:
        return rng.sample.integers("time", 0, 1000), rng.sample.normal("noise", batch.x0.shape[1:])

    def student(self, roles: Roles, batch: Batch, draws: Any, shared: None) -> Loss:
        time, noise = draws
        said = roles.student(self.schedule.add_noise(batch.x0, noise, time), time, batch.cond)
        return Loss((said.epsilon - noise).square().mean())

    def calls_per_step(self) -> dict[str, float]:
        return {"student": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--set", dest="sets", action="append", default=[], help="overrides of scenes-64-dmd2")
    options = parser.parse_args()
    common = [f"training.device={options.device}", f"data.size={options.pictures}", *options.sets]
    recipe = load_recipe("scenes-64-dmd2", common)
    every = recipe.method_settings().student_every
    plain = recipe.model_copy(update={"method": {"name": f"{__file__}:FineTuning"}})
    tuning, dmd2 = measured(plain)[0], measured(recipe, steps=every + 2)[0]
    print(json.dumps({
        "device": options.device, "torch": torch.__version__, "set": options.sets,
        "fine_tuning_mb": round(tuning / 1e6, 2), "dmd2_mb": round(dmd2 / 1e6, 2), "ratio": round(dmd2 / tuning, 3),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
