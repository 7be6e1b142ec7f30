"""The image of the README: a teacher and its student from the same noise, with steps and seconds of each.

    OMP_NUM_THREADS=1 python benchmarks/side_by_side.py runs/demo --out docs/steps.png

Seconds are those of one image of a batch of eight, without decoding: the least of three rounds. Steps, calls and
seconds are printed as a line of JSON too.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import fewstep
from fewstep.evaluation.grids import image_grid

PROMPTS = (
    "two shapes", "a large pink shape", "a red shape", "a large circle",
    "two white circles", "a large plain shape", "a blue shape", "a small green shape",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished run, as `fewstep demo` leaves one")
    parser.add_argument("--out", type=Path, default=Path("docs/steps.png"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--guidance", type=float, default=3.0, help="of the teacher")
    given = parser.parse_args()
    torch.set_num_threads(1)
    student = fewstep.load(given.run)
    teacher = fewstep.load(student.card.teacher)
    rows, labels, facts = [], [], {"seed": given.seed}
    for who, model, steps, scale in (
        ("the model", teacher, 50, given.guidance),
        ("its student", student, student.card.num_inference_steps, 1.0),
    ):
        asked = {"seed": given.seed, "num_inference_steps": steps, "guidance_scale": scale}
        latents, seconds = None, []
        for _ in range(3):
            begin = time.perf_counter()
            latents = model.sample(list(PROMPTS), output_type="latent", **asked)
            seconds.append((time.perf_counter() - begin) / len(PROMPTS))
        rows.append(model.teacher.decode(latents).cpu())
        labels.append(f"{who}: {steps} steps, {min(seconds):.2f} s")
        facts[who] = {"steps": steps, "seconds": round(min(seconds), 3)}
    image_grid(rows, labels, PROMPTS).save(given.out, optimize=True)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
