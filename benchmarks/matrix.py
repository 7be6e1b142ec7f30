"""Every method on tiny pipelines of the families: a 20-step LoRA run of the program itself, from a folder to an export.

Of each run: every logged number is finite; before training the student answers as its teacher, to the bit; the files of
the finished student answer as the weights in training do; the export draws in diffusers what it draws here. A student
that is told its guidance alone has no LoRA that others read: it is exported whole where that is possible.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fewstep.data.files import replace_text
from fewstep.export.publish import export
from fewstep.inference.generate import load_model
from fewstep.methods.registry import METHODS
from fewstep.models.denoiser import Denoiser
from fewstep.models.hub import quiet
from fewstep.recipe.load import parse_recipe
from fewstep.recipe.schema import Recipe
from fewstep.runs.distill import distill
from fewstep.runs.setup import Run, setup
from fewstep.training.checkpoint import latest, load, split
from tests.models.pipelines import SIZE, build
from tests.models.pipelines_flow import TEACHERS
from tests.rewards import taste

EVERYWHERE = ("lcm", "tcd", "pcm", "dmd2", "lightning")
CASES = [(family, method) for family in ("sdxl", "sd3") for method in METHODS]
CASES += [(family, method) for family in ("sd15", "sd2v", "flux") for method in EVERYWHERE]
CASES += [(family, method) for family in ("sdxl", "sd3") for method in ("tcd+told", "hyper+told")]
FLOW = tuple(family for family in TEACHERS if family != "qwen_image21")
"""Five methods of each, and LCM with full weights.

Qwen-Image-2.1 is not among them: without torchvision no other process can read its processor. Its runs are those of
`tests.runs.test_distill_families`, its files those of `tests.export.test_families`, where a tokenizer stands for it.
"""
CASES += [(family, method) for family in FLOW for method in (*EVERYWHERE, "lcm+full")]
FEW = {"num_grid_steps": 4, "num_phases": 2, "segments": 2, "max_hops": 2, "encoder": "scenes-64"}
"""Settings that fit a few steps, where a method has them."""
NOBODY = "refused: diffusers has no scheduler"
"""Why a student may stay in the house: no other program could draw what it draws."""
RESULTS = Path(__file__).parent / "results" / "matrix.json"


def recipe_of(method: str, teacher: Path, steps: int) -> Recipe:
    """LoRA of rank 4 on two scenes; ``lcm+full`` with full weights, ``tcd+told`` conditioned on its target time."""
    method, _, way = method.partition("+")
    known = METHODS[method].Settings.__annotations__
    settings = {key: value for key, value in FEW.items() if key in known}
    settings |= {"tell_end": True} if way == "told" else {}
    still = way == "told" or (teacher.name in FLOW and method == "tcd")  # as their shipped recipes have it
    eta = {"eta": 0.0} if still and method in ("tcd", "hyper") else {}
    if "rewards" in known:
        file = taste(teacher.parent / "taste.safetensors", "encoder")
        settings["rewards"] = [{"model": str(file), "threshold": 50.0}]  # out of reach: it pulls in every step
    return parse_recipe({
        "method": {"name": method, **settings},
        "teacher": {"path": str(teacher), "size": SIZE},
        "student": {"weights": "full"} if way == "full" else {"rank": 4},
        "data": {"size": 2},
        "pairs": {"size": 2, "num_inference_steps": 2},
        "training": {"steps": steps, "batch_size": 2, "warmup_steps": 1, "learning_rate": 1e-3, "log_every": 1},
        "sample": {"every": 10 * steps, "teacher_steps": 1, "prompts": ["a red circle"], **eta},
    })  # fmt: skip


@torch.no_grad()
def ask(run: Run, view: Denoiser) -> torch.Tensor:
    """What a role says at one noise, told whatever it wants to be told."""
    x = torch.randn(1, *run.teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    told = {"end": view.schedule.end, "guidance_embed": 3.5}
    cond = run.teacher.encode_prompts(["a red circle"])
    return view(x, view.schedule.start, cond, **{k: v for k, v in told.items() if k in view.accepts}).output


def run(family: str, method: str, steps: int, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    with quiet():
        build(family).save_pretrained(folder / family)
    recipe, began = recipe_of(method, folder / family, steps), time.perf_counter()
    before = setup(recipe, folder / "run")
    for weight in before.roles.base.parameters():
        # Products round by where their factors begin in memory: those of a file begin anywhere, a copy's at 64 bytes
        weight.data = weight.data.clone()
    start = (ask(before, before.roles.student) - ask(before, before.roles.teacher)).abs().max().item()
    student = distill(recipe, folder / "run")
    seconds = time.perf_counter() - began
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    numbers = [value for line in lines for value in line.values() if isinstance(value, int | float)]
    before.roles.load_tensors(split(load(latest(folder / "run" / "checkpoints"))[0], "roles"))
    trained, model = ask(before, before.roles.student), load_model(str(folder / "run"))
    return {
        "family": family,
        "method": method,
        "steps": len(lines),
        "finite": all(map(math.isfinite, numbers)),
        "first_difference": start,
        "moved": (trained - ask(before, before.roles.teacher)).abs().max().item(),
        "reloaded_difference": (ask(before, model.denoiser) - trained).abs().max().item(),
        **exported(folder, student.parent),
        "seconds": round(seconds, 1),
    }


def exported(folder: Path, student: Path) -> dict[str, Any]:
    """How the student leaves the house: as a LoRA, or whole, or why not; with its gap in diffusers."""
    why = ""
    for to in ("lora", "diffusers"):
        try:
            made = export(student, to, folder / to)
            return {"export": to, "gap": made.round_trip.gap, "layers": made.round_trip.layers}
        except ValueError as error:
            why = str(error).replace(str(folder), "")
    return {"export": f"refused: {why}"}


def good(row: dict[str, Any]) -> bool:
    """Whether a row is as it must be."""
    gone = row["export"].startswith(NOBODY) or row.get("gap", 1) <= 1e-5
    return row["finite"] and row["first_difference"] == 0 and row["reloaded_difference"] <= 1e-4 < row["moved"] and gone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="families or methods, as sdxl or sdxl-tcd; all by default")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file; rows of other cases in it stay")
    options = parser.parse_args()
    rows = {f"{row['family']}-{row['method']}": row for row in _known(options.results)}
    for family, method in CASES:
        name = f"{family}-{method}"
        if options.cases and not any(name == case or family == case or method == case for case in options.cases):
            continue
        with tempfile.TemporaryDirectory() as place:
            rows[name] = run(family, method, options.steps, Path(place))
        print(json.dumps({**rows[name], "good": good(rows[name])}), flush=True)
        about = {"torch": torch.__version__, "machine": platform.machine()}
        replace_text(options.results, json.dumps({**about, "rows": list(rows.values())}, indent=1) + "\n")
    bad = [name for name, row in rows.items() if not good(row)]
    print(f"{len(rows) - len(bad)} of {len(CASES)} as they must be" + (f"; not {', '.join(bad)}" if bad else ""))


def _known(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path.is_file() else []


if __name__ == "__main__":
    main()
