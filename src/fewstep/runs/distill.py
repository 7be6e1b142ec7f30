"""The main job: a recipe becomes a run directory that holds everything it needs and everything it made.

<run>/recipe.yaml          the resolved recipe, every default written out
      versions.json        of the programs, and the data's fingerprint
      data/                encoded pictures and captions, and skipped.txt, what could not be used of them
      data/pairs/          the teacher's own samples (recipe key `pairs`)
      log.jsonl            one line for every log step
      checkpoints/         to resume from
      samples/             grids at fixed seeds, while it trains
      evaluations.jsonl    what was measured on the way;  best/  the best student so far (recipe key `evaluate`)
      student/             the result, and samples.png drawn from just these files
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from fewstep.data.cache import fingerprint, image_latents, prompt_latents
from fewstep.data.files import LOCK, only_one, replace_text
from fewstep.data.find import find_captions, find_images
from fewstep.data.pairs import PairSource, WithPairs
from fewstep.data.sources import Buckets, CaptionDropout, LatentSource, Prompts, Source, WithPrompts
from fewstep.planning.out_of_memory import explained
from fewstep.recipe.schema import Recipe, RecipeError, as_yaml, count_pictures
from fewstep.runs.setup import Run, prepare
from fewstep.runs.teacher_samples import captions, pair_files, sample_teacher
from fewstep.runs.validation import SampleGrid, Validation, asked_later, draw_exported
from fewstep.scenes64.latents import scene_latents
from fewstep.students.student import CARD_FILE, save_student
from fewstep.training import distributed
from fewstep.training.logging import progress_bar
from fewstep.training.trainer import Hook, Trainer

LATENTS = "latents"
_MAY_CHANGE = (
    "training.steps", "training.log_every", "training.checkpoint_every", "training.keep_checkpoints",
    "training.trackers", "pairs.path",
    "training.accumulation", "training.gradient_checkpointing", "training.fsdp",  # the same numbers in less memory
)  # fmt: skip


def distill(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    show_progress: bool = False,
    earlier: Mapping[str, Path] | None = None,
    stage: str = "",
    data: Path | None = None,
) -> Path:
    """Run ``recipe`` in ``folder``; returns the student's folder. Started by torchrun, all processes train as one.

    Args:
        earlier: what the recipe may call by name in ``teacher`` and ``init``: earlier stages' student folders.
        stage: what this run is called among them. data: where encoded pictures are kept, ``folder/data`` by default.

    Raises:
        RecipeError: the folder holds another run, or something else.
        OutOfMemory: with what would need less.
        TrainingStopped: by Ctrl-C or SIGTERM; everything is saved, and ``resume`` goes on from there.
    """
    distributed.join(recipe.training.device)
    check_folder(recipe, folder, resume)
    if _is_finished(recipe, folder):
        return folder / "student"
    with explained(recipe, folder):
        return _distill(recipe, folder, resume, show_progress, earlier, stage, data or folder / "data")


def prepare_data(
    recipe: Recipe, folder: Path, *, from_teacher: bool = False, show_progress: bool = False
) -> PairSource | None:
    """What `distill` does before it trains; with ``resume`` it goes on from there. Raises as it does.

    Args:
        from_teacher: sample the teacher, and leave pictures for later.

    Returns:
        the teacher's samples, or None where the recipe wants none.
    """
    if from_teacher and not recipe.needs_pairs:
        raise RecipeError(
            "This recipe wants no samples of its teacher: set data.source to teacher to train on them, or take a "
            "method that learns from pairs."
        )
    distributed.join(recipe.training.device)
    check_folder(recipe, folder, resume=True)
    with explained(recipe, folder):
        job = prepare(recipe, folder)
        distributed.wait()
        folder.mkdir(parents=True, exist_ok=True)
        with only_one(folder) if distributed.first() else nullcontext():
            pairs = _claim(job, show_progress)
            if not from_teacher:
                _data(job, pairs, folder / "data", show_progress)
            return pairs


def _distill(
    recipe: Recipe,
    folder: Path,
    resume: bool,
    show_progress: bool,
    earlier: Mapping[str, Path] | None,
    stage: str,
    data: Path,
) -> Path:
    job = prepare(recipe, folder, earlier)
    distributed.wait()  # nobody may find the others' files before it has looked
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder) if distributed.first() else nullcontext():
        return _train(job, resume, show_progress, stage, data)


def _train(job: Run, resume: bool, show_progress: bool, stage: str, data: Path) -> Path:
    recipe, folder = job.recipe, job.folder
    pairs = _claim(job, show_progress, data if data != folder / "data" else None)
    job.sampled = 0.0 if pairs is None else pairs.cost
    source = _data(job, pairs, data, show_progress)
    job.teacher.free_text_encoders(asked_later(recipe), autoencoder=not job.roles.helpers.look)
    hooks: list[tuple[int, Hook]] = [(recipe.sample.every, SampleGrid(job))]
    trainer = Trainer(
        job.method, job.roles, source, recipe.training,
        seed=recipe.seed, run_dir=folder, hooks=(), show_progress=show_progress, stage=stage,
    )  # fmt: skip
    watch = Validation(job, trainer.cost) if recipe.evaluate.every else None
    if watch is not None:
        hooks.append((recipe.evaluate.every, watch))
    trainer.hooks = tuple(hooks)
    if resume:
        trainer.resume()
    if distributed.first():
        _go_on(recipe, folder)
    trainer.run()
    if watch is None or not watch.keep():
        save_student(folder / "student", job.roles, job.card(trainer.done, trainer.cost()), job.role)
    if distributed.first() and not (recipe.training.fsdp and distributed.count() > 1):
        draw_exported(job, folder / "student")
    distributed.wait()
    return folder / "student"


def _go_on(recipe: Recipe, folder: Path) -> None:
    """A run that goes on longer is unfinished again: until its end, the student of fewer steps must not pass for it."""
    stored = folder / "recipe.yaml"
    if stored.read_text(encoding="utf-8") != as_yaml(recipe):
        (folder / "student" / CARD_FILE).unlink(missing_ok=True)
        replace_text(stored, as_yaml(recipe))


def _is_finished(recipe: Recipe, folder: Path) -> bool:
    """Whether just this recipe has run to its end here."""
    stored = folder / "recipe.yaml"
    return (
        (folder / "student" / CARD_FILE).is_file()
        and stored.is_file()
        and stored.read_text(encoding="utf-8") == as_yaml(recipe)
    )


def _claim(job: Run, show_progress: bool, shared: Path | None = None) -> PairSource | None:
    """Make the folder this recipe's, which one that cannot run never does; returns the teacher's samples, if any."""
    files, mine = pair_files(job, shared), job.folder / "recipe.yaml"
    if distributed.first() and not mine.is_file():
        replace_text(mine, as_yaml(job.recipe))
    return None if files is None else sample_teacher(job, files, show_progress)


def _data(job: Run, pairs: PairSource | None, place: Path, show_progress: bool) -> Source:
    """What the run trains on: pictures, encoded now or before, or the teacher's samples; pairs for who wants them."""
    recipe, folder = job.recipe, job.folder
    of_teacher = pairs is not None and recipe.data.source == "teacher"
    data = pairs if pairs is not None and of_teacher else _pictures(job, place, show_progress)
    if distributed.first():
        made_by = {**versions(), "data": fingerprint(data)}
        made_by |= {} if pairs is None or of_teacher else {"pairs": fingerprint(pairs)}
        replace_text(folder / "versions.json", json.dumps(made_by, indent=1) + "\n")
    read: Source = _with_prompts(data, recipe, of_teacher) if "prompts" in job.method.streams else data
    source: Source = CaptionDropout(read, recipe.data.caption_dropout) if recipe.data.caption_dropout else read
    return WithPairs(source, pairs) if pairs is not None and "pairs" in job.method.streams else source


