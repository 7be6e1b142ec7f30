"""The field's sentences, held against measured students: `fewstep benchmark` first, then this reads what it left.

    fewstep benchmark benchmarks/table/*.yaml --budget 100000 --count 512 --runs runs/table --out runs/table/out
    fewstep benchmark benchmarks/claims/*.yaml --count 512 --runs runs/claims --out runs/claims/out
    python benchmarks/claims.py runs/table runs/claims

For each sentence: by how much the one is better than the other (FD and detail FD lower, accuracy higher), on the same
prompts and noise, with the 95 % interval of that difference, in the mean over the seeds that both have and for each of
them. "yes": better beyond the interval in every seed; "no": worse beyond it in every seed; else "open". A sentence
whose students are not in the folders keeps its former answer. What needs another statistic stands in
benchmarks/methods.md with its own command.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from fewstep.data.files import replace_text
from fewstep.evaluation.compare import Figures, Result, lower_by
from fewstep.evaluation.grids import image_grid
from fewstep.reports.results import IN_SHORT, PICTURES, Entry
from fewstep.scenes64.prompts import unseen_captions

load = cache(Entry.load)  # most entries are held against several others
RESULTS = Path(__file__).parent / "results" / "claims.json"


@dataclass(frozen=True)
class Claim:
    """That one way is better than another; a way is (job, steps).

    Attributes:
        paper: whose. says: the sentence, in our words. better, worse: the two ways.
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
    Claim("turbo", "the game grounded by advice is better than the game alone", ("turbo-both", 2), ("turbo-game", 2)),
    Claim("turbo", "the game grounded by advice is better than advice alone", ("turbo-both", 2), ("turbo-advice", 2)),
    Claim("turbo", "the game alone is better than advice alone", ("turbo-game", 2), ("turbo-advice", 2)),
    Claim("lightning", "the teacher's own encoder judges better than one of pictures", ("lightning", 4), ("turbo", 4)),
    Claim("hyper", "segments and matching are better than tcd, at one step", ("hyper", 1), ("tcd", 1)),
    Claim("hyper", "segments and matching are better than tcd, at two steps", ("hyper", 2), ("tcd", 2)),
    Claim("hyper", "segments and matching are better than tcd, at four steps", ("hyper", 4), ("tcd", 4)),
    Claim("hyper", "segments and matching are better than lcm, at one step", ("hyper", 1), ("lcm", 1)),
    Claim("hyper", "segments and matching are better than lcm, at two steps", ("hyper", 2), ("lcm", 2)),
    Claim("dmd", "what is drawn in the end is all that counts: better than tcd, at one step", ("dmd", 1), ("tcd", 1)),
    Claim("dmd2", "no pairs are needed: better than dmd at one step and equal cost", ("dmd2-1step", 1), ("dmd", 1)),
    Claim("dmd2", "several steps are better than one", ("dmd2", 4), ("dmd2-1step", 1)),
    Claim("dmd2", "its discriminator is worth having", ("dmd2", 4), ("dmd2-no-game", 4)),
    Claim("dmd2", "two time scales are better than one, at equal cost", ("dmd2", 4), ("dmd2-one-pace", 4)),
    Claim("dmd2", "the student passes its teacher at full length", ("dmd2", 4), ("teacher", 50)),
    Claim("dmd2", "one step is better than two of the teacher", ("dmd2-1step", 1), ("teacher", 2)),
    Claim("dmd", "one step is better than two of the teacher", ("dmd", 1), ("teacher", 2)),
    *(
        Claim("table", f"{job} at {steps} steps is better than its teacher at fifty", (job, steps), ("teacher", 50))
        for steps, jobs in (
            (4, ("hyper", "lightning", "ctm", "pcm", "tcd", "cm", "dmd2")),
            (8, ("hyper", "ctm", "tcd", "cm")),
        )
        for job in jobs
    ),
)
SHOWN = ("dmd", "dmd2-1step", "cm", "lcm", "tcd", "ctm", "pcm", "lightning", "hyper", "dmd2", "turbo", "ladd")
"""Rows of the picture, each at one step and at four where it has them."""


