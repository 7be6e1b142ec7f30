"""Recipes of several stages: each an ordinary run, its teacher or its start perhaps what an earlier stage made.

    teacher: scenes-64                      # keys above `stages` hold for every stage that does not say otherwise
    stages:
      - {name: coarse, method: {name: lcm, num_grid_steps: 10}, training: {steps: 500}}
      - {name: whole, merge: coarse}        # a LoRA becomes full weights; scale: 0.7 takes a part of it
      - {name: fine, method: tcd, init: coarse}

The run directory holds one folder a stage, ``01-coarse``, ``02-whole``, ..., and the data they share. Resuming enters
the first unfinished one.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from fewstep.data.files import replace_text
from fewstep.models.families import shipped
from fewstep.recipe.schema import NAMED, Recipe, RecipeError, as_yaml, parse_recipe, read_recipe, spelled_out
from fewstep.runs.distill import check_folder, distill, holds_run, read_stored
from fewstep.students.lineage import merge_student
from fewstep.training import distributed

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Stage:
    """One stage: a recipe, or the merging of an earlier stage's LoRA into its teacher.

    Attributes:
        name: how later stages call it.
        recipe: what it trains, or None.
        merge: the earlier stage whose LoRA becomes full weights, or None.
        scale: of that LoRA.
        weights: "lora": it is joined with the LoRA that it stands on instead, into one.
    """

    name: str
    recipe: Recipe | None = None
    merge: str | None = None
    scale: float = 1.0
    weights: Literal["full", "lora"] = "full"

    @property
    def begins_with(self) -> set[str | None]:
        """What it calls by name: earlier stages, and models."""
        return {self.merge} if self.recipe is None else {self.recipe.teacher.path, self.recipe.init}


@dataclass(frozen=True)
class Chain:
    """Stages in their order."""

    stages: tuple[Stage, ...]

    def folder(self, run: Path, name: str) -> Path:
        """Where the stage ``name`` works."""
        names = [stage.name for stage in self.stages]
        return run / f"{names.index(name) + 1:02d}-{name}"

    def alone(self, stage: Stage) -> Recipe:
        """A stage's recipe on the model that its teacher came from: for what depends on shapes alone."""
        assert stage.recipe is not None
        by_name = {s.name: s for s in self.stages}
        teacher = stage.recipe.teacher
        while teacher.path in by_name:
            before = by_name[teacher.path]
            before = by_name[str(before.merge)] if before.recipe is None else before
            assert before.recipe is not None
            teacher = before.recipe.teacher
        return stage.recipe.model_copy(update={"teacher": teacher, "init": None})


def load(source: str | Path, overrides: Sequence[str] = ()) -> Recipe | Chain:
    """A recipe or a chain from a YAML file or a shipped name; ``stages.NAME.key=value`` overrides one stage.

    Raises:
        RecipeError: one sentence: what is wrong, in which stage, what to do.
    """
    data = read_recipe(source, overrides)
    return parse_chain(data) if "stages" in data else parse_recipe(data)


def parse_chain(data: Mapping[str, Any]) -> Chain:
    """A validated chain from plain data."""
    given = data["stages"]
    if not isinstance(given, list) or not given or not all(isinstance(entry, dict) for entry in given):
        raise RecipeError("stages must be a list of recipes, each with a name.")
    common = spelled_out({key: value for key, value in data.items() if key != "stages"})
    stages: list[Stage] = []
    for number, entry in enumerate(given, 1):
        stages.append(_stage(entry, common, number, [stage.name for stage in stages]))
        _check_fits(stages)
    if stages[-1].recipe is None and len(stages) == 1:
        raise RecipeError("stages: a chain needs a stage that trains.")
    return Chain(tuple(stages))


