"""The model at the beginning of a run's lineage, past all students in between: what its students are measured against.

A run knows what it began with: an earlier stage of its chain, or a finished run that its recipe names as ``teacher`` or
``init``. These are found from its folder, as far as they are still there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from fewstep.models.families import Teacher
from fewstep.models.hub import DTYPES
from fewstep.recipe.schema import Recipe, SampleConfig, Section, TeacherConfig
from fewstep.runs.folder import RunFolder
from fewstep.students.card import load_card
from fewstep.students.lineage import model_behind, open_teacher, student_folder, teacher_name

S = TypeVar("S", bound=Section)


def first_teacher_of(recipe: Recipe) -> Teacher:
    """The model at the beginning of a run's lineage, held as ``recipe`` states."""
    teacher = recipe.teacher
    return open_teacher(
        model_behind(teacher.path), teacher.loras, size=teacher.size, guidance_embed=teacher.guidance_embed,
        **held_as(recipe),
    )  # fmt: skip


def held_as(recipe: Recipe) -> dict[str, Any]:
    """Device, number format, quantisation and tiling of a run's teacher: what its students are measured in, too."""
    teacher = recipe.teacher
    return {
        "device": recipe.training.device, "dtype": DTYPES[teacher.dtype], "config": teacher.config,
        "quantization": teacher.quantize, "vae_tiling": teacher.vae_tiling,
    }  # fmt: skip


def on_first_teacher(recipe: Recipe, folder: RunFolder) -> Recipe:
    """The recipe of the run in ``folder`` on the model behind its teacher; itself where its teacher is a model.

    That model is held, guided and sampled as in the run that was trained on it, so that all runs of one lineage are
    measured against the same images; where that run is not there any more, as ``recipe`` states.
    """
    student, _ = _begun_with(folder)
    if student is None:
        return recipe
    size, line = recipe.teacher.size or load_card(student).image_size, [student]
    while (below := _begun_with(RunFolder(line[-1].parent), line[-1])[0]) is not None and below not in line:
        line.append(below)
    first = _told(RunFolder(line[-1].parent))
    if not isinstance(first.get("teacher"), Mapping):
        changes = {"path": model_behind(str(line[-1])), "config": None, "loras": (), "size": size}
        return recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update=changes)})
    sampled = _section(SampleConfig, first.get("sample"))
    as_first = {"teacher_steps": sampled.teacher_steps, "guidance_scale": sampled.guidance_scale}
    return recipe.model_copy(update={
        "teacher": _section(TeacherConfig, {**first["teacher"], "size": size}),
        "sample": recipe.sample.model_copy(update=as_first),
    })  # fmt: skip


def students_behind(folder: RunFolder) -> list[Path]:
    """Folders of the students that the run in ``folder`` began with, and of those behind them, the nearest first."""
    found: list[Path] = []
    waiting = list(_begun_with(folder))
    while waiting:
        student = waiting.pop(0)
        if student is not None and student not in found:
            found.append(student)
            waiting += _begun_with(RunFolder(student.parent), student)
    return found


def _begun_with(run: RunFolder, student: Path | None = None) -> tuple[Path | None, Path | None]:
    """Folders of the students that a run had as its teacher, or merged, and as its first weights; None for no student.

    Args:
        student: what the run has made; its card names the teacher where the run's recipe is gone.
    """
    told = _told(run)
    teacher, init = told.get("teacher"), told.get("init")
    name = told.get("merge") or (teacher.get("path") if isinstance(teacher, Mapping) else teacher)
    if not told and student is not None:
        name = teacher_name(student, load_card(student))
    places = (None if place is None else run.beside(place) or Path(place) for place in (name, init))
    one, other = (None if place is None else student_folder(place) for place in places)
    return one, other


def _told(run: RunFolder) -> dict[str, Any]:
    """A run's recipe as plain data, or the entry of a stage that merges; nothing where neither is there."""
    if run.recipe.is_file():
        return run.stored()
    whole = RunFolder(run.path.parent)
    stages = whole.stored().get("stages") if whole.recipe.is_file() else None
    return next((entry for entry in stages or () if entry.get("name") == run.path.name[3:]), {})


def _section(kind: type[S], stored: Mapping[str, Any] | None) -> S:
    """A section of a stored recipe, which another version of fewstep may have written."""
    return kind.model_validate({key: value for key, value in (stored or {}).items() if key in kind.model_fields})
