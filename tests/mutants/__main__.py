"""Plants every defect of the catalogue, one at a time, in a copy of src/, and runs the test that must see it.

    python -m tests.mutants [NAME-PART ...] [--list] [--why] [--jobs N]

Each test runs in a process of its own, forked from a warm one that has torch and its like loaded but nothing of
fewstep; it makes sure that what it imports is the copy. First of all the same tests pass on the code as it is.
"""

from __future__ import annotations

import argparse
import compileall
import multiprocessing
import os
import py_compile
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import BaseContext
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.catalogue import CATALOGUE
from tests.mutants.child import run_tests
from tests.mutants.mutant import ROOT, Mutant

LIMIT = 180  # seconds; a defect may make a test run for ever, which is seen too
WARM = ["pytest", "torch", "scipy.stats", "scipy.interpolate", "hypothesis", "peft", "diffusers.schedulers"]
PASSED, FAILED, HUNG = 0, 1, -1


class Copy:
    """A copy of src/ in which one file at a time is changed."""

    def __init__(self, folder: Path, context: BaseContext) -> None:
        self.source, self.output, self.context = folder / "src", folder / "output.txt", context
        shutil.copytree(ROOT / "src", self.source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        # Bytecode known by its content: by time and size, a sign flipped within the same second would go unseen.
        checked = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(self.source, quiet=2, invalidation_mode=checked)

    def run(self, *tests: str) -> int:
        """pytest's exit code on the copy as it is, or HUNG."""
        process = self.context.Process(target=run_tests, args=(str(self.source), list(tests), str(self.output)))
        process.start()
        process.join(LIMIT * len(tests))
        if process.exitcode is None:
            process.kill()
            process.join()
            return HUNG
        return process.exitcode

    def run_planted(self, mutant: Mutant) -> int:
        path = self.source / "fewstep" / mutant.file
        text = path.read_text(encoding="utf-8")
        path.write_text(mutant.plant(text), encoding="utf-8")
        try:
            return self.run(mutant.test)
        finally:
            path.write_text(text, encoding="utf-8")

    def said(self) -> str:
        """The last run's output."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def why(self) -> str:
        """What the last run's test failed with."""
        return next((line for line in self.said().splitlines() if line.startswith("E  ")), "")


def broken(copy: Copy, tests: list[str]) -> list[str]:
    """Those of the tests that do not pass on the code as it is: all at once, one by one only where that fails."""
    if copy.run(*tests) == PASSED:
        return []
    return [test for test in tests if copy.run(test) != PASSED]


def verdict(copy: Copy, mutant: Mutant) -> tuple[str, float, str]:
    """In one word, the seconds it took, and why."""
    start = time.perf_counter()
    code = copy.run_planted(mutant)
    seconds = time.perf_counter() - start
    if code in (PASSED, FAILED):
        return ("SURVIVED", seconds, "") if code == PASSED else ("killed", seconds, copy.why())
    if code == HUNG:
        return "killed", seconds, f"nothing after {LIMIT} seconds"
    return "UNCLEAR", seconds, f"pytest ended with {code}\n{copy.said()[-2000:]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="NAME-PART", help="only mutants whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="name them and their tests, run nothing")
    parser.add_argument("--why", action="store_true", help="show what each test failed with")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at the same time")
    options = parser.parse_args()
    chosen = [m for m in CATALOGUE if not options.parts or any(part in m.name for part in options.parts)]
    for mutant in chosen:
        if mutant.missing:  # its test would be skipped, which is no pass
            print(f"left out, as {mutant.missing} is not installed (make extras): {mutant.name}")
    chosen = [mutant for mutant in chosen if options.list or not mutant.missing]
    if options.list or not chosen:
        print("\n".join(f"{m.name}\n    {m.file}: {m.test}" for m in chosen) or "There is no such mutant.")
        return 0 if chosen else 2
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    context.set_forkserver_preload(WARM)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fewstep-mutants-") as name:
        folders = [Path(name) / str(i) for i in range(max(1, min(options.jobs, len(chosen))))]
        copies: SimpleQueue[Copy] = SimpleQueue()
        for folder in folders:
            copies.put(Copy(folder, context))

        def work(mutant: Mutant) -> tuple[Mutant, str, float, str]:
            copy = copies.get()
            try:
                return mutant, *verdict(copy, mutant)
            finally:
                copies.put(copy)

        copy = copies.get()
        failing = broken(copy, sorted({m.test for m in chosen}))
        copies.put(copy)
        for test in failing:
            print(f"does not pass as it is: {test}")
        print(f"as it is: {time.perf_counter() - start:.0f} s", flush=True)
        with ThreadPoolExecutor(len(folders)) as pool:
            results = []
            for mutant, word, seconds, why in pool.map(work, [m for m in chosen if m.test not in failing]):
                results.append(word)
                print(f"{word:8} {seconds:5.1f} s  {mutant.name}", flush=True)
                if why and (options.why or word == "UNCLEAR"):
                    print(why, flush=True)
    killed = results.count("killed")
    print(f"{killed} of {len(chosen)} killed in {time.perf_counter() - start:.0f} s")
    return 0 if killed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
