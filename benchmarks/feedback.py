"""What human feedback did to a student: rewards, the one that was held out among them, and what they cost.

    OMP_NUM_THREADS=1 python benchmarks/feedback.py runs/feedback --held-out runs/taste-held-out/reward.safetensors
        [--reward runs/taste/reward.safetensors] [--threshold 1] [--steps 1,2,4] [--count 512]

RUN is a finished `fewstep distill scenes-64-feedback`. Before the feedback and after it its student draws the same
prompts from the same noise. Rewards are in standard deviations of the pictures that they learnt from; differences are
paired, with 95 % intervals from a bootstrap of the prompts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from style import picks
from torch import Tensor

from fewstep.data.files import replace_text
from fewstep.evaluation.compare import Candidate, compare
from fewstep.evaluation.metrics import centred_interval
from fewstep.evaluation.result import Result, lower_by
from fewstep.models.families import load_teacher
from fewstep.models.rewards import load_reward
from fewstep.scenes64.prompts import unseen_prompts
from fewstep.students.card import load_card, sampler_of
from fewstep.students.lineage import teacher_of
from fewstep.students.student import load_student

RESULTS = Path(__file__).parent / "results" / "feedback.json"
STAGES = {"before": "01-student", "after": "02-feedback"}


def judged(file: Path, pictures: Tensor) -> Tensor:
    """What the reward in ``file`` says of pictures [N, 3, H, W] from 0 to 1: [N]."""
    network = load_reward(file)
    with torch.no_grad():
        return torch.cat([network(part) for part in pictures.split(64)])


def paired(after: Tensor, before: Tensor) -> tuple[float, tuple[float, float]]:
    """Mean difference over prompts."""
    change = (after - before).double()
    return float(change.mean()), centred_interval(change[picks(len(change))].mean(1), float(change.mean()))


def row(found: dict[str, Result], rewards: dict[str, Path], threshold: float) -> dict[str, object]:
    """Both students at one number of steps."""
    after, before = found["after"], found["before"]
    line: dict[str, object] = {}
    for name, file in rewards.items():
        now, then = (judged(file, outcome.images) for outcome in (after, before))
        line[f"{name} reward"] = [float(then.mean()), float(now.mean())]
        line[f"{name} reward up by"] = paired(now, then)
        line[f"{name} reward above the threshold"] = [float((r >= threshold).double().mean()) for r in (then, now)]
    for name in ("FD", "detail FD", "accuracy", "recall", "precision", "spread"):
        line[name] = [before.figures[name], after.figures[name]]
        if name in before.resampled:
            value, (low, high) = lower_by(name, after, before)
            line[f"{name} up by"] = (-value, (-high, -low))
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--reward", type=Path, help="the one that was trained on")
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--threshold", type=float, default=1.0)
    parser.add_argument("--steps", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4])
    parser.add_argument("--count", type=int, default=512)
    options = parser.parse_args()
    rewards = {"held-out": options.held_out, **({"trained": options.reward} if options.reward else {})}
    teacher, rows = load_teacher("scenes-64"), {}
    students = {}
    for name, stage in STAGES.items():
        folder = options.run / stage / "student"
        card = load_card(folder)
        students[name] = load_student(teacher_of(folder, card), folder, card), card
    prompts = unseen_prompts(teacher, options.count)
    for steps in options.steps:
        ways = [
            Candidate(name, student, sampler_of(card, num_inference_steps=steps))
            for name, (student, card) in students.items()
        ]
        found = compare(teacher, ways, prompts, per_prompt=4, floors=False)
        rows[str(steps)] = row({r.model: r for r in found.results}, rewards, options.threshold)
        print(json.dumps({"steps": steps, **rows[str(steps)]}), flush=True)
    about = {"prompts": options.count, "torch": torch.__version__, "threshold": options.threshold}
    replace_text(RESULTS, json.dumps({**about, "steps": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
