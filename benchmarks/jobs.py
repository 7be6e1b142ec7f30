"""The jobs of the table: which are done, and the next slice of the first that is not.

    python benchmarks/jobs.py                       list them
    python benchmarks/jobs.py run [NAME-PART ...] [--slice 9] [--device cuda]
    python benchmarks/jobs.py table                 what benchmarks/results holds, as Markdown

A job is a file in ``benchmarks/jobs/``: a recipe, what is changed in it, seeds, and at how many steps its student is
measured. ``run`` trains for at most ``--slice`` minutes and stops; the same command goes on where it stood. A finished
seed leaves ``benchmarks/results/NAME-sSEED.json``, which belongs into the repository; its run, ``runs/gap/``, does not.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from gap import closed_in_words, gap

HERE = Path(__file__).parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Job:
    """One file of ``benchmarks/jobs/``.

    Attributes:
        name: the file's. recipe: a name or file that `fewstep distill` takes. set: changes to it.
        seeds: one run each. steps: of the student, each measured. teacher_steps: few ones of the teacher.
        count: prompts.
    """

    name: str
    recipe: str
    set: dict[str, object] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    steps: tuple[int, ...] = (1, 2, 4, 8)
    teacher_steps: tuple[int, ...] = (1, 2, 4, 8)
    count: int = 5000

    def runs(self) -> Iterator[tuple[str, list[str]]]:
        """Name and overrides of the run of every seed."""
        changes = [f"{key}={value}" for key, value in self.set.items()]
        for seed in self.seeds:
            yield f"{self.name}-s{seed}", [*changes, f"seed={seed}"]


def jobs() -> list[Job]:
    """All jobs, in the order of their names."""
    return [Job(path.stem, **yaml.safe_load(path.read_text())) for path in sorted((HERE / "jobs").glob("*.yaml"))]


def is_done(run: str) -> bool:
    return (RESULTS / f"{run}.json").exists()


def show(found: list[Job]) -> None:
    for job in found:
        runs = [name for name, _ in job.runs()]
        done = sum(map(is_done, runs))
        print(f"{job.name:24} {done} of {len(runs)} seeds done   {job.recipe}, steps {', '.join(map(str, job.steps))}")


def work(found: list[Job], minutes: float, device: str | None) -> None:
    """Unfinished runs, one after the other, until the time is spent."""
    until = time.monotonic() + 60 * minutes
    for job in found:
        for name, overrides in job.runs():
            if is_done(name):
                continue
            left = (until - time.monotonic()) / 60
            chosen = [*overrides, f"training.device={device}"] if device else overrides
            if left <= 0 or not gap(name, job.recipe, chosen, job.steps, job.teacher_steps, job.count, left, RESULTS):
                return


def table() -> Iterator[str]:
    """A line for every result and number of steps: figures, and what is closed of the teacher's gap at as many."""
    yield "| run | steps | forward equivalents | FD (teacher) | closed | detail FD (teacher) | closed |"
    yield "|---|---|---|---|---|---|---|"
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        for student, teachers in result.get("against", {}).items():
            steps = student.split()[1]
            few = f"teacher, {steps} steps" if f"teacher, {steps} steps" in teachers else next(iter(teachers))
            cells = [path.stem, steps, f"{result['forward_equivalents']:,.0f}"]
            for figure, said in teachers[few].items():
                mine, theirs = (result["ways"][way][figure] for way in (student, few))
                cells += [f"{mine:.3g} ({theirs:.3g})", closed_in_words(said["closed"])]
            yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["list", "run", "table"], default="list")
    parser.add_argument("parts", nargs="*", metavar="NAME-PART", help="only jobs whose name holds one of these")
    parser.add_argument("--slice", type=float, default=9.0, help="minutes before it stops")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the recipe's)")
    given = parser.parse_args()
    found = [job for job in jobs() if not given.parts or any(part in job.name for part in given.parts)]
    if given.what == "list":
        show(found)
    elif given.what == "table":
        print("\n".join(table()))
    else:
        work(found, given.slice, given.device)


if __name__ == "__main__":
    main()
