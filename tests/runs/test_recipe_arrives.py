"""Every key of a recipe does something: changed alone, it changes what a run loads, holds, reads, trains, or writes.

The keys of `method` are those of tests/methods/test_settings_arrive.py. A key without a row here fails the first test.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fewstep.data.find import find_images
from fewstep.data.random import Rng
from fewstep.methods.dmd2 import DMD2
from fewstep.models.families import load_teacher
from fewstep.models.lora import base_parameters
from fewstep.recipe.load import load_recipe
from fewstep.recipe.schema import (
    DataConfig,
    EvaluateConfig,
    PairsConfig,
    Recipe,
    SampleConfig,
    StudentConfig,
    TeacherConfig,
)
from fewstep.runs import validation
from fewstep.runs.dataset import build_dataset
from fewstep.runs.distill import distill
from fewstep.runs.setup import setup
from fewstep.runs.teacher_samples import pair_files, pairs_folder, sample_teacher
from fewstep.runs.validation import SampleGrid, validation_prompts
from fewstep.training.settings import TrainingSettings
from tests.checkpoints.tiny import lora_of, peft
from tests.models.pipelines import build
from tests.mutants.mutant import ROOT
from tests.training.killable import SOURCE, VP, trainer

SECTIONS = {
    "teacher": TeacherConfig, "student": StudentConfig, "data": DataConfig, "pairs": PairsConfig,
    "sample": SampleConfig, "evaluate": EvaluateConfig,
}  # fmt: skip
KEYS = {f"{section}.{key}" for section, config in SECTIONS.items() for key in config.model_fields}
TRAINING = {field.name for field in dataclasses.fields(TrainingSettings)}


# ---------------------------------------------------------------- what a run makes of its recipe


def loaded(recipe, folder):
    """The teacher, and the student's weights and answer once its LoRA is no longer 0."""
    job = setup(recipe, folder)
    teacher, base = job.teacher, job.teacher.family.base
    weights = sum(p.detach().double().sum() for p in base_parameters(job.roles.base))
    found = [teacher.latent_shape, teacher.guidance_embed, teacher.pipeline.vae.use_tiling, base.dtype, float(weights)]
    shapes = {name: tuple(t.shape) for name, t in job.roles.tensors().items()}
    with torch.no_grad():
        for name, t in job.roles.tensors().items():
            if name.endswith("lora_B.weight"):
                t.fill_(0.01)
    x = torch.ones(1, *teacher.latent_shape)
    with torch.no_grad():
        answer = job.roles.student(x, teacher.denoiser.schedule.start / 2, teacher.encode_prompts(["a star"])).output
    return [*found, shapes, answer.double().sum().item(), dataclasses.asdict(job.card(4)) | {"costs": {}}]


def read(recipe, folder):
    """Two batches of the run's data."""
    job = setup(recipe, folder)
    files = pair_files(job)
    source = build_dataset(job, files and sample_teacher(job, files), folder / "data")
    batches = [source.batch(Rng(0, step, 4)) for step in (0, 1)]
    return [(batch.x0.tolist(), batch.cond["prompt_embeds"].tolist()) for batch in batches]


def found(recipe, folder):
    """Images and captions as they are found, before any is opened."""
    images = find_images(recipe.data.place, recipe.data.size).images
    return [(image.name, image.caption) for image in images]


def paired(recipe, folder):
    """The teacher's samples: their folder, their files, and their values."""
    job = setup(recipe, folder)
    made = sample_teacher(job, pair_files(job))
    place = pairs_folder(recipe, job.folder)
    return [place.name, sorted(path.name for path in place.iterdir()), made.cost, made.mean.tolist()]


def sampled(recipe, folder):
    """A sample grid: its latents, its labels, and the student's card."""
    job, seen = setup(recipe, folder), []
    folder.mkdir()
    decode, grid = job.teacher.decode, validation.image_grid
    job.teacher.decode = lambda x: (seen.append(x.tolist()), decode(x))[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            validation, "image_grid", lambda *parts, **named: (seen.append(parts[1:]), grid(*parts, **named))[1]
        )
        SampleGrid(job)(1)
    return [*seen, dataclasses.asdict(job.card(1)) | {"costs": {}}, validation_prompts(recipe)]


def watched(recipe, folder):
    """What validation decides after each of five measurements, and how many prompts it is of."""
    job = setup(recipe, folder)
    values = {1: 3.0, 2: 1.0, 3: 2.0, 4: 0.5, 5: 2.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation.Validation, "_measure", lambda self, step: {
            "FD": values[step], "detail FD": -values[step], "accuracy": 1.0})  # fmt: skip
        judge = validation.Validation(job, validation.run_prompt_set(job), lambda: 0.0)
        ends = [judge(step) for step in values]
    return [recipe.evaluate.every, len(judge._prompts.captions), ends, judge._best(5), job.folder.best.is_dir()]


def trained(recipe, folder):
    """The loss of the first step, at which a LoRA is its teacher still, and the files that the run leaves."""
    distill(recipe, folder)
    first = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    return [first["student/loss"], sorted(path.name for path in (folder / "samples").iterdir())]


