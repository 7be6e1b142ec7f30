"""The main job: a recipe becomes a run directory that holds all it needs and all it makes (see `RunFiles`).

setup -> teacher's samples -> dataset -> trainer -> student
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from fewstep.data.listing import forget, listed_once
from fewstep.data.pairs import PairSource
from fewstep.export.possible import obstacle
from fewstep.recipe.schema import Recipe
from fewstep.recipe.validate import RecipeError
from fewstep.runs.dataset import build_dataset
from fewstep.runs.folder import RunFolder
from fewstep.runs.measured_on import check_measured, check_networks
from fewstep.runs.out_of_memory import explained
from fewstep.runs.setup import Run, setup
from fewstep.runs.teacher_samples import pair_files, sample_teacher
from fewstep.runs.validation import SampleGrid, Validation, run_prompt_set, sample_exported, validation_prompts
from fewstep.students.student import save_student
from fewstep.training import distributed
from fewstep.training.trainer import Trainer

_MANY = 100_000  # images whose names and captions are not kept in memory while a run trains


@listed_once()
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
        earlier: student folders of earlier stages, by the names under which ``teacher`` and ``init`` refer to them.
        stage: name of this run among the stages.
        data: data folder that the stages share; ``folder/data`` by default.

    Raises:
        RecipeError: the folder holds another run, or something else, or a run that drew other random numbers.
        OutOfMemory: with the changes that would need less.
        TrainingStopped: by Ctrl-C or SIGTERM; everything is saved, and ``resume`` continues from there.
        ValueError: the folder is not the same one for all processes.
    """
    distributed.join(recipe.training.device, folder, recipe.training.timeout_minutes)
    files = RunFolder(folder)
    files.check(recipe, resume)
    if files.is_finished(recipe):
        return files.student
    files.check_random()
    check_measured(recipe)
    check_networks([recipe])
    with explained(recipe, folder):
        return _distill(recipe, files, resume, show_progress, earlier, stage, data)


def _distill(
    recipe: Recipe,
    files: RunFolder,
    resume: bool,
    show_progress: bool,
    earlier: Mapping[str, Path] | None,
    stage: str,
    data: Path | None,
) -> Path:
    """`distill` in a frame of its own: when memory runs out, nothing here is held while advice is prepared."""
    run = setup(recipe, files.path, earlier)
    _say_obstacle(run)
    with files.locked():
        pairs = _claim(run, show_progress, shared=data)
        measured_on = run_prompt_set(run, show_progress) if recipe.evaluate.every else None
        source = build_dataset(run, pairs, data or files.data, show_progress)
        keep_vae = recipe.data.stream or bool(run.roles.helpers.look)
        run.teacher.make_room(validation_prompts(recipe), texts=recipe.data.live, autoencoder=keep_vae)

        trainer = Trainer(
            run.method, run.roles, source, recipe.training,
            seed=recipe.seed, run_dir=files.path, show_progress=show_progress, stage=stage,
        )  # fmt: skip
        validation = None if measured_on is None else Validation(run, measured_on, trainer.cost)
        trainer.hooks = (
            (recipe.sample.every, SampleGrid(run)),
            *([] if validation is None else [(recipe.evaluate.every, validation)]),
        )
        if resume:
            trainer.resume()
        if recipe.captions() > _MANY:
            forget()
        files.reopen(recipe)
        trainer.run()

        if validation is None or not validation.keep():
            save_student(files.student, run.roles, run.card(trainer.done, trainer.cost()), run.role)
        if distributed.first() and not (recipe.training.fsdp and distributed.count() > 1):
            sample_exported(run, files.student)
        distributed.wait()
    return files.student


def _say_obstacle(run: Run) -> None:
    """Say before hours of training that the student will have no export."""
    teacher = run.teacher
    config = dict(teacher.pipeline.scheduler.config)
    why = obstacle(run.card(0), teacher.denoiser.schedule, config, type(teacher.family))
    if why and distributed.first():
        print(f"This student will have no export. {why}", file=sys.stderr, flush=True)


@listed_once()
def prepare_data(
    recipe: Recipe, folder: Path, *, from_teacher: bool = False, show_progress: bool = False
) -> PairSource | None:
    """The part of `distill` before training; `distill` with ``resume`` continues from there. Raises as it does.

    Args:
        from_teacher: sample the teacher, but encode no images yet.

    Returns:
        the teacher's samples, or None where the recipe needs none.
    """
    if from_teacher and not recipe.needs_pairs:
        raise RecipeError(
            "This recipe needs no samples of its teacher: set data.source to teacher to train on them, or take a "
            "method that learns from pairs."
        )
    distributed.join(recipe.training.device, folder, recipe.training.timeout_minutes)
    files = RunFolder(folder)
    files.check(recipe, resume=True)
    files.check_random()
    with explained(recipe, folder):
        run = setup(recipe, folder)
        with files.locked():
            pairs = _claim(run, show_progress)
            if not from_teacher:
                build_dataset(run, pairs, files.data, show_progress)
            return pairs


def _claim(run: Run, show_progress: bool, shared: Path | None = None) -> PairSource | None:
    """Make the folder this recipe's, and return the teacher's samples, if it needs any.

    What cannot run must not claim a folder: so the samples' folder is checked first.
    """
    wanted = pair_files(run, shared)
    run.folder.claim(run.recipe.as_yaml())
    if wanted is None:
        return None
    pairs = sample_teacher(run, wanted, show_progress)
    run.sampled = pairs.cost
    return pairs
