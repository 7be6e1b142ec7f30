"""Forms of dmd2 on scenes-64 at one cost: today's, TDM, random times, and prompts alone; with their diversity.

    OMP_NUM_THREADS=1 python -m benchmarks.dmd2_forms [--budget 100000] [--seeds 0,1,2] [--count 512]
        [--runs runs/dmd2-forms] [--only dmd2-4,tdm] [--set KEY=VALUE ...] [--read] [--out results/dmd2-forms.json]

Trains and measures the jobs of benchmarks/dmd2_forms by `fewstep benchmark`, which keeps what is finished: the same
command goes on with the rest (--read only reads what is there). Results are kept in results/dmd2-forms.safetensors, so
that seeds can be added without the runs of the others. Students of a fixed number of steps are measured at their own:
dmd2-1, dmd2-2, dmd2-4 (today's) and dmd2-8. Printed for each form and number of steps: FD, detail FD, prompt accuracy
and the spread within prompts, means over seeds with their standard deviations. Then, at four steps, by how much each
form is better than dmd2-4 on the same prompts and noise, with the 95 % interval of the mean difference; and how far
`any` and `tdm-any` are from the student of each fixed number, in per cent.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from benchmarks import kept
from fewstep.data.files import replace_text
from fewstep.evaluation.result import Result

HERE = Path(__file__).parent
TODAY, ANY = "dmd2-4", ("any", "tdm-any")


def train(given: argparse.Namespace, jobs: list[str]) -> None:
    """`fewstep benchmark` of the jobs."""
    files = [str(HERE / "dmd2_forms" / f"{job}.yaml") for job in jobs]
    words = ["--budget", str(given.budget), "--seeds", given.seeds, "--count", str(given.count)]
    sets = [word for item in given.set for word in ("--set", item)]
    folders = ["--runs", str(given.runs), "--out", str(given.runs / "out")]
    subprocess.run([sys.executable, "-m", "fewstep", "benchmark", *files, *words, *sets, *folders], check=True)


def of_job(found: dict[str, Result], job: str, steps: int) -> list[Result]:
    """The results of a job at a number of steps, by seed."""
    return [r for label, r in found.items() if re.fullmatch(rf"{re.escape(job)}-s\d+/{steps}", label)]


def row(results: list[Result]) -> dict[str, list[float]]:
    """Each figure's mean over seeds, its standard deviation over them (0 for one), and how many they are."""
    return {name: [*kept.over_seeds(results, name), len(results)] for name in kept.mean(results).figures}


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
    kept_in = given.out.with_suffix(".safetensors")
    of_ours = re.compile(rf"(teacher|({'|'.join(jobs)})-s\d+)/.*")
    found = kept.read(kept_in) | {k: r for k, r in kept.in_runs(given.runs).items() if of_ours.fullmatch(k)}
    kept.write(kept_in, found)
    by_seed = {(job, n): each for job in jobs for n in (1, 2, 4, 8) if (each := of_job(found, job, n))}
    means = {key: kept.mean(each) for key, each in by_seed.items()}
    table = {f"{job}, {n} steps": row(each) for (job, n), each in by_seed.items()}
    for label, figures in table.items():
        cells = (f"{name} {value:.3f} ± {spread:.3f}" for name, (value, spread, _) in figures.items())
        print(f"{label:22} {next(iter(figures.values()))[2]} seeds: " + ", ".join(cells))
    today, compared = means.get((TODAY, 4)), {}
    for (job, n), result in means.items():
        if today is not None and n == 4 and job != TODAY:
            compared[job] = {
                name: kept.better_by(name, result, today) for name in result.figures if name in today.figures
            }
            said = ", ".join(
                f"{name} {v:+.3f} [{low:+.3f}, {high:+.3f}]" for name, (v, low, high) in compared[job].items()
            )
            print(f"{job} better than {TODAY} at 4 steps by {said}")
    apart = {}
    for form, n in ((form, n) for form in ANY for n in (1, 2, 4, 8)):
        if (form, n) in means and (f"dmd2-{n}", n) in means:
            mine, fixed = means[form, n].figures, means[f"dmd2-{n}", n].figures
            apart[f"{form}, {n}"] = more = {
                name: 100 * (mine[name] / fixed[name] - 1) for name in mine if name in fixed
            }
            print(f"{form} at {n} steps, beside dmd2-{n}: " + ", ".join(f"{k} {v:+.1f} %" for k, v in more.items()))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    figures = {"budget": given.budget, "prompts": given.count, "mean, deviation, seeds": table}
    figures |= {"better than today's": compared, "any beside fixed, %": apart}
    replace_text(given.out, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
