"""Runs of several stages: the run directory holds one folder a stage, ``01-coarse``, ``02-whole``, and shared data.

Resuming enters the first unfinished stage.
"""

from __future__ import annotations

from pathlib import Path

from fewstep.data.files import replace_text
from fewstep.recipe.chain import Chain, Merge
from fewstep.recipe.schema import Recipe
from fewstep.recipe.validate import RecipeError
from fewstep.runs.distill import distill
from fewstep.runs.folder import RunFolder
from fewstep.runs.foresee import foresee
from fewstep.runs.measured_on import check_networks
from fewstep.students.card import CARD_FILE
from fewstep.students.lineage import merge_student
from fewstep.training import distributed
from fewstep.training.progress import doing
from fewstep.training.settings import TrainingSettings


def run(recipe: Recipe | Chain, folder: Path, *, resume: bool = False, show_progress: bool = False) -> Path:
    """Distil a recipe or a chain; returns the student's folder."""
    if isinstance(recipe, Chain):
        return run_chain(recipe, folder, resume=resume, show_progress=show_progress)
    return distill(recipe, folder, resume=resume, show_progress=show_progress)


def run_chain(chain: Chain, folder: Path, *, resume: bool = False, show_progress: bool = False) -> Path:
    """Run the stages that are not finished; returns the last one's student folder.

    Raises:
        RecipeError: the folder holds something else, or a stage was started with another recipe.
        TrainingStopped: by Ctrl-C or SIGTERM; ``resume`` enters the stage that was interrupted.
    """
    training = next((s.recipe.training for s in chain.stages if s.recipe), TrainingSettings())
    distributed.join(training.device, folder, training.timeout_minutes)
    files = RunFolder(folder)
    places = {s.name: RunFolder(files.stage(number, s.name)) for number, s in enumerate(chain.stages, 1)}
    foresee(chain)
    check_networks(stage.recipe for stage in chain.stages if stage.recipe is not None)
    _claim(chain, files, places, resume)
    made: dict[str, Path] = {}
    for stage in chain.stages:
        place, does = places[stage.name], stage.does
        if isinstance(does, Merge):
            with doing(f"{stage.name}: merging"):
                made[stage.name] = merge_student(made[does.merge], place.student, does.scale, does.weights)
        else:
            made[stage.name] = distill(
                does, place.path, resume=True, show_progress=show_progress,
                earlier=made, stage=stage.name, data=files.data,
            )  # fmt: skip
    return made[chain.stages[-1].name]


def _claim(chain: Chain, files: RunFolder, places: dict[str, RunFolder], resume: bool) -> None:
    """Make the folder this chain's, or refuse a chain that does not continue what is there."""
    begun = files.holds_run(resume)
    for old in files.stages():
        if old not in [place.path for place in places.values()]:
            raise RecipeError(f"{files.path} was started with a stage {old.name} that the recipe lacks now.")
    if begun:
        _check_begun(chain, files, places)
    distributed.wait()
    if distributed.first():
        files.path.mkdir(parents=True, exist_ok=True)
        replace_text(files.recipe, chain.as_yaml())


def _check_begun(chain: Chain, files: RunFolder, places: dict[str, RunFolder]) -> None:
    """Refuse a chain that would leave the folder with stages that do not belong together."""
    before = files.stored().get("stages")
    if before is None:
        raise RecipeError(f"{files.path} holds a run of one recipe, not of stages: choose another --out.")
    last = places[chain.stages[-1].name]
    for place in places.values() if not (last.student / CARD_FILE).is_file() else ():
        place.check_random()
    merges = {entry.get("name"): {"scale": 1.0, "weights": "full", **entry} for entry in before if "merge" in entry}
    for number, stage in enumerate(chain.stages):
        place = places[stage.name]
        if isinstance(stage.does, Merge):
            if place.path.exists() and merges.get(stage.name) != stage.as_data():
                raise RecipeError(
                    f"{place.path} was merged with other settings: delete it to merge again, or choose another --out."
                )
        elif place.recipe.is_file():
            place.check(stage.does, resume=True)
            _check_length(chain, number, files, places)


def _check_length(chain: Chain, number: int, files: RunFolder, places: dict[str, RunFolder]) -> None:
    """A stage may not be made longer when later ones have begun with its student: theirs would be of another chain."""
    stage = chain.stages[number]
    before, now = places[stage.name].stored().get("training", {}).get("steps"), stage.recipe.training.steps  # type: ignore[union-attr]
    users = {stage.name}
    for later in chain.stages[number + 1 :]:
        users |= {later.name} if users & later.begins_with else set()
    built = [place.path.name for name, place in places.items() if name in users - {stage.name} and place.path.exists()]
    if before != now and built:
        raise RecipeError(
            f"stages.{stage.name}.training.steps was {before}, and {' and '.join(built)} began with its student: "
            f"delete these in {files.path} to make it {now}, or choose another --out."
        )
