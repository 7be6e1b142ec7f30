"""The command line. Nothing heavy is imported before a command runs: ``fewstep --help`` must be quick."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fewstep.scenes64.commands import reward_app, scenes, teacher_app
from fewstep.training.console import (
    RANK,
    Device,
    Quiet,
    at_home,
    check_working_folder,
    command,
    end_with,
    finite,
    in_words,
    long,
    numbers,
    options,
    plain_remarks,
    resumable,
    whole_numbers,
)  # fmt: skip


class _Commands(TyperGroup):
    """Ends with a sentence on Ctrl-C, where typer alone prints none."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(end_with("Interrupted.", 130)) from None


app = typer.Typer(
    name="fewstep",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Turn any diffusion model into one that needs 1-8 steps.

Try `fewstep demo` first: it distils a small model on this machine in minutes and shows images.
Then `fewstep distill RECIPE` with a recipe of your own (`fewstep recipes` lists the shipped ones).""",
)
app.add_typer(teacher_app, name="teacher")
app.add_typer(reward_app, name="reward")
recipes_app = typer.Typer(invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")

Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe, e.g. --set training.steps=500."),
]
RecipeName = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")]
Features = Annotated[
    str,
    typer.Option(
        help="Network of FD and KID: imagenet, or a DINOv2, CLIP or SigLIP model (folder or hub name); by default the "
        "recipe's, for scenes-64 its detector."
    ),
]
PromptsFile = Annotated[
    Path | None, typer.Option(help="Text file of prompts, one a line, to measure on instead of the recipe's.")
]
RunOut = Annotated[Path | None, typer.Option(help="Run directory (default: runs/<recipe>).")]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fewstep {version('fewstep')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
@long
def distill(
    recipe: RecipeName,
    out: RunOut = None,
    overrides: Sets = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds of several runs in OUT/seed-0, OUT/seed-1, ..., e.g. 0,1,2.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and what it needs, and stop.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Distil a teacher into a few-step student.

    Ctrl-C saves everything; --resume then continues to the same weights as an uninterrupted run.
    On several GPUs: `torchrun --nproc-per-node 2 -m fewstep distill ...`; the processes share every batch.
    """
    from fewstep.recipe.chain import load

    if dry_run:
        from fewstep.runs.plan import dry_run as text

        typer.echo(text(load(recipe, overrides or ())))
        return
    from fewstep.runs.chain import run
    from fewstep.training import distributed
    from fewstep.training.run_files import RunFiles

    folder = out or Path("runs") / Path(recipe).stem
    several = {folder / f"seed-{n}": [f"seed={n}"] for n in whole_numbers(seeds, "--seeds")}
    with resumable("distill", recipe, *options(out=folder, set=overrides, seeds=seeds), "--resume"):
        for place, seed in (several or {folder: []}).items():
            student = run(load(recipe, [*(overrides or ()), *seed]), place, resume=resume, show_progress=not quiet)
            if distributed.first():
                _report_skipped(place)
                samples = RunFiles(student.parent).samples
                typer.echo(f"The student is in {student}. Sample grids of the training are in {samples}. Then try:")
                typer.echo("  " + command("sample", place, "-p", "a red star", "-p", "two shapes"))


@app.command()
@long
def prepare(
    recipe: RecipeName,
    from_teacher: Annotated[
        bool, typer.Option("--from-teacher", help="Generate the teacher's samples (key `pairs`), encode no images.")
    ] = False,
    out: RunOut = None,
    overrides: Sets = None,
    quiet: Quiet = False,
) -> None:
    """Make a recipe's training data; `fewstep distill` does the same before it trains.

    After an interruption the same command continues: finished files are kept. Recipes with the same `pairs.path` share
    the teacher's samples.
    """
    from fewstep.recipe.load import load_recipe
    from fewstep.runs.distill import prepare_data
    from fewstep.runs.folder import RunFolder
    from fewstep.runs.teacher_samples import pairs_folder
    from fewstep.training import distributed

    folder, resolved = out or Path("runs") / Path(recipe).stem, load_recipe(recipe, overrides or ())
    rest = options(out=folder, set=overrides)
    with resumable("prepare", recipe, *(["--from-teacher"] if from_teacher else []), *rest):
        made = prepare_data(resolved, folder, from_teacher=from_teacher, show_progress=not quiet)
    if distributed.first():
        _report_skipped(folder)
        if made is not None:
            place = pairs_folder(resolved, RunFolder(folder))
            typer.echo(f"{len(made.mean):,} samples of the teacher are in {place} ({made.cost:,.0f} forward passes).")
        typer.echo("Continue with: " + command("distill", recipe, *rest, "--resume"))


@app.command()
@long
def sample(
    model: Annotated[
        str | None,
        typer.Argument(help="A run, an exported folder or LoRA file, a teacher (scenes-64, a pipeline folder)."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Prompt of an image; repeat the option for several.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Number of sampling steps (default: the student's own; 50 for a teacher).")
    ] = None,
    timesteps: Annotated[
        str | None, typer.Option(help="Timesteps of the network instead of --steps, e.g. 999,749,499,249.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="Sampler: lcm, tcd, ddim, euler, ... (default: the student's own).")
    ] = None,
    eta: Annotated[
        float | None, typer.Option(help="Share of fresh noise, 0 to 1, for samplers that have it (default: own).")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance scale; 1 or 0 is off (default: 1; 3 for a teacher).")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="Prompt that guidance leads away from (default: the empty prompt).")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:SCALE]", help="Style LoRA: file, folder or hub name; scale 1 by default."),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Start from this image instead of noise (img2img).")] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Change --image only where this mask, of the same size, is white.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How far to change --image, 0 to 1 (default 0.5; 1 with a mask).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.")] = 0,
    out: Annotated[Path, typer.Option(help="Image file to write.")] = Path("sample.png"),
    checkpoint: Annotated[
        str | None, typer.Option(help="Name of a published file (`fewstep checkpoints`), instead of MODEL.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Model on which a LoRA or published file is put (default: its own).")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Local copy of the published file (default: downloaded from the hub).")
    ] = None,
    device: Device = "cpu",
) -> None:
    """Generate images with a student, a teacher or a published checkpoint, by the sampler that it was trained for.

    `fewstep sample --checkpoint sdxl-lightning-4step-lora --base my-sdxl -p "a cat"` knows scheduler, grid, guidance,
    eta, LoRA scale and prediction type.
    """
    from fewstep.inference.generate import check_out, generate, load_model, scaled_loras
    from fewstep.training.progress import doing

    if (model is None) == (checkpoint is None):
        raise ValueError("Give a MODEL or a --checkpoint, one of the two.")
    if image is None and (mask is not None or strength is not None):
        raise ValueError("--mask and --strength go with --image.")
    check_out(out)
    with doing("loading the model"):
        loaded = load_model(
            str(model or checkpoint), base, file, scaled_loras(lora or ()), published=model is None, device=device
        )
    times = numbers(timesteps)
    warnings = loaded.warnings(len(times) if times else steps, guidance_scale, sampler)
    for line in [*warnings, *([loaded.licence] if loaded.licence else [])]:
        typer.echo(line, err=True)
    if image is not None and strength is None:
        strength = 0.5 if mask is None else 1.0
    made = generate(
        loaded, prompt or ["a red star", "two shapes"], sampler,
        {"num_inference_steps": steps, "timesteps": times, "eta": eta}, guidance_scale, seed, out,
        negative_prompt=negative_prompt, image=image, mask=mask, strength=strength,
    )  # fmt: skip
    typer.echo(f"Wrote {out} ({made}).")


@app.command("app")
def page(
    model: Annotated[str, typer.Argument(help="Model, as in `fewstep sample` (default: the newest run).")] = "",
    port: Annotated[int, typer.Option(min=1024, max=65535, help="Port on this machine's loopback address.")] = 7860,
    device: Device = "cpu",
) -> None:
    """Serve a page on this machine: prompts, model, steps, seed, and the teacher's images beside. Ctrl-C ends it.

    Needs gradio: `pip install 'fewstep[app]'`. The page is served to this machine alone and loads nothing from others.
    """
    from fewstep.inference.app import serve

    blocks, address = serve(model, port, device)
    typer.echo(f"Open {address} in a browser; Ctrl-C ends it.")
    blocks.block_thread()


@app.command()
@long
def export(
    run: Annotated[Path, typer.Argument(help="A finished run, or a student's folder.")],
    to: Annotated[str, typer.Option(help="Layout: diffusers, lora, kohya or merged.")] = "diffusers",
    out: Annotated[Path | None, typer.Option(help="Folder to write (default: RUN/export/TO).")] = None,
    dtype: Annotated[
        str, typer.Option(help="Number format of the weights: fp32, or half the size: fp16, bf16.")
    ] = "fp32",
    device: Device = "cpu",
) -> None:
    """Write a student for other programs, and check that diffusers samples the same from the written files.

    **diffusers**: a whole pipeline folder, right with nothing set but the number of steps. **lora**: PEFT's layout, for
    diffusers; for ComfyUI too if the model is a transformer. **kohya**: a UNet's LoRA for ComfyUI, A1111, Forge and
    InvokeAI. **merged**: the network alone, all weights.
    """
    from fewstep.export.publish import export as write

    made = write(run, to, out, dtype, device)
    typer.echo(f"Wrote {made.folder}; diffusers samples from it what fewstep does (gap {made.round_trip.gap:.1e}).")
    if made.round_trip.layers:
        typer.echo(f"All {made.round_trip.layers} LoRA layers were found.")
    for line in made.remarks:
        typer.echo(line)
    typer.echo(f"In diffusers: pipe(prompt, {made.call}). The README has the whole code.")


@app.command()
def checkpoints(
    name: Annotated[str | None, typer.Argument(help="Name of a published file (default: list all).")] = None,
    code: Annotated[bool, typer.Option("--code", help="Print only the code for diffusers.")] = False,
) -> None:
    """List published few-step files; for one of them, print its settings, code for diffusers, settings for ComfyUI.

    `fewstep sample --checkpoint NAME` samples from any of them, and each may be the `init` of a recipe.
    """
    from fewstep.checkpoints import explain
    from fewstep.checkpoints.registry import find_checkpoint

    if name is None:
        typer.echo(explain.table())
        return
    entry = find_checkpoint(name)
    typer.echo(explain.code(entry) if code else f"{explain.explain(entry)}\n\n{explain.code(entry)}")


@app.command()
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
    """Verify methods against closed forms: train each on exact teachers and print every quantity beside its value."""
    import torch

    from fewstep.methods.registry import METHODS, find_method
    from fewstep.verification.verify import verify as check

    torch.set_num_threads(1)
    passed = True
    for name in methods or METHODS:
        for case in find_method(name).truth_cases:
            report = check(name, mixture, seed=seed, steps=steps, show_progress=not quiet, **case)
            typer.echo(f"{report}\n")
            passed &= report.passed
    if not passed:
        raise typer.Exit(1)


@app.command()
@long
def doctor(
    plan: Annotated[
        str | None, typer.Option("--plan", metavar="RECIPE", help="Print what this recipe needs instead, and stop.")
    ] = None,
    overrides: Sets = None,
) -> None:
    """Check this machine: its hardware, its packages, whether its numbers are right. Exit code 1 on a problem."""
    if plan is not None:
        from fewstep.recipe.chain import Chain, load
        from fewstep.runs.plan import advise, describe, fits
        from fewstep.runs.plan import plan as make

        recipe = load(plan, overrides or ())
        if isinstance(recipe, Chain):
            raise ValueError(f"{plan} has stages: {command('distill', plan, '--dry-run')} prints what each needs.")
        planned = make(recipe)
        typer.echo("\n".join([*describe(planned), *advise(planned)]))
        raise typer.Exit(0 if fits(planned) else 1)
    from fewstep.planning.doctor import PROBLEM, examine

    problems = 0
    for finding in examine():
        typer.echo(str(finding))
        problems += finding.level == PROBLEM
    raise typer.Exit(1 if problems else 0)


@app.command()
def methods() -> None:
    """List the methods, each with its purpose and the network calls of a step."""
    from fewstep.diffusion.schedule import Schedule
    from fewstep.methods.registry import METHODS

    for name, cls in METHODS.items():
        calls = cls(Schedule.scaled_linear()).calls_per_step()
        typer.echo(f"{name:8} {cls.summary}")
        typer.echo(f"{'':8} network calls per step: {', '.join(f'{k} {v:g}' for k, v in calls.items())}")


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the shipped recipes, print one, or copy one to a file of your own."""
    if context.invoked_subcommand is None:
        recipes_list()


@recipes_app.command("list")
def recipes_list() -> None:
    """List name and purpose of every shipped recipe."""
    from fewstep.recipe.load import shipped_recipes

    for name, path in shipped_recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0]
        typer.echo(f"{name:20} {first.removeprefix('#').strip()}")


@recipes_app.command("show")
def recipes_show(name: RecipeName) -> None:
    """Print a recipe; `fewstep distill NAME --dry-run` adds every default and what it needs."""
    from fewstep.recipe.load import find_recipe

    typer.echo(find_recipe(name).read_text(encoding="utf-8").rstrip())


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="The name of a shipped recipe.")],
    to: Annotated[Path | None, typer.Argument(help="File to write (default: NAME.yaml here).")] = None,
) -> None:
    """Write a shipped recipe to a file of your own."""
    from fewstep.data.files import replace_text
    from fewstep.recipe.load import find_recipe

    text, target = find_recipe(name).read_text(encoding="utf-8"), to or Path(f"{Path(name).stem}.yaml")
    if target.exists():
        raise ValueError(f"{target} exists already: choose another file.")
    if not target.parent.is_dir():
        raise ValueError(f"There is no folder {target.parent} to write {target.name} to: make it first.")
    replace_text(target, text)
    typer.echo(f"Wrote {target}. Change it, then: {command('distill', target)}")


@app.command()
@long
def demo(
    out: Annotated[Path, typer.Option(help="Run directory; a run in it is used again.")] = Path("runs/demo"),
    overrides: Sets = None,
    count: Annotated[int, typer.Option(min=8, help="Number of unseen prompts to compare on.")] = 256,
    quiet: Quiet = False,
) -> None:
    """Distil the shipped model into a 4-step LoRA on this machine, and compare it with its teacher. Takes minutes."""
    from fewstep.evaluation.compare import table
    from fewstep.recipe.load import load_recipe
    from fewstep.reports.demo import RECIPE
    from fewstep.reports.demo import demo as run
    from fewstep.training.run_files import RunFiles

    with resumable("demo", *options(out=out, set=overrides)):
        made = run(out, load_recipe(RECIPE, overrides or ()), count, show_progress=not quiet)
    typer.echo(table(made.comparison))
    typer.echo("")
    for figure in ("FD", "detail FD"):
        typer.echo(made.gap_closed(figure))
    typer.echo(f"\nLook at {made.grid}; the student is in {RunFiles(made.folder).student}.")


@app.command()
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
            help="Forward passes that a run may cost, a backward pass counting as 2 (default: open).",
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, one run each, e.g. 0,1,2 (default: the job's).")] = None,
    steps: Annotated[
        str | None, typer.Option(help="Sampling steps to measure students at, e.g. 1,2,4,8 (default: the job's).")
    ] = None,
    count: Annotated[int | None, typer.Option(min=8, help="Number of unseen prompts (default 5000).")] = None,
    minutes: Annotated[
        float | None,
        typer.Option("--slice", min=0, callback=finite, help="Minutes after which it stops (default: never)."),
    ] = None,
    overrides: Sets = None,
    show: Annotated[bool, typer.Option("--list", help="Print which runs are measured and which are not, and stop.")] = (
        False
    ),
    quiet: Quiet = False,
) -> None:
    """Train recipes at the same cost and measure their students on the same prompts: one table, with intervals.

    A job file is YAML: recipe, and perhaps set, seeds, budget, steps, count. Finished runs are kept; the same command
    continues with the rest. Started twice, on two cores or GPUs, each process takes runs that the other has not.
    """
    from fewstep.reports.benchmark import Benchmark, BenchmarkEntry, every_method

    given = {
        "seeds": tuple(whole_numbers(seeds, "--seeds")) or None,
        "steps": tuple(whole_numbers(steps, "--steps")) or None,
        "budget": budget,
        "count": count,
    }
    made = [run for job in jobs or every_method() for run in BenchmarkEntry.of(job, **given).runs(overrides or ())]
    work = Benchmark(made, out, runs or out / "runs", minutes, show_progress=not quiet)
    if show:
        for run in made:
            typer.echo(f"{run.name:32} {'done' if work.is_measured(run) else 'not done':10} {run.steps:,} steps")
        return
    again = options(
        out=out, runs=runs, budget=budget, seeds=seeds, steps=steps, count=count, slice=minutes, set=overrides
    )
    with resumable("benchmark", *(jobs or ()), *again):
        done = work.work(typer.echo)
    if work.write() is not None:
        typer.echo((out / "table.md").read_text(encoding="utf-8"))
        typer.echo(f"The table, the page and the images are in {out}.")
    if not done:
        typer.echo("Not all is done: run the same command again.")


@app.command()
@long
def report(
    runs: Annotated[list[Path], typer.Argument(help="Finished run directories of one teacher.")],
    out: Annotated[Path, typer.Option(help="Page to write, with PNG and JSON files beside it.")] = Path("report.html"),
    count: Annotated[int, typer.Option(min=8, help="Number of unseen prompts to measure on.")] = 256,
    features: Features = "",
    prompts: PromptsFile = None,
    quiet: Quiet = False,
) -> None:
    """Write one self-contained page: images from the same noise, quality against steps, losses, settings."""
    from fewstep.reports.report import report as make

    make(runs, out, count, not quiet, features, prompts)
    typer.echo(f"Wrote {out}.")


@app.command()
@long
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Finished run directories of one teacher.")],
    steps: Annotated[str | None, typer.Option(help="Numbers of steps, e.g. 1,2,4,8 (default: its own).")] = None,
    guidance: Annotated[str | None, typer.Option(help="Guidance scales, e.g. 1,2,3 (default: its own).")] = None,
    eta: Annotated[str | None, typer.Option(help="Shares of fresh noise, e.g. 0,0.3 (default: its own).")] = None,
    lora_scale: Annotated[str | None, typer.Option(help="Strengths of a LoRA student, e.g. 0.8,1.")] = None,
    prompts: PromptsFile = None,
    count: Annotated[int, typer.Option(min=0, help="Number of prompts; 0: as the recipe says.")] = 0,
    features: Features = "",
    out: Annotated[Path, typer.Option(help="JSON file to write, with a PNG of the images.")] = Path("evaluation.json"),
    quiet: Quiet = False,
) -> None:
    """Measure students at every combination of steps, guidance, eta and LoRA scale, to choose what to ship."""
    from fewstep.evaluation.compare import table
    from fewstep.reports.evaluate import COLUMNS, Sweep, best
    from fewstep.reports.evaluate import evaluate as measure

    several = {"guidance": guidance, "eta": eta, "lora_scale": lora_scale}
    values = {
        name: tuple(numbers(text, f"--{name.replace('_', '-')} needs numbers, e.g. 1,2,3") or ())
        for name, text in several.items()
    }
    sweep = Sweep(steps=tuple(whole_numbers(steps, "--steps")), **values)
    found = measure(runs, sweep, out, count, features, prompts, not quiet)
    typer.echo(table(found, COLUMNS))
    typer.echo(best(found, "FD"))
    typer.echo(f"Wrote {out} and {out.with_suffix('.png')}.")


@app.command()
def diagnose(
    run: Annotated[Path, typer.Argument(help="A run directory, finished or not.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Find the problems of a run from its log, in words; exit code 1 if there is one."""
    from fewstep.reports.diagnose import diagnose as examine
    from fewstep.training.run_files import RunFiles

    found = examine(RunFiles(run).last())
    typer.echo(found.as_json() if as_json else str(found))
    if not found.healthy:
        raise typer.Exit(1)


app.command()(scenes)


def main() -> None:
    """Entry point: every user error is one sentence on stderr and exit code 2; Ctrl-C is 130."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may hold bytes that no encoding has
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        check_working_folder()
        with plain_remarks():
            app(args=at_home(sys.argv[1:]), prog_name="fewstep")
    except KeyboardInterrupt:
        sys.exit(end_with("Interrupted.", 130))
    except (ValueError, OSError, ArithmeticError) as error:
        if os.environ.get("FEWSTEP_TRACEBACK"):  # shows where a defect is
            raise
        sys.exit(end_with(f"Error: {' '.join(in_words(error).split())}", 2))
    except RecursionError:
        if os.environ.get("FEWSTEP_TRACEBACK"):
            raise
        sys.exit(end_with("Error: A value is nested too deeply: no recipe or option needs hundreds of levels.", 2))
    except (MemoryError, RuntimeError) as error:
        from fewstep.training.machine import is_out_of_memory

        if is_out_of_memory(error) and not os.environ.get("FEWSTEP_TRACEBACK"):
            sys.exit(end_with("Error: Out of memory: ask for fewer images at once (--prompt, --count).", 2))
        if RANK == "0" or "onnection" not in str(error):
            raise
        sys.exit(end_with("Error: another process ended, see its message.", 2))


def _report_skipped(run: Path) -> None:
    """Print how many images or captions could not be used, if any, and where they are listed."""
    from fewstep.data.cache import SKIPPED
    from fewstep.training.run_files import RunFiles

    listed = RunFiles(run).data / SKIPPED
    if listed.is_file():
        count = len(listed.read_text(encoding="utf-8").splitlines())
        typer.echo(f"{count:,} of the images or captions could not be used: see {listed}.")
