"""Can eyes tell the teacher's many steps from its few? Unlabelled pairs of images, and how an onlooker did.

    OMP_NUM_THREADS=1 python benchmarks/pairs.py show --seed 0 --out benchmarks/results/pairs.jpg
    python benchmarks/pairs.py judge "A B B ..." --seed 0 --out benchmarks/results/pairs.json

`show` writes pairs of the teacher's images at 50 and at 4 steps, from the same prompt and noise, beside each other as A
and B in random order. An onlooker who has seen nothing else says for each pair which is the more finished image.
`judge` counts how often that was the image of 50 steps, and keeps the answers beside the truth.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

import torch
from PIL import Image
from torch import Tensor

from fewstep.data.files import replace_text
from fewstep.evaluation.compare import Candidate, eval_inputs, sample_candidate
from fewstep.evaluation.grids import image_grid
from fewstep.models.families import load_teacher
from fewstep.sampling import DDIMSampler
from fewstep.scenes64.prompts import unseen_prompts

PAIRS, COLUMNS = 20, 5
STEPS = (50, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("show", "judge"))
    parser.add_argument("answers", nargs="?", default="", help=f"{PAIRS} letters, A or B: the better of each pair")
    parser.add_argument("--teacher", default="scenes-64", help="scenes-64, or a folder of its architecture")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0, help="of noise, and of the order within pairs")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.what == "show":
        sheet(given.teacher, given.guidance, given.seed).save(given.out, quality=88)
        return
    result = judged(given.answers.split(), truth(given.seed))
    replace_text(given.out, json.dumps({"seed": given.seed, "guidance": given.guidance, **result}) + "\n")
    print(f"{result['right']} of {PAIRS} named right")


def truth(seed: int) -> list[str]:
    """The letter of the image of 50 steps in each pair."""
    rng = Random(f"pairs {seed}")
    return [rng.choice("AB") for _ in range(PAIRS)]


def judged(answers: list[str], right: list[str]) -> dict[str, object]:
    """The answers beside the truth.

    Raises:
        SystemExit: they are not as many letters A and B as there are pairs.
    """
    if len(answers) != PAIRS or set(answers) - set("AB"):
        raise SystemExit(f"Give {PAIRS} letters, A or B, not {' '.join(answers)!r}.")
    return {"answers": answers, "truth": right, "right": sum(a == b for a, b in zip(answers, right, strict=True))}


def sheet(path: str, guidance: float, seed: int) -> Image.Image:
    """All pairs, five to a row: A above, B below it."""
    teacher = load_teacher(path)
    prompts = unseen_prompts(teacher, PAIRS)
    cond, noise = eval_inputs(teacher, prompts, seed=seed)
    many, few = (
        teacher.decode(sample_candidate(candidate, noise, cond, seed))
        for candidate in (
            Candidate("teacher", teacher.denoiser, DDIMSampler(num_inference_steps=n), guidance) for n in STEPS
        )
    )
    first = torch.tensor([letter == "A" for letter in truth(seed)])[:, None, None, None]
    a, b = torch.where(first, many, few), torch.where(first, few, many)
    rows: list[Tensor] = []
    labels: list[str] = []
    for begin in range(0, PAIRS, COLUMNS):
        part = slice(begin, begin + COLUMNS)
        rows += [a[part], b[part]]
        labels += [f"{begin + 1} to {begin + COLUMNS}: A", "B"]
    return image_grid(rows, labels, scale=3)


if __name__ == "__main__":
    main()
