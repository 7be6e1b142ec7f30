"""What fresh noise repairs: a TCD student sampled at several numbers of steps and values of eta.

    OMP_NUM_THREADS=2 python benchmarks/eta.py runs/demo [--steps 4,8,16] [--eta 0,0.3,0.6,1] [--count 512]
        [--out benchmarks/results/eta.json]

TCD's authors say that jumping back and adding noise corrects the errors that jumps accumulate, the more the more steps
there are. Yes is, at a number of steps: some eta > 0 has a lower detail FD than the first, 0, and the 95 % interval of
the difference, taken on the same prompts and starts, lies above 0. (The intervals of the two figures, which mostly say
how far 512 prompts stand for all, may meet all the same.)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fewstep.data.files import replace_text
from fewstep.evaluation.compare import Candidate, compare
from fewstep.evaluation.result import lower_by
from fewstep.evaluation.tables import as_text
from fewstep.inference.generate import load_model
from fewstep.scenes64.prompts import unseen_prompts
from fewstep.students.card import sampler_of

FIGURES = ("FD", "detail FD", "accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished run of tcd, or a student's folder")
    parser.add_argument("--steps", default="4,8,16")
    parser.add_argument("--eta", default="0,0.3,0.6,1")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "eta.json")
    given = parser.parse_args()
    model = load_model(given.run)
    candidates = []
    for steps in map(int, given.steps.split(",")):
        for eta in map(float, given.eta.split(",")):
            sampler = sampler_of(model.card, num_inference_steps=steps, eta=eta)
            scale, embed = model.card.guidance_scale, model.card.guidance_embed
            candidates.append(Candidate(f"eta {eta:g}", model.denoiser, sampler, scale, embed))
    found = compare(model.teacher, candidates, unseen_prompts(model.teacher, given.count), given.seed)
    print(as_text(found, FIGURES))
    results = {f"{r.steps} steps, {r.model}": r for r in found.results}
    rows = {label: {n: (r.figures[n], r.intervals[n]) for n in FIGURES} for label, r in results.items()}
    etas = len(given.eta.split(","))
    for i, label in enumerate(results):
        better, (low, high) = lower_by("detail FD", found.results[i], found.results[i - i % etas])
        rows[label]["repaired"] = (better, (low, high))
        print(f"{label}: detail FD lower than at the first eta by {better:.2f} [{low:.2f}, {high:.2f}]")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(given.out, json.dumps({"run": given.run, "prompts": given.count, "ways": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
