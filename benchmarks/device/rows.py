"""What only a GPU can tell, row by row: each takes at most four minutes there and leaves one JSON.

    python benchmarks/device/rows.py                                        # the first row without a JSON
    python benchmarks/device/rows.py step-flux-tcd                          # this one
    python benchmarks/device/rows.py --tiny --device cpu --out /tmp/rows    # scenes-64 in place of the large models

Networks have random weights and data are zeros: neither time nor memory depends on them.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fewstep.methods.base import Progress
from fewstep.planning.estimate import estimate, filled_trainer
from fewstep.recipe.load import load_recipe
from fewstep.runs.fit import foreseen_card
from fewstep.runs.foresee import outline_of
from fewstep.sampling import sample
from fewstep.students.card import sampler_of
from fewstep.training.trainer import seconds_per_step

OUT = Path(__file__).parent / "results"
LIMIT = 240  # seconds of one row
_NOT_THERE = ("autoencoder", "encoded data", "validation", "CUDA context (assumed)", "fragmentation (assumed)")
_TINY = {"sdxl-lcm": "scenes-64-lcm", "sdxl-dmd2": "scenes-64-dmd2", "flux-tcd": "scenes-64-tcd"}


class Row:
    """One recipe on one device, with random weights, in one micro-batch a step.

    Args:
        tiny: scenes-64's recipe of the same method in its place.
    """

    def __init__(self, name: str, device: str, tiny: bool, *changes: str) -> None:
        size = 2 if tiny else load_recipe(name).training.batch_size // load_recipe(name).training.accumulation
        wanted = [f"training.device={device}", f"training.batch_size={size}", "training.accumulation=1"]
        self.recipe = load_recipe(
            _TINY[name] if tiny else name, [*wanted, "training.precision=bf16", "teacher.dtype=bf16", *changes]
        )
        self.device, self.outline, self.rows = torch.device(device), outline_of(self.recipe), size
        self.parts = (
            self.recipe.method_class(), self.recipe.method_settings(), self.recipe.training, self.recipe.student.build()
        )  # fmt: skip
        self.trainer, self.steps = filled_trainer(self.outline, *self.parts)

    def inputs(self) -> tuple[Any, float, Any]:
        """A state of noise, a time in the middle, and a condition."""
        x = torch.randn(self.rows, *self.outline.latent_shape, device=self.device)
        cond = self.outline.prompts(self.rows, torch.float32, str(self.device))
        return x, 0.5 * self.trainer.roles.teacher.schedule.start, cond

    def timed(self, call: Callable[[], Any], repeats: int = 5) -> float:
        """Seconds of a call: the mean of ``repeats``, after one that does not count."""
        call()
        self.wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        self.wait()
        return (time.perf_counter() - start) / repeats

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def step(name: str, device: str, tiny: bool, *changes: str, layout: Any = torch.contiguous_format) -> dict[str, Any]:
    """Seconds of a training step, over those of its forward passes by the bare network; its peak over the plan's."""
    row = Row(name, device, tiny, *changes)
    row.trainer.roles.base.to(memory_format=layout)
    with torch.no_grad():
        x, t, cond = row.inputs()
        bare = row.timed(lambda: row.trainer.roles.teacher(x, t, cond)) / row.rows
    on_cuda = row.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_per_step(row.trainer, row.steps, warm_up=1)
    peak = torch.cuda.max_memory_allocated() if on_cuda else None
    plan = estimate(row.outline, *row.parts, images=1)
    planned = sum(size for part, size in plan.training.items() if part not in _NOT_THERE)
    passes = plan.equivalents * row.rows
    return {
        "recipe": row.recipe.method["name"], "teacher": row.recipe.teacher.path, "rows": row.rows,
        "changes": list(changes), "seconds_of_step": seconds, "seconds_of_forward": bare, "forward_passes": passes,
        "over_bare": seconds / (bare * passes), "peak": peak, "planned": planned,
        "peak_over_plan": peak / planned if peak else None,
    }  # fmt: skip


def compiled(device: str, tiny: bool) -> dict[str, Any]:
    """SDXL's LCM-LoRA step without and with ``training.compile``."""
    without, with_ = (step("sdxl-lcm", device, tiny, f"training.compile={on}") for on in ("false", "true"))
    return {"without": without, "compiled": with_, "faster": without["seconds_of_step"] / with_["seconds_of_step"]}


