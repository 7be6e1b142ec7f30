"""Finished runs as reports and evaluations read them: of one teacher, on the same prompts, at steps they can take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.diffusion.schedule import Schedule
from fewstep.evaluation.prompt_set import PromptSet
from fewstep.models.families import Teacher
from fewstep.models.hub import check_device
from fewstep.recipe.resume import flat
from fewstep.recipe.schema import Recipe
from fewstep.recipe.validate import RecipeError
from fewstep.runs.first_teacher import on_first_teacher
from fewstep.runs.folder import RunFolder
from fewstep.runs.measured_on import HELD_OUT, prompt_set
from fewstep.students.card import CARD_FILE, Card, load_card, sampler_of
from fewstep.students.lineage import first_teacher
from fewstep.training.logging import read_log
from fewstep.training.progress import doing
from fewstep.training.run_files import RunFiles, refuse_missing_run

STEPS = (1, 2, 4, 8)


@dataclass
class FinishedRun:
    """A run with a student: its label in the report, its files, its recipe on the first teacher, its log's lines."""

    label: str
    files: RunFolder
    recipe: Recipe
    log: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path, label: str) -> FinishedRun:
        """Raises RecipeError: ``folder`` is no run directory, or the run is not finished."""
        files = RunFolder(folder)
        refuse_missing_run(folder)
        if not files.recipe.is_file():
            raise RecipeError(f"{folder} is no run directory: recipe.yaml is missing.")
        if not (files.student / CARD_FILE).is_file():
            raise RecipeError(f"The run {folder} has no student yet: finish it with fewstep distill ... --resume.")
        return cls(label, files, on_first_teacher(files.kept_recipe(), files), list(read_log(files.log)))

    @property
    def card(self) -> Card:
        """How its student is sampled."""
        return load_card(self.files.student)

    @property
    def own(self) -> Recipe:
        """Its recipe as it was trained, on a teacher that may be a student, but on the device of `recipe`."""
        return self.files.kept_recipe().on_device(self.recipe.training.device)

    @property
    def facts(self) -> dict[str, Any]:
        """What tables of results say of it: how long it was trained, and at what cost."""
        card = self.card
        return {"method": card.method, "training_steps": card.steps, "forward_equivalents": card.forward_equivalents}

    @property
    def settings(self) -> dict[str, object]:
        """Its recipe by dotted keys; before it those of a chain's earlier stages, under their folders' names."""
        around, found = RunFiles(self.files.path.parent), dict[str, object]()
        for folder in around.stages() if around.recipe.is_file() else []:
            if folder.name < self.files.path.name and RunFiles(folder).recipe.is_file():
                found |= flat(RunFolder(folder).kept_recipe().as_data(), folder.name)
        return found | flat(self.files.kept_recipe().as_data())

    def column(self, key: str) -> list[tuple[float, float]]:
        """Points (step, value) of a column of the log."""
        return [(line["step"], line[key]) for line in self.log if key in line]


def finished_runs(folders: Sequence[Path], device: str | None = None) -> tuple[list[FinishedRun], str]:
    """The runs in these folders, of several stages the last one that trains, and the name of their one teacher.

    Args:
        device: for all of them, instead of that on which each was trained.

    Raises:
        ValueError: a run is not finished, is there twice, or has another teacher; there is no such device.
    """
    if device is not None:
        check_device(device, "--device")
    folders = [RunFiles(folder).last() for folder in folders]
    runs = [FinishedRun.read(folder, label) for folder, label in zip(folders, labels_of(folders), strict=True)]
    runs = [replace(run, recipe=run.recipe.on_device(device)) for run in runs]
    names = {first_teacher(run.files.student) for run in runs}
    if len(names) != 1:
        raise ValueError("Students of one teacher are compared: measure those of each other teacher apart.")
    return runs, names.pop()


def check_out(out: Path, *beside: str) -> None:
    """Raises ValueError where a file to write has the name of one of those that go beside it."""
    if out.suffix in beside:
        raise ValueError(f"--out {out}: a file of that name goes beside it: give it another ending than {out.suffix}.")


def measured_alike(
    runs: Sequence[FinishedRun],
    teacher: Teacher,
    features: str = "",
    prompts: Path | None = None,
    count: int | None = None,
    show_progress: bool = False,
) -> PromptSet:
    """What the students of ``runs`` are measured on, all of them on that of the first one.

    Raises:
        ValueError: they make images of several sizes.
    """
    first, sizes = runs[0], {run.card.image_size for run in runs}
    if len(sizes) > 1:
        listed = " and ".join(sorted(map(str, sizes)))
        raise ValueError(f"Images of one size are compared, not of {listed}: measure these runs apart.")
    with doing("preparing what is measured"):
        found = prompt_set(asked(first.recipe, features, prompts), teacher, first.files, count, show_progress)
    data = {(run.recipe.place, run.recipe.data.size) for run in runs}
    if len(data) > 1 and found.about.startswith(HELD_OUT):
        of_first = f"{HELD_OUT} of {first.label}, which others may have seen"
        found = replace(found, about=found.about.replace(HELD_OUT, of_first, 1))
    return found


def asked(recipe: Recipe, features: str = "", prompts: Path | None = None) -> Recipe:
    """The recipe with other features or prompts to measure with."""
    changes: dict[str, Any] = {} if prompts is None else {"prompts": str(prompts)}
    if features not in ("", "detector", "reader"):  # "reader" is the detector's former name
        changes |= {"features": features}
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=changes)})


def model_of(run: FinishedRun, runs: Sequence[FinishedRun]) -> str:
    """What the student of ``run`` is called in a table of ``runs``."""
    return run.label if len(runs) > 1 else "student"


def steps_of(run: FinishedRun, schedule: Schedule) -> tuple[int, ...]:
    """Those of `STEPS` that a run's student can take, by its method and on its sampler's grid; else its own number."""
    card, recipe = load_card(run.files.student), run.recipe
    wanted = recipe.method_class().sampling(recipe.method_settings())
    own = (card.num_inference_steps,)
    if wanted.no_other_steps and recipe.sample.sampler is None:
        if card.num_inference_steps not in wanted.trained_steps:
            return own
        return tuple(sorted({*own, wanted.num_inference_steps, *wanted.others_among(STEPS)}))
    return tuple(n for n in STEPS if _has_times(card, n, schedule)) or own


def _has_times(card: Card, steps: int, schedule: Schedule) -> bool:
    try:
        sampler_of(card, num_inference_steps=steps).times(schedule)
    except ValueError:
        return False
    return True


def labels_of(folders: Sequence[Path]) -> list[str]:
    """Labels that distinguish runs: their folders' names, with as many folders above them as that takes.

    Raises:
        ValueError: a run is there twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len({*labels, "teacher"}) > len(labels):  # the teacher has a row of its own
            return labels
    raise ValueError("A report compares different runs: the same one was given twice.")
