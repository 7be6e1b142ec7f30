"""Loss curves of LoRA on a quantised base beside those on the plain one: the same recipe, pictures and random numbers.

Runs of scenes-64 go through `fewstep.runs.distill` as any run does, once with each `teacher.quantize`. Compared are the
means of the student's loss over slices of the run: the largest relative difference of a slice, and that of the whole.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from fewstep.recipe.load import load_recipe
from fewstep.runs.distill import distill


def losses(recipe: str, kind: str, options: argparse.Namespace) -> list[float]:
    """Mean losses of the slices of one run."""
    more = [
        f"training.steps={options.steps}", f"training.batch_size={options.batch_size}",
        f"training.log_every={options.slice}", f"data.size={options.pictures}", f"seed={options.seed}",
        f"sample.every={10 * options.steps}", "sample.teacher_steps=1", f"training.device={options.device}",
        *options.sets, *([] if kind == "plain" else [f"teacher.quantize={kind}"]),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        distill(load_recipe(recipe, more), Path(place) / "run")
        lines = (Path(place) / "run" / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["student/loss"] for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=["scenes-64-lcm"])
    parser.add_argument("--kinds", nargs="+", default=["int8", "nf4"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--slice", type=int, default=10, help="steps whose mean is compared")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", dest="sets", action="append", default=[], help="overrides, as in fewstep distill")
    options = parser.parse_args()
    for recipe in options.recipes:
        plain = losses(recipe, "plain", options)
        for kind in options.kinds:
            mine = losses(recipe, kind, options)
            apart = [abs(a / b - 1) for a, b in zip(mine, plain, strict=True)]
            print(json.dumps({
                "recipe": recipe, "kind": kind, "steps": options.steps, "batch_size": options.batch_size,
                "sets": options.sets,
                "plain": [float(f"{x:.4g}") for x in plain], "quantised": [float(f"{x:.4g}") for x in mine],
                "largest_difference": round(max(apart), 4), "of_the_whole": round(abs(sum(mine) / sum(plain) - 1), 4),
            }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