# ---------------------------------------------------------------- the table

PICTURES = ["data.source=folder", "data.path={pictures}"]
DMD = ["pairs.size=3", "pairs.batch_size=2", "pairs.num_inference_steps=2", "method.regression_weight=0.1"]
QUICK = ["training.steps=2", "training.log_every=1", "training.batch_size=2", "data.size=2"]
WATCH = ["evaluate.every=1", "evaluate.count=8"]
# key -> (what is looked at, its other value, changes beside it, shipped recipe)
ROWS: dict[str, tuple[Callable[..., Any], str, list[str], str]] = {
    "teacher.path": (loaded, "{tiny}", [], "tcd"),
    "teacher.loras": (loaded, "[{lora}]", [], "tcd"),
    "teacher.size": (loaded, "128", [], "tcd"),
    "teacher.dtype": (loaded, "bf16", [], "tcd"),
    "teacher.vae_tiling": (loaded, "true", [], "tcd"),
    "teacher.guidance_embed": (loaded, "2.0", ["teacher.path={flux}", "student.targets=[to_q]", "data.size=2"], "tcd"),
    "student.weights": (loaded, "full", [], "tcd"),
    "student.rank": (loaded, "2", [], "tcd"),
    "student.alpha": (loaded, "2.0", [], "tcd"),
    "student.targets": (loaded, "[to_q]", [], "tcd"),
    "data.source": (read, "teacher", ["data.size=4", "pairs.num_inference_steps=1"], "tcd"),
    "data.path": (found, "{others}", PICTURES, "tcd"),
    "data.size": (found, "2", PICTURES, "tcd"),
    "data.seed": (read, "2", ["data.size=4"], "tcd"),
    "data.caption_column": (found, "other", PICTURES, "tcd"),
    "data.aspect_buckets": (read, "true", [*PICTURES, "data.size=3"], "tcd"),
    "data.caption_dropout": (read, "0.9", ["data.size=4"], "tcd"),
    "pairs.size": (paired, "4", DMD, "dmd"),
    "pairs.solver": (paired, "heun", DMD, "dmd"),
    "pairs.num_inference_steps": (paired, "3", DMD, "dmd"),
    "pairs.guidance_scale": (paired, "1.5", DMD, "dmd"),
    "pairs.seed": (paired, "4", DMD, "dmd"),
    "pairs.batch_size": (paired, "1", DMD, "dmd"),
    "pairs.path": (paired, "{elsewhere}", DMD, "dmd"),
    "sample.prompts": (sampled, "[a blue star]", [], "tcd"),
    "sample.sampler": (sampled, "lcm", [], "tcd"),
    "sample.num_inference_steps": (sampled, "2", [], "tcd"),
    "sample.eta": (sampled, "0.0", [], "tcd"),
    "sample.teacher_steps": (sampled, "3", [], "tcd"),
    "sample.guidance_scale": (sampled, "1.0", [], "tcd"),
    "evaluate.every": (watched, "2", WATCH, "tcd"),
    "evaluate.metric": (watched, "FD", WATCH, "tcd"),
    "evaluate.count": (watched, "9", WATCH, "tcd"),
    "evaluate.keep_best": (watched, "false", WATCH, "tcd"),
    "evaluate.patience": (watched, "1", WATCH, "tcd"),
    "sample.every": (trained, "1", QUICK, "tcd"),
    "seed": (trained, "7", QUICK, "tcd"),
}  # fmt: skip
# Keys whose effect needs what is not built here, with the reason and the test that sees it.
ELSEWHERE = {
    **dict.fromkeys(
        (f"evaluate.{key}" for key in ("prompts", "reference", "path", "features", "metrics")),
        "tests/runs/test_measured_on.py",
    ),
    # the folder of configs of a single file, which takes a whole model to write
    "teacher.config": "tests/models/test_single_file.py",
    # where captions are encoded: batches are the same
    "data.text": "tests/runs/test_live_text.py",
    # shards that are read while a run trains
    "data.stream": "tests/runs/test_stream.py",
    "data.shuffle_buffer": "tests/data/test_streamed.py",
    # columns and splits of tables, which need the extra `data`
    "data.split": "tests/data/test_tables.py",
    "data.image_column": "tests/data/test_tables.py",
    # what it saves is known by shapes; holding a network so needs the extra `lowmem`
    "teacher.quantize": "tests/models/test_quantize.py",
    # needs a finished run
    "init": "tests/runs/test_chain.py",
}


