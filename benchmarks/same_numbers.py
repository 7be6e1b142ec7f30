"""Does this checkout compute the same numbers as an earlier commit, to the bit, on the same machine?

    python benchmarks/same_numbers.py [--only weights,samplers,exports,verify,compat] [--match PATTERN] [--commit HASH]
        [--tree FOLDER] [--work FOLDER] [--out FILE.json]

Both trees run the same commands, `python -m fewstep ...` on one thread, in folders of their own; then their files are
compared. The parts are:

    weights    every method's student, checkpoint, log and samples.png after 50 short steps of its shipped recipe;
               the losses of scenes-64's own training on fixed batches (to 1e-6), its choices for reward models
    samplers   pictures by every sampler, and every sampler's float64 states on a closed-form network
    exports    every tensor, header and configuration of `fewstep export`, and what it refuses
    verify     the figures of `fewstep verify METHOD --steps 30`, as printed and in full precision
    compat     the earlier commit's recipes, runs and exports in the new tree: parsed, drawn from, exported, resumed

Training before and after the random numbers of version 2 (`fewstep.data.random`) differs: compare with commits since.
A row is OK, or DIFFERS (exit code 1), or NOTE, which is for people to judge: the new tree refuses an old file in one
sentence and exit code 2, or no longer prints a quantity. With --work the earlier commit's outputs are kept, and made
again only when the machine, the versions or the commands change. Where names change between the two trees, extend the
tables `NAMES`, `FIELDS` and `NEW_WORDS` below and the losses of scenes-64's stages; everything else is found by command
line, file or registry key.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import io
import json
import math
import os
import platform
import re
import resource
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

COMMIT = "14e21aa336d5be70491b6ff7a0664ee5c9249004"
PARTS = ("weights", "samplers", "exports", "verify", "compat")

# ---------------------------------------------------------------- what may be called otherwise in the new tree

NAMES: dict[str, tuple[str, ...]] = {
    "Denoiser": ("fewstep:Denoiser",),
    "Schedule": ("fewstep:Schedule",),
    "sample": ("fewstep:sample",),
    "solve": ("fewstep:solve",),
    "SAMPLERS": ("fewstep.sampling:SAMPLERS",),
    "SOLVERS": ("fewstep.sampling.solvers:SOLVERS",),
    "verify": ("fewstep.verification.verify:verify", "fewstep.evaluation.truth.verify:verify"),
    "load": ("fewstep.recipe.chain:load", "fewstep.stages:load"),
    "as_yaml": ("fewstep.recipe:as_yaml",),
    "chain_yaml": ("fewstep.stages:chain_yaml",),
}
"""Where a name is found; of several places the first that a tree has is taken."""

FIELDS: dict[str, tuple[str, ...]] = {
    "num_inference_steps": ("num_inference_steps",),
    "timestep_spacing": ("timestep_spacing",),
    "eta": ("eta",),
}
"""What a field of a dataclass is called: the first name that the class has is taken."""

ACCEPTS = ("accepts",)
"""Attributes by which a network says what it wants to be told, in either tree."""

NEW_WORDS: dict[str, str] = {}
"""Words of a command line, options and keys of --set KEY=VALUE, that are others in the new tree: old to new."""

TIMES = ("steps_per_second", "modelspec.date")
"""Keys whose values say when or how fast something was made; they are not compared."""

ENVIRONMENT = {
    **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")},
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",  # `feedback` adds terms of its perceptual loss in the order of a set of strings
}
"""Of every command, in both trees."""

# ---------------------------------------------------------------- what is run

SHORT = (
    "training.batch_size=4", "training.log_every=10", "data.size=32", "sample.every=1000", "sample.teacher_steps=2",
    "sample.prompts=[a red star, two shapes]",
)  # fmt: skip
PAIRS = ("pairs.size=32", "pairs.num_inference_steps=4")
STEPS = 50


@dataclass(frozen=True)
class Training:
    """A shipped recipe made short.

    Attributes:
        recipe: its name. sets: overrides beside `SHORT`.
        stages: steps of each stage, for a recipe of several; others take `STEPS`.
        copies: of the job, see `Job`.
    """

    recipe: str
    sets: tuple[str, ...] = ()
    stages: Mapping[str, int] = field(default_factory=dict)
    copies: tuple[tuple[str, str, str], ...] = ()

    def words(self, folder: str) -> tuple[str, ...]:
        """The command line."""
        steps = [f"stages.{name}.training.steps={n}" for name, n in self.stages.items()]
        sets = [*SHORT, *(steps or [f"training.steps={STEPS}"]), *self.sets]
        return ("distill", self.recipe, "--out", folder, "-q", *(word for s in sets for word in ("--set", s)))


def _pairs_of(*stages: str) -> tuple[str, ...]:
    return tuple(f"stages.{stage}.{item}" for stage in stages for item in PAIRS)


TRAININGS: dict[str, Training] = {
    "cm": Training("scenes-64-cm"),
    "ict": Training("scenes-64-ict"),
    "lcm": Training("scenes-64-lcm"),
    "lcm-told": Training(  # all weights, told its guidance: the other form of LCM, for its exports
        "scenes-64-lcm",
        ("student.weights=full", "method.guidance_embed=true", "method.guidance_scale=[2, 4]",
         "method.target_decay=0.95", "training.learning_rate=1e-5", "training.steps=15"),
    ),
    "ctm": Training("scenes-64-ctm"),
    "tcd": Training("scenes-64-tcd"),
    "pcm": Training("scenes-64-pcm"),
    "dmd": Training("scenes-64-dmd", PAIRS),
    "dmd2": Training("scenes-64-dmd2"),
    "turbo": Training("scenes-64-turbo"),
    "ladd": Training("scenes-64-ladd", ("method.warmup_steps=10",)),
    "progressive": Training("scenes-64-progressive", stages={"eight": 25, "four": 25}),
    "lightning": Training(
        "scenes-64-lightning", stages={"eight": 14, "four": 12, "conditional": 12, "unconditional": 12}
    ),
    "hyper": Training(
        "scenes-64-hyper",
        _pairs_of("one-step", "unified"),
        {"eight": 9, "four": 9, "two": 8, "one": 8, "one-step": 8, "unified": 8},
    ),
    "feedback": Training(  # by the earlier commit's reward models in both trees
        "scenes-64-feedback",
        stages={"student": 25, "feedback": 25},
        copies=tuple(("rewards", f"runs/{name}", f"runs/{name}") for name in ("taste", "taste-held-out")),
    ),
}  # fmt: skip

SAMPLERS = (
    "lcm", "renoise", "tcd", "ctm", "phased", "ddim", "euler", "euler-ancestral", "heun", "dpm++2m",
)  # fmt: skip
WITH_ETA = ("tcd", "ctm", "phased", "ddim", "euler-ancestral")
GRIDS = ("trailing", "leading", "linspace", "karras", "lcm", "lcm-v1", "turbo", "phases")
METHODS = (
    "cm", "lcm", "ctm", "tcd", "pcm", "dmd", "dmd2", "turbo", "ladd", "lightning", "hyper", "feedback",
)  # fmt: skip
PROMPTS = ("-p", "a red star", "-p", "two shapes")

EXPORTS: dict[str, tuple[str, str, tuple[str, ...]]] = {  # name: training, folder in it, options
    "tcd-diffusers": ("tcd", "", ("--to", "diffusers")),
    "tcd-lora": ("tcd", "", ("--to", "lora")),
    "tcd-kohya": ("tcd", "", ("--to", "kohya")),
    "tcd-merged": ("tcd", "", ("--to", "merged")),
    "dmd-diffusers": ("dmd", "", ("--to", "diffusers")),
    "dmd-merged-half": ("dmd", "", ("--to", "merged", "--dtype", "float16")),
    "dmd-lora": ("dmd", "", ("--to", "lora")),
    "lcm-told-diffusers": ("lcm-told", "", ("--to", "diffusers")),
    "lcm-told-merged": ("lcm-told", "", ("--to", "merged")),
    "lcm-told-kohya": ("lcm-told", "", ("--to", "kohya")),
    "ctm-diffusers": ("ctm", "", ("--to", "diffusers")),
    "feedback-lora": ("feedback", "/02-feedback", ("--to", "lora")),
}
"""Some of them are refused: full weights, what a student is told, a LoRA on another student."""

RESUMED = {
    "tcd": ("training.steps=60",),
    "dmd": ("training.steps=60",),
    "progressive": ("stages.four.training.steps=35",),
}
DRAWN = ("tcd", "ctm", "lcm-told", "feedback")
EXPORTED = {"tcd": "kohya"}
READ_BACK = ("tcd-lora", "tcd-diffusers")


@dataclass(frozen=True)
class Job:
    """Commands that both trees run, each in its own folder.

    Attributes:
        name: also the path that the commands write, unless `makes` says otherwise.
        commands: words after `python -m fewstep`, or "inside" and the name of a function of `INSIDE` and its arguments.
        needs: jobs of the same tree that must have run.
        copies: (job, path, to): what that job made at ``path`` in the earlier commit's tree is copied there first.
        reads: other jobs of the earlier commit's tree that must have run.
        makes: paths that are removed before the commands run.
        may_fail: an exit code other than 0 is an answer to compare, not an accident.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...] = ()
    copies: tuple[tuple[str, str, str], ...] = ()
    reads: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    may_fail: bool = False


