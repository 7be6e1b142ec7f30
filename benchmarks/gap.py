"""How much of its teacher's loss at few steps a student avoids: a recipe run in slices, then measured.

    OMP_NUM_THREADS=2 python benchmarks/gap.py scenes-64-tcd [--set KEY=VALUE ...] [--steps 4] [--count 512]
        [--slice 9] [--out benchmarks/results]

Trains for at most ``--slice`` minutes and stops; the same command goes on, until the recipe is finished and the student
(of several stages the last one's) measured against the teacher at 50 and at as many steps, on the same prompts and
noise. Writes one JSON file a recipe.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import threading
from pathlib import Path
from typing import Any

import torch

from fewstep.data.files import replace_text
from fewstep.demo import against_teacher
from fewstep.distill import versions
from fewstep.evaluation.compare import Comparison
from fewstep.export.chain import student_folder
from fewstep.export.student import load_card
from fewstep.recipe import Recipe
from fewstep.stages import Chain, load, run
from fewstep.training.trainer import TrainingStopped


def train(recipe: Recipe | Chain, folder: Path, minutes: float) -> bool:
    """Go on with the run for so long; True when it is finished."""
    timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        run(recipe, folder, resume=True, show_progress=True)
    except TrainingStopped as stopped:
        print(f"{stopped} Run the same command again.")
        return False
    finally:
        timer.cancel()
    return True


def measure(recipe: Recipe, folder: Path, steps: int, count: int) -> dict[str, Any]:
    """Teacher at many and at ``steps`` steps, student at ``steps``: figures, and the closed part of the gap."""
    student = student_folder(folder)
    assert student is not None
    card = load_card(student)
    found = against_teacher(recipe, student, count, steps, per_prompt=4)
    return {
        "closed": {name: _closed(found, name) for name in ("FD", "detail FD")},
        "forward_equivalents": card.forward_equivalents,
        "training_steps": card.steps,
        "num_inference_steps": steps,
        "prompts": count,
        "ways": {o.label: {**o.figures, "intervals": o.intervals} for o in found.outcomes},
    }


def _closed(found: Comparison, figure: str) -> dict[str, Any] | None:
    share = found.closed(figure, few=1, many=0, student=2)
    return None if share is None else {"share": share[0], "interval": share[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--name", help="of the run and of the JSON file (default: the recipe's)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--slice", type=float, default=9.0, help="minutes of training before it stops")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    name = given.name or Path(given.recipe).stem
    recipe = load(given.recipe, given.overrides)
    folder = Path("runs/gap") / name
    if not train(recipe, folder, given.slice):
        return
    if isinstance(recipe, Chain):
        recipe = recipe.alone([stage for stage in recipe.stages if stage.recipe is not None][-1])
    result = {
        "recipe": given.recipe, "set": given.overrides, "seed": recipe.seed,
        **measure(recipe, folder, given.steps, given.count),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {recipe.training.device}",
        "versions": versions(),
    }  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    replace_text(given.out / f"{name}.json", json.dumps(result, indent=1) + "\n")
    for figure, closed in result["closed"].items():
        if closed is not None:
            low, high = closed["interval"]
            print(f"{name}: {figure}: closes {100 * closed['share']:.0f} % [{100 * low:.0f}, {100 * high:.0f}]")


if __name__ == "__main__":
    main()
