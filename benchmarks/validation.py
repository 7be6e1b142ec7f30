"""What validation costs beyond its networks: CPU time of one measurement over the bare calls that it cannot avoid.

    OMP_NUM_THREADS=1 python benchmarks/validation.py scenes-64 sd15 --rounds 9

Bare are sampling 64 prompts at 4 steps, decoding and one pass of the feature network, on inputs that are ready. A
measurement during training (`fewstep.runs.validation`) does the same and computes every figure of it; on scenes-64 the
detector also judges the prompts, a second pass. Both alternate; printed is the median of the ratios of neighbours. The
reference was made before, once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fewstep.evaluation.compare import eval_inputs
from fewstep.recipe.load import parse_recipe
from fewstep.runs.setup import Run, setup
from fewstep.runs.validation import Validation, run_prompt_set, validation_prompts
from fewstep.sampling import sample
from fewstep.scenes64.scenes import WORDS
from fewstep.students.card import sampler_of

COUNT, STEPS = 64, 4


def recipe_of(case: str, folder: Path, metrics: list[str]) -> dict[str, Any]:
    """A recipe of scenes-64, or of a tiny random SD 1.5 that is measured on the ImageNet network."""
    common = {
        "method": "tcd",
        "sample": {"num_inference_steps": STEPS, "teacher_steps": STEPS},
        "evaluate": {"every": 1, "count": COUNT, "metrics": metrics},
    }
    if case == "scenes-64":
        return common
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.models.pipelines import build

    build("sd15").save_pretrained(folder / "model")
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"a {WORDS[i % len(WORDS)]} and number {i}\n" for i in range(COUNT)))
    return {**common, "teacher": str(folder / "model"), "evaluate": {**common["evaluate"], "prompts": str(prompts)}}


def bare_calls(run: Run, validation: Validation) -> Callable[[], None]:
    """The networks' calls of one measurement, and nothing around them."""
    card, prompts = run.card(0), validation._prompts
    student, sampler = run.roles.views()[run.role].uncounted(), sampler_of(card)
    cond, noise = eval_inputs(run.teacher, prompts, 0)
    perceptual, teacher = prompts.perceptual, prompts.teacher

    def calls() -> None:
        generator = torch.Generator().manual_seed(0)
        latents = sample(
            student, sampler, noise, cond, card.guidance_scale,
            guidance_embed=card.guidance_embed, generator=generator,
        ).x0  # fmt: skip
        images = run.teacher.decode(latents).cpu()
        prompts.features(images)
        if perceptual is not None and teacher is not None:
            perceptual(images, teacher)

    return calls


def measure(case: str, rounds: int, metrics: list[str]) -> dict[str, float]:
    """Medians over ``rounds`` pairs, whose order alternates."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = setup(parse_recipe(recipe_of(case, folder, metrics)), folder / "run")
        prompts = run_prompt_set(run)
        run.teacher.free_text_encoders(validation_prompts(run.recipe))  # as a run does: prompts are encoded once
        validation = Validation(run, prompts, lambda: 0.0)
        kinds = {"bare": bare_calls(run, validation), "validation": lambda: validation._measure(1)}
        taken: dict[str, list[float]] = {kind: [] for kind in kinds}
        for i in range(rounds + 1):
            for kind in sorted(kinds, reverse=bool(i % 2)):
                begun = time.process_time()
                kinds[kind]()
                taken[kind].append(time.process_time() - begun)
    ratios = sorted(a / b for a, b in zip(taken["validation"][1:], taken["bare"][1:], strict=True))
    return {
        "ratio": statistics.median(ratios), "ratio_low": ratios[len(ratios) // 4],
        "ratio_high": ratios[-1 - len(ratios) // 4],
        **{f"{kind}_seconds": statistics.median(seconds[1:]) for kind, seconds in taken.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=["scenes-64", "sd15"], help="scenes-64, sd15 or both")
    parser.add_argument("--rounds", type=int, default=9, help="pairs to measure")
    parser.add_argument("--metrics", nargs="*", default=[], help="further figures, as in evaluate.metrics")
    options = parser.parse_args()
    for case in options.cases:
        figures = measure(case, options.rounds, options.metrics)
        about = {"case": case, "rounds": options.rounds, "torch": torch.__version__}
        print(json.dumps({**about, **{key: round(value, 4) for key, value in figures.items()}}))
        print(
            f"{case}: measuring {COUNT} prompts at {STEPS} steps takes {figures['ratio']:.3f} times the CPU time of "
            f"the calls of its networks (middle half: {figures['ratio_low']:.3f} to {figures['ratio_high']:.3f}; "
            f"{figures['bare_seconds']:.2f} s bare).",
            flush=True,
        )


if __name__ == "__main__":
    main()