def _jobs() -> dict[str, Job]:
    """All of them by name."""
    jobs = [*_training_jobs(), *_sampler_jobs(), *_export_jobs(), *_verify_jobs(), *_compat_jobs()]
    return {job.name: job for job in jobs}


def _training_jobs() -> Iterator[Job]:
    folders = ("runs/choices", "runs/taste", "runs/taste-held-out")
    choices, taste, held_out = folders
    train = ("reward", "train", choices, "--steps", "20", "-q", "--out")
    yield Job(
        "rewards",
        (("reward", "scenes", choices, "--count", "40", "-q"), (*train, taste),
         (*train, held_out, "--trunk", "reader", "--seed", "1")),
        makes=folders,
    )  # fmt: skip
    for name, training in TRAININGS.items():
        yield Job(f"runs/{name}", (training.words(f"runs/{name}"),), copies=training.copies)
    yield Job("losses.json", (("inside", "losses", "losses.json"),))


def _sampler_jobs() -> Iterator[Job]:
    begin = ("sample", "scenes-64", *PROMPTS, "--seed", "3", "--guidance-scale", "2", "--steps", "4")
    for name in SAMPLERS:
        eta = ("--eta", "0.5") if name in WITH_ETA else ()
        path = f"pictures/{name}.png"
        yield Job(path, ((*begin, "--sampler", name, *eta, "--out", path),))
    path = "pictures/anew.png"
    drawn_anew = ("--image", "../start.png", "--mask", "../mask.png", "--strength", "0.75")
    yield Job(path, ((*begin, *drawn_anew, "--out", path),))
    yield Job("states.safetensors", (("inside", "states", "states.safetensors"),))


def _export_jobs() -> Iterator[Job]:
    for name, (training, inner, options) in EXPORTS.items():
        words = ("export", f"runs/{training}{inner}", *options, "--out", f"exports/{name}")
        yield Job(f"exports/{name}", (words,), needs=(f"runs/{training}",), may_fail=True)


def _verify_jobs() -> Iterator[Job]:
    for name in METHODS:
        path = f"verify/{name}.json"
        yield Job(path, (("inside", "verify", path, "verify", name, "--steps", "30", "-q"),), may_fail=True)


def _compat_jobs() -> Iterator[Job]:
    for name, sets in RESUMED.items():
        path = f"compat/resumed-{name}"
        command = (*TRAININGS[name].words(path), "--resume", *(word for item in sets for word in ("--set", item)))
        yield Job(path, (command,), copies=((f"runs/{name}", f"runs/{name}", path),), may_fail=True)
    for name in DRAWN:
        path = f"compat/drawn-{name}"
        command = ("sample", path, *PROMPTS, "--seed", "5", "--out", f"{path}/drawn.png")
        yield Job(path, (command,), copies=((f"runs/{name}", f"runs/{name}", path),), may_fail=True)
    for name, to in EXPORTED.items():
        path = f"compat/exported-{name}"
        command = ("export", path, "--to", to, "--out", f"{path}/made")
        yield Job(path, (command,), copies=((f"runs/{name}", f"runs/{name}", path),), may_fail=True)
    for name in READ_BACK:
        path = f"compat/read-{name}"
        command = ("sample", path, *PROMPTS, "--seed", "5", "--out", f"{path}/drawn.png")
        yield Job(path, (command,), copies=((f"exports/{name}", f"exports/{name}", path),), may_fail=True)
    path, runs = "compat/recipes.json", tuple(f"runs/{name}" for name in TRAININGS)
    yield Job(path, (("inside", "parse", path, "{old source}/src/fewstep/recipes", "{old}/runs"),), reads=runs)


JOBS = _jobs()

# ---------------------------------------------------------------- inside a tree: run with its src on the path


def find(name: str) -> Any:
    """What `NAMES` calls so, from the first place that this tree has."""
    for place in NAMES[name]:
        module, _, attribute = place.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError):
            continue
    sys.exit(f"This tree has none of {', '.join(NAMES[name])}: add the new place of {name} to NAMES.")


