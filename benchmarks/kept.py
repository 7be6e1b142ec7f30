"""Measured figures of many runs in one small file, from which means and intervals can be made again without the runs.

    python -m benchmarks.kept runs/table benchmarks/results/table.safetensors    # adds what the runs have; prints all

A result is kept under ``JOB-sSEED/STEPS`` (the teacher's under ``teacher/SAMPLER-STEPS``), with its figures and, of
those that are compared, the values over resamplings of the prompts; without images. Seeds can be added later.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from safetensors import safe_open

from fewstep.data.files import replace_tensors
from fewstep.evaluation.result import Result, lower_by

COMPARED = ("FD", "detail FD", "accuracy", "spread")
HIGHER = ("accuracy", "spread")  # better


def in_runs(runs: Path) -> dict[str, Result]:
    """The results in the runs of `fewstep benchmark --runs`, each under its label."""
    found = {}
    for path in sorted(runs.glob("*/measured/*.safetensors")):
        found[f"{path.parent.parent.name}/{path.stem}"] = Result.load(path)
    return found


def read(file: Path) -> dict[str, Result]:
    """The results that `write` has kept; none where there is no file."""
    if not file.is_file():
        return {}
    with safe_open(file, framework="pt") as kept:
        plain = json.loads(kept.metadata()["results"])
        values = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
    return {
        label: Result(**entry, images=torch.empty(0), resampled=_of(label, values)) for label, entry in plain.items()
    }


def write(file: Path, results: dict[str, Result]) -> None:
    """Keep the results."""
    plain = {
        label: {"model": r.model, "steps": r.steps, "figures": r.figures, "seed": r.seed}
        for label, r in sorted(results.items())
    }
    values = {
        f"{label}/{name}": r.resampled[name].float().contiguous()
        for label, r in sorted(results.items())
        for name in COMPARED
        if name in r.resampled
    }
    replace_tensors(file, values, {"results": json.dumps(plain)})


def over_seeds(results: list[Result], figure: str) -> tuple[float, float]:
    """The mean of a figure over seeds and its standard deviation, which is 0 for one seed."""
    values = [result.figures[figure] for result in results]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def mean(results: list[Result]) -> Result:
    """The mean over seeds, whose resampling of the prompts is the same."""
    names = [name for name in COMPARED if all(name in r.figures for r in results)]
    figures = {name: over_seeds(results, name)[0] for name in names}
    resampled = {name: torch.stack([r.resampled[name] for r in results]).mean(0) for name in names}
    return Result("mean", results[0].steps, results[0].images, figures, resampled=resampled)


def better_by(figure: str, result: Result, other: Result) -> tuple[float, float, float]:
    """By how much a figure of ``result`` is better, and the interval: positive where it is."""
    value, (low, high) = lower_by(figure, result, other)
    return (-value, -high, -low) if figure in HIGHER else (value, low, high)


def _of(label: str, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values of one result, by figure."""
    return {name: values[f"{label}/{name}"].double() for name in COMPARED if f"{label}/{name}" in values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    found = read(given.file) | in_runs(given.runs)
    write(given.file, found)
    for label, result in found.items():
        figures = (f"{name} {result.figures[name]:.3f}" for name in COMPARED if name in result.figures)
        print(f"{label:24} " + ", ".join(figures))


if __name__ == "__main__":
    main()