def _with_prompts(data: LatentSource | Buckets | Prompts, recipe: Recipe, of_teacher: bool) -> WithPrompts:
    """The data with their captions, for methods that read them.

    Raises:
        RecipeError: pictures were passed over, so that captions and latents are not the same rows.
    """
    texts = captions(recipe, None if of_teacher else count_pictures(recipe))
    if isinstance(data, Buckets) or len(texts) != data.order.size:
        raise RecipeError(
            f"data: the method {recipe.method['name']} reads captions, and some pictures could not be encoded "
            "(skipped.txt) or have several sizes: take these out of the data, and leave data.aspect_buckets out."
        )
    return WithPrompts(data, texts)


def _pictures(job: Run, place: Path, show_progress: bool) -> LatentSource | Buckets | Prompts:
    """The recipe's pictures, encoded now or before; the first process does it."""
    path, data, device, teacher = place / LATENTS, job.recipe.data, job.recipe.training.device, job.teacher
    loud = show_progress and distributed.first()
    with distributed.first_goes_first():
        if data.place is None:
            with progress_bar(data.size or 0, 0, "encoding", loud) as advance:
                return scene_latents(path, teacher, data.size or 0, data.seed, device, advance)
        if data.source == "prompts":
            prompts = find_captions(data.place, data.size)
            with progress_bar(len(prompts), 0, "encoding", loud) as advance:
                return prompt_latents(path, teacher, prompts, device, advance)
        found = find_images(data.place, data.size)
        with progress_bar(len(found.images), 0, "encoding", loud) as advance:
            return image_latents(path, teacher, found, device, advance, data.aspect_buckets)