def options(cls: Any, **values: Any) -> dict[str, Any]:
    """``values`` under the names that the dataclass has for them."""
    known = {f.name for f in dataclasses.fields(cls)}
    found = {}
    for name, value in values.items():
        own = next((other for other in FIELDS[name] if other in known), None)
        if own is None:
            sys.exit(f"{cls.__name__} has none of {', '.join(FIELDS[name])}: add the new name of {name} to FIELDS.")
        found[own] = value
    return found


def _closed_form(x: Tensor, t: Any, cond: Any = None, **told: Any) -> Tensor:
    """A smooth function that stands for a network; what it is told of the end of a jump shows in its answer."""
    t, *ends = (torch.as_tensor(v, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1)) for v in (t, *told.values()))
    return torch.sin(1.3 * x + 0.01 * t) + 0.2 * x.roll(1, dims=-1) + sum(0.003 * end for end in ends)


def inside_states(out: str) -> None:
    """Every sampler's states in float64: three schedules, several numbers of steps, amounts of noise and grids."""
    make, denoise, sample, samplers = find("Schedule"), find("Denoiser"), find("sample"), find("SAMPLERS")
    for name in ACCEPTS:
        setattr(_closed_form, name, frozenset({"end"}))
    generator = torch.Generator().manual_seed(0)
    noise, *noises = torch.randn(20, 3, 2, 5, generator=generator, dtype=torch.float64)
    found = {}
    kinds = ((make.scaled_linear(), "epsilon"), (make.edm(), "sample"), (make.flow(3.0), "flow"))
    for schedule, kind in kinds:
        network = denoise(_closed_form, schedule, kind)
        for label, sampler in _all_samplers(samplers):
            try:
                walked = sample(network, sampler, noise, None, 1.0, noises)
            except ValueError:  # a grid that this schedule has not: the other tree must have as many
                continue
            _, states, times = vars(walked).values()
            found[f"{kind} {label} states"], found[f"{kind} {label} times"] = torch.stack(states), times
        for solver in find("SOLVERS"):
            times = np.linspace(float(schedule.start), float(schedule.end), 7)
            found[f"{kind} solver {solver}"] = find("solve")(network, noise, times, None, 1.0, solver)
    save_file({name: t.contiguous().clone() for name, t in found.items()}, out)


