"""What a teacher of scenes shows instead of what its captions say: accuracy of each word, and what stands in its place.

    OMP_NUM_THREADS=1 python benchmarks/values.py scenes-64 --count 512 --guidance 3 --steps 25

Accuracies of whole attributes (`fewstep teacher measure`) hide that some of their values never come: a teacher with
67 % of its fills right may draw no stripe at all, as half of all fills are plain.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter

from fewstep.evaluation.compare import Candidate, eval_inputs, sample_candidate
from fewstep.models.families import Teacher, load_teacher
from fewstep.sampling import DDIMSampler
from fewstep.scenes64.detector import judge, load_detector, matched
from fewstep.scenes64.prompts import UNSEEN, unseen_prompts
from fewstep.scenes64.scenes import ATTRIBUTES, Scenes
from fewstep.scenes64.scenes.caption import DEFAULT_STATED

Found = dict[tuple[str, str, str], int]
"""How often of a caption's attribute a value was stated and another (or the same, or "nothing") found."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("teacher", nargs="?", default="scenes-64", help="scenes-64, or a folder of its architecture")
    parser.add_argument("--count", type=int, default=512, help="number of unseen prompts (default 512)")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale (default 3)")
    parser.add_argument("--steps", type=int, default=25, help="steps of DDIM (default 25)")
    parser.add_argument(
        "--stated",
        type=float,
        default=DEFAULT_STATED,
        help=f"share of the attributes stated (default {DEFAULT_STATED})",
    )
    options = parser.parse_args()
    teacher = load_teacher(options.teacher)
    found, things = values(teacher, options.count, options.guidance, options.steps, options.stated)
    print(json.dumps({"things": things, "found": [[*key, n] for key, n in sorted(found.items())]}))
    for number, (right, images) in sorted(things.items()):
        print(f"{number} named: all right in {right / images:.2f} of {images} images")
    for name, options_of in ATTRIBUTES.items():
        for value in options_of:
            rows = {other: n for (kind, stated, other), n in found.items() if (kind, stated) == (name, value)}
            total = sum(rows.values())
            others = [f"{other} {n}" for other, n in Counter(rows).most_common() if other != value][:3]
            print(f"{name:7} {value:9} {rows.get(value, 0) / max(1, total):.2f} of {total:3}  {', '.join(others)}")


def values(
    teacher: Teacher, count: int, guidance: float, steps: int, stated: float = DEFAULT_STATED
) -> tuple[Found, dict[int, tuple[int, int]]]:
    """What was found for each stated value; and by the number of things named, images that are right, and all."""
    prompts = unseen_prompts(teacher, count, stated)
    cond, noise = eval_inputs(teacher, prompts, seed=0)
    candidate = Candidate("teacher", teacher.denoiser, DDIMSampler(num_inference_steps=steps), guidance)
    images = teacher.decode(sample_candidate(candidate, noise, cond, seed=0))
    found: Counter[tuple[str, str, str]] = Counter()
    things: dict[int, tuple[int, int]] = {}
    for index, seen in enumerate(load_detector().detect(images)):
        scene = Scenes(UNSEEN).scene(index, stated=stated)
        pairs = matched(seen, scene)
        right, images_so_far = things.get(len(pairs), (0, 0))
        things[len(pairs)] = right + judge(seen, scene).all_right, images_so_far + 1
        for mention, thing in pairs:
            for name in ATTRIBUTES:
                if (stated := getattr(mention, name)) is not None:
                    found[name, stated, getattr(thing, name, "nothing")] += 1
    return dict(found), things


if __name__ == "__main__":
    main()