def channels_last(device: str, tiny: bool) -> dict[str, Any]:
    """SDXL's LCM-LoRA step with its convolutions in PyTorch's usual layout, and in channels_last."""
    usual, last = (step("sdxl-lcm", device, tiny, layout=of) for of in (torch.contiguous_format, torch.channels_last))
    return {"usual": usual, "channels_last": last, "faster": usual["seconds_of_step"] / last["seconds_of_step"]}


def offloaded(device: str, tiny: bool) -> dict[str, Any]:
    """FLUX's TCD-LoRA step with its blocks on the device, and streamed from the host's memory."""
    without, with_ = (step("flux-tcd", device, tiny, f"training.offload={on}") for on in ("false", "true"))
    return {"without": without, "offload": with_, "slower": with_["seconds_of_step"] / without["seconds_of_step"]}


@torch.no_grad()
def samples(device: str, tiny: bool) -> dict[str, Any]:
    """Latents that a student of SDXL samples in a second, by its own sampler and steps, without the autoencoder."""
    row = Row("sdxl-lcm", device, tiny)
    x, _, cond = row.inputs()
    student, method = row.trainer.roles.student, row.trainer.method
    sampler = sampler_of(foreseen_card(row.recipe, method, student.prediction_type))
    seconds = row.timed(lambda: sample(student, sampler, x, cond), repeats=3)
    return {"teacher": row.recipe.teacher.path, "steps": sampler.num_inference_steps, "per_second": row.rows / seconds}


def draws(device: str, tiny: bool) -> dict[str, Any]:
    """Milliseconds of the random numbers of a step for this process's rows, as the global batch grows."""
    row, found = Row("sdxl-dmd2", device, tiny), {}
    trainer = row.trainer
    for size in (row.rows, 64 * row.rows):
        rng = trainer.rng(0, 0, size, slice(0, row.rows), device, torch.float32)
        batch, progress = trainer.source.batch(rng), Progress(0, trainer.settings.steps)
        seconds = row.timed(lambda r=rng, b=batch, p=progress: trainer.method.draw(b, r, p))
        found[f"ms_for_{row.rows}_of_{size}_rows"] = 1000 * seconds
    return {"teacher": row.recipe.teacher.path, **found}


def scenes(device: str, tiny: bool) -> dict[str, Any]:
    """`fewstep demo` on the device: scenes-64 distilled, and compared with its teacher."""
    steps, count = (3, 8) if tiny else (300, 128)
    with tempfile.TemporaryDirectory() as folder:
        changes = ["--set", f"training.steps={steps}", *(["--set", "data.size=8"] if tiny else [])]
        command = ["demo", "--device", device, "--count", str(count), "--out", str(Path(folder, "run")), *changes]
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "fewstep", *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"fewstep {' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    return {"steps": steps, "count": count, "demo_seconds": time.perf_counter() - start, "said": done.stdout}


ROWS: dict[str, Callable[[str, bool], dict[str, Any]]] = {
    "step-sdxl-lcm": lambda device, tiny: step("sdxl-lcm", device, tiny),
    "step-flux-tcd": lambda device, tiny: step("flux-tcd", device, tiny),
    "step-sdxl-dmd2": lambda device, tiny: step("sdxl-dmd2", device, tiny),
    "compile": compiled,
    "offload": offloaded,
    "channels-last": channels_last,
    "samples": samples,
    "draws": draws,
    "scenes-64": scenes,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="?", choices=ROWS, help="by default the first without a JSON")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSONs")
    parser.add_argument("--tiny", action="store_true", help="scenes-64 in place of the large models")
    options = parser.parse_args(arguments)
    name = options.row or next((row for row in ROWS if not (options.out / f"{row}.json").is_file()), None)
    if name is None:
        print(f"Every row has its JSON in {options.out}.")
        return
    start = time.perf_counter()
    found = ROWS[name](options.device, options.tiny)
    on_cuda = torch.device(options.device).type == "cuda"
    machine = torch.cuda.get_device_name() if on_cuda else platform.machine()
    seconds = time.perf_counter() - start
    about = {"row": name, "machine": machine, "torch": torch.__version__, "tiny": options.tiny, "seconds": seconds}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps({**about, **found}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({**about, **found}))
    if seconds > LIMIT:
        print(f"This row took {seconds:.0f} s, more than the {LIMIT} s that it may take.", file=sys.stderr)


if __name__ == "__main__":
    main()
