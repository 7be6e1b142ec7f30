"""Commands that make students: `fewstep demo`, `distill`, `prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import RecipeDevice, RecipeName, RunOut, Sets, Vram
from fewstep.training import launch
from fewstep.training.console import Quiet, command, long, options, resumable, say, whole_numbers


@long
def demo(
    out: Annotated[Path, typer.Option(help="Run directory; a run in it is continued.")] = Path("runs/demo"),
    overrides: Sets = None,
    count: Annotated[int, typer.Option(min=8, help="Number of unseen prompts to compare on.")] = 512,
    device: RecipeDevice = None,
    quiet: Quiet = False,
) -> None:
    """Distil a small shipped model into a 4-step student, and compare it with its teacher, in minutes on a CPU.

    It first shows what few steps cost without distillation: images of the model in many and in few steps.

    - `fewstep demo`

    - `fewstep demo --set training.steps=200 --count 32`, a shorter one
    """
    from fewstep.evaluation.tables import as_text
    from fewstep.recipe.load import load_recipe
    from fewstep.reports.demo import RECIPE
    from fewstep.reports.demo import demo as run
    from fewstep.training.run_files import RunFiles

    recipe = load_recipe(RECIPE, overrides or ()).on_device(device)
    with resumable("demo", *options(out=out, set=overrides, count=count, device=device)):
        made = run(out, recipe, count, show_progress=not quiet, tell=say)
    say(as_text(made.comparison))
    say()
    for figure in ("FD", "detail FD"):
        say(made.gap_closed(figure))
    say(f"\nLook at {made.grid}; the student is in {RunFiles(made.folder).student}.")
    say("Your own model: " + command("distill", "sdxl-lcm", "--set", "teacher.path=MODEL", "--set", "data.path=IMAGES"))


@long
def distill(
    recipe: RecipeName,
    out: RunOut = None,
    overrides: Sets = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds of several runs, e.g. 0,1,2, in OUT/seed-0, OUT/seed-1, OUT/seed-2.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the whole recipe and what it needs, and stop.")
    ] = False,
    device: RecipeDevice = None,
    vram: Vram = None,
    quiet: Quiet = False,
) -> None:
    """Distil a teacher into a few-step student.

    - `fewstep distill scenes-64-tcd`

    - `fewstep distill sdxl-lcm --set teacher.path=my-sdxl --set data.path=images`

    Ctrl-C saves everything; --resume then continues to the same weights as an uninterrupted run. On several GPUs:
    `torchrun --nproc-per-node 2 -m fewstep distill ...`; the processes share every batch.
    """
    from fewstep.recipe.chain import load

    folder = out or Path("runs") / Path(recipe).stem
    lines: list[str] = []
    if vram is not None:
        from fewstep.runs.vram import fitted

        begun = _begun(folder, seeds) if resume else None
        found = fitted(recipe, overrides or (), device, vram, launch.place().count, dry_run, begun)
        overrides, lines = [*(overrides or ()), *found.overrides], found.lines
    if dry_run:
        from fewstep.runs.plan import dry_run as text

        say("\n".join([text(load(recipe, overrides or ()).on_device(device)), *(f"# {line}" for line in lines)]))
        return
    from fewstep.runs.chain import run
    from fewstep.runs.hints import next_commands
    from fewstep.training import distributed
    from fewstep.training.run_files import RunFiles

    if lines and distributed.first():
        say("\n".join(lines))
    several = {folder / f"seed-{n}": [f"seed={n}"] for n in whole_numbers(seeds, "--seeds")}
    again = options(out=folder, set=overrides, seeds=seeds, device=device)
    with resumable("distill", recipe, *again, "--resume"):
        for place, seed in (several or {folder: []}).items():
            resolved = load(recipe, [*(overrides or ()), *seed]).on_device(device)
            student = run(resolved, place, resume=resume, show_progress=not quiet)
            if distributed.first():
                _report_skipped(place)
                samples = RunFiles(student.parent).samples
                say(f"The student is in {student}. Sample grids of the training are in {samples}. Then try:")
                for words in next_commands(resolved, place):
                    say("  " + command(*words))


def _begun(folder: Path, seeds: str | None) -> Path | None:
    """The recipe of the run in a folder, or of the first of several that has begun."""
    from fewstep.training.run_files import RunFiles

    places = [folder / f"seed-{n}" for n in whole_numbers(seeds, "--seeds")] or [folder]
    return next((path for place in places if (path := RunFiles(place).recipe).is_file()), None)


@long
def prepare(
    recipe: RecipeName,
    from_teacher: Annotated[
        bool, typer.Option("--from-teacher", help="Generate the teacher's samples (key `pairs`), encode no images.")
    ] = False,
    out: RunOut = None,
    overrides: Sets = None,
    device: RecipeDevice = None,
    quiet: Quiet = False,
) -> None:
    """Make a recipe's training data; `fewstep distill` does the same before it trains.

    - `fewstep prepare sdxl-lcm --set data.path=images`

    - `fewstep prepare scenes-64-dmd --from-teacher`

    After an interruption the same command continues: finished files are kept. Recipes with the same `pairs.path` share
    the teacher's samples.
    """
    from fewstep.recipe.load import load_recipe
    from fewstep.runs.distill import prepare_data
    from fewstep.runs.folder import RunFolder
    from fewstep.runs.teacher_samples import pairs_folder
    from fewstep.training import distributed

    folder, resolved = out or Path("runs") / Path(recipe).stem, load_recipe(recipe, overrides or ()).on_device(device)
    rest = options(out=folder, set=overrides, device=device)
    with resumable("prepare", recipe, *(["--from-teacher"] if from_teacher else []), *rest):
        made = prepare_data(resolved, folder, from_teacher=from_teacher, show_progress=not quiet)
    if distributed.first():
        _report_skipped(folder)
        if made is not None:
            place = pairs_folder(resolved, RunFolder(folder))
            say(f"{len(made.mean):,} samples of the teacher are in {place} ({made.cost:,.0f} forward passes).")
        say("Continue with: " + command("distill", recipe, *rest, "--resume"))


def _report_skipped(run: Path) -> None:
    """Print how many images or captions could not be used, if any, and where they are listed."""
    from fewstep.data.cache import SKIPPED
    from fewstep.training.run_files import RunFiles

    listed = RunFiles(run).data / SKIPPED
    if listed.is_file():
        count = len(listed.read_text(encoding="utf-8").splitlines())
        say(f"{count:,} of the images or captions could not be used: see {listed}.")
