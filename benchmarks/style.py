"""Whether a style LoRA that was trained on the teacher works on its students: Lightning's claim for LoRAs.

    OMP_NUM_THREADS=1 python benchmarks/style.py RUN ... [--prompts 64] [--steps 300] [--out runs/style]

The style is grey pictures: rendered scenes without their colours, on which a LoRA of scenes-64 is fine-tuned once, with
the plain loss of diffusion models. Then the teacher (25 guided steps) and every student draw the same prompts from the
same noise with the LoRA and without. Reported is how much of the colour goes, and that over what goes from the
teacher's: 1 is a LoRA that does to the student what it does to the teacher. Intervals are a bootstrap of the prompts.
And how far a student's pictures, without the style, are from the teacher's of the same noise: whether it kept the
teacher's map, or its distribution alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from PIL import Image
from step_cost import __file__ as fine_tuning
from torch import Tensor

import fewstep
from fewstep.data.files import replace_text
from fewstep.evaluation.grids import image_grid
from fewstep.evaluation.metrics import centred_interval
from fewstep.recipe.load import parse_recipe
from fewstep.runs.distill import distill
from fewstep.scenes64.prompts import unseen_captions
from fewstep.scenes64.scenes import Scenes
from fewstep.scenes64.scenes.write import write_image_folder

LORA = "pytorch_lora_weights.safetensors"
TEACHER = {"num_inference_steps": 25, "sampler": "ddim", "guidance_scale": 3.0}
PICTURES, RESAMPLES = 1000, 2000


def grey_scenes(folder: Path) -> None:
    """Rendered scenes without colour, with their captions."""
    if folder.is_dir():
        return
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        made = Path(place) / "made"
        write_image_folder(made, Scenes(1), PICTURES)
        for path in made.rglob("*.png"):
            Image.open(path).convert("L").convert("RGB").save(path)
        made.rename(folder)


def style_lora(place: Path, steps: int) -> Path:
    """The LoRA's file; trained unless it is there."""
    place.mkdir(parents=True, exist_ok=True)
    grey_scenes(place / "pictures")
    recipe = parse_recipe({
        "method": {"name": f"{fine_tuning}:FineTuning"},
        "teacher": {"path": "scenes-64"},
        "student": {"rank": 8},
        "data": {"source": "folder", "path": str(place / "pictures")},
        "training": {"steps": steps, "batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 20,
                     "lr_schedule": "cosine"},
        "sample": {"every": 10 * steps, "teacher_steps": 1, "num_inference_steps": 1, "prompts": ["a red star"]},
    })  # fmt: skip
    return distill(recipe, place / "run", resume=True) / LORA


def colour(pictures: Tensor) -> Tensor:
    """How far a picture's channels lie apart, in the mean over its pixels: [B]; 0 is grey."""
    return (pictures.amax(1) - pictures.amin(1)).flatten(1).mean(1)


def drawn(name: str, lora: Path | None, prompts: list[str], noise: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] from 0 to 1."""
    model = fewstep.load(name, loras=[] if lora is None else [lora])
    how = TEACHER if name == "scenes-64" else {}
    latents = model.generate(prompts, latents=noise, **how)  # type: ignore[arg-type]
    return latents.images


def share(plain: Tensor, styled: Tensor, own: Tensor, own_styled: Tensor) -> tuple[float, tuple[float, float]]:
    """Colour that the style takes from a student over that which it takes from the teacher."""
    takes, base = colour(plain) - colour(styled), colour(own) - colour(own_styled)
    rows = picks(len(takes))
    found = float(takes.mean() / base.mean())
    return found, centred_interval(takes[rows].mean(1) / base[rows].mean(1), found)


def apart(pictures: Tensor, own: Tensor) -> tuple[float, tuple[float, float]]:
    """Root mean square difference of pixels between a student's and the teacher's pictures of one noise."""
    squares = (pictures - own).square().flatten(1).mean(1)
    found = float(squares.mean().sqrt())
    return found, centred_interval(squares[picks(len(squares))].mean(1).sqrt(), found)


def picks(count: int) -> Tensor:
    """Rows of every resampling of ``count`` prompts."""
    return torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="finished runs of fewstep distill")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300, help="of the style's training")
    parser.add_argument("--out", type=Path, default=Path("runs/style"))
    options = parser.parse_args()
    lora = style_lora(options.out, options.steps)
    prompts = unseen_captions(options.prompts)
    teacher = fewstep.load("scenes-64").teacher
    noise = torch.randn(len(prompts), *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    own, own_styled = (drawn("scenes-64", file, prompts, noise) for file in (None, lora))
    rows, pictures, names = [], [own[:8], own_styled[:8]], ["teacher", "with the style"]
    for run in ("scenes-64", *options.runs):
        plain, styled = (own, own_styled) if run == "scenes-64" else (
            drawn(run, file, prompts, noise) for file in (None, lora)
        )  # fmt: skip
        (found, interval), (distance, ends) = share(plain, styled, own, own_styled), apart(plain, own)
        rows.append({
            "model": Path(run).name, "colour": round(float(colour(plain).mean()), 4),
            "with the style": round(float(colour(styled).mean()), 4),
            "share": round(found, 3), "interval": [round(end, 3) for end in interval],
            "to the teacher": round(distance, 4), "its interval": [round(end, 4) for end in ends],
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
        if run != "scenes-64":
            pictures, names = [*pictures, styled[:8]], [*names, Path(run).name]
    image_grid(pictures, names, prompts[:8]).save(options.out / "style.png")
    about = {"prompts": options.prompts, "steps": options.steps, "torch": torch.__version__}
    replace_text(options.out / "style.json", json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