def _all_samplers(samplers: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(label, sampler) for every key of the registry."""
    for name, cls in samplers.items():
        has_eta = any(f.name in FIELDS["eta"] for f in dataclasses.fields(cls))
        for steps in (1, 4, 16):
            for eta in (0.0, 0.3, 1.0) if has_eta else (None,):
                more = {} if eta is None else {"eta": eta}
                yield f"{name} {steps} {eta}", cls(**options(cls, num_inference_steps=steps, **more))
        for grid in GRIDS:
            yield f"{name} {grid}", cls(**options(cls, num_inference_steps=5, timestep_spacing=grid))


def inside_verify(out: str, *words: str) -> None:
    """The command line with these words; every number of the reports goes to ``out`` in full precision.

    One row, R1 of a linear head, is about random weights from PyTorch's global generator, so it is seeded here.
    """
    kept: list[list[list[float]]] = []

    def keeping(check: Callable[..., Any]) -> Callable[..., Any]:
        def kept_too(*given: Any, **named: Any) -> Any:
            report = check(*given, **named)
            kept.append([[float(v) for v in vars(row).values() if isinstance(v, int | float)] for row in report])
            return report

        return kept_too

    for place in NAMES["verify"]:
        module, _, attribute = place.partition(":")
        try:
            home = importlib.import_module(module)
            setattr(home, attribute, keeping(getattr(home, attribute)))
        except (ImportError, AttributeError):
            continue
    sys.argv = ["fewstep", *words]
    torch.manual_seed(0)
    try:
        runpy.run_module("fewstep", run_name="__main__")
    finally:
        Path(out).write_text(json.dumps(kept), encoding="utf-8")


def inside_parse(out: str, *folders: str) -> None:
    """What this tree makes of recipe files: their resolved values, or the error."""
    found: dict[str, dict[str, Any]] = {}
    for folder in map(Path, folders):
        paths = folder.rglob("recipe.yaml") if folder.name == "runs" else folder.glob("*.yaml")
        for path in sorted(paths):
            name = str(path.relative_to(folder.parent))
            try:
                recipe = find("load")(str(path))
                found[name] = {"values": yaml.safe_load(_as_yaml(recipe))}
            except ValueError as error:
                found[name] = {"sentence": str(error)}
            except Exception as error:
                found[name] = {"crash": f"{type(error).__name__}: {error}"}
    Path(out).write_text(json.dumps(found), encoding="utf-8")


def _as_yaml(recipe: Any) -> str:
    """A resolved recipe or chain as text."""
    if hasattr(recipe, "as_yaml"):
        return recipe.as_yaml()
    return (find("chain_yaml") if hasattr(recipe, "stages") else find("as_yaml"))(recipe)


def inside_losses(out: str) -> None:
    """Losses of scenes-64's two stages, small networks on fixed batches with the same random streams.

    This is the place to adapt when these stages change again: one function for each tree. Their trainings themselves
    draw other random numbers than before, which is why losses are compared and not weights.
    """
    losses = _losses_of_stages() if importlib.util.find_spec("fewstep.scenes64") else _losses_before()
    found = {stage: {name: v.item() for name, v in terms.items()} for stage, terms in losses.items()}
    Path(out).write_text(json.dumps(found), encoding="utf-8")


def _stirred(*networks: torch.nn.Module) -> None:
    """Residual branches start at zero: let something through."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for network in networks for p in network.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def _losses_before() -> dict[str, dict[str, Tensor]]:
    """As commit 14e21aa has them: a stage draws its own batch."""
    from fewstep.data.scenes import WORDS, Scenes
    from fewstep.methods.random import Rng
    from fewstep.training.linear_code import fit_linear_code
    from fewstep.training.teacher_stages import AutoencoderStage, TextToImageStage, as_tensor, encode_pool, token_ids

    from fewstep.models import scenes64
    from fewstep.training.settings import TrainingSettings

    settings = TrainingSettings(steps=10, batch_size=4)
    code = fit_linear_code(as_tensor(Scenes(3).render(range(64)).images), 16)
    torch.manual_seed(1)
    vae = scenes64.build_vae((8, 8, 8, 8))
    _stirred(vae)
    found = {"autoencoder": AutoencoderStage(vae, code, settings, seed=0).loss(Rng(0, 2, 4))}
    tokenizer = scenes64.build_tokenizer(WORDS)
    torch.manual_seed(0)
    pool = encode_pool(scenes64.build_vae().eval(), tokenizer, seed=3, size=12, tellings=2)
    torch.manual_seed(1)
    unet = scenes64.build_unet((48, 32), text_width=32)
    encoder = scenes64.build_text_encoder(tokenizer, width=32, layers=1)
    schedule, empty = find("Schedule").from_diffusers(scenes64.build_scheduler()), token_ids(tokenizer, [""])
    stage = TextToImageStage(unet, encoder, pool, empty, schedule, settings)
    _stirred(unet, encoder, stage.teller)
    return found | {"unet": stage.loss(Rng(0, 5, 4))}


def _losses_of_stages() -> dict[str, dict[str, Tensor]]:
    """As `fewstep.scenes64` has them: batch and draws are handed over, from the streams that `_losses_before` reads."""
    from fewstep.data.batch import Batch
    from fewstep.methods.base import Progress
    from fewstep.models.cond import Cond
    from fewstep.scenes64 import architecture, autoencoder, denoise
    from fewstep.scenes64.linear_code import fit_linear_code
    from fewstep.scenes64.random import ScenesRng as Rng
    from fewstep.scenes64.scenes import WORDS, Scenes

    code = fit_linear_code(autoencoder.as_tensor(Scenes(3).render(range(64)).images), 16)
    torch.manual_seed(1)
    vae, rng = architecture.build_vae((8, 8, 8, 8)), Rng(0, 2, 4)
    _stirred(vae)
    stage = autoencoder.Autoencoding(vae, autoencoder.RenderedScenes(Scenes(0, numbers=autoencoder.CROWDED)), code)
    width = rng.sample.uniform("wobble", -0.4, 0.4).clamp_min(0)
    draws = autoencoder.Draws(rng.sample.normal("posterior", architecture.LATENT_SHAPE), width)
    found = {"autoencoder": _loss_of_stage(stage, stage.source.batch(rng), draws)}
    tokenizer = architecture.build_tokenizer(WORDS)
    torch.manual_seed(0)
    pool = denoise.encode_scenes(architecture.build_vae().eval(), tokenizer, seed=3, size=12, tellings=2)
    torch.manual_seed(1)
    unet, rng = architecture.build_unet((48, 32), text_width=32), Rng(0, 5, 4)
    network = denoise.CaptionedUNet(unet, architecture.build_text_encoder(tokenizer, width=32, layers=1))
    _stirred(unet, network.text_encoder, network.head)
    schedule = find("Schedule").from_diffusers(architecture.build_scheduler())
    stage = denoise.Denoise(network, denoise.encoded_scenes(pool), schedule, denoise.token_ids(tokenizer, [""]))
    picked = {name: t[rng.sample.integers("rows", 0, 12)] for name, t in pool.items()}
    mean, std = picked.pop("mean").float(), picked.pop("std").float()
    batch = Batch(torch.addcmul(mean, std, rng.sample.normal("posterior", mean.shape[1:])), Cond(picked))
    return found | {"unet": _loss_of_stage(stage, batch, stage.draw(batch, rng, Progress(5, 10)))}


def _loss_of_stage(stage: Any, batch: Any, draws: Any) -> dict[str, Tensor]:
    """The loss that the trainer would go backward through, and its terms by their former names."""
    from fewstep.training.settings import TrainingSettings

    roles = stage.trainer(TrainingSettings(steps=10, batch_size=4), 0).roles
    loss = stage.student(roles, batch, draws, stage.prepare(roles, batch, draws, {"student"}))
    terms = {name.replace("detection", "telling"): term for name, term in {**loss.parts, **loss.stats}.items()}
    return {"loss": loss.total, **terms}


INSIDE: dict[str, Callable[..., None]] = {
    "states": inside_states, "verify": inside_verify, "parse": inside_parse, "losses": inside_losses,
}  # fmt: skip

# ---------------------------------------------------------------- trees, and running jobs in them


def _clocks() -> tuple[float, float]:
    """Wall clock, and the CPU time of all commands so far: on a machine with other work only the second says much."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), used.ru_utime + used.ru_stime


@dataclass(frozen=True)
class Tree:
    """One of the two.

    Attributes:
        name: "old" or "new". source: holds ``src``. place: where its commands run and write.
        words: of command lines, that are others in this tree.
    """

    name: str
    source: Path
    place: Path
    words: Mapping[str, str] = field(default_factory=dict)

    def python(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Python with this tree's package on one thread, in this tree's place."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("FEWSTEP_", "RANK", "WORLD_SIZE"))}
        env |= {**ENVIRONMENT, "PYTHONPATH": str(self.source / "src")}
        command = [sys.executable, "-P", *words]
        return subprocess.run(command, cwd=self.place, env=env, capture_output=True, text=True, check=False)

    def check(self) -> None:
        """Make sure that the package is this tree's and not one that is installed.

        Raises:
            SystemExit: it is another.
        """
        said = self.python("-c", "import fewstep; print(fewstep.__file__)")
        if not said.stdout.strip().startswith(str(self.source)):
            sys.exit(f"Python finds another fewstep than that of {self.source}: {said.stdout}{said.stderr}")

    def perform(self, job: Job, old: Tree, stamp: str) -> None:
        """Run a job and keep what it said and how long it took."""
        for path in job.makes or (job.name,):
            target = self.place / path
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
        for _, source, target in job.copies:
            if (old.place / source).is_dir() and (self is not old or source != target):
                shutil.copytree(old.place / source, self.place / target, dirs_exist_ok=True)
        began, said = _clocks(), []
        for words in job.commands:
            done = self._command(words, old)
            said.append({"code": done.returncode, "out": done.stdout, "err": done.stderr})
            if done.returncode:
                break
        wall, cpu = (now - then for now, then in zip(_clocks(), began, strict=True))
        record = {"stamp": stamp, "seconds": wall, "cpu_seconds": cpu, "said": said}
        path = self._record(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1), encoding="utf-8")

    def _command(self, words: tuple[str, ...], old: Tree) -> subprocess.CompletedProcess[str]:
        words = tuple(w.replace("{old}", str(old.place)).replace("{old source}", str(old.source)) for w in words)
        if words[0] == "inside":
            return self.python(str(Path(__file__).resolve()), *words[:3], *map(self._word, words[3:]))
        return self.python("-m", "fewstep", *map(self._word, words))

    def _word(self, word: str) -> str:
        """A word of the command line, or the key of KEY=VALUE, as this tree has it."""
        key, equals, value = word.partition("=")
        return f"{self.words.get(key, key)}{equals}{value}"

    def _record(self, job: Job) -> Path:
        return self.place / "records" / f"{job.name.replace('/', '--')}.json"

    def record(self, job: Job) -> dict[str, Any] | None:
        """What `perform` kept, if it ran."""
        path = self._record(job)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


@dataclass
class Session:
    """Both trees, and which jobs have run in them.

    Attributes:
        base: what the earlier commit's outputs depend on, apart from commands.
        match: a pattern of the names that are wanted; empty: all.
    """

    old: Tree
    new: Tree
    base: str
    match: str = ""
    done: set[tuple[str, str]] = field(default_factory=set)
    seconds: dict[str, dict[str, float]] = field(default_factory=lambda: {"old": {}, "new": {}})

    def ensure(self, tree: Tree, name: str) -> None:
        """Run a job and what it needs, each once; the earlier commit's kept outputs are taken where they fit."""
        if (tree.name, name) in self.done:
            return
        job = JOBS[name]
        for other in (*(source for source, _, _ in job.copies), *job.reads):
            self.ensure(self.old, other)
        for other in job.needs:
            self.ensure(tree, other)
        record, stamp = tree.record(job), self.stamp(job)
        kept = tree is self.old and record is not None and record["stamp"] == stamp
        if not kept:
            print(f"         {tree.name}: {name} ...", end=" ", flush=True)
            tree.perform(job, self.old, stamp)
            record = tree.record(job)
            print(f"{record['seconds']:.1f} s, {record['cpu_seconds']:.1f} s of CPU", flush=True)
        self.seconds[tree.name][name] = record.get("cpu_seconds", record["seconds"])
        self.done.add((tree.name, name))

    def stamp(self, job: Job) -> str:
        """Changes with anything that a job's outputs depend on, but for the new tree's source."""
        called = [INSIDE[words[1]] for words in job.commands if words[0] == "inside"]
        sources = [inspect.getsource(function) for function in called]
        before = [self.stamp(JOBS[n]) for n in (*job.needs, *(source for source, _, _ in job.copies), *job.reads)]
        said = json.dumps([self.base, job.commands, job.copies, sources, before])
        return hashlib.sha256(said.encode()).hexdigest()

    def both(self, name: str) -> tuple[Said, Said]:
        """Run a job in both trees; what its last command said in each."""
        for tree in (self.old, self.new):
            self.ensure(tree, name)
        return tuple(Said(**tree.record(JOBS[name])["said"][-1]) for tree in (self.old, self.new))  # type: ignore

    def pick(self, names: Iterable[str]) -> list[str]:
        """Those names that are wanted."""
        return [name for name in names if re.search(self.match, name)]

    def paths(self, name: str) -> tuple[Path, Path]:
        """Where both trees have it."""
        return self.old.place / name, self.new.place / name


@dataclass(frozen=True)
class Said:
    """A command's exit code and words."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line of its complaint."""
        return ([line.strip() for line in self.err.splitlines() if line.strip()] or [""])[-1]

    @property
    def is_sentence(self) -> bool:
        """Whether it refused as it should: exit code 2 and one sentence."""
        return self.code == 2 and self.last.startswith("Error: ") and "Traceback" not in self.err


# ---------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Finding:
    """Whether two things are the same, the largest gap between their numbers, and remarks."""

    same: bool
    gap: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One comparison: its verdict is OK, DIFFERS or NOTE."""

    part: str
    name: str
    verdict: str
    gap: float | None
    note: str

    def __str__(self) -> str:
        gap = "" if self.gap is None else f"gap {self.gap:.3g}"
        return f"{self.verdict:8} {self.part:8} {self.name:34} {gap:12} {self.note}".rstrip()


def bits(tensor: Tensor) -> bytes:
    """A tensor's own bytes: -0 is not 0 here, and NaN is itself."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def gap_of(old: Tensor, new: Tensor) -> float:
    """The largest difference; infinite where shapes, types or NaN differ."""
    if bits(old) == bits(new) and (old.shape, old.dtype) == (new.shape, new.dtype):
        return 0.0
    if old.shape != new.shape or old.dtype != new.dtype:
        return math.inf
    gap = float((old.double() - new.double()).abs().max())
    return math.inf if math.isnan(gap) else gap


def compare_tensors(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Finding:
    """By name; those whose names only one side has, by their contents."""
    shared = [name for name in old if name in new]
    differing = {name: gap_of(old[name], new[name]) for name in shared if not _same_tensor(old[name], new[name])}
    left, right = (Counter(map(_mark, (t for k, t in a.items() if k not in b))) for a, b in ((old, new), (new, old)))
    gap, notes = max(differing.values(), default=0.0), [f"{len(old)} tensors"]
    if differing:
        notes.append(f"{len(differing)} differ, {min(differing)} among them")
    if left == right and left:
        notes.append(f"{left.total()} have other names")
    elif left != right:
        gap = math.inf
        notes.append(f"{(left - right).total()} are missing, {(right - left).total()} are new")
    return Finding(bool(old) and not differing and left == right, gap, ", ".join(notes))


def _same_tensor(old: Tensor, new: Tensor) -> bool:
    return (old.shape, old.dtype) == (new.shape, new.dtype) and bits(old) == bits(new)


def _mark(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(bits(tensor)).hexdigest()}"


def compare_values(old: Any, new: Any, *, words_too: bool = True, tolerance: float = 0.0) -> Finding:
    """JSON data by its leaves; a leaf whose key only one side has must be there under another key.

    Args:
        words_too: whether words must be the same as well, or numbers alone.
        tolerance: relative, of numbers.
    """
    a, b = (dict(_leaves(data)) for data in (old, new))
    gap, differing, reworded = 0.0, [], 0
    for key in a.keys() & b.keys():
        apart = _apart(a[key], b[key])
        if isinstance(a[key], str) and isinstance(b[key], str) and not words_too:
            reworded += a[key] != b[key]
            continue
        if apart and math.isfinite(apart):
            apart, gap = apart / max(abs(a[key]), 1e-300), max(gap, apart)
        if apart > tolerance:
            gap = max(gap, apart)
            differing.append(key)
    left, right = (Counter(repr(v) for k, v in x.items() if k not in y) for x, y in ((a, b), (b, a)))
    missing, added = (left - right), (right - left)
    notes = [f"{len(a)} values"]
    notes += [f"differ: {', '.join(sorted(differing)[:3])}"] if differing else []
    notes += [f"{left.total()} old keys are not there"] if left else []
    notes += [f"values without a match: {', '.join(list(missing)[:3])}"] if missing else []
    notes += [f"{added.total()} new values"] if added else []
    notes += [f"{reworded} texts differ"] if reworded else []
    return Finding(bool(a) and not differing and not missing, math.inf if missing else gap, ", ".join(notes))


def _leaves(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            if key not in TIMES:
                yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(data, list):
        for i, value in enumerate(data):
            yield from _leaves(value, f"{prefix}[{i}]")
    else:
        yield prefix, data


def _apart(old: Any, new: Any) -> float:
    """0 for the same value; the distance of numbers, else infinity."""
    if type(old) is type(new) and (old == new or repr(old) == repr(new)):
        return 0.0
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in (old, new))
    return abs(old - new) if numbers else math.inf


def compare_pictures(old: Path, new: Path, tile: int, count: int) -> Finding:
    """The last row of ``count`` square pictures of a grid; labels and captions stand outside and may be reworded."""
    if not old.is_file() or not new.is_file():
        return Finding(False, math.inf, "no picture")
    wide, high = count * (tile + 4), tile + 4
    a, b = (np.asarray(Image.open(path).convert("RGB"), dtype=np.int64)[-high:, -wide:] for path in (old, new))
    if a.shape != b.shape:
        return Finding(False, math.inf, f"{a.shape} and {b.shape} pixels")
    apart = np.abs(a - b)
    note = f"{count} pictures" + (f", {(apart > 0).any(-1).sum()} pixels differ" if apart.any() else "")
    return Finding(not apart.any(), float(apart.max()), note)


def tensors_below(folder: Path, pattern: str) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, by file and name."""
    found = {}
    for path in sorted(folder.rglob(pattern)):
        if path.suffix == ".safetensors":
            found |= {f"{path.relative_to(folder)} {name}": t for name, t in load_file(path).items()}
    return found


def headers_below(folder: Path) -> dict[str, dict[str, str]]:
    """What the safetensors files of a folder say of themselves."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found[str(path.relative_to(folder))] = dict(file.metadata() or {})
    return found


def json_below(folder: Path, pattern: str) -> dict[str, Any]:
    """The JSON files of a folder, by path; of lines, a list."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob(pattern)):
        text = path.read_text(encoding="utf-8")
        lines = path.suffix == ".jsonl"
        found[str(path.relative_to(folder))] = [json.loads(x) for x in text.splitlines()] if lines else json.loads(text)
    return found


_FIGURE = re.compile(r"-?(?:\d+(?:\.\d+)?(?:e[-+]?\d+)?|nan|inf)\b")


def printed(text: str) -> list[tuple[float, ...]]:
    """The figures in the columns of a report, row by row; its words, and numbers in them, may be others."""
    rows = []
    for line in text.splitlines():
        _, *columns = re.split(r" {2,}", line.strip())
        figures = tuple(float(x) for column in columns for x in _FIGURE.findall(column))
        rows += [figures] if len(columns) >= 2 and figures else []
    return rows


# ---------------------------------------------------------------- the parts, row by row


def found_row(part: str, name: str, finding: Finding, more: str = "") -> Row:
    """A row of a comparison."""
    note = "; ".join(text for text in (finding.note, more) if text)
    return Row(part, name, "OK" if finding.same else "DIFFERS", finding.gap, note)


def accident(part: str, name: str, session: Session, job: str) -> Row | None:
    """Run a job that must succeed in both trees; a row where it does not."""
    for tree, said in zip(("old", "new"), session.both(job), strict=True):
        if said.code:
            return Row(part, name, "DIFFERS", None, f"exit code {said.code} in the {tree} tree: {said.last}")
    return None


def rows_of_weights(session: Session) -> Iterator[Row]:
    """Students, checkpoints, logs and pictures of every training, and the teacher's own."""
    if session.pick(["rewards"]):
        failed = accident("weights", "rewards", session, "rewards")
        yield from [failed] if failed else _rows_of_rewards(*session.paths("runs"))
    for name in session.pick(TRAININGS):
        failed = accident("weights", name, session, f"runs/{name}")
        if failed:
            yield failed
            continue
        yield from _rows_of_run("weights", name, *session.paths(f"runs/{name}"))
    if session.pick(["losses"]):
        yield from _rows_of_losses(session)


def _rows_of_rewards(old: Path, new: Path) -> Iterator[Row]:
    """The pairs of images that reward models learn from, and the models' tensors by shape: these trainings may draw
    other random numbers, and `feedback` is compared on the same models."""
    files = sorted(path.relative_to(old) for path in old.glob("choices/**/*") if path.is_file())
    differing = [str(f) for f in files if not (new / f).is_file() or (old / f).read_bytes() != (new / f).read_bytes()]
    note = f"{len(files)} files" + (f", differ: {', '.join(differing[:3])}" if differing else "")
    yield found_row("weights", "rewards: choices", Finding(bool(files) and not differing, 0.0, note))
    tensors = (tensors_below(place, "taste*/reward.safetensors") for place in (old, new))
    shapes = [{name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} for found in tensors]
    same = bool(shapes[0]) and shapes[0] == shapes[1]
    yield found_row("weights", "rewards: shapes", Finding(same, 0.0, f"{len(shapes[0])} tensors"))


def _rows_of_run(part: str, name: str, old: Path, new: Path) -> Iterator[Row]:
    students = (tensors_below(place, "student/*") for place in (old, new))
    yield found_row(part, f"{name}: student", compare_tensors(*students))
    checkpoints = (tensors_below(place, "checkpoints/*/*") for place in (old, new))
    yield found_row(part, f"{name}: checkpoint", compare_tensors(*checkpoints))
    files = ("log.jsonl", "statistics.jsonl", "few_step.json")
    logs = ({file: json_below(place, file) for file in files} for place in (old, new))
    yield found_row(part, f"{name}: log and card", compare_values(*logs, words_too=False))
    pictures = sorted(path.relative_to(old) for path in old.rglob("student/samples.png"))
    findings = [compare_pictures(old / path, new / path, 128, 2) for path in pictures]
    worst = max((f.gap for f in findings), default=math.inf)
    same = bool(findings) and all(f.same for f in findings)
    yield found_row(part, f"{name}: samples.png", Finding(same, worst, f"{len(pictures)} files"))


def _rows_of_losses(session: Session) -> Iterator[Row]:
    failed = accident("weights", "losses", session, "losses.json")
    if failed:
        yield failed
        return
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in session.paths("losses.json"))
    for name in old:
        gap = max(abs(value - new[name].get(term, math.inf)) for term, value in old[name].items())
        note = f"{', '.join(old[name])} on a fixed batch; limit 1e-6"
        yield found_row("weights", f"losses of scenes-64: {name}", Finding(gap <= 1e-6, gap, note))


def rows_of_samplers(session: Session) -> Iterator[Row]:
    """Pictures by the command line, and states in float64."""
    for name in session.pick([*SAMPLERS, "anew"]):
        path = f"pictures/{name}.png"
        failed = accident("samplers", f"{name}: picture", session, path)
        yield failed or found_row("samplers", f"{name}: picture", compare_pictures(*session.paths(path), 192, 2))
    failed = accident("samplers", "states", session, "states.safetensors") if session.pick(["states"]) else None
    if failed or not session.pick(["states"]):
        yield from [failed] if failed else []
        return
    old, new = map(load_file, session.paths("states.safetensors"))
    for key in sorted({label.split()[1] for label in (*old, *new)}):
        both = ({k: t for k, t in states.items() if k.split()[1] == key} for states in (old, new))
        yield found_row("samplers", f"{key}: states" if key != "solver" else "solvers", compare_tensors(*both))


def rows_of_exports(session: Session) -> Iterator[Row]:
    """Files of every export, and refusals."""
    for name in session.pick(EXPORTS):
        yield from _rows_of_export("exports", name, *session.both(f"exports/{name}"), *session.paths(f"exports/{name}"))


def _rows_of_export(part: str, name: str, before: Said, after: Said, old: Path, new: Path) -> Iterator[Row]:
    if before.code or after.code:
        same, reworded = before.is_sentence and after.is_sentence, before.last != after.last
        note = f"refused: {after.last}" + (f" (before: {before.last})" if reworded else "")
        yield Row(part, name, "OK" if same else "DIFFERS", None, note)
        return
    yield found_row(part, f"{name}: tensors", compare_tensors(*(tensors_below(place, "*") for place in (old, new))))
    headers = [headers_below(place) for place in (old, new)]
    keys = [{file: sorted(header) for file, header in found.items()} for found in headers]
    said = compare_values(*headers, words_too=False).note
    yield found_row(part, f"{name}: header keys", Finding(keys[0] == keys[1], 0.0, said))
    configs = (json_below(place, "*.json") for place in (old, new))
    yield found_row(part, f"{name}: configs", compare_values(*configs, words_too=False))


def rows_of_verify(session: Session) -> Iterator[Row]:
    """Figures as they are printed, and in full precision."""
    for name in session.pick(METHODS):
        path = f"verify/{name}.json"
        before, after = session.both(path)
        if max(before.code, after.code) > 1:
            more = f"exit codes {before.code} and {after.code}: {(before if before.code > 1 else after).last}"
            yield Row("verify", name, "DIFFERS", None, more)
            continue
        more = "" if before.code == after.code else f"exit codes {before.code} and {after.code}"
        yield figures_row(f"{name}: as printed", printed(before.out), printed(after.out), more)
        exact = [json.loads(file.read_text(encoding="utf-8")) for file in session.paths(path)]
        both = ([tuple(row) for report in reports for row in report] for reports in exact)
        yield figures_row(f"{name}: in full", *both, more)


def figures_row(name: str, old: list[tuple[float, ...]], new: list[tuple[float, ...]], more: str) -> Row:
    """Reports row by row: what the new tree has must be the earlier commit's, in its order; a part may be left out."""
    marks = [[repr(row) for row in rows] for rows in (old, new)]
    gone, added = [], []
    for what, i, j, k, m in difflib.SequenceMatcher(None, *marks, autojunk=False).get_opcodes():
        if what != "equal":
            gone, added = gone + old[i:j], added + new[k:m]
    moved = sorted(map(repr, gone)) == sorted(map(repr, added))
    note = f"{len(old)} rows of figures"
    if not gone and not added:
        return Row("verify", name, "OK", 0.0, "; ".join(text for text in (note, more) if text))
    if moved:
        return Row("verify", name, "NOTE", 0.0, f"{note}, all the same in another order; {more}".rstrip("; "))
    if added or not new:
        pairs = [(a, b) for x, y in zip(gone, added, strict=False) for a, b in zip(x, y, strict=False)]
        gap = max((_apart(a, b) for a, b in pairs), default=math.inf)
        note += f", {len(gone)} are not in the new tree, {len(added)} are not in the old one; the first: "
        note += f"{_short(gone)} and {_short(added)}"
        return Row("verify", name, "DIFFERS", gap, f"{note}; {more}".rstrip("; "))
    note += f", {len(gone)} are not printed now, the others are the same; the first: {_short(gone)}"
    return Row("verify", name, "NOTE", 0.0, f"{note}; {more}".rstrip("; "))


def _short(rows: list[tuple[float, ...]]) -> str:
    return " ".join(f"{value:.6g}" for value in rows[0]) if rows else "none"


def rows_of_compat(session: Session) -> Iterator[Row]:
    """What the new tree makes of the earlier commit's files."""
    if session.pick(["recipes"]):
        yield from _rows_of_recipes(session)
    for name in session.pick(RESUMED):
        path = f"compat/resumed-{name}"
        yield _refused(f"resumed {name}", *session.both(path)) or found_row(
            "compat", f"resumed {name}", _weights_of_run(*session.paths(path))
        )
    drawn, read = (f"compat/drawn-{name}" for name in DRAWN), (f"compat/read-{name}" for name in READ_BACK)
    for path in session.pick([*drawn, *read]):
        name = path.removeprefix("compat/").replace("-", " ", 1)
        pictures = (place / "drawn.png" for place in session.paths(path))
        yield _refused(name, *session.both(path)) or found_row("compat", name, compare_pictures(*pictures, 192, 2))
    for name in session.pick(EXPORTED):
        path = f"compat/exported-{name}"
        before, after = session.both(path)
        failed = _refused(f"exported {name}", before, after)
        made = (place / "made" for place in session.paths(path))
        yield from [failed] if failed else _rows_of_export("compat", f"exported {name}", before, after, *made)


def _weights_of_run(old: Path, new: Path) -> Finding:
    """Students and checkpoints together."""
    return compare_tensors(*(
        {**tensors_below(place, "student/*"), **tensors_below(place, "checkpoints/*/*")} for place in (old, new)
    ))  # fmt: skip


def _refused(name: str, before: Said, after: Said) -> Row | None:
    """A row where either tree does not do it; None where both do."""
    if before.code:
        return Row("compat", name, "DIFFERS", None, f"exit code {before.code} in the old tree: {before.last}")
    if after.code:
        return Row("compat", name, "NOTE" if after.is_sentence else "DIFFERS", None, after.last)
    return None


def _rows_of_recipes(session: Session) -> Iterator[Row]:
    """One row for shipped recipes and one for those that runs keep, and one more for each that is not parsed alike."""
    job = "compat/recipes.json"
    failed = accident("compat", "recipes", session, job)
    if failed:
        yield failed
        return
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in session.paths(job))
    for label, first in (("shipped recipes", "recipes"), ("recipes of runs", "runs")):
        names = [name for name in old if name.startswith(f"{first}/")]
        odd = [row for row in (_row_of_recipe(name, old[name], new[name]) for name in names) if row is not None]
        yield from odd
        bad, alike = sum(row.verdict == "DIFFERS" for row in odd), len(names) - len(odd)
        note = f"{alike} of {len(names)} resolve to the same values"
        yield Row("compat", label, "DIFFERS" if bad or not names else "OK", None, note)


