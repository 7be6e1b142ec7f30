"""The table of all methods at one cost: keeps what was measured, and writes the figures on the methods' pages.

    fewstep benchmark benchmarks/table/*.yaml --budget 100000 --count 512 --runs runs/table --out runs/table/out
    python -m benchmarks.one_cost [--runs runs/table] [--kept benchmarks/results/table/one-cost.safetensors]

Figures of the runs are added to the kept ones, so that seeds and methods can be added without the runs of the others.
Tables are written behind their marks: all methods in benchmarks/methods.md and docs/methods/README.md, each method on
its own page. Printed at the end: at every number of steps the method of lowest FD, and by how much each of those that
serve several numbers from one file is better than it on the same prompts and noise, with the 95 % interval of the
mean difference over seeds; and its spread within prompts beside that of the teacher's fifty steps.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

from benchmarks import kept
from benchmarks.pages import put
from fewstep.evaluation.result import Result

HERE = Path(__file__).parent
KEPT = HERE / "results" / "table" / "one-cost.safetensors"
DOCS = HERE.parent / "docs" / "methods"
STEPS, LONGEST = (1, 2, 4, 8), 50
SHARED = {"rcm": "scm", "tdm": "dmd2", "dmd2-1step": "dmd2"}
"""Jobs that stand on the page of another method."""
FIGURES = {"FD": "{:.3f}", "detail FD": "{:.1f}", "accuracy": "{:.0f} %", "spread": "{:.2f}"}
IN_WORDS = {"accuracy": "prompt accuracy", "spread": "spread within prompts"}
Means = dict[tuple[str, int], Result]
Seeds = dict[tuple[str, int], list[Result]]


def by_job(found: dict[str, Result]) -> Seeds:
    """Results by job and number of steps, in the order of seeds; the teacher's are those of its DDIM steps."""
    jobs: Seeds = {}
    for label, result in sorted(found.items()):
        if at := re.fullmatch(r"(.+)-s\d+/\d+|(teacher)/ddim-\d+", label):
            jobs.setdefault((at[1] or at[2], result.steps), []).append(result)
    return jobs


def cell(results: list[Result], figure: str, exact: bool = True) -> str:
    """The mean over seeds of one figure, and its standard deviation over several."""
    form = FIGURES[figure] if exact else FIGURES[figure].replace(".3", ".2")
    share = 100 if figure == "accuracy" else 1
    value, deviation = kept.over_seeds(results, figure)
    text = form.format(share * value)
    if len(results) == 1 or not exact:
        return text
    unit = " %" if figure == "accuracy" else ""
    return f"{text.removesuffix(unit)} ± {form.format(share * deviation)}"


def in_rows(rows: Iterable[list[str]], head: list[str]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("| --- ", "|---").replace("--- |", "---|")


def of_all(jobs: Seeds) -> str:
    """All methods: FD, detail FD and accuracy in each cell."""
    return _table(jobs, ("FD", "detail FD", "accuracy"), exact=True)


def in_short(jobs: Seeds) -> str:
    """All methods: FD and accuracy, without what seeds add to them."""
    return _table(jobs, ("FD", "accuracy"), exact=False)


def of_page(jobs: Seeds, job: str) -> str:
    """One job: its steps are the columns; below it FD of the teacher's as many steps."""
    steps = [n for n in STEPS if (job, n) in jobs]
    rows = [[IN_WORDS.get(f, f), *(cell(jobs[job, n], f) for n in steps)] for f in FIGURES]
    rows.append(["the teacher's FD", *(cell(jobs["teacher", n], "FD") for n in steps)])
    return in_rows(rows, [f"`{job}`", *(f"{n} step{'s' * (n > 1)}" for n in steps)])


def tables(jobs: Seeds) -> dict[tuple[Path, str], str]:
    """Every table by its page and mark."""
    pages = {(HERE / "methods.md", "all"): of_all(jobs), (DOCS / "README.md", "short"): in_short(jobs)}
    for job in dict.fromkeys(job for job, _ in jobs if job != "teacher"):
        page = DOCS / f"{SHARED.get(job, job)}.md"
        if page.stem != "dmd2":  # its own table has all its forms: benchmarks/dmd2_forms.py
            pages[page, job] = of_page(jobs, job)
    return pages


def beside_best(jobs: Seeds, job: str) -> str:
    """By how much one job is better than the best of the others at each number of steps, in words."""
    means: Means = {key: kept.mean(results) for key, results in jobs.items()}
    lines = []
    for steps in (n for n in STEPS if (job, n) in means):
        others = {name: r for (name, n), r in means.items() if n == steps and name not in (job, "teacher")}
        best = min(others, key=lambda name: others[name].figures["FD"])
        value, low, high = kept.better_by("FD", means[job, steps], others[best])
        spread = means[job, steps].figures["spread"] / means["teacher", LONGEST].figures["spread"] - 1
        lines.append(
            f"{job} at {steps} steps: better than {best} by FD {value:+.3f} [{low:+.3f}, {high:+.3f}]; spread "
            f"{100 * spread:+.0f} % of the teacher's"
        )
    return "\n".join(lines)


def _table(jobs: Seeds, figures: tuple[str, ...], exact: bool) -> str:
    rows = []
    for job in sorted({job for job, _ in jobs}, key=lambda job: (job == "teacher", job)):
        steps = ([cell(jobs[job, n], f, exact) for f in figures] if (job, n) in jobs else ["—"] for n in STEPS)
        rows.append([_named(job, linked=not exact), *(", ".join(cells) for cells in steps)])
    return in_rows(rows, ["Method", *(f"{n} step{'s' * (n > 1)}" for n in STEPS)])


def _named(job: str, linked: bool) -> str:
    if job == "teacher":
        return "teacher, DDIM"
    return f"[`{job}`]({SHARED.get(job, job)}.md)" if linked else f"`{job}`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/table"))
    parser.add_argument("--kept", type=Path, default=KEPT)
    given = parser.parse_args()
    table = {"teacher", *(path.stem for path in (HERE / "table").glob("*.yaml"))}
    measured = {k: r for k, r in kept.in_runs(given.runs).items() if re.sub(r"(-s\d+)?/.*", "", k) in table}
    found = kept.read(given.kept) | measured
    kept.write(given.kept, found)
    jobs = by_job(found)
    for (page, mark), text in tables(jobs).items():
        put(page, f"at one cost: {mark}", text)
    for job in dict.fromkeys(job for job, n in jobs if job != "teacher" and (job, 2) in jobs):
        print(beside_best(jobs, job))


if __name__ == "__main__":
    main()
