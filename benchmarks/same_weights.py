"""Do methods train the same weights as at an earlier commit, to the bit, on every family's tiny pipeline?

    python benchmarks/same_weights.py [--methods dmd2,dmd,hyper,feedback] [--match PATTERN] [--commit HASH] [--steps 50]
        [--work FOLDER] [--out FILE.json]

Every recipe of the methods that the earlier commit ships, stage by stage, trains once with each tree's sources: its
method's settings, its weights (LoRA or full) and its rates, in float32 with batches of two latents of random numbers.
The teacher is a pipeline of the recipe's family with random weights, and for scenes-64 the shipped one. A stage starts
from its teacher, and reward models are a closed form, as in the tests. Then every tensor that training changes, roles,
heads and optimizer moments, must be the same. Prints a line per stage; exit code 1 where one differs. With --work a
second call goes on where the first ended. `same_numbers.py` compares whole runs of scenes-64 instead.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
FAMILIES = {
    "sd15": "sd15", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux", "sana": "sana", "qwen": "qwen_image",
    "qwen21": "qwen_image21", "zimage": "z_image", "klein": "klein_base", "flux2": "flux2_dev", "krea2": "krea2",
    "chroma": "chroma", "scenes-64": "scenes-64",
}  # fmt: skip
"""The first word of a recipe's name: a pipeline of `tests.models.pipelines`, or the shipped teacher."""


def stages(methods: list[str], match: str) -> dict[str, Any]:
    """Recipes of the methods by ``recipe`` or ``recipe/stage``, each on the model that its chain starts from."""
    import fewstep
    from fewstep.recipe.chain import load

    found: dict[str, Any] = {}
    for path in sorted((Path(fewstep.__file__).parent / "recipes").glob("*.yaml")):  # the tree's own
        loaded = load(str(path), () if "feedback" in path.stem else ("data.path=.",) * ("scenes" not in path.stem))
        chain = hasattr(loaded, "stages")
        for name, recipe in (loaded.on_first_teacher() if chain else {"": loaded}).items():
            label = f"{path.stem}/{name}" if chain else path.stem
            if recipe.method["name"] in methods and re.search(match, label):
                found[label] = recipe
    return found


def teacher_of(family: str) -> Any:
    """A teacher whose network is nobody else's."""
    from fewstep.models.families import as_teacher, load_teacher
    from tests.models.pipelines import SIZE, build

    if family == "scenes-64":
        return load_teacher(family)
    pipeline = copy.copy(build(family))
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    pipeline.register_modules(**{part: copy.deepcopy(getattr(pipeline, part))})
    return as_teacher(pipeline, family, size=SIZE)


def trained(recipe: Any, family: str, steps: int) -> str:
    """A hash of all tensors after ``steps`` of the recipe's training."""
    import torch

    from fewstep.data.pairs import PairSource, WithPairs
    from fewstep.data.sources import LatentSource
    from fewstep.models.roles import Weights
    from fewstep.training.settings import TrainingSettings
    from fewstep.training.trainer import Trainer, build_roles
    from tests.models.pipelines import PROMPTS
    from tests.rewards import never_enough

    teacher, settings = teacher_of(family), recipe.method_settings()
    if family != "scenes-64" and hasattr(settings, "halvings"):  # tiny latents have maps of 4x4 already
        settings = dataclasses.replace(settings, halvings=0)
    method = recipe.method_class()(teacher.denoiser.schedule, settings)
    mean = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    cond = teacher.encode_prompts(PROMPTS)
    data = LatentSource(mean, torch.full_like(mean, 0.1), cond)
    helpers = teacher.helpers(method.encoder)
    helpers = dataclasses.replace(helpers, rewards=dict.fromkeys((*method.rewards, *method.measures), never_enough))
    given = recipe.training
    training = TrainingSettings(
        steps=steps, batch_size=2, warmup_steps=5, learning_rate=given.learning_rate, log_every=steps,
        critic_learning_rate=given.critic_learning_rate, betas=given.betas, max_grad_norm=given.max_grad_norm,
        weight_decay=given.weight_decay, ema_decay=given.ema_decay,
    )  # fmt: skip
    roles = build_roles(teacher.denoiser, method, training, Weights(recipe.student.weights, rank=4), helpers=helpers)
    trainer = Trainer(method, roles, WithPairs(data, PairSource(mean, cond, seed=0)), training)
    before = hash_of(trainer.tensors())
    trainer.run()
    after = hash_of(trainer.tensors())
    assert before != after
    return after


def hash_of(tensors: Any) -> str:
    """A hash of tensors by name."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(name.encode() + tensor.detach().contiguous().cpu().numpy().tobytes())
    return whole.hexdigest()


def inside(out: Path, methods: str, match: str, steps: str) -> None:
    """Train everything that ``out`` does not have yet, with the sources on the path."""
    found: dict[str, str] = json.loads(out.read_text()) if out.exists() else {}
    for label, recipe in stages(methods.split(","), match).items():
        key = f"{label} {steps}"
        if key not in found:
            family = FAMILIES["scenes-64" if label.startswith("scenes-64") else label.split("-")[0]]
            found[key] = trained(recipe, family, int(steps))
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def run(source: Path, out: Path, given: argparse.Namespace) -> dict[str, str]:
    """The hashes of one tree, by its own process."""
    path = os.pathsep.join([str(source / "src"), str(HERE.parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    words = [str(HERE), "inside", str(out), given.methods, given.match, str(given.steps)]
    subprocess.run([sys.executable, *words], env=environment, check=True)
    found: dict[str, str] = json.loads(out.read_text())
    return found


def compare(given: argparse.Namespace, work: Path) -> int:
    """Train in both trees and compare; returns the exit code."""
    from same_numbers import check_out, git, machine

    tree = HERE.parents[1]
    commit, head = (git(tree, "rev-parse", f"{name}^{{commit}}").decode().strip() for name in (given.commit, "HEAD"))
    changed = hashlib.sha256(git(tree, "diff", "HEAD", "--", "src")).hexdigest()[:12]
    old = run(check_out(tree, commit, work / f"tree-{commit[:12]}"), work / f"old-{commit[:12]}.json", given)
    new = run(tree, work / f"new-{head[:12]}-{changed}.json", given)
    rows = {key: bool(old[key] == new.get(key)) for key in old}
    for key, same in rows.items():
        print(f"{'OK     ' if same else 'DIFFERS'}  {key.rpartition(' ')[0]}")
    print(f"{sum(rows.values())} of {len(rows)} stages have the same weights after {given.steps} steps.")
    report = {"old": commit, "new": head, "new_is_changed": bool(git(tree, "diff", "HEAD", "--", "src")), **machine()}
    report |= {"steps": given.steps, "same": {key.rpartition(" ")[0]: same for key, same in rows.items()}}
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(not rows or not all(rows.values()))


def main() -> None:
    if sys.argv[1:2] == ["inside"]:
        inside(Path(sys.argv[2]), *sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="dmd2,dmd,hyper,feedback", help="names with commas between them")
    parser.add_argument("--match", default="", metavar="PATTERN", help="only recipes or stages whose name has it")
    parser.add_argument("--commit", default="main", help="the earlier commit (default: main)")
    parser.add_argument("--steps", type=int, default=50, help="training steps of each stage (default 50)")
    parser.add_argument("--work", type=Path, help="keep sources and hashes here, and use them again")
    parser.add_argument("--out", type=Path, help="JSON to write")
    from same_numbers import in_work_folder

    sys.exit(in_work_folder(compare, parser.parse_args()))


if __name__ == "__main__":
    main()
