"""Commands that measure: `fewstep evaluate`, `report`, `benchmark`, `diagnose`, `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import Features, PromptsFile, RecipeDevice, RunDevice, Runs, Sets
from fewstep.training.console import Quiet, finite, long, numbers, options, resumable, say, whole_numbers


@long
def evaluate(
    runs: Runs,
    steps: Annotated[str | None, typer.Option(help="Numbers of steps, e.g. 1,2,4,8 (default: its own).")] = None,
    guidance: Annotated[str | None, typer.Option(help="Guidance scales, e.g. 1,2,3 (default: its own).")] = None,
    eta: Annotated[str | None, typer.Option(help="Shares of fresh noise, e.g. 0,0.3 (default: its own).")] = None,
    lora_scale: Annotated[
        str | None, typer.Option(help="Strengths of a LoRA student, e.g. 0.8,1 (default: 1).")
    ] = None,
    prompts: PromptsFile = None,
    count: Annotated[int, typer.Option(min=0, help="Number of prompts; 0: as the recipe says.")] = 0,
    features: Features = "",
    out: Annotated[Path, typer.Option(help="JSON file to write, with a PNG of the images.")] = Path("evaluation.json"),
    device: RunDevice = None,
    quiet: Quiet = False,
) -> None:
    """Measure students at every combination of steps, guidance, eta and LoRA scale, to choose what to ship.

    - `fewstep evaluate runs/mine --steps 1,2,4,8`

    - `fewstep evaluate runs/mine runs/other --steps 4 --prompts prompts.txt`
    """
    from fewstep.evaluation.figures import MAIN
    from fewstep.evaluation.tables import as_text
    from fewstep.reports.evaluate import Sweep, best
    from fewstep.reports.evaluate import evaluate as measure
    from fewstep.reports.results import verdict_text

    several = {"guidance": guidance, "eta": eta, "lora_scale": lora_scale}
    values = {
        name: tuple(numbers(text, f"--{name.replace('_', '-')} needs numbers, e.g. 1,2,3") or ())
        for name, text in several.items()
    }
    sweep = Sweep(steps=tuple(whole_numbers(steps, "--steps")), **values)
    found = measure(runs, sweep, out, count, features, prompts, not quiet, device)
    say(as_text(found, MAIN))
    say(f"\n{verdict_text(found)}\n")
    say(best(found, "FD"))
    say(f"Wrote {out} and {out.with_suffix('.png')}.")


@long
def report(
    runs: Runs,
    out: Annotated[Path, typer.Option(help="Page to write, with PNG and JSON files beside it.")] = Path("report.html"),
    count: Annotated[int, typer.Option(min=8, help="Number of unseen prompts to measure on.")] = 256,
    features: Features = "",
    prompts: PromptsFile = None,
    device: RunDevice = None,
    quiet: Quiet = False,
) -> None:
    """Write one self-contained page: images from the same noise, quality against steps, losses, settings.

    - `fewstep report runs/mine`

    - `fewstep report runs/mine runs/other --out both.html`
    """
    from fewstep.reports.report import report as make

    make(runs, out, count, not quiet, features, prompts, device)
    say(f"Wrote {out}.")


@long
def benchmark(
    jobs: Annotated[
        list[str] | None,
        typer.Argument(help="Recipes (names or files) or job files (default: every method's recipe for scenes-64)."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the table and the page.")] = Path("runs/benchmark"),
    runs: Annotated[Path | None, typer.Option(help="Folder of the runs (default: OUT/runs).")] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            min=1,
            callback=finite,
            help="Forward passes that a run may cost, a backward pass counting as 2 (default: as the recipe states).",
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, one run each, e.g. 0,1,2 (default: the job's).")] = None,
    steps: Annotated[
        str | None, typer.Option(help="Sampling steps to measure students at, e.g. 1,2,4,8 (default: the job's).")
    ] = None,
    count: Annotated[int | None, typer.Option(min=8, help="Number of unseen prompts (default: 5000).")] = None,
    minutes: Annotated[
        float | None,
        typer.Option("--slice", min=0, callback=finite, help="Minutes after which it stops (default: never)."),
    ] = None,
    overrides: Sets = None,
    show: Annotated[
        bool, typer.Option("--list", help="Print which runs are measured and which are not, and stop.")
    ] = False,
    device: RecipeDevice = None,
    quiet: Quiet = False,
) -> None:
    """Train recipes at the same cost and measure their students on the same prompts: one table, with intervals.

    - `fewstep benchmark scenes-64-tcd scenes-64-lcm --budget 100000 --seeds 0,1`

    - `fewstep benchmark my-job.yaml --list`

    A job file is YAML: recipe, and perhaps set, seeds, budget, steps, count. Finished runs are kept; the same command
    continues with the rest. Started twice, on two cores or GPUs, each process takes runs that the other has not.
    """
    from fewstep.reports.benchmark import Benchmark
    from fewstep.reports.jobs import BenchmarkEntry, every_method
    from fewstep.reports.results import in_short
    from fewstep.training.progress import doing

    given = {
        "seeds": tuple(whole_numbers(seeds, "--seeds")) or None,
        "steps": tuple(whole_numbers(steps, "--steps")) or None,
        "budget": budget,
        "count": count,
    }
    changes = [*(overrides or ()), *([] if device is None else [f"training.device={device}"])]
    with doing("fitting the recipes to their budget" if budget else "reading the recipes"):
        made = [run for job in jobs or every_method() for run in BenchmarkEntry.of(job, **given).runs(changes)]
    work = Benchmark(made, out, runs or out / "runs", minutes, show_progress=not quiet)
    if show:
        for run in made:
            say(f"{run.name:32} {'done' if work.is_measured(run) else 'not done':10} {run.steps:,} steps")
        return
    again = options(
        out=out, runs=runs, budget=budget, seeds=seeds, steps=steps, count=count, slice=minutes, set=overrides,
        device=device,
    )  # fmt: skip
    with resumable("benchmark", *(jobs or ()), *again):
        done = work.work(say)
    table = work.write()
    if table is not None:
        say(f"{in_short(table)}\n")
        say(f"The table, the page and the images are in {out}.")
    if not done:
        say("Not all is done: run the same command again.")


@long
def diagnose(
    run: Annotated[Path, typer.Argument(help="A run directory, finished or not.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Find the problems of a run from its log, in words; exit code 1 if there is one.

    - `fewstep diagnose runs/mine`
    """
    from fewstep.reports.diagnose import diagnose as examine
    from fewstep.training.run_files import RunFiles

    found = examine(RunFiles(run).last())
    say(found.as_json() if as_json else str(found))
    if not found.healthy:
        raise typer.Exit(1)


@long
def verify(
    methods: Annotated[
        list[str] | None, typer.Argument(help="Names of methods, or FILE.py:Class for your own (default: all methods).")
    ] = None,
    mixture: Annotated[
        Path | None, typer.Option(help="JSON file of the Gaussian mixture to verify on (default: a built-in one).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of data, initial weights and training.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Number of training steps; 0 trains nothing (default: chosen for the method).")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Verify methods against closed forms: train each on exact teachers and print every quantity beside its value.

    - `fewstep verify lcm`

    - `fewstep verify ./mine.py:Mine --steps 0`, the contract and the fixed point alone

    Exit code 1 where a quantity is further from its value than its limit.
    """
    import torch

    from fewstep.methods.registry import METHODS, find_method
    from fewstep.verification.verify import verify as check

    torch.set_num_threads(1)
    passed = True
    for name in methods or METHODS:
        for case in find_method(name).truth_cases:
            report = check(name, mixture, seed=seed, steps=steps, show_progress=not quiet, **case)
            say(f"{report}\n")
            passed &= report.passed
    if not passed:
        raise typer.Exit(1)