def _row_of_recipe(name: str, old: dict[str, Any], new: dict[str, Any]) -> Row | None:
    """None where both trees resolve it to the same values, or both refuse it."""
    if "values" not in old and "sentence" in new:
        return None
    if "sentence" in new:
        one_line = "\n" not in new["sentence"]
        return Row("compat", name, "NOTE" if one_line else "DIFFERS", None, new["sentence"])
    if "crash" in new or "values" not in old:
        return Row("compat", name, "DIFFERS", None, new.get("crash", "refused by the old tree alone"))
    finding = compare_values(old["values"], new["values"])
    return None if finding.same else found_row("compat", name, finding)


ROWS: dict[str, Callable[[Session], Iterable[Row]]] = {
    "weights": rows_of_weights, "samplers": rows_of_samplers, "exports": rows_of_exports, "verify": rows_of_verify,
    "compat": rows_of_compat,
}  # fmt: skip

# ---------------------------------------------------------------- the whole


def git(folder: Path, *words: str) -> bytes:
    """Output of a git command."""
    return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, check=True).stdout


def check_out(repository: Path, commit: str, folder: Path) -> Path:
    """The package's sources of a commit, below ``folder``."""
    if not folder.is_dir():
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        with tarfile.open(fileobj=io.BytesIO(git(repository, "archive", commit, "src"))) as archive:
            archive.extractall(part, filter="data")
        part.rename(folder)
    return folder


