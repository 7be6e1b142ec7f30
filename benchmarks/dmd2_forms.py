"""Forms of dmd2 on scenes-64 at one cost: today's, TDM, random times, and prompts alone; with their diversity.

    OMP_NUM_THREADS=1 python benchmarks/dmd2_forms.py [--budget 100000] [--seeds 0,1,2] [--count 512]
        [--runs runs/dmd2-forms] [--only dmd2-4,tdm] [--set KEY=VALUE ...] [--read] [--out results/dmd2-forms.json]

Trains and measures the jobs of benchmarks/dmd2_forms by `fewstep benchmark`, which keeps what is finished: the same
command goes on with the rest (--read only reads what is there). Students of a fixed number of steps are measured at
their own number: dmd2-1, dmd2-2, dmd2-4 (today's) and dmd2-8. Printed for each form and number of steps: FD, detail FD,
prompt accuracy and the spread within prompts, the mean over seeds. Then, at four steps, by how much each form is better
than dmd2-4 on the same prompts and noise, with the 95 % interval of the mean difference; and how far `any` is from the
student of each fixed number, in per cent.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from fewstep.data.files import replace_text
from fewstep.evaluation.result import Result, lower_by

HERE = Path(__file__).parent
FIGURES = ("FD", "detail FD", "accuracy", "spread")
HIGHER = ("accuracy", "spread")
TODAY, ANY = "dmd2-4", "any"


def train(given: argparse.Namespace, jobs: list[str]) -> None:
    """`fewstep benchmark` of the jobs."""
    files = [str(HERE / "dmd2_forms" / f"{job}.yaml") for job in jobs]
    words = ["--budget", str(given.budget), "--seeds", given.seeds, "--count", str(given.count)]
    sets = [word for item in given.set for word in ("--set", item)]
    folders = ["--runs", str(given.runs), "--out", str(given.runs / "out")]
    subprocess.run([sys.executable, "-m", "fewstep", "benchmark", *files, *words, *sets, *folders], check=True)


def measured(runs: Path, job: str, steps: int) -> list[Result]:
    """The results of a job at a number of steps, by seed."""
    return [Result.load(path) for path in sorted(runs.glob(f"{job}-s*/measured/{steps}.safetensors"))]


def mean(results: list[Result]) -> Result:
    """The mean over seeds, whose resampling of the prompts is the same."""
    names = [name for name in FIGURES if all(name in r.figures for r in results)]
    figures = {name: sum(r.figures[name] for r in results) / len(results) for name in names}
    resampled = {name: torch.stack([r.resampled[name] for r in results]).mean(0) for name in names}
    return Result("mean", results[0].steps, results[0].images, figures, resampled=resampled)


def better_by(figure: str, result: Result, other: Result) -> tuple[float, float, float]:
    """By how much a figure of ``result`` is better, and the interval: positive where it is."""
    value, (low, high) = lower_by(figure, result, other)
    return (-value, -high, -low) if figure in HIGHER else (value, low, high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=100_000)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--runs", type=Path, default=Path("runs/dmd2-forms"))
    parser.add_argument("--only", default="", help="names of jobs with commas between them (default: all)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of all recipes")
    parser.add_argument("--read", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "dmd2-forms.json")
    given = parser.parse_args()
    jobs = given.only.split(",") if given.only else sorted(path.stem for path in (HERE / "dmd2_forms").glob("*.yaml"))
    if not given.read:
        train(given, jobs)
    means = {(job, n): mean(found) for job in jobs for n in (1, 2, 4, 8) if (found := measured(given.runs, job, n))}
    table = {f"{job}, {n} steps": result.figures for (job, n), result in means.items()}
    for label, figures in table.items():
        print(f"{label:22} " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    today, compared = means.get((TODAY, 4)), {}
    for (job, n), result in means.items():
        if today is not None and n == 4 and job != TODAY:
            compared[job] = {name: better_by(name, result, today) for name in result.figures if name in today.figures}
            said = ", ".join(
                f"{name} {v:+.3f} [{low:+.3f}, {high:+.3f}]" for name, (v, low, high) in compared[job].items()
            )
            print(f"{job} better than {TODAY} at 4 steps by {said}")
    apart = {}
    for n in (1, 2, 4, 8):
        if (ANY, n) in means and (f"dmd2-{n}", n) in means:
            mine, fixed = means[ANY, n].figures, means[f"dmd2-{n}", n].figures
            apart[n] = {name: 100 * (mine[name] / fixed[name] - 1) for name in mine if name in fixed}
            print(f"{ANY} at {n} steps, beside dmd2-{n}: " + ", ".join(f"{k} {v:+.1f} %" for k, v in apart[n].items()))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    found = {"budget": given.budget, "prompts": given.count, "table": table, "better than today's": compared}
    replace_text(given.out, json.dumps(found | {"any beside fixed, %": apart}, indent=1) + "\n")


if __name__ == "__main__":
    main()