def check_folder(recipe: Recipe, folder: Path, resume: bool) -> None:
    """Refuse in one sentence a ``folder`` that holds something else than this recipe's run."""
    if not holds_run(folder, resume):
        return
    before = read_stored(folder / "recipe.yaml")
    if "stages" in before:
        raise RecipeError(f"{folder} holds a run of several stages, not of one recipe: choose another --out.")
    _same_recipe(before, yaml.safe_load(as_yaml(recipe)), folder)


def holds_run(folder: Path, resume: bool) -> bool:
    """Whether a run, of one recipe or of stages, is there to go on with.

    Raises:
        RecipeError: it is there and nobody said ``resume``, or ``folder`` is or holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder} is a file: choose another --out.")
    if (folder / "recipe.yaml").is_file():
        if not resume:
            raise RecipeError(f"{folder} already holds a run: add --resume to go on with it, or choose another --out.")
        return True
    if folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
        raise RecipeError(f"{folder} is not empty and holds no run: choose another --out.")
    return False


def read_stored(path: Path) -> dict[str, Any]:
    """The plain data of the recipe that a run keeps.

    Raises:
        RecipeError: it is damaged.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError):
        data = None
    if not isinstance(data, dict):
        raise RecipeError(f"{path} is damaged: restore it, or choose another --out.")
    return data


def _same_recipe(before: dict[str, object], now: dict[str, object], folder: Path) -> None:
    """A run may be made longer; anything else would no longer be the same run."""
    old, new = _flat(before), _flat(now)
    for key in sorted(old.keys() | new.keys()):
        if key in _MAY_CHANGE or key.startswith("sample."):
            continue
        if old.get(key) != new.get(key):
            raise RecipeError(
                f"{folder} was started with {key} = {old.get(key)}, not {new.get(key)}: "
                "resume with the recipe it was started with, or choose another --out."
            )


def _flat(data: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(data, dict):
        return {prefix: data}
    found: dict[str, object] = {}
    for key, value in data.items():
        found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def versions() -> dict[str, str]:
    """Of everything that can change a result."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("fewstep", "torch", "diffusers", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