def copy_of(tree: Path, folder: Path) -> Path:
    """A copy of the present sources: they may be edited while it runs."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tree / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return folder


def machine() -> dict[str, Any]:
    """Of everything that decides the last bit."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    found = {"machine": platform.machine(), "processor": model or platform.processor(), "system": platform.system()}
    found |= {"vector_instructions": torch.backends.cpu.get_cpu_capability(), "python": platform.python_version()}
    names = ("torch", "numpy", "diffusers", "transformers", "peft", "safetensors", "pillow")
    return found | {name: version(name) for name in names}


def write_inputs(work: Path) -> None:
    """A picture to draw anew and a mask, for both trees."""
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    picture = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.full((64, 64), 90, np.uint8)], -1)
    Image.fromarray(picture).save(work / "start.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:56] = 255
    Image.fromarray(mask).save(work / "mask.png")


def prepared(given: argparse.Namespace, work: Path) -> tuple[Session, dict[str, Any]]:
    """Both trees in place, and what to say of them."""
    tree = given.tree.resolve()
    commit = git(tree, "rev-parse", f"{given.commit}^{{commit}}").decode().strip()
    about = {
        "old": commit,
        "new": git(tree, "rev-parse", "HEAD").decode().strip(),
        "new_is_changed": bool(git(tree, "status", "--porcelain", "--", "src").strip()),
        **machine(),
    }
    sources = check_out(tree, commit, work / f"tree-{commit[:12]}"), copy_of(tree, work / "tree-new")
    places = work / f"outputs-{commit[:12]}", work / "outputs-new"
    for place in places:
        place.mkdir(exist_ok=True)
    write_inputs(work)
    old, new = Tree("old", sources[0], places[0]), Tree("new", sources[1], places[1], NEW_WORDS)
    for each in (old, new):
        each.check()
    return Session(old, new, json.dumps([commit, machine(), ENVIRONMENT]), given.match), about


def compare_all(given: argparse.Namespace, work: Path) -> int:
    """Run and compare the parts; returns the exit code."""
    session, about = prepared(given, work)
    print(f"{about['old'][:12]} and {about['new'][:12]}{', changed' if about['new_is_changed'] else ''}: torch "
          f"{about['torch']}, {about['processor']}")  # fmt: skip
    rows: list[Row] = []
    taken: dict[str, dict[str, float]] = {}
    for part in given.only:
        before = {name: sum(seconds.values()) for name, seconds in session.seconds.items()}
        for row in ROWS[part](session):
            print(row, flush=True)
            rows.append(row)
        taken[part] = {name: sum(s.values()) - before[name] for name, s in session.seconds.items()}
        spent = {name: f"{seconds:.0f} s of CPU" for name, seconds in taken[part].items()}
        print(f"         {part}: {spent['old']} in the old tree, {spent['new']} in the new")
    counts = Counter(row.verdict for row in rows)
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("OK", "DIFFERS", "NOTE"))
    print(f"{len(rows)} rows: {said}.")
    costs = {"cpu_seconds": taken, "cpu_seconds_of_jobs": session.seconds}
    found = [{**vars(row), "gap": None if row.gap == math.inf else row.gap} for row in rows]
    report = {**about, **costs, "counts": counts, "rows": found}
    text = json.dumps(report, indent=1) + "\n"
    for path in {work / "same_numbers.json", given.out or work / "same_numbers.json"}:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 1 if counts["DIFFERS"] or not rows else 0


