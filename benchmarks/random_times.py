"""One dmd2 student for any number of steps (any_steps), against students of a fixed number, on a closed-form teacher.

    OMP_NUM_THREADS=1 python benchmarks/random_times.py [--steps 2000] [--seeds 0,1,2] [--forms any,fixed,tdm]
        [--out benchmarks/results/random-times.json]

Two modes on a line, 0.3 N(-1.2, 0.25^2) + 0.7 N(0.8, 0.35^2), flow schedule; students are small networks fitted to the
exact teacher first. Printed: sliced W2 of 8,192 samples to the data at 1, 2, 4 and 8 steps, each seed and the median.
The bar of `any` is 1.3 times what a prototype reached with one seed: 0.22, 0.18, 0.20, 0.29. Finished seeds are kept
in the file and not trained again: the same command goes on with the rest.

All forms have dmd2's default of five steps of the fake score to one of the student's. `any-2` has the prototype's two:
the fake score then lags behind a student of eight grids, whose modes stay too wide at one step, too narrow at eight.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from fewstep.data.files import replace_text
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.dmd2 import DMD2
from fewstep.models.roles import Roles
from fewstep.sampling import make_sampler, sample
from fewstep.training.settings import TrainingSettings
from fewstep.verification.bench import Bench
from fewstep.verification.distribution import sliced_w2
from fewstep.verification.dmd2 import fit_teacher

DATA, FLOW, SAMPLES = GaussianMixture([0.3, 0.7], [-1.2, 0.8], [0.25, 0.35]), Schedule.flow(), 8192
FORMS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "any": ({"any_steps": 8}, (1, 2, 4, 8)),
    "any-2": ({"any_steps": 8, "student_every": 2}, (1, 2, 4, 8)),
    "fixed": ({}, (4,)),
    "tdm": ({"rollout": "ode", "match": "x_s"}, (4,)),
    "tdm-score": ({"rollout": "ode", "match": "x_s", "fake_target": "score"}, (4,)),
    "tdm-any": ({"rollout": "ode", "match": "x_s", "any_steps": 8}, (1, 2, 4, 8)),
}
REACHED = {1: 0.22, 2: 0.18, 4: 0.20, 8: 0.29}


def measure(form: str, seed: int, steps: int) -> dict[str, float]:
    """W2 to the data by number of steps, and the seconds of CPU time."""
    settings, counts = FORMS[form]
    bench, begun = Bench(DATA, FLOW, seed), time.process_time()
    method = DMD2(FLOW, guidance_scale=1.0, adversarial_weight=0.0, **settings)
    fitted, roles = fit_teacher(bench), Roles(bench.teacher, seed=seed)
    for spec in method.roles():
        network: Any = copy.deepcopy(fitted.network)
        roles.add_network(spec.name, network, fitted.prediction_type)
    training = TrainingSettings(
        steps=steps, batch_size=512, learning_rate=3e-4, critic_learning_rate=3e-3, warmup_steps=min(100, steps // 10),
        lr_schedule="cosine", log_every=max(1, min(500, steps)),
    )  # fmt: skip
    bench.train(method, training, roles=roles)
    noise = torch.randn(SAMPLES, 1, generator=torch.Generator().manual_seed(5))
    data = DATA.sample(SAMPLES, torch.Generator().manual_seed(6))
    found = {"seconds": time.process_time() - begun}
    for n in counts:
        sampler = make_sampler(method.sampler, num_inference_steps=n)
        x = sample(roles.student, sampler, noise, generator=torch.Generator().manual_seed(1)).x0
        found[str(n)] = sliced_w2(x.double(), data)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--forms", default="any,fixed,tdm", help=", ".join(FORMS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "random-times.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept: dict[str, dict[str, float]] = json.loads(given.out.read_text()) if given.out.exists() else {}
    for form in given.forms.split(","):
        rows = []
        for seed in map(int, given.seeds.split(",")):
            key = f"{form}, {given.steps} steps, seed {seed}"
            if key not in kept:
                kept[key] = measure(form, seed, given.steps)
                given.out.parent.mkdir(parents=True, exist_ok=True)
                replace_text(given.out, json.dumps(kept, indent=1) + "\n")
            rows.append(kept[key])
            print(f"{key}: {', '.join(f'{n} {value:.3f}' for n, value in kept[key].items())}", flush=True)
        for n in FORMS[form][1]:
            median = statistics.median(row[str(n)] for row in rows)
            bar = f", bar {1.3 * REACHED[n]:.3f}: {'held' if median <= 1.3 * REACHED[n] else 'MISSED'}"
            print(f"{form}, {n} steps: median of {len(rows)} seeds {median:.3f}{bar if form.startswith('any') else ''}")


if __name__ == "__main__":
    main()
