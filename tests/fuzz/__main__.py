"""Broken recipes and broken files through the command line, as a stranger would hand them in.

    python -m tests.fuzz [--recipes 500] [--files 200] [--commands 200] [--seed 0]

Every one must end as a good run does or in exit code 2 and one sentence, without a traceback, within `LIMIT` seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from fewstep.cli import main as fewstep
from fewstep.recipe.shipped import shipped_recipes
from fewstep.scenes64 import architecture as scenes64
from fewstep.scenes64.scenes import WORDS
from tests.fuzz import mutate
from tests.fuzz.commands import command_line

LIMIT = 60  # seconds
SHORT = """
training: {steps: 2, batch_size: 2, log_every: 1, checkpoint_every: 1, learning_rate: 1.0e-3}
data: {size: 4, seed: 1}
student: {weights: lora, rank: 2}
sample: {every: 2, teacher_steps: 2, num_inference_steps: 1, prompts: [a star]}
"""
CHAIN = f"""{SHORT}
teacher: {{path: TEACHER}}
stages:
- name: one
  method: {{name: lcm, num_grid_steps: 4}}
- name: whole
  merge: one
- name: two
  method: {{name: tcd, num_grid_steps: 4}}
  init: one
"""


class Hung(BaseException):
    """It ran past the limit."""


class Runner:
    """Runs the command line in this process and judges how it ended."""

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()
        self.faults: list[str] = []

    def run(self, what: str, *arguments: object, usage: bool = False) -> None:
        out, err = io.StringIO(), io.StringIO()
        signal.signal(signal.SIGALRM, _hung)
        signal.alarm(LIMIT)
        sys.argv = ["fewstep", *map(str, arguments)]
        code: object = 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                fewstep()
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException as error:
            self.fault(what, arguments, f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-4)}")
            return
        finally:
            signal.alarm(0)
        said = [line for line in err.getvalue().strip().splitlines() if line.strip()]
        if code == 0 or (usage and code == 2 and said and said[0].startswith("Usage: ")):
            self.ends["fine"] += 1
        elif code == 2 and len(said) == 1 and said[0].startswith("Error: ") and "Traceback" not in said[0]:
            self.ends["one sentence"] += 1
            if os.environ.get("FUZZ_SHOW"):
                print(f"{what}: {said[0]}")
        else:
            self.fault(what, arguments, f"exit code {code}: {err.getvalue()[-800:]}")

    def fault(self, what: str, arguments: tuple[object, ...], words: str) -> None:
        self.ends["FAULT"] += 1
        self.faults.append(f"{what}: fewstep {' '.join(map(str, arguments))}\n  {words}")


def _hung(number: int, frame: object) -> None:
    raise Hung(f"more than {LIMIT} s")


def recipes(runner: Runner, count: int, seed: int, folder: Path, teacher: Path) -> None:
    """Shipped recipes and a chain, broken; a dry run for each, and for every fifth a real one."""
    sources = [path.read_text(encoding="utf-8") for path in shipped_recipes().values()]
    sources.append(CHAIN.replace("TEACHER", str(teacher)))
    for i in range(count):
        rng = random.Random(f"recipe {seed} {i}")
        source, real = rng.choice(sources), i % 5 == 0
        if real:
            source = sources[-1]
        path = folder / f"{i}.yaml"
        path.write_text(mutate.recipe_text(source, rng), encoding="utf-8")
        if real and _small(path):
            runner.run(f"recipe {i}", "distill", path, "--out", folder / f"run-{i}", "-q")
        else:
            runner.run(f"recipe {i}", "distill", path, "--dry-run")
    for run in folder.glob("run-*"):
        shutil.rmtree(run)


def commands(runner: Runner, count: int, seed: int, folder: Path, teacher: Path) -> None:
    """Command lines with values that make no sense; those that typer itself explains are as good as a sentence."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        for i in range(count):
            runner.run(f"command {i}", *command_line(random.Random(f"command {seed} {i}"), teacher), usage=True)
    finally:
        os.chdir(here)


def _small(path: Path) -> bool:
    """Whether the recipe, if it is one, asks for seconds of work: large numbers are no mistake, only long."""
    from fewstep.recipe.chain import Chain, load

    try:
        recipe = load(path)
    except ValueError:
        return True
    runs = [s.recipe for s in recipe.stages if s.recipe] if isinstance(recipe, Chain) else [recipe]
    return all(
        r.training.steps <= 10 and r.training.batch_size <= 8 and r.data.size <= 64 and r.student.rank <= 64
        and r.sample.teacher_steps <= 100 and r.sample.num_inference_steps <= 100 and len(r.sample.prompts) <= 8
        for r in runs
    )  # fmt: skip


def files(runner: Runner, count: int, seed: int, folder: Path, teacher: Path) -> None:
    """A finished chain and its teacher, one file broken at a time, then read by the commands that read it."""
    recipe = folder / "chain.yaml"
    recipe.write_text(CHAIN.replace("TEACHER", str(folder / "teacher")), encoding="utf-8")
    shutil.copytree(teacher, folder / "teacher")
    runner.run("the whole run", "distill", recipe, "--out", folder / "run", "-q")
    shutil.copytree(folder / "run", folder / "kept")
    candidates = [p.relative_to(folder) for root in ("run", "teacher") for p in sorted((folder / root).rglob("*"))
                  if p.is_file() and p.suffix != ".png"]  # fmt: skip
    for i in range(count):
        rng = random.Random(f"file {seed} {i}")
        victim = rng.choice(candidates)
        kind = mutate.file(folder / victim, rng)
        what = f"file {i}, {victim}, {kind}"
        stage = folder / "run" / "03-two"
        if i % 2:  # unfinished: it must go on
            shutil.rmtree(stage / "student", ignore_errors=True)
        longer = ("--set", "stages.two.training.steps=3")
        runner.run(what, "distill", recipe, "--out", folder / "run", "--resume", "-q", *longer)
        runner.run(what, "sample", folder / "run", "--out", folder / "a.png")
        for root, origin in (("run", folder / "kept"), ("teacher", teacher)):
            shutil.rmtree(folder / root)
            shutil.copytree(origin, folder / root)


@contextlib.contextmanager
def tiny_teacher() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        torch.manual_seed(0)
        scenes64.save_pipeline(scenes64.build_pipeline(WORDS), Path(name) / "teacher")
        yield Path(name) / "teacher"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--recipes", type=int, default=500)
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--commands", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    runner = Runner()
    with tiny_teacher() as teacher:
        for job, count in ((recipes, given.recipes), (files, given.files), (commands, given.commands)):
            with tempfile.TemporaryDirectory() as name:
                job(runner, count, given.seed, Path(name), teacher)
            print(f"{count} broken {job.__name__}: {dict(runner.ends)}", flush=True)
    print("\n".join(runner.faults))
    sys.exit(bool(runner.faults))


if __name__ == "__main__":
    main()
