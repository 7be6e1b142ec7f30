"""The command line. Nothing heavy is imported before a command runs: ``fewstep --help`` must be quick."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

_RANK = os.environ.get("RANK", "0")  # which of torchrun's processes this is


class _Commands(TyperGroup):
    """Says a word on Ctrl-C, which typer alone leaves without any."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(_say("Interrupted.", 130)) from None


app = typer.Typer(
    name="fewstep",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Turn any diffusion model into one that needs 1-8 steps.

Try `fewstep demo` first: it distils a small model on this machine in minutes and shows pictures.
Then `fewstep distill RECIPE` with a recipe of your own (`fewstep recipes` lists the shipped ones).""",
)
teacher_app = typer.Typer(no_args_is_help=True, help="Train scenes-64, the model that ships with fewstep.")
app.add_typer(teacher_app, name="teacher")
reward_app = typer.Typer(no_args_is_help=True, help="Reward models of what people choose, for the method `feedback`.")
app.add_typer(reward_app, name="reward")
recipes_app = typer.Typer(invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")

Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: --set training.steps=500")
]


@app.command()
def distill(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a shipped recipe's name.")],
    out: Annotated[Path | None, typer.Option(help="Run directory (default: runs/<recipe>).")] = None,
    overrides: Sets = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    seeds: Annotated[str | None, typer.Option(help="Several runs, OUT/seed-0, OUT/seed-1, ...: --seeds 0,1,2")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and its cost, and stop.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Distil a teacher into a few-step student, as a recipe says.

    Ctrl-C saves everything; --resume then continues to the same weights as if nothing had happened.
    On several GPUs: `torchrun --nproc-per-node 2 -m fewstep distill ...`; the batch is shared out among them.
    """
    folder = out or Path("runs") / Path(recipe).stem
    if dry_run:
        from fewstep.recipe.chain import load

        typer.echo(_plan(load(recipe, overrides or ())))
        return
    from fewstep.recipe.chain import load
    from fewstep.runs.chain import run
    from fewstep.training import distributed

    several = {folder / f"seed-{n}": [f"seed={n}"] for n in _whole(seeds, "--seeds")}
    again = [*_sets(overrides), *(["--seeds", seeds] if seeds else []), "--resume"]
    with _stoppable(_command("distill", recipe, "--out", folder, *again)):
        for place, seed in (several or {folder: []}).items():
            student = run(load(recipe, [*(overrides or ()), *seed]), place, resume=resume, show_progress=not quiet)
            if distributed.first():
                _say_skipped(place)
                typer.echo(f"The student is in {student}. Look at {student.parent}/samples, then:")
                typer.echo("  " + _command("sample", place, "-p", "a red star", "-p", "two shapes"))


@app.command()
def prepare(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a shipped recipe's name.")],
    from_teacher: Annotated[
        bool, typer.Option("--from-teacher", help="The teacher's samples alone (recipe key `pairs`), no pictures.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Run directory (default: runs/<recipe>).")] = None,
    overrides: Sets = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Make a recipe's training data; `fewstep distill` does the same before it trains.

    Interrupted, the same command goes on: finished files are kept. Recipes share the teacher's samples by `pairs.path`.
    """
    from fewstep.recipe.load import load_recipe
    from fewstep.runs.distill import prepare_data
    from fewstep.runs.folder import RunFolder
    from fewstep.runs.teacher_samples import pairs_folder
    from fewstep.training import distributed

    folder, resolved = out or Path("runs") / Path(recipe).stem, load_recipe(recipe, overrides or ())
    rest = ("--out", folder, *_sets(overrides))
    with _stoppable(_command("prepare", recipe, *(["--from-teacher"] if from_teacher else []), *rest)):
        made = prepare_data(resolved, folder, from_teacher=from_teacher, show_progress=not quiet)
    if distributed.first():
        _say_skipped(folder)
        if made is not None:
            place, cost = pairs_folder(resolved, RunFolder(folder)), f"{made.cost:,.0f} forward equivalents"
            typer.echo(f"{len(made.mean):,} samples of the teacher are in {place} ({cost}).")
        typer.echo("Go on with: " + _command("distill", recipe, *rest, "--resume"))


@app.command()
def sample(
    model: Annotated[
        str | None,
        typer.Argument(help="A run, an exported folder or LoRA file, a teacher (scenes-64, a pipeline folder)."),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="What to draw; repeat for more.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps (default: the student's own, 50 for a teacher).")
    ] = None,
    timesteps: Annotated[str | None, typer.Option(help="The network's times instead, e.g. 999,749,499,249.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="lcm, tcd, ddim, euler, ... (default: what the student wants).")
    ] = None,
    eta: Annotated[float | None, typer.Option(help="Fresh noise, 0 to 1, for samplers that have it.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is off (default: 1; 3 for a teacher).")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance leads away from.")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:SCALE]", help="A style LoRA on top; repeat for more.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Draw this picture anew instead of beginning with noise.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Only where this is white; of the picture's size.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much of the picture to draw anew, 0 to 1 (default: 0.5, 1 with a mask).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("sample.png"),
    checkpoint: Annotated[
        str | None, typer.Option(help="A published file by its name (`fewstep checkpoints`), instead of MODEL.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Model the published file is put on (default: its own).")] = None,
    file: Annotated[Path | None, typer.Option(help="The published file, if it is here already.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Draw pictures with a student, a teacher or a published checkpoint, by the right sampler unless you say otherwise.

    `fewstep sample --checkpoint sdxl-lightning-4step-lora --base my-sdxl -p "a cat"` knows scheduler, grid, guidance,
    eta, LoRA scale and prediction type.
    """
    from fewstep.inference.generate import draw, load_model, scaled_loras

    if (model is None) == (checkpoint is None):
        raise ValueError("Give a MODEL or a --checkpoint, one of the two.")
    if image is None and (mask is not None or strength is not None):
        raise ValueError("--mask and --strength go with --image.")
    loaded = load_model(
        str(model or checkpoint), base, file, scaled_loras(lora or ()), published=model is None, device=device
    )
    wishes = _numbers(timesteps)
    said = loaded.advice(len(wishes) if wishes else steps, guidance_scale)
    for line in [*said, *([loaded.licence] if loaded.licence else [])]:
        typer.echo(line, err=True)
    if image is not None and strength is None:
        strength = 0.5 if mask is None else 1.0
    drawn = draw(
        loaded, prompt or ["a red star", "two shapes"], sampler,
        {"num_inference_steps": steps, "timesteps": wishes, "eta": eta}, guidance_scale, seed, out,
        negative_prompt=negative_prompt, image=image, mask=mask, strength=strength,
    )  # fmt: skip
    typer.echo(f"Wrote {out} ({drawn}).")


@app.command("app")
def page(
    model: Annotated[str, typer.Argument(help="As in `fewstep sample` (default: the newest run).")] = "",
    port: Annotated[int, typer.Option(min=1024, max=65535, help="On this machine's loopback address.")] = 7860,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """A page on this machine: prompts, model, steps, seed, and the teacher's pictures beside. Ctrl-C ends it.

    Needs gradio: `pip install 'fewstep[app]'`. It is served to this machine alone and asks no other.
    """
    from fewstep.inference.app import serve

    blocks, address = serve(model, port, device)
    typer.echo(f"Open {address} in a browser; Ctrl-C ends it.")
    blocks.block_thread()


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A finished run, or a student's folder.")],
    to: Annotated[str, typer.Option(help="diffusers, lora, kohya or merged.")] = "diffusers",
    out: Annotated[Path | None, typer.Option(help="Folder to write (default: RUN/export/TO).")] = None,
    dtype: Annotated[str, typer.Option(help="Of weights: float32, or half the size: float16, bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Write a student for other programs, and compare what diffusers draws from it before saying done.

    **diffusers**: a whole pipeline folder, right with nothing set but the number of steps. **lora**: PEFT's layout, for
    diffusers; for ComfyUI too if the model is a transformer. **kohya**: a UNet's LoRA for ComfyUI, A1111, Forge and
    InvokeAI. **merged**: the network alone, all weights.
    """
    from fewstep.export.publish import export as write

    made = write(run, to, out, dtype, device)
    typer.echo(f"Wrote {made.folder}; diffusers draws from it what fewstep does (gap {made.round_trip.gap:.1e}).")
    if made.round_trip.layers:
        typer.echo(f"All {made.round_trip.layers} LoRA layers were found.")
    for line in made.remarks:
        typer.echo(line)
    typer.echo(f"In diffusers: pipe(prompt, {made.call}); the README says more.")


@app.command()
def checkpoints(
    name: Annotated[str | None, typer.Argument(help="One of them; without a name all are listed.")] = None,
    code: Annotated[bool, typer.Option("--code", help="Only the lines for diffusers.")] = False,
) -> None:
    """Published few-step files and the settings they want: what each is, lines for diffusers, settings for ComfyUI.

    Any of them is drawn with by `fewstep sample --checkpoint NAME`, and may be the `init` of a recipe.
    """
    from fewstep.checkpoints import explain
    from fewstep.checkpoints.registry import find_checkpoint

    if name is None:
        typer.echo(explain.table())
        return
    entry = find_checkpoint(name)
    typer.echo(explain.code(entry) if code else f"{explain.explain(entry)}\n\n{explain.code(entry)}")


@app.command()
def verify(
    methods: Annotated[list[str] | None, typer.Argument(help="Methods, or FILE.py:Class (default: all).")] = None,
    mixture: Annotated[Path | None, typer.Option(help="JSON file of a Gaussian mixture to verify on.")] = None,
    seed: Annotated[int, typer.Option(help="Of data, starts and students.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Training steps (default: by its hops; 0 trains nothing).")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Hold methods against closed-form truth: train them on exact teachers and print every quantity."""
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
def doctor(
    plan: Annotated[
        str | None, typer.Option("--plan", metavar="RECIPE", help="Say what this recipe would need, and start nothing.")
    ] = None,
    overrides: Sets = None,
) -> None:
    """Look at this machine: what it has, what it lacks, whether its numbers are right. Exit code 1 on a problem."""
    if plan is not None:
        from fewstep.recipe.chain import Chain, load
        from fewstep.recipe.validate import RecipeError
        from fewstep.runs.plan import advise, describe, fits
        from fewstep.runs.plan import plan as make

        recipe = load(plan, overrides or ())
        if isinstance(recipe, Chain):
            raise RecipeError(f"{plan} has stages: {_command('distill', plan, '--dry-run')} says what each needs.")
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
    """List the methods, what they do and what a step costs."""
    from fewstep.diffusion.schedule import Schedule
    from fewstep.methods.registry import METHODS

    for name, cls in METHODS.items():
        calls = cls(Schedule.scaled_linear()).calls_per_step()
        typer.echo(f"{name:8} {cls.summary}")
        typer.echo(f"{'':8} network calls per step: {', '.join(f'{k} {v:g}' for k, v in calls.items())}")


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """Shipped recipes: list them, look at one, copy one to make it yours."""
    if context.invoked_subcommand is None:
        recipes_list()


@recipes_app.command("list")
def recipes_list() -> None:
    """Name and purpose of every shipped recipe."""
    from fewstep.recipe.load import shipped_recipes

    for name, path in shipped_recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0]
        typer.echo(f"{name:20} {first.removeprefix('#').strip()}")


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(help="A shipped recipe's name, or a file.")]) -> None:
    """Print a recipe; `fewstep distill NAME --dry-run` adds every default and what it will cost."""
    from fewstep.recipe.load import find_recipe

    typer.echo(find_recipe(name).read_text(encoding="utf-8").rstrip())


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="A shipped recipe's name.")],
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
    typer.echo(f"Wrote {target}. Change it, then: {_command('distill', target)}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run directory; what is there already is used again.")] = Path("runs/demo"),
    overrides: Sets = None,
    count: Annotated[int, typer.Option(min=8, help="Unseen prompts to compare on.")] = 256,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Distil the shipped model into a 4-step LoRA on this machine, and compare it with its teacher. Minutes."""
    from fewstep.evaluation.compare import table
    from fewstep.recipe.load import load_recipe
    from fewstep.reports.demo import RECIPE
    from fewstep.reports.demo import demo as run

    with _stoppable(_command("demo", "--out", out, *_sets(overrides))):
        made = run(out, load_recipe(RECIPE, overrides or ()), count, show_progress=not quiet)
    typer.echo(table(made.comparison))
    typer.echo("")
    for figure in ("FD", "detail FD"):
        typer.echo(made.closed(figure))
    typer.echo(f"\nLook at {made.picture}; the student is in {made.folder}/student.")


@app.command()
def benchmark(
    jobs: Annotated[
        list[str] | None,
        typer.Argument(help="Recipes (names or files) or job files; all methods' recipes for scenes-64 by default."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the table goes.")] = Path("runs/benchmark"),
    runs: Annotated[Path | None, typer.Option(help="Where the runs work (default: OUT/runs).")] = None,
    budget: Annotated[
        float | None, typer.Option(min=1, help="Forward equivalents of every run, pairs and stages included.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="One run each: --seeds 0,1,2")] = None,
    steps: Annotated[str | None, typer.Option(help="Of the students: --steps 1,2,4,8")] = None,
    count: Annotated[int | None, typer.Option(min=8, help="Unseen prompts (default: 5000).")] = None,
    minutes: Annotated[float | None, typer.Option("--slice", min=0, help="Minutes before it stops.")] = None,
    overrides: Sets = None,
    show: Annotated[bool, typer.Option("--list", help="Say what is done and what is not, and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Train recipes at the same cost and measure their students alike: one table, with intervals.

    A job file is YAML: recipe, and perhaps set, seeds, budget, steps, count. What is finished stays; the same command
    goes on with the rest. Start it twice at once, on two cores or GPUs, and each takes what the other has not.
    """
    from fewstep.reports.benchmark import Benchmark, BenchmarkEntry, every_method

    given = {
        "seeds": tuple(_whole(seeds, "--seeds")) or None, "steps": tuple(_whole(steps, "--steps")) or None,
        "budget": budget, "count": count,
    }  # fmt: skip
    made = [run for job in jobs or every_method() for run in BenchmarkEntry.of(job, **given).runs(overrides or ())]
    work = Benchmark(made, out, runs or out / "runs", minutes, show_progress=not quiet)
    if show:
        for run in made:
            typer.echo(f"{run.name:32} {'done' if work.is_measured(run) else 'not done':10} {run.steps:,} steps")
        return
    words = _options(out=out, runs=runs, budget=budget, seeds=seeds, steps=steps, count=count, slice=minutes)
    with _stoppable(_command("benchmark", *(jobs or ()), *words, *_sets(overrides))):
        done = work.work(typer.echo)
    if work.write() is not None:
        typer.echo((out / "table.md").read_text(encoding="utf-8"))
        typer.echo(f"The table, the page and the pictures are in {out}.")
    if not done:
        typer.echo("Not all is done: run the same command again.")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Finished run directories of one teacher.")],
    out: Annotated[Path, typer.Option(help="Page to write; PNG and JSON appear beside it.")] = Path("report.html"),
    count: Annotated[int, typer.Option(min=8, help="Unseen prompts to measure on.")] = 256,
    features: Annotated[
        str, typer.Option(help="For FD and KID: detector, or a DINOv2 or CLIP model (folder or hub name).")
    ] = "detector",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """One self-contained page: pictures from the same noise, quality against steps, losses, settings."""
    from fewstep.reports.report import STEPS
    from fewstep.reports.report import report as make
    from fewstep.training.logging import progress_bar

    with progress_bar(1 + len(STEPS) * (1 + len(runs)), 0, "sampling", not quiet) as advance:
        make(runs, out, count, advance, features)
    typer.echo(f"Wrote {out}.")


