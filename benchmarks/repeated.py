"""The table measured again, on this machine or another: is every figure within the interval that it had before?

    python benchmarks/repeated.py benchmarks/results/table/table.csv runs/table/out/table.csv

Rows are matched by model, seed and steps. Without a second training the interval is over prompts alone, so a figure of
another seed may well lie outside; one of the same seed should be the same to the digit on a machine of the same kind.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

SAME = 1e-6  # relative


def rows(path: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return {(row["model"], row["seed"], row["steps"]): row for row in csv.DictReader(file)}


def pairs(before: Path, after: Path) -> Iterator[tuple[str, str, float, float, float, float]]:
    """(label, figure, before, low, high, after) of every figure that both tables have."""
    old, new = rows(before), rows(after)
    for key in old.keys() & new.keys():
        label = f"{key[0]}{', seed ' + key[1] if key[1] else ''}, {key[2]} steps"
        for name in (column.removesuffix(" low") for column in old[key] if column.endswith(" low")):
            if old[key][name] and new[key][name]:
                value, low, high = (float(old[key][f"{name}{end}"]) for end in ("", " low", " high"))
                yield label, name, value, low, high, float(new[key][name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="table.csv with the intervals")
    parser.add_argument("after", type=Path, help="table.csv of the repetition")
    options = parser.parse_args()
    found = sorted(pairs(options.before, options.after))
    if not found:
        parser.error("the two tables have no row in common")
    outside = [one for one in found if not one[3] <= one[5] <= one[4]]
    same = sum(abs(after - value) <= SAME * abs(value) for _, _, value, _, _, after in found)
    for label, name, value, low, high, after in outside:
        print(f"{label}: {name} was {value:.4g} [{low:.4g}, {high:.4g}], is {after:.4g}")
    within = len(found) - len(outside)
    print(f"{len(found)} figures: {same} the same to {SAME:g}, {within} within the interval of before.")


if __name__ == "__main__":
    main()