def _stage(entry: Mapping[str, Any], common: Mapping[str, Any], number: int, earlier: list[str]) -> Stage:
    name = entry.get("name", f"stage-{number}")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or shipped(name):
        raise RecipeError(f"stages: stage {number} needs a name of letters, digits and dashes, not {name!r:.40}.")
    if name in earlier:
        raise RecipeError(f"stages: two stages are called '{name}'.")
    own = spelled_out({key: value for key, value in entry.items() if key != "name"})
    if "merge" in own:
        if not own.keys() <= {"merge", "scale", "weights"}:
            raise RecipeError(f"stages.{name}: a merge stage takes its name, 'merge', 'scale' and 'weights' alone.")
        _check_earlier(own["merge"], f"stages.{name}.merge", earlier, must=True)
        scale, weights = own.get("scale", 1.0), own.get("weights", "full")
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise RecipeError(f"stages.{name}.scale must be a number, not {scale!r:.40}.")
        if weights not in ("full", "lora"):
            raise RecipeError(f"stages.{name}.weights must be full or lora, not {weights!r:.40}.")
        return Stage(name, merge=own["merge"], scale=float(scale), weights=weights)
    try:
        recipe = parse_recipe(_over(common, own))
    except ValueError as error:
        raise RecipeError(f"stages.{name}: {error}") from None
    _check_earlier(recipe.teacher.path, f"stages.{name}.teacher", earlier)
    _check_earlier(recipe.init, f"stages.{name}.init", earlier)
    return Stage(name, recipe)


def _check_earlier(reference: Any, where: str, earlier: list[str], must: bool = False) -> None:
    """A slip in a stage's name must not be taken for a model on a hub, hours later."""
    if reference in earlier or reference is None:
        return
    near = difflib.get_close_matches(str(reference), earlier, n=1)
    if must or (near and "/" not in str(reference)):
        hint = f"did you mean '{near[0]}'?" if near else f"the earlier stages are {', '.join(earlier) or 'none'}."
        raise RecipeError(f"{where}: there is no earlier stage '{reference}': {hint}")


def _check_fits(stages: Sequence[Stage]) -> None:
    """What the last of these begins with must suit it: better said now than when the earlier ones have run."""
    *earlier, stage = stages
    if any(stage.name in before.begins_with for before in stages):
        raise RecipeError(f"stages.{stage.name}: a teacher or init has this name too: give the stage another one.")
    made = {before.name: before.recipe for before in earlier}  # None: merged
    if stage.recipe is None:
        source = made[str(stage.merge)]
        if source is None or source.student.weights == "full":
            raise RecipeError(f"stages.{stage.name}.merge: '{stage.merge}' has full weights already.")
        under = made.get(source.teacher.path)
        if stage.weights == "lora" and (under is None or under.student.weights == "full"):
            raise RecipeError(
                f"stages.{stage.name}.weights: '{stage.merge}' stands on no stage's LoRA that it could be joined with: "
                "leave it out, for full weights."
            )
        return
    if stage.recipe.teacher.path in made and stage.recipe.teacher.loras:
        raise RecipeError(f"stages.{stage.name}.teacher.loras go with a model, not with an earlier stage.")
    _check_steps(stage.name, stage.recipe, made.get(stage.recipe.teacher.path))
    if stage.recipe.init not in made or stage.recipe.student.weights == "full":
        return
    source, rank = made[stage.recipe.init], stage.recipe.student.rank
    if source is None or source.student.weights == "full" or source.student.rank != rank:
        has = "full weights" if source is None or source.student.weights == "full" else f"rank {source.student.rank}"
        raise RecipeError(
            f"stages.{stage.name}.init: a LoRA of rank {rank} cannot start from '{stage.recipe.init}', which has {has}."
        )


def _check_steps(name: str, recipe: Recipe, teacher: Recipe | None) -> None:
    """A teacher of few steps is asked on its own grid, or not what it learnt."""
    many = recipe.method_class().num_teacher_steps(recipe.method_settings())
    if teacher is not None and many not in (None, teacher.sample.num_inference_steps):
        raise RecipeError(
            f"stages.{name}.method.num_teacher_steps is {many}, but '{recipe.teacher.path}' makes students of "
            f"{teacher.sample.num_inference_steps} steps."
        )