@pytest.fixture(scope="module")
def places(tiny, tmp_path_factory):
    """A teacher that captions reach, another family, a style LoRA, and two folders of images with two captions each."""
    folder = tmp_path_factory.mktemp("places")
    teacher, generator = load_teacher(str(tiny)), torch.Generator().manual_seed(0)
    save_file(peft(lora_of(teacher.pipeline.unet, seed=1, targets=("to_q",))), folder / "lora.safetensors")
    with torch.no_grad():
        for p in teacher.pipeline.unet.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    teacher.pipeline.save_pretrained(folder / "other")
    build("flux").save_pretrained(folder / "flux")
    for name, colours in (("pictures", ("red", "blue", "green")), ("others", ("white", "black", "red"))):
        (folder / name).mkdir()
        lines = []
        for i, colour in enumerate(colours):
            Image.new("RGB", (64, 64 << (i % 2)), colour).save(folder / name / f"{i}.png")
            lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a {colour} square", "other": f"{colour}"}))
        (folder / name / "metadata.jsonl").write_text("\n".join(lines))
    return {name: str(folder / name) for name in ("other", "flux", "pictures", "others")} | {
        "lora": str(folder / "lora.safetensors"),
        "elsewhere": str(folder / "elsewhere"),
        "tiny": str(tiny),
    }


def test_every_key_of_a_recipe_is_looked_at():
    assert KEYS | {"seed", "init"} == ROWS.keys() | ELSEWHERE.keys() and not ROWS.keys() & ELSEWHERE.keys()
    assert KEYS | {"seed", "init"} | {"method", "training"} == KEYS | (Recipe.model_fields.keys() - SECTIONS.keys())
    assert CHANGED.keys() | NOT_HERE.keys() == TRAINING and not CHANGED.keys() & NOT_HERE.keys()
    assert all((ROOT / path).is_file() for path in (*ELSEWHERE.values(), *NOT_HERE.values()))


@pytest.fixture(scope="module")
def looked(short, places, tmp_path_factory):
    """What a recipe with these changes makes of a run; each once."""
    known = {}

    def look(key, *changes):
        how, _, beside, name = ROWS[key]
        changes = [item.format(**places) for item in (*beside, *changes)]
        wanted = how, name, tuple(changes)
        if wanted not in known:
            recipe = load_recipe(f"scenes-64-{name}", [*short, f"teacher.path={places['other']}", *changes])
            known[wanted] = how(recipe, tmp_path_factory.mktemp("runs") / "run")
        return known[wanted]

    return look


@pytest.mark.slow
@pytest.mark.parametrize("key", ROWS)
def test_a_key_changes_a_run(key, looked):
    assert looked(key) != looked(key, f"{key}={ROWS[key][1]}")


@pytest.mark.slow
@pytest.mark.parametrize("key", {how: key for key, (how, *_) in ROWS.items()}.values())
def test_it_is_the_key_that_changes_it_and_not_the_second_time(key, looked):
    assert looked(key) == looked(key, "training.keep_checkpoints=7")


# ---------------------------------------------------------------- training, on a toy


BASE = {"steps": 6, "learning_rate": 1e-2, "log_every": 2, "checkpoint_every": 2, "lr_schedule": "constant"}
CHANGED: dict[str, Any] = {
    "steps": 4, "batch_size": 4, "accumulation": 2, "learning_rate": 2e-2, "critic_learning_rate": 3e-2,
    "warmup_steps": 3, "lr_schedule": "cosine", "betas": (0.5, 0.9), "critic_betas": (0.5, 0.9), "weight_decay": 0.5,
    "eps": 1e-2, "max_grad_norm": 1e-3, "ema_decay": 0.5, "precision": "bf16", "gradient_checkpointing": True,
    "log_every": 3, "checkpoint_every": 3, "keep_checkpoints": 1,
}  # fmt: skip
NOT_HERE = {
    "optimizer": "tests/training/test_optimizers.py",  # needs the extra `lowmem`
    "fsdp": "tests/training/test_processes.py",  # needs several processes
    "timeout_minutes": "tests/training/test_lost.py",  # needs several processes
    "async_checkpoints": "tests/training/test_async_checkpoints.py",  # so does this one
    "trackers": "tests/training/test_trackers.py",  # write through packages of their own
    "offload": "tests/models/test_offload.py",  # changes memory alone
    "compile": "tests/models/test_compiled.py",  # takes a compiler, and seconds
    "device": "tests/training/test_trainer.py",  # needs another device than the CPU, or a stand-in for one
}


def followed(folder, **settings):
    """A run of both players of DMD2: its batches, weights, log and checkpoints, and how its networks compute."""
    rows = []

    class Watched:
        def batch(self, rng):
            rows.append((rng.step, rng.rows, str(rng.device), rng.dtype))
            return SOURCE.batch(rng)

    method = DMD2(VP, num_inference_steps=1, student_every=1, adversarial_weight=0.0, guidance_scale=2.0)
    run = trainer(method, folder, source=Watched(), **{**BASE, **settings})
    run.run()
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    log = [{key: value for key, value in line.items() if key != "steps_per_second"} for line in log]
    weights = {name: t.tolist() for name, t in run.tensors().items()}
    computed = [run.roles.autocast, run.roles.base.gradient_checkpointing]
    return [rows, log, weights, sorted(p.name for p in (folder / "checkpoints").iterdir()), computed]


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    first, again = followed(folder / "first"), followed(folder / "again")
    assert first == again
    return first


@pytest.mark.parametrize("name", CHANGED)
def test_a_setting_of_training_changes_a_run(name, unchanged, tmp_path):
    assert followed(tmp_path, **{name: CHANGED[name]}) != unchanged
