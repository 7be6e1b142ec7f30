"""Every family at every size, from a folder of pictures to an export, through the command line.

For each of six families at 64, 96 and 128 pixels, on 24 captioned pictures of one's own: `fewstep distill` with
validation on held-out captions against the teacher's images, and `evaluate` of the student and of a copy whose weights
are damaged; with ``--pages`` `report`, `benchmark` and `export`, too. A row says whether everything worked, whether all
figures are finite and have intervals, and whether the damaged student ranks behind.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from fewstep.cli import main as fewstep
from fewstep.data.files import replace_text
from fewstep.models.hub import quiet
from fewstep.students.student import weights_file
from tests.models.pipelines import BUILD, WORDS, build

SIDES = (64, 96, 128)
METHODS = ("lcm", "tcd", "pcm", "cm")
ONLY = {"sd2v": "pcm"}
"""Two steps with fresh noise of a random network of v-prediction are as far from its three as any damage: no student
to rank there but a deterministic one."""
KINDS = (("lora", "fp32"), ("full", "fp32"), ("lora", "bf16"))
"""Weights of the student and number format of the teacher."""
DAMAGE = {"lora": 10.0, "full": 1.0}
"""Standard deviation of the noise that is added to a student's weights, in that of these weights."""
RANKED = ("FD", "KID", "detail FD", "to teacher", "unlike teacher")
FEW = {"num_grid_steps": 10, "num_phases": 2, "guidance_scale": 1.0}
"""Settings that fit a few steps, where a method has them."""
RESULTS = Path(__file__).parent / "results" / "families.json"


def cases() -> list[tuple[str, int, str, str, str]]:
    """(family, side, method, weights, number format): each family meets every size, method, kind and format in turn."""
    made = []
    for row, family in enumerate(BUILD):
        for column, side in enumerate(SIDES):
            number = row * len(SIDES) + column
            weights, dtype = KINDS[(row + column) % len(KINDS)]
            made.append((family, side, ONLY.get(family, METHODS[number % len(METHODS)]), weights, dtype))
    return made