@app.command()
def diagnose(
    run: Annotated[Path, typer.Argument(help="A run directory, finished or not.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say in words what is wrong with a run, from its log; exit code 1 if anything is."""
    from fewstep.reports.diagnose import diagnose as examine
    from fewstep.training.run_files import RunFiles

    found = examine(RunFiles(run).last())
    typer.echo(found.as_json() if as_json else str(found))
    if not found.healthy:
        raise typer.Exit(1)


@app.command()
def scenes(
    out: Annotated[Path, typer.Argument(help="Folder to write to.")],
    count: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 1000,
    layout: Annotated[str, typer.Option(help="folder (pictures and metadata.jsonl) or webdataset (tar shards).")] = (
        "folder"
    ),
    seed: Annotated[int, typer.Option(help="Which pictures.")] = 1,
    size: Annotated[int, typer.Option(min=8, help="Side in pixels.")] = 64,
) -> None:
    """Write rendered, captioned scenes as training data for this or any other program."""
    from fewstep.scenes64.scenes import Scenes, write_image_folder, write_webdataset

    if layout not in ("folder", "webdataset"):
        raise ValueError(f"Unknown --layout '{layout}': use folder or webdataset.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder: choose another one.")
    (write_image_folder if layout == "folder" else write_webdataset)(out, Scenes(seed, size=size), count)
    typer.echo(f"Wrote {count} captioned pictures to {out}.")


@teacher_app.command("train")
def teacher_train(
    out: Annotated[Path, typer.Option(help="Run directory; an unfinished run in it is continued.")] = Path(
        "runs/teacher"
    ),
    vae_minutes: Annotated[
        float | None, typer.Option(help="Length of stage one (default: its number of steps).")
    ] = None,
    unet_minutes: Annotated[
        float | None, typer.Option(help="Length of stage two (default: its number of steps).")
    ] = None,
    init: Annotated[str | None, typer.Option(help="Go on from these weights: scenes-64, a pipeline folder.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, scenes and noise.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    export: Annotated[Path | None, typer.Option(help="Write the diffusers folder here at the end.")] = None,
) -> None:
    """Train the autoencoder, then the UNet with its text encoder. Hours on a CPU; resumable."""
    from fewstep.scenes64.train_teacher import TeacherSettings, train_teacher

    again = _options(
        out=out, vae_minutes=vae_minutes, unet_minutes=unet_minutes, init=init, seed=seed, device=device, export=export
    )
    with _stoppable(_command("teacher", "train", *again)):
        size = train_teacher(out, TeacherSettings(seed), vae_minutes, unet_minutes, init, export, device, show=True)
    if size is not None:
        typer.echo(f"Wrote {export} ({size / 1e6:.1f} MB).")


@teacher_app.command("detector")
def teacher_detector(
    out: Annotated[Path, typer.Option(help="Run directory; an unfinished run in it is continued.")] = Path(
        "runs/detector"
    ),
    network: Annotated[str, typer.Option(help="detector, which measures, or encoder, which serves in losses.")] = (
        "detector"
    ),
    teacher: Annotated[
        str | None,
        typer.Option(help="Its autoencoder makes half of the images: scenes-64, a pipeline folder, a teacher's run."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Length of the training (default: its number of steps).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and scenes (default: the shipped one's).")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    export: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the weights here at the end.")] = None,
) -> None:
    """Train the detector, which measures prompt accuracy, or the encoder. Less than an hour on a CPU; resumable."""
    from fewstep.scenes64.train_detector import NETWORKS, DetectorSettings, autoencoder, train_detector
    from fewstep.scenes64.train_detector import export as write

    if network not in NETWORKS:
        raise ValueError(f"Unknown --network '{network}': use {' or '.join(NETWORKS)}.")
    again = _options(
        out=out, network=network, teacher=teacher, minutes=minutes, seed=seed, device=device, export=export
    )
    settings = DetectorSettings.of(network, seed, device)
    with _stoppable(_command("teacher", "detector", *again)):
        trained = train_detector(out, settings, autoencoder(teacher) if teacher else None, minutes, show=True)
    if export:
        typer.echo(f"Wrote {export} ({write(trained, export) / 1e6:.2f} MB).")


@teacher_app.command("ceilings")
def teacher_ceilings(
    detector: Annotated[Path | None, typer.Option(help="Its weights (default: those that ship).")] = None,
    teacher: Annotated[str, typer.Option(help="Whose autoencoder renders go through; empty: none.")] = "scenes-64",
    count: Annotated[int, typer.Option(min=1, help="Number of unseen scenes.")] = 2000,
) -> None:
    """Prompt accuracy of the detector on images that are right by construction: the most that generated ones reach."""
    from fewstep.scenes64.detector import ASSET, load_detector
    from fewstep.scenes64.train_detector import autoencoder, ceilings

    vae = autoencoder(teacher) if teacher else None
    for name, accuracy in ceilings(load_detector(detector or ASSET), vae, count).items():
        shares = "  ".join(f"{part} {100 * share:.2f}" for part, share in accuracy.share.items())
        typer.echo(f"{name:14s} n = {accuracy.images}: {shares} %")


@teacher_app.command("measure")
def teacher_measure(
    teacher: Annotated[str, typer.Argument(help="scenes-64, or a folder of the same architecture.")] = "scenes-64",
    count: Annotated[int, typer.Option(min=32, help="Unseen prompts.")] = 1000,
    guidance: Annotated[str, typer.Option(help="Guidance scales to try, 1 is off.")] = "1,2,3,4,5",
    out: Annotated[Path | None, typer.Option(help="Write the table here as JSON.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Write statistics of real scenes here, and use them.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
) -> None:
    """What the teacher obeys and what it loses at few steps: 50, 8 and 4 steps of DDIM at several scales."""
    from fewstep.evaluation.compare import as_json, table
    from fewstep.scenes64.prompts import measure_teacher, recommended_guidance
    from fewstep.training.logging import progress_bar

    scales = _numbers(guidance, "--guidance wants numbers, e.g. 1,2,3") or []
    with progress_bar(3 * len(scales), 0, "sampling", True) as advance:
        comparison = measure_teacher(teacher, count, scales, seed, reference, advance)
    names = ["FD", "detail FD", "accuracy", *(n for n in comparison.results[0].figures if n.startswith("accuracy of"))]
    typer.echo(table(comparison, names))
    best = recommended_guidance(comparison)
    typer.echo(f"\nGuidance of lowest FD among those within a point of the best accuracy: {best:g}")
    if out:
        from fewstep.data.files import replace_text

        replace_text(out, as_json(comparison))


@reward_app.command("scenes")
def reward_scenes(
    out: Annotated[Path, typer.Argument(help="Folder to write to.")],
    count: Annotated[int, typer.Option(min=10, help="How many pairs.")] = 3000,
    seed: Annotated[int, typer.Option(help="Which pairs.")] = 11,
    teacher: Annotated[
        str, typer.Option(help="Whose autoencoder half of the pairs go through; empty: none.")
    ] = "scenes-64",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Write choices between scenes, by simulated raters: a stated rule of taste and noise. No person was asked."""
    from fewstep.scenes64.scenes.raters import write_preferences
    from fewstep.scenes64.train_rewards import through_teacher
    from fewstep.training.logging import progress_bar

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder: choose another one.")
    decode = through_teacher(teacher, seed) if teacher else None
    with progress_bar(count, 0, "pairs", not quiet) as advance:
        ceiling = write_preferences(out, seed, count, decode, advance)
    typer.echo(f"Wrote {count} choices of simulated raters to {out}.")
    typer.echo(f"They are noisy: no judge agrees with more than {100 * ceiling:.1f} % of them in the mean.")
    typer.echo("Go on with: " + _command("reward", "train", out, "--out", "runs/taste"))


@reward_app.command("train")
def reward_train(
    folder: Annotated[Path, typer.Argument(help="Pictures and preferences.jsonl: prompt, chosen, rejected.")],
    out: Annotated[Path, typer.Option(help="Run directory; an unfinished run in it is continued.")] = Path(
        "runs/taste"
    ),
    trunk: Annotated[
        str, typer.Option(help="Frozen network below it: encoder, or detector for a model that only measures.")
    ] = "encoder",
    seed: Annotated[int, typer.Option(help="Of weights and order, and of what is held out.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Learn a small reward model from choices between pictures of scenes-64, and measure it on those held out."""
    from fewstep.models.encoders import load_encoder
    from fewstep.scenes64.detector import load_detector
    from fewstep.scenes64.train_rewards import FILE, train_reward, with_steps

    if trunk not in ("encoder", "detector", "reader"):  # "reader" is the detector's former name
        raise ValueError(f"Unknown --trunk '{trunk}': use encoder or detector.")
    network = load_encoder() if trunk == "encoder" else load_detector().network
    with _stoppable(_command("reward", "train", folder, *_options(out=out, trunk=trunk, seed=seed, steps=steps))):
        result = train_reward(folder, out, network, seed, with_steps(steps), not quiet)
    typer.echo(f"{result}")
    typer.echo(f"The reward model is {out / FILE}, in standard deviations of the pictures it was trained on.")


def main() -> None:
    """Entry point: every user error is one sentence on stderr and exit code 2; Ctrl-C is 130."""
    try:
        app(prog_name="fewstep")
    except KeyboardInterrupt:
        sys.exit(_say("Interrupted.", 130))
    except (ValueError, OSError, ArithmeticError) as error:
        if os.environ.get("FEWSTEP_TRACEBACK"):  # for those who hunt a defect
            raise
        sys.exit(_say(f"Error: {' '.join(str(error).split())}", 2))
    except (MemoryError, RuntimeError) as error:
        from fewstep.training.machine import is_out_of_memory

        if is_out_of_memory(error) and not os.environ.get("FEWSTEP_TRACEBACK"):
            sys.exit(_say("Error: Out of memory: ask for fewer pictures at once (--prompt, --count).", 2))
        if _RANK == "0" or "onnection" not in str(error):
            raise
        sys.exit(_say("Error: another process ended, see what it said.", 2))


def _say(message: str, code: int) -> int:
    if code == 130:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cut the last words
    typer.echo(message if _RANK == "0" else f"process {_RANK}: {message}", err=True)
    return code


class _stoppable:
    """Turns a stopped training into a sentence that says how to go on, and exit code 130."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        from fewstep.training.trainer import TrainingStopped

        if isinstance(error, TrainingStopped):
            raise typer.Exit(_say(f"{error} All is saved; go on with: {self.command}", 130))
        if isinstance(error, KeyboardInterrupt):
            raise typer.Exit(_say(f"Interrupted; what was saved is kept. Go on with: {self.command}", 130))


def _say_skipped(run: Path) -> None:
    """What of the data could not be used, if anything: how much, and where it is listed."""
    from fewstep.data.cache import SKIPPED

    listed = run / "data" / SKIPPED
    if listed.is_file():
        count = len(listed.read_text(encoding="utf-8").splitlines())
        typer.echo(f"{count:,} of the pictures or captions could not be used: see {listed}.")


def _command(*words: object) -> str:
    """A command line of ours, quoted so that it can be pasted."""
    return shlex.join(["fewstep", *map(str, words)])


def _options(**values: object) -> list[object]:
    """Options of a command line, those that are not None."""
    given = {name.replace("_", "-"): value for name, value in values.items() if value is not None}
    return [word for name, value in given.items() for word in (f"--{name}", value)]


def _sets(overrides: list[str] | None) -> list[str]:
    return [word for item in overrides or () for word in ("--set", item)]


def _plan(recipe: Any) -> str:
    """What --dry-run prints: the resolved recipe, and in comments what it, or each of its stages, needs."""
    from fewstep.recipe.chain import Chain
    from fewstep.runs.plan import describe, plan

    lines = [recipe.as_yaml().rstrip()]
    if not isinstance(recipe, Chain):
        return "\n".join([*lines, *(f"# {line}" for line in describe(plan(recipe)))])
    for name, stage in recipe.on_first_teacher().items():
        lines += [f"# stage {name}", *(f"#   {line}" for line in describe(plan(stage)))]
    return "\n".join(lines)


def _whole(text: str | None, option: str) -> list[int]:
    try:
        found = [int(part) for part in (text or "").replace(",", " ").split()]
    except ValueError:
        found = []
    if text is not None and not found:
        raise ValueError(f"{option} wants whole numbers, e.g. 0,1,2, not '{text}'.")
    return found


def _numbers(text: str | None, wanted: str = "--timesteps wants numbers, e.g. 999,749,499,249") -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"{wanted}, not '{text}'.") from None