def in_work_folder(compare: Callable[[argparse.Namespace, Path], int], given: argparse.Namespace) -> int:
    """The exit code of ``compare`` in the folder of --work, or in one that is removed afterwards."""
    if given.work:
        given.work.mkdir(parents=True, exist_ok=True)
        return compare(given, given.work.resolve())
    with tempfile.TemporaryDirectory(prefix=f"{Path(sys.argv[0]).stem}-") as folder:
        return compare(given, Path(folder).resolve())


def parts(text: str) -> list[str]:
    """The parts of --only."""
    found = [part.strip() for part in text.split(",")]
    if unknown := [part for part in found if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}: use {', '.join(PARTS)}")
    return found


def main() -> None:
    if sys.argv[1:2] == ["inside"]:
        INSIDE[sys.argv[2]](*sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=parts, default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--match", default="", metavar="PATTERN", help="only names that have it, e.g. 'tcd|hyper'")
    parser.add_argument("--commit", default=COMMIT, help="the earlier commit")
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="the new tree (default: this one)")
    parser.add_argument("--work", type=Path, help="keep the earlier commit's outputs here, and use them again")
    parser.add_argument("--out", type=Path, help="JSON to write")
    sys.exit(in_work_folder(compare_all, parser.parse_args()))


if __name__ == "__main__":
    main()