def pictures(folder: Path, side: int, count: int = 24) -> None:
    """Captioned pictures, a little larger than the images that are trained on."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(generator.integers(0, 255, (5, 4, 3), dtype=np.uint8))
        coarse.resize((side + 8, side + 20), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"a {WORDS[1 + i % 4]} number {i}")


def recipe_of(folder: Path, side: int, method: str, weights: str, dtype: str) -> dict[str, Any]:
    """A recipe of two steps with validation after each."""
    from fewstep.methods.registry import METHODS as known

    settings = {key: value for key, value in FEW.items() if key in known[method].Settings.__annotations__}
    return {
        "method": {"name": method, **settings},
        "teacher": {"path": str(folder / "model"), "size": side, "dtype": dtype},
        "student": {"weights": weights, **({"rank": 4} if weights == "lora" else {})},
        "data": {"source": "folder", "path": str(folder / "images")},
        "training": {"steps": 2, "batch_size": 2, "log_every": 1, "checkpoint_every": 2},
        "sample": {
            "prompts": ["a red circle"],
            "every": 2,
            "num_inference_steps": 2,
            "teacher_steps": 3,
            "guidance_scale": 1.0,
        },
        "evaluate": {"every": 1, "count": 8, "metric": "FD", "patience": 2},
    }


def command(*words: object) -> str:
    """What a command of fewstep prints.

    Raises:
        RuntimeError: it does not end with exit code 0.
    """
    said, errors = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["fewstep", *map(str, words)]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            fewstep()
    except SystemExit as stopped:
        if stopped.code:
            raise RuntimeError(f"fewstep {words[0]}: {errors.getvalue().strip()}") from None
    finally:
        sys.argv = before
    return said.getvalue()


def damaged(run: Path, place: Path, strength: float) -> Path:
    """The run with a student to whose weights noise is added."""
    shutil.copytree(run, place)
    file, generator = weights_file(place / "student"), torch.Generator().manual_seed(0)
    weights = load_file(file)
    scale = torch.cat([t.float().flatten() for t in weights.values()]).std()
    noise = {key: torch.randn(t.shape, generator=generator) for key, t in weights.items()}
    with_noise = {key: (t.float() + strength * scale * noise[key]).to(t.dtype) for key, t in weights.items()}
    save_file({key: t.contiguous() for key, t in with_noise.items()}, file)
    return place


def run(family: str, side: int, method: str, weights: str, dtype: str, folder: Path, pages: bool) -> dict[str, Any]:
    """One row of the table."""
    with quiet():
        build(family).save_pretrained(folder / "model")
    pictures(folder / "images", side)
    words, file = recipe_of(folder, side, method, weights, dtype), folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(words))
    began = time.perf_counter()
    command("distill", file, "--out", folder / "run", "-q")
    lines = [json.loads(line) for line in (folder / "run" / "evaluations.jsonl").read_text().splitlines()]
    worse = damaged(folder / "run", folder / "worse", DAMAGE[weights])
    command("evaluate", folder / "run", worse, "--out", folder / "evaluation.json", "-q")
    found = json.loads((folder / "evaluation.json").read_text())["ways"]
    if pages:
        command("report", folder / "run", "--out", folder / "report.html", "--count", 8, "-q")
        command("benchmark", file, "--out", folder / "table", "--steps", 2, "--count", 8, "-q")
        layout = "diffusers" if weights == "full" else "lora"
        command("export", folder / "run", "--to", layout, "--out", folder / "export")
    figures = {name: [student[name] for student in list(found.values())[-2:]] for name in RANKED}
    made = ["evaluation.png"]
    made += ["report.html", "report.png", "report.json", "table/table.md", "export/README.md"] if pages else []
    return {
        "family": family, "side": side, "method": method, "weights": weights, "dtype": dtype,
        "pages": pages,
        "validations": len(lines), "kept": (folder / "run" / "best").is_dir(),
        "files": all((folder / name).is_file() for name in made),
        "finite": all(map(whole, found.values())),
        "behind": {name: good < bad for name, (good, bad) in figures.items()}, "figures": figures,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def whole(way: dict[str, Any]) -> bool:
    """Whether every figure of a row is finite and lies where it can, with an interval of two finite ends."""
    intervals = way["intervals"]
    for name in way.keys() - {"intervals", "evaluations", "ms"}:
        low, high = intervals.get(name, (math.nan, math.nan))
        if not all(map(math.isfinite, (way[name], low, high))) or low > high:
            return False
    return True


def good(row: dict[str, Any]) -> bool:
    """Whether a row is as it must be."""
    worked = row.get("validations") == 2 and row["kept"] and row["files"] and row["finite"]
    return bool(worked and all(row["behind"].values()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="families, sizes or both, as sdxl, 96 or sdxl-96; all by default")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file; rows of other cases in it stay")
    parser.add_argument("--pages", action="store_true", help="report, benchmark and export, too")
    options = parser.parse_args(arguments)
    known = json.loads(options.results.read_text())["rows"] if options.results.is_file() else []
    rows = {f"{row['family']}-{row['side']}": row for row in known}
    for family, side, *others in cases():
        name = f"{family}-{side}"
        if options.cases and not {name, family, str(side)} & set(options.cases):
            continue
        with tempfile.TemporaryDirectory() as place:
            try:
                rows[name] = run(family, side, *others, Path(place), options.pages)
            except RuntimeError as error:
                rows[name] = {"family": family, "side": side, "error": str(error).replace(place, "")}
        print(json.dumps({**rows[name], "good": good(rows[name])}), flush=True)
        about = {"torch": torch.__version__, "machine": platform.machine()}
        replace_text(options.results, json.dumps({**about, "rows": list(rows.values())}, indent=1) + "\n")
    bad = [name for name, row in rows.items() if not good(row)]
    print(f"{len(rows) - len(bad)} of {len(cases())} as they must be" + (f"; not {', '.join(bad)}" if bad else ""))


if __name__ == "__main__":
    main()