def find(folders: list[Path], way: tuple[str, int]) -> dict[int | None, Entry]:
    """The measured entries of a way, by seed; the teacher's, which has none, under None."""
    job, steps = way
    name = f"teacher/measured/ddim-{steps}" if job == "teacher" else f"{job}-s*/measured/{steps}"
    files = [file for folder in folders for file in folder.glob(f"{name}.safetensors")]
    return {entry.seed: entry for entry in map(load, sorted(files))}


def pairs(better: dict[int | None, Entry], worse: dict[int | None, Entry]) -> Iterator[tuple[Entry, Entry]]:
    """Entries of one seed; the teacher stands beside every seed."""
    for seed, entry in better.items():
        other = worse.get(seed, worse.get(None))
        if other is not None:
            yield entry, other


def better_by(entry: Figures, other: Figures, figure: str) -> tuple[float, tuple[float, float]]:
    """Positive where ``entry`` is the better one."""
    value, (low, high) = lower_by(figure, entry, other)
    return (-value, (-high, -low)) if figure == "accuracy" else (value, (low, high))


def averaged(entries: list[Entry]) -> Result:
    """The figures of several seeds in the mean, with the same resampling of the prompts for all of them."""
    resampled = {name: torch.stack([e.resampled[name] for e in entries]).mean(0) for name in IN_SHORT}
    figures = {name: sum(e.figures[name] for e in entries) / len(entries) for name in IN_SHORT}
    return Result("", entries[0].pictures, figures, resampled=resampled)


def answer(differences: list[tuple[float, tuple[float, float]]]) -> str:
    """Over all seeds."""
    if all(low > 0 for _, (low, _) in differences):
        return "yes"
    return "no" if all(high < 0 for _, (_, high) in differences) else "open"


def picture(folders: list[Path]) -> Image.Image:
    """Every method's first seed at one and four steps, from the same noise and prompts as the teacher's row."""
    ways = [("teacher", 50), ("teacher", 4), *((job, steps) for steps in (1, 4) for job in SHOWN)]
    entries = [found[min(found, key=lambda seed: seed or 0)] for way in ways if (found := find(folders, way))]
    labels = [f"{e.model.split(',')[0]}, {e.steps} step{'s' if e.steps > 1 else ''}" for e in entries]
    return image_grid([e.pictures.float() / 255 for e in entries], labels, unseen_captions(PICTURES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="where fewstep benchmark worked (--runs)")
    parser.add_argument("--picture", type=Path, help="PNG file to write, a row for each method")
    options = parser.parse_args()
    if options.picture:
        picture(options.folders).save(options.picture)
    known = {(*row["better"], *row["worse"]): row for row in json.loads(RESULTS.read_text(encoding="utf-8"))}
    rows = []
    for claim in CLAIMS:
        found = list(pairs(find(options.folders, claim.better), find(options.folders, claim.worse)))
        if not found:
            before = known.get((*claim.better, *claim.worse))
            print(f"{claim.paper}: {claim.says}: not in these folders{', as answered before' if before else ''}")
            rows += [before] if before else []
            continue
        figures = {name: [better_by(*pair, name) for pair in found] for name in IN_SHORT}
        answers = {name: answer(values) for name, values in figures.items()}
        ours, theirs = (averaged([pair[i] for pair in found]) for i in (0, 1))
        means = {name: better_by(ours, theirs, name) for name in IN_SHORT}
        rows.append({
            "paper": claim.paper, "says": claim.says, "better": list(claim.better), "worse": list(claim.worse),
            "seeds": [entry.seed for entry, _ in found], "answers": answers,
            "better by": {n: [v, *ends] for n, (v, ends) in means.items()},
            "by seed": {n: [[v, *ends] for v, ends in values] for n, values in figures.items()},
        })  # fmt: skip
        said = "; ".join(
            f"{name} {answers[name]}, {v:.3g} [{low:.3g}, {high:.3g}]" for name, (v, (low, high)) in means.items()
        )
        seeds = ", ".join(str(entry.seed) for entry, _ in found)
        print(f"{claim.paper}: {claim.says}: {said} (seeds {seeds})")
    replace_text(RESULTS, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
