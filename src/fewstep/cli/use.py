"""Commands that use models: `fewstep sample`, `app`, `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.training.console import Device, long, numbers, say


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
        str | None,
        typer.Option(help="Sampler: lcm, tcd, ddim, euler, ..., or ComfyUI's name of it (default: the student's own)."),
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
        float | None, typer.Option(help="How far to change --image, 0 to 1 (default: 0.5; 1 with a mask).")
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

    - `fewstep sample scenes-64 -p "a red star"`

    - `fewstep sample runs/mine -p "a red star" -p "two shapes"`

    - `fewstep sample --checkpoint sdxl-lightning-4step-lora --base my-sdxl -p "a cat"`

    The last one knows the published file's scheduler, grid, guidance, eta, LoRA scale and prediction type.
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
        say(line, err=True)
    if image is not None and strength is None:
        strength = 0.5 if mask is None else 1.0
    made = generate(
        loaded, prompt or ["a red star", "two shapes"], sampler,
        {"num_inference_steps": steps, "timesteps": times, "eta": eta}, guidance_scale, seed, out,
        negative_prompt=negative_prompt, image=image, mask=mask, strength=strength,
    )  # fmt: skip
    say(f"Wrote {out} ({made}).")


def page(
    model: Annotated[str, typer.Argument(help="Model, as in `fewstep sample` (default: the newest run).")] = "",
    port: Annotated[int, typer.Option(min=1024, max=65535, help="Port on this machine's loopback address.")] = 7860,
    device: Device = "cpu",
) -> None:
    """Serve a page on this machine: prompts, model, steps, seed, and the teacher's images beside. Ctrl-C ends it.

    - `fewstep app`

    - `fewstep app runs/mine --port 8000`

    Needs gradio: `pip install 'fewstep[app]'`. The page is served to this machine alone and loads nothing from others.
    """
    from fewstep.training.progress import command

    with command("fewstep app"):  # the page itself is served in silence
        from fewstep.inference.app import serve

        blocks, address = serve(model, port, device)
    say(f"Open {address} in a browser; Ctrl-C ends it.")
    blocks.block_thread()


@long
def export(
    run: Annotated[Path, typer.Argument(help="A finished run, or a student's folder.")],
    to: Annotated[str, typer.Option(help="Layout: diffusers, lora, kohya, merged or heads.")] = "diffusers",
    out: Annotated[Path | None, typer.Option(help="Folder to write (default: RUN/export/TO).")] = None,
    dtype: Annotated[
        str, typer.Option(help="Number format of the weights: fp32, or half the size: fp16, bf16.")
    ] = "fp32",
    device: Device = "cpu",
) -> None:
    """Write a student for other programs, and check that diffusers samples the same from the written files.

    - `fewstep export runs/mine --to lora`

    - `fewstep export runs/mine --to kohya --dtype fp16`

    **diffusers**: a whole pipeline folder, right with nothing set but the number of steps. **lora**: PEFT's layout, for
    diffusers; for ComfyUI too if the model is a transformer. **kohya**: a UNet's LoRA for ComfyUI, A1111, Forge and
    InvokeAI. **merged**: the network alone, all weights.
    """
    from fewstep.export.publish import export as write

    made = write(run, to, out, dtype, device)
    say(f"Wrote {made.folder}; diffusers samples from it what fewstep does (gap {made.round_trip.gap:.1e}).")
    if made.round_trip.layers:
        say(f"All {made.round_trip.layers} LoRA layers were found.")
    for line in made.remarks:
        say(line)
    say(f"In diffusers: pipe(prompt=prompt, {made.call}). The README has the whole code.")
