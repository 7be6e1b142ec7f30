"""How much of its teacher's loss at few steps a student avoids: a recipe run in slices, then measured.

    OMP_NUM_THREADS=2 python benchmarks/gap.py scenes-64-tcd [--set KEY=VALUE ...] [--steps 4 ...]
        [--teacher-steps 4 ...] [--count 512] [--slice 9] [--out benchmarks/results]

Trains for at most ``--slice`` minutes and stops; the same command goes on, until the recipe is finished and the student
measured against the teacher at 50 and at few steps, on the same prompts and noise. A recipe of several stages is
measured by what its last stage made. Writes one JSON file a recipe.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fewstep.data.files import replace_text
from fewstep.demo import against_teacher
from fewstep.distill import versions
from fewstep.evaluation.compare import Comparison, compare
from fewstep.evaluation.reference import reference_of
from fewstep.export.chain import student_folder
from fewstep.export.student import load_card
from fewstep.recipe import Recipe
from fewstep.stages import Chain, load, run
from fewstep.training.trainer import TrainingStopped

FIGURES = ("FD", "detail FD")


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


def measure(
    recipe: Recipe, folder: Path, steps: Sequence[int], teacher_steps: Sequence[int], count: int
) -> dict[str, Any]:
    """Teacher at many and at few steps, student at ``steps``: figures, and every student against every few.

    ``against`` holds by student and teacher, by figure, the part of the teacher's loss that the student does not have
    (None where that loss is not above 0), and by how much the student is better, each with its 95 % interval.
    """
    student = student_folder(folder)
    assert student is not None
    card = load_card(student)
    teacher, ways = against_teacher(recipe, student, steps, teacher_steps)
    found = compare(teacher, ways, count, recipe.seed, reference=reference_of(teacher), per_prompt=4)
    few, students = range(1, 1 + len(teacher_steps)), range(1 + len(teacher_steps), len(ways))
    return {
        "against": {
            ways[i].label: {ways[j].label: {name: _against(found, name, i, j) for name in FIGURES} for j in few}
            for i in students
        },
        "forward_equivalents": card.forward_equivalents,
        "training_steps": card.steps,
        "prompts": count,
        "floors": found.floors,
        "ways": {o.label: {**o.figures, "intervals": o.intervals} for o in found.outcomes},
    }


def _against(found: Comparison, figure: str, student: int, few: int) -> dict[str, Any]:
    closed = found.closed(figure, few=few, many=0, student=student)
    better, its_interval = found.better_by(figure, way=student, than=few)
    return {
        "closed": None if closed is None else {"share": closed[0], "interval": closed[1]},
        "better by": {"value": better, "interval": its_interval},
    }


def words(name: str, result: dict[str, Any]) -> list[str]:
    """One line for each student, teacher and figure."""
    lines, ways = [], result["ways"]
    best = next(iter(ways))
    for student, teachers in result["against"].items():
        for teacher, figures in teachers.items():
            for figure, said in figures.items():
                values = ", ".join(f"{way} {ways[way][figure]:.3g}" for way in (student, teacher, best))
                lines.append(f"{name}: {figure}: {values}: closes {closed_in_words(said['closed'])}")
    return lines


def closed_in_words(said: dict[str, Any] | None) -> str:
    """A closed part with its interval, of a result's ``closed``."""
    if said is None:
        return "no gap"
    share, low, high = (100 * x for x in (said["share"], *said["interval"]))
    return f"{share:.0f} % [{low:.0f}, {high:.0f}]"


def gap(
    name: str,
    recipe: str,
    overrides: Sequence[str],
    steps: Sequence[int],
    teacher_steps: Sequence[int],
    count: int,
    minutes: float,
    out: Path,
) -> bool:
    """Train for a slice; once trained, measure and write ``out/NAME.json``. True when that is done."""
    job = load(recipe, list(overrides))
    folder = Path("runs/gap") / name
    if not train(job, folder, minutes):
        return False
    if isinstance(job, Chain):
        job = job.alone([stage for stage in job.stages if stage.recipe is not None][-1])
    result = {
        "recipe": recipe, "set": list(overrides), "seed": job.seed,
        **measure(job, folder, steps, teacher_steps, count),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {job.training.device}",
        "versions": versions(),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / f"{name}.json", json.dumps(result, indent=1) + "\n")
    print("\n".join(words(name, result)))
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--name", help="of the run and of the JSON file (default: the recipe's)")
    parser.add_argument("--steps", type=int, nargs="+", default=[4])
    parser.add_argument("--teacher-steps", type=int, nargs="+", help="few steps of the teacher (default: --steps)")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--slice", type=float, default=9.0, help="minutes of training before it stops")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    name = given.name or Path(given.recipe).stem
    few = given.teacher_steps or given.steps
    gap(name, given.recipe, given.overrides, given.steps, few, given.count, given.slice, given.out)


if __name__ == "__main__":
    main()
