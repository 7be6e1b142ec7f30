"""Claims of the papers, tested on measured students: `fewstep benchmark` first, then this script reads its results.

    fewstep benchmark benchmarks/table/*.yaml --budget 100000 --count 512 --runs runs/table --out runs/table/out
    fewstep benchmark benchmarks/claims/*.yaml --count 512 --runs runs/claims --out runs/claims/out
    python -m benchmarks.claims runs/table runs/claims

For each claim: by how much one student is better than the other (FD and detail FD lower, accuracy higher) on the same
prompts and noise, with the 95 % interval of the difference, for each seed that both have and in the mean over them.
"yes": better beyond the interval in every seed; "no": worse beyond it in every seed; else "open". A claim without
students in the folders keeps its former answer. Claims that need another statistic are in benchmarks/methods.md, each
with its own command.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

from benchmarks import kept
from fewstep.data.files import replace_text
from fewstep.evaluation.grids import image_grid
from fewstep.evaluation.result import KEPT_IMAGES, Estimate, Result, in_steps
from fewstep.reports.results import IN_SHORT
from fewstep.scenes64.prompts import unseen_captions

load = cache(Result.load)  # most results appear in several claims
RESULTS = Path(__file__).parent / "results" / "claims.json"


@dataclass(frozen=True)
class Claim:
    """The claim that one student is better than another, each given as (job, steps).

    Attributes:
        paper: that makes it. says: the claim, in our words. better, worse: the two students.
    """

    paper: str
    says: str
    better: tuple[str, int]
    worse: tuple[str, int]


CLAIMS = (
    Claim("lcm", "fresh noise and a second step repair what one step lacks", ("lcm", 2), ("lcm", 1)),
    Claim("lcm", "four steps are better than one", ("lcm", 4), ("lcm", 1)),
    Claim("tcd", "more steps do not get worse, as lcm's do", ("tcd", 8), ("lcm", 8)),
    Claim("tcd", "any end s is better than s = 0 alone, at four steps", ("tcd", 4), ("lcm", 4)),
    Claim("ctm", "its own loss is better than tcd's, at four steps", ("ctm", 4), ("tcd", 4)),
    Claim("ctm", "its own loss is better than tcd's, at one step", ("ctm", 1), ("tcd", 1)),
    Claim("pcm", "phases are better than re-noising, at four steps", ("pcm", 4), ("lcm", 4)),
    Claim("turbo", "both losses are better than the adversarial loss alone", ("turbo-both", 2), ("turbo-game", 2)),
    Claim("turbo", "both losses are better than the distillation loss alone", ("turbo-both", 2), ("turbo-advice", 2)),
    Claim(
        "turbo",
        "the adversarial loss is better than the distillation loss alone",
        ("turbo-game", 2),
        ("turbo-advice", 2),
    ),
    Claim(
        "lightning",
        "the teacher's encoder is a better discriminator than an image encoder",
        ("lightning", 4),
        ("turbo", 4),
    ),
    Claim("hyper", "segments and matching are better than tcd, at one step", ("hyper", 1), ("tcd", 1)),
    Claim("hyper", "segments and matching are better than tcd, at two steps", ("hyper", 2), ("tcd", 2)),
    Claim("hyper", "segments and matching are better than tcd, at four steps", ("hyper", 4), ("tcd", 4)),
    Claim("hyper", "segments and matching are better than lcm, at one step", ("hyper", 1), ("lcm", 1)),
    Claim("hyper", "segments and matching are better than lcm, at two steps", ("hyper", 2), ("lcm", 2)),
    Claim("dmd", "matching the final distribution is better than tcd, at one step", ("dmd", 1), ("tcd", 1)),
    Claim("dmd2", "no pairs are needed: better than dmd at one step and equal cost", ("dmd2-1step", 1), ("dmd", 1)),
    Claim("dmd2", "several steps are better than one", ("dmd2", 4), ("dmd2-1step", 1)),
    Claim("dmd2", "its discriminator is worth having", ("dmd2", 4), ("dmd2-no-game", 4)),
    Claim("dmd2", "two time scales are better than one, at equal cost", ("dmd2", 4), ("dmd2-one-pace", 4)),
    Claim("dmd2", "the student passes its teacher at full length", ("dmd2", 4), ("teacher", 50)),
    Claim("dmd2", "one step is better than two of the teacher", ("dmd2-1step", 1), ("teacher", 2)),
    Claim("dmd", "one step is better than two of the teacher", ("dmd", 1), ("teacher", 2)),
    Claim("tdm", "matching along its own trajectory is better than dmd2, at four steps", ("tdm", 4), ("dmd2", 4)),
    Claim("scm", "no grid is better than one: than cm, at one step", ("scm", 1), ("cm", 1)),
    Claim("scm", "no grid is better than one: than cm, at two steps", ("scm", 2), ("cm", 2)),
    Claim("rcm", "matching beside consistency is better than scm alone, at one step", ("rcm", 1), ("scm", 1)),
    Claim("rcm", "matching beside consistency is better than scm alone, at four steps", ("rcm", 4), ("scm", 4)),
    Claim("reflow", "a straight trajectory is better than its teacher's, at two steps", ("reflow", 2), ("teacher", 2)),
    Claim("reflow", "a straight trajectory is better than its teacher's, at four steps", ("reflow", 4), ("teacher", 4)),
    *(
        Claim("table", f"{job} at {steps} steps is better than its teacher at fifty", (job, steps), ("teacher", 50))
        for steps, jobs in (
            (4, ("hyper", "lightning", "ctm", "pcm", "tcd", "cm", "dmd2", "tdm", "pdd", "flowmap", "scm")),
            (8, ("hyper", "ctm", "tcd", "cm", "pdd", "flowmap", "scm")),
        )
        for job in jobs
    ),
)
SHOWN = (
    "dmd", "dmd2-1step", "cm", "scm", "lcm", "tcd", "ctm", "flowmap", "pcm", "lightning", "hyper", "pdd", "dmd2", "tdm",
    "reflow", "turbo", "ladd",
)  # fmt: skip
"""Rows of the image grid, each at one step and at four where it has them."""


def find(folders: list[Path], student: tuple[str, int]) -> dict[int | None, Result]:
    """The results of a student (job, steps) by seed; a teacher has no seed, and is under None."""
    job, steps = student
    name = f"teacher/measured/ddim-{steps}" if job == "teacher" else f"{job}-s*/measured/{steps}"
    files = [file for folder in folders for file in folder.glob(f"{name}.safetensors")]
    return {result.seed: result for result in map(load, sorted(files))}


def pairs(better: dict[int | None, Result], worse: dict[int | None, Result]) -> Iterator[tuple[Result, Result]]:
    """Results of the same seed; the teacher is compared with every seed."""
    for seed, result in better.items():
        other = worse.get(seed, worse.get(None))
        if other is not None:
            yield result, other


def better_by(figure: str, result: Result, other: Result) -> Estimate:
    """By how much a figure of ``result`` is better: positive where it is."""
    value, low, high = kept.better_by(figure, result, other)
    return value, (low, high)


def answer(differences: list[Estimate]) -> str:
    """The answer over all seeds."""
    if all(low > 0 for _, (low, _) in differences):
        return "yes"
    return "no" if all(high < 0 for _, (_, high) in differences) else "open"


def grid(folders: list[Path]) -> Image.Image:
    """Every method's first seed at one and four steps, from the same noise and prompts as the teacher's row."""
    shown = [("teacher", 50), ("teacher", 4), *((job, steps) for steps in (1, 4) for job in SHOWN)]
    by_seed = [(job, found) for job, steps in shown if (found := find(folders, (job, steps)))]
    results = [(job, found[min(found, key=lambda seed: seed or 0)]) for job, found in by_seed]
    labels = [f"{job}, {in_steps(result.steps)}" for job, result in results]
    return image_grid([result.images for _, result in results], labels, unseen_captions(KEPT_IMAGES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders of the runs of fewstep benchmark (--runs)")
    parser.add_argument("--picture", type=Path, help="PNG file to write, with a row for each method")
    options = parser.parse_args()
    if options.picture:
        grid(options.folders).save(options.picture)
    known = {(*row["better"], *row["worse"]): row for row in json.loads(RESULTS.read_text(encoding="utf-8"))}
    rows = []
    for claim in CLAIMS:
        found = list(pairs(find(options.folders, claim.better), find(options.folders, claim.worse)))
        if not found:
            before = known.get((*claim.better, *claim.worse))
            print(f"{claim.paper}: {claim.says}: not in these folders{', as answered before' if before else ''}")
            rows += [before] if before else []
            continue
        figures = {name: [better_by(name, *pair) for pair in found] for name in IN_SHORT}
        answers = {name: answer(values) for name, values in figures.items()}
        ours, theirs = (kept.mean([pair[i] for pair in found]) for i in (0, 1))
        means = {name: better_by(name, ours, theirs) for name in IN_SHORT}
        rows.append({
            "paper": claim.paper, "says": claim.says, "better": list(claim.better), "worse": list(claim.worse),
            "seeds": [result.seed for result, _ in found], "answers": answers,
            "better by": {n: [v, *ends] for n, (v, ends) in means.items()},
            "by seed": {n: [[v, *ends] for v, ends in values] for n, values in figures.items()},
        })  # fmt: skip
        text = "; ".join(
            f"{name} {answers[name]}, {v:.3g} [{low:.3g}, {high:.3g}]" for name, (v, (low, high)) in means.items()
        )
        seeds = ", ".join(str(result.seed) for result, _ in found)
        print(f"{claim.paper}: {claim.says}: {text} (seeds {seeds})")
    replace_text(RESULTS, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