def _over(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """``top`` over ``base``, nested; but another method starts from its own defaults, and another teacher too."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and not _other(key, old, value):
            value = _over(old, value)
        merged[key] = value
    return merged


def _other(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether ``new`` names another method or teacher than ``old``."""
    name = NAMED.get(key)
    return name is not None and name in new and new[name] != old.get(name)


def run(recipe: Recipe | Chain, folder: Path, *, resume: bool = False, show_progress: bool = False) -> Path:
    """Distil as a recipe or a chain says; returns the student's folder."""
    if isinstance(recipe, Chain):
        return run_chain(recipe, folder, resume=resume, show_progress=show_progress)
    return distill(recipe, folder, resume=resume, show_progress=show_progress)


def run_chain(chain: Chain, folder: Path, *, resume: bool = False, show_progress: bool = False) -> Path:
    """Run the stages that are not finished; returns the last one's student folder.

    Raises:
        RecipeError: the folder holds something else, or a stage was started with another recipe.
        TrainingStopped: by Ctrl-C or SIGTERM; ``resume`` enters the stage that was interrupted.
    """
    distributed.join(next((s.recipe.training.device for s in chain.stages if s.recipe), "cpu"))
    _claim(chain, folder, resume)
    made: dict[str, Path] = {}
    for stage in chain.stages:
        place = chain.folder(folder, stage.name)
        if stage.recipe is not None:
            made[stage.name] = distill(
                stage.recipe, place, resume=True, show_progress=show_progress,
                earlier=made, stage=stage.name, data=folder / "data",
            )  # fmt: skip
        else:
            source = made[str(stage.merge)]
            made[stage.name] = merge_student(source, place / "student", stage.scale, stage.weights)
    return made[chain.stages[-1].name]


def _claim(chain: Chain, folder: Path, resume: bool) -> None:
    begun = holds_run(folder, resume)
    for old in sorted(folder.glob("[0-9][0-9]-*")):
        names = {chain.folder(folder, stage.name).name for stage in chain.stages}
        if old.name not in names:
            raise RecipeError(f"{folder} was started with a stage {old.name} that the recipe lacks now.")
    if begun:
        _check_begun(chain, folder)
    distributed.wait()
    if distributed.first():
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "recipe.yaml", chain_yaml(chain))


def _check_begun(chain: Chain, folder: Path) -> None:
    """Refuse what would leave a folder with stages that do not belong together."""
    before = read_stored(folder / "recipe.yaml").get("stages")
    if before is None:
        raise RecipeError(f"{folder} holds a run of one recipe, not of stages: choose another --out.")
    merged = {entry.get("name"): {"scale": 1.0, "weights": "full", **entry} for entry in before if "merge" in entry}
    for stage in chain.stages:
        place = chain.folder(folder, stage.name)
        if stage.recipe is None and place.exists() and merged.get(stage.name) != {"name": stage.name, **_entry(stage)}:
            raise RecipeError(f"{place} was merged otherwise: delete it to have it made anew, or choose another --out.")
    for number, stage in enumerate(chain.stages):
        stored = chain.folder(folder, stage.name) / "recipe.yaml"
        if stage.recipe is None or not stored.is_file():
            continue
        check_folder(stage.recipe, stored.parent, resume=True)
        names = {stage.name}
        for later in chain.stages[number + 1 :]:
            names |= {later.name} if names & later.begins_with else set()
        built = [chain.folder(folder, s.name) for s in chain.stages if s is not stage and s.name in names]
        steps = read_stored(stored).get("training", {}).get("steps")
        if steps != stage.recipe.training.steps and any(place.exists() for place in built):
            raise RecipeError(
                f"stages.{stage.name}.training.steps was {steps}, and {' and '.join(p.name for p in built)} began with "
                f"its student: delete these in {folder} to make it {stage.recipe.training.steps}, or choose another "
                "--out."
            )


def chain_yaml(chain: Chain) -> str:
    """The resolved chain, every default written out."""
    entries: list[dict[str, Any]] = []
    for stage in chain.stages:
        entries.append({"name": stage.name, **_entry(stage)})
    return yaml.safe_dump({"stages": entries}, sort_keys=False)


def _entry(stage: Stage) -> dict[str, Any]:
    """A stage as a recipe has it, without its name."""
    if stage.recipe is None:
        return {"merge": stage.merge, "scale": stage.scale, "weights": stage.weights}
    found: dict[str, Any] = yaml.safe_load(as_yaml(stage.recipe))
    return found


def last_run(run: Path) -> Path:
    """The run itself, or the last stage of a chain that trains: where its log and its recipe are."""
    trained = sorted(p.parent for p in run.glob("[0-9][0-9]-*/recipe.yaml"))
    return trained[-1] if trained and (run / "recipe.yaml").is_file() else run
