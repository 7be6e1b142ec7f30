"""What the recipes of a method need, as the tables on its page have it: `fewstep distill RECIPE --dry-run` of each.

    OMP_NUM_THREADS=1 python -m benchmarks.plans [--tables pdd,flowmap,reflow,scm,tdm] [--again]
        [--out benchmarks/results/plans.json]

No weights, images or GPU are needed. Planned recipes are kept in the file of ``--out`` and planned anew with
``--again``; then the tables of docs/methods are written, behind their marks. A recipe belongs to a table by its name,
and `tdm` is on the page of dmd2. Hours are on an H100 at 35 % of its peak rate, which is assumed; recipes of
scenes-64 are for a CPU.
"""

from __future__ import annotations

import argparse
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from benchmarks.pages import put
from fewstep.data.files import replace_text
from fewstep.planning.hardware import durations
from fewstep.recipe.load import load_recipe
from fewstep.runs.plan import plan

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "plans.json"
TABLES = {"pdd": ("pdd",), "flowmap": ("flowmap",), "reflow": ("reflow",), "scm": ("scm", "rcm"), "tdm": ("tdm",)}
"""The endings of the recipes' names in each table."""
HEAD = (
    "| Recipe | Network calls per step | Forward passes per image | Steps x batch | Peak memory | Hours |\n"
    "|---|---|---|---|---|---|\n"
)
TIMED_ON = "H100"


def recipes(kind: str) -> list[str]:
    """Names of the shipped recipes of a table, scenes-64 first."""
    names = (entry.name.removesuffix(".yaml") for entry in resources.files("fewstep.recipes").iterdir())
    ours = [name for name in names if name.rpartition("-")[2] in TABLES[kind]]
    return sorted(ours, key=lambda name: ("scenes" not in name, name))


def row(name: str) -> dict[str, Any]:
    """What `fewstep distill NAME --dry-run` says of one recipe."""
    recipe = load_recipe(name)
    planned = plan(recipe, timed=False)
    found, settings = planned.estimate, recipe.training
    assert found is not None, planned.why_not
    low, flops = settings.precision == "bf16", settings.steps * found.rehearsal.flops
    seconds = [s for gpu, s in durations(flops, planned.peak, low) if gpu.name == TIMED_ON]
    return {
        "calls": ", ".join(f"{role} {count:.3g}" for role, count in found.calls.items()),
        "passes": f"{found.equivalents:.3g}",
        "steps": f"{settings.steps:,} x {settings.batch_size}",
        "memory": f"{planned.peak / 1e9:.3g} GB",
        "hours": "CPU" if settings.device == "cpu" else f"{seconds[0] / 3600:.3g}" if seconds else "needs over 80 GB",
    }


def table(kind: str, found: dict[str, dict[str, Any]]) -> str:
    """The table of a page, in Markdown: of all recipes that are planned."""
    rows = ((name, *found[name].values()) for name in recipes(kind) if name in found)
    return HEAD + "".join(f"| `{name}` | {' | '.join(cells)} |\n" for name, *cells in rows)


def page(kind: str) -> Path:
    """The page of documentation that has a table."""
    return HERE.parent / "docs" / "methods" / f"{'dmd2' if kind == 'tdm' else kind}.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept: dict[str, dict[str, Any]] = json.loads(given.out.read_text()) if given.out.exists() else {}
    for kind in given.tables.split(","):
        for name in recipes(kind):
            if given.again or name not in kept:
                kept[name] = row(name)
                replace_text(given.out, json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
                print(name, *kept[name].values(), sep=" | ", flush=True)
        put(page(kind), f"plans {kind}", table(kind, kept))


if __name__ == "__main__":
    main()
