"""The commands of the shipped model: `fewstep scenes`, `fewstep teacher ...` and `fewstep reward ...`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fewstep.training.console import Device, Quiet, command, finite, long, numbers, options, resumable, say

teacher_app = typer.Typer(no_args_is_help=True, help="Train scenes-64, the model that ships with fewstep.")
reward_app = typer.Typer(
    no_args_is_help=True, help="Make reward models of human preference, for the method `feedback`."
)

_RESUMES = "Run directory; an unfinished run in it is continued."
_EMPTY = "Folder to write to; it must be empty or not exist."


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: choose another one.")


@long
def scenes(
    out: Annotated[Path, typer.Argument(help=_EMPTY)],
    count: Annotated[int, typer.Option(min=1, help="Number of images.")] = 1000,
    layout: Annotated[
        str, typer.Option(help="folder (images and metadata.jsonl) or webdataset (tar shards).")
    ] = "folder",
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 1,
    size: Annotated[int, typer.Option(min=8, help="Side of the images in pixels.")] = 64,
) -> None:
    """Write rendered, captioned scenes as training data for this or any other program.

    - `fewstep scenes images --count 1000`
    """
    from fewstep.scenes64.scenes import Scenes, write_image_folder, write_webdataset
    from fewstep.training.progress import doing

    if layout not in ("folder", "webdataset"):
        raise ValueError(f"Unknown --layout '{layout}': use folder or webdataset.")
    _check_empty(out)
    with doing(f"rendering {count:,} scenes"):
        (write_image_folder if layout == "folder" else write_webdataset)(out, Scenes(seed, size=size), count)
    say(f"Wrote {count} captioned images to {out}.")


@teacher_app.command("train")
@long
def teacher_train(
    out: Annotated[Path, typer.Option(help=_RESUMES)] = Path("runs/teacher"),
    vae_minutes: Annotated[
        float | None,
        typer.Option(
            min=0, callback=finite, help="Minutes of stage one, the autoencoder (default: its number of steps)."
        ),
    ] = None,
    unet_minutes: Annotated[
        float | None,
        typer.Option(min=0, callback=finite, help="Minutes of stage two, the UNet (default: its number of steps)."),
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="First weights: scenes-64 or a pipeline folder (default: random weights).")
    ] = None,
    lesson: Annotated[
        str | None, typer.Option(help="Stage two practises one thing: places, or patterns (default: the whole task).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, scenes and noise.")] = 0,
    device: Device = "cpu",
    export: Annotated[Path | None, typer.Option(help="Diffusers folder to write at the end (default: none).")] = None,
) -> None:
    """Train the autoencoder, then the UNet with its text encoder. Hours on a CPU; resumable.

    - `fewstep teacher train --out runs/teacher --export my-scenes`
    - `fewstep teacher train --init my-scenes --lesson patterns --unet-minutes 20 --out runs/lesson --export learnt`
    """
    from fewstep.models.hub import check_device
    from fewstep.scenes64.denoise import LESSONS
    from fewstep.scenes64.train_teacher import TeacherSettings, train_teacher

    check_device(device, "--device")
    if lesson is not None and lesson not in LESSONS:
        raise ValueError(f"Unknown --lesson '{lesson}': use {' or '.join(LESSONS)}.")
    again = options(
        out=out, vae_minutes=vae_minutes, unet_minutes=unet_minutes, init=init, lesson=lesson, seed=seed, device=device,
        export=export,
    )  # fmt: skip
    settings = TeacherSettings(seed, lesson=lesson or "")
    with resumable("teacher", "train", *again):
        size = train_teacher(out, settings, vae_minutes, unet_minutes, init, export, device, show=True)
    if size is not None:
        say(f"Wrote {export} ({size / 1e6:.1f} MB).")


@teacher_app.command("detector")
@long
def teacher_detector(
    out: Annotated[Path, typer.Option(help=_RESUMES)] = Path("runs/detector"),
    network: Annotated[
        str, typer.Option(help="detector, which measures prompt accuracy, or encoder, for losses.")
    ] = "detector",
    teacher: Annotated[
        str | None,
        typer.Option(help="Model whose autoencoder half of the images pass through: scenes-64, a pipeline folder, a "
                     "teacher's run (default: none)."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, callback=finite, help="Minutes of training (default: its number of steps).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of weights and scenes (default: that of the shipped network).")
    ] = None,
    device: Device = "cpu",
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of weights to write at the end (default: none).")
    ] = None,
) -> None:  # fmt: skip
    """Train the detector, which measures prompt accuracy, or the encoder. Less than an hour on a CPU; resumable.

    - `fewstep teacher detector --teacher scenes-64 --export detector.safetensors`
    """
    from fewstep.models.hub import check_device
    from fewstep.scenes64.train_detector import NETWORKS, DetectorSettings, autoencoder, train_detector
    from fewstep.scenes64.train_detector import export as write

    check_device(device, "--device")
    if network not in NETWORKS:
        raise ValueError(f"Unknown --network '{network}': use {' or '.join(NETWORKS)}.")
    again = options(out=out, network=network, teacher=teacher, minutes=minutes, seed=seed, device=device, export=export)
    settings = DetectorSettings.of(network, seed, device)
    with resumable("teacher", "detector", *again):
        trained = train_detector(out, settings, autoencoder(teacher) if teacher else None, minutes, show=True)
    if export:
        say(f"Wrote {export} ({write(trained, export) / 1e6:.2f} MB).")


@teacher_app.command("ceilings")
@long
def teacher_ceilings(
    detector: Annotated[
        Path | None, typer.Option(help="File of the detector's weights (default: the shipped ones).")
    ] = None,
    teacher: Annotated[
        str, typer.Option(help="Model whose autoencoder the images pass through; empty: none.")
    ] = "scenes-64",
    count: Annotated[int, typer.Option(min=1, help="Number of unseen scenes.")] = 2000,
) -> None:
    """Prompt accuracy of the detector on images that are right by construction: the most that generated ones reach.

    - `fewstep teacher ceilings`
    """
    from fewstep.scenes64.detector import ASSET, load_detector
    from fewstep.scenes64.train_detector import autoencoder, ceilings
    from fewstep.training.progress import doing

    with resumable("teacher", "ceilings", *options(detector=detector, teacher=teacher, count=count)):
        vae = autoencoder(teacher) if teacher else None  # an unfinished run trains its autoencoder to the end first
    with doing(f"reading {count:,} scenes"):
        found = ceilings(load_detector(detector or ASSET), vae, count)
    for name, accuracy in found.items():
        shares = "  ".join(f"{part} {100 * share:.2f}" for part, share in accuracy.share.items())
        say(f"{name:14s} n = {accuracy.images}: {shares} %")


@teacher_app.command("measure")
@long
def teacher_measure(
    teacher: Annotated[str, typer.Argument(help="scenes-64, or a folder of the same architecture.")] = "scenes-64",
    count: Annotated[int, typer.Option(min=32, help="Number of unseen prompts.")] = 1000,
    guidance: Annotated[str, typer.Option(help="Guidance scales to measure at; 1 is off.")] = "1,2,3,4,5",
    out: Annotated[Path | None, typer.Option(help="JSON file to write the table to (default: none).")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="File of real scenes' statistics to write and use (default: the shipped one).")
    ] = None,
    stated: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of attributes that prompts state (default: a quarter).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
) -> None:
    """Measure the teacher's quality and prompt accuracy with 50, 8 and 4 steps of DDIM at several guidance scales.

    - `fewstep teacher measure --guidance 1,3`
    """
    from fewstep.evaluation.tables import as_text
    from fewstep.methods.guidance import off_is_one
    from fewstep.scenes64.prompts import measure_teacher, recommended_guidance
    from fewstep.scenes64.scenes.caption import DEFAULT_STATED
    from fewstep.training.progress import progress_bar

    given = numbers(guidance, "--guidance needs numbers, e.g. 1,2,3") or []
    if not given or not all(0 <= scale < math.inf for scale in given):
        raise ValueError(f"--guidance needs numbers of at least 0, e.g. 1,2,3, not '{guidance}'.")
    scales = [off_is_one(scale) for scale in given]
    with progress_bar(3 * len(scales), 0, "sampling", True) as advance:
        comparison = measure_teacher(
            teacher, count, scales, seed, reference, advance, DEFAULT_STATED if stated is None else stated
        )
    names = ["FD", "detail FD", "accuracy", *(n for n in comparison.results[0].figures if n.startswith("accuracy of"))]
    say(as_text(comparison, names))
    best = recommended_guidance(comparison)
    say(f"\nGuidance of lowest FD among those within a point of the best accuracy: {best:g}")
    if out:
        from fewstep.data.files import replace_text

        replace_text(out, comparison.as_json())


@reward_app.command("scenes")
@long
def reward_scenes(
    out: Annotated[Path, typer.Argument(help=_EMPTY)],
    count: Annotated[int, typer.Option(min=10, help="Number of pairs of images.")] = 3000,
    seed: Annotated[int, typer.Option(help="Seed of the pairs.")] = 11,
    teacher: Annotated[
        str, typer.Option(help="Model whose autoencoder half of the pairs pass through; empty: none.")
    ] = "scenes-64",
    quiet: Quiet = False,
) -> None:
    """Write choices between scenes by simulated raters, a stated rule of taste with noise. No person was asked.

    - `fewstep reward scenes runs/choices`
    """
    from fewstep.scenes64.scenes.raters import write_preferences
    from fewstep.scenes64.train_rewards import through_teacher
    from fewstep.training.progress import progress_bar

    _check_empty(out)
    with resumable("reward", "scenes", out, *options(count=count, seed=seed, teacher=teacher)):
        decode = through_teacher(teacher, seed) if teacher else None
    with progress_bar(count, 0, "pairs", not quiet) as advance:
        ceiling = write_preferences(out, seed, count, decode, advance)
    say(f"Wrote {count} choices of simulated raters to {out}.")
    say(f"They are noisy: no judge agrees with more than {100 * ceiling:.1f} % of them in the mean.")
    say("Continue with: " + command("reward", "train", out, "--out", "runs/taste"))


@reward_app.command("train")
@long
def reward_train(
    folder: Annotated[Path, typer.Argument(help="Folder of images and preferences.jsonl: prompt, chosen, rejected.")],
    out: Annotated[Path, typer.Option(help=_RESUMES)] = Path("runs/taste"),
    trunk: Annotated[
        str, typer.Option(help="Frozen network below it: encoder, or detector for a model that only measures.")
    ] = "encoder",
    seed: Annotated[int, typer.Option(help="Seed of weights, order and the held-out choices.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Number of training steps (default: that of the shipped recipe).")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train a small reward model on choices between images of scenes-64, and measure it on held-out ones.

    - `fewstep reward train runs/choices --out runs/taste`
    """
    from fewstep.models.encoders import load_encoder
    from fewstep.scenes64.detector import load_detector
    from fewstep.scenes64.train_rewards import FILE, SETTINGS, train_reward

    if trunk not in ("encoder", "detector", "reader"):  # "reader" is the detector's former name
        raise ValueError(f"Unknown --trunk '{trunk}': use encoder or detector.")
    network = load_encoder() if trunk == "encoder" else load_detector().network
    with resumable("reward", "train", folder, *options(out=out, trunk=trunk, seed=seed, steps=steps)):
        settings = replace(SETTINGS, steps=steps or SETTINGS.steps)
        result = train_reward(folder, out, network, seed, settings, not quiet)
    say(f"{result}")
    say(f"The reward model is {out / FILE}, in standard deviations of the images it was trained on.")
