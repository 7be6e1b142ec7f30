"""Recipes of several stages: each is an ordinary recipe whose teacher or first weights may be an earlier stage.

teacher: scenes-64                      # keys above `stages` hold for every stage that does not set its own
stages:
  - {name: coarse, method: {name: lcm, num_grid_steps: 10}, training: {steps: 500}}
  - {name: whole, merge: coarse}        # a LoRA becomes full weights; scale: 0.7 takes a part of it
  - {name: fine, method: tcd, init: coarse}
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from fewstep.models.families import shipped
from fewstep.recipe.load import SHORT_FORMS, parse_recipe, read_recipe, spelled_out
from fewstep.recipe.schema import Recipe, Section
from fewstep.recipe.validate import RecipeError, validated

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Merge(Section):
    """What a stage makes of an earlier stage's LoRA without training.

    Attributes:
        merge: the earlier stage.
        scale: factor on its LoRA.
        weights: "full": the LoRA is added to its teacher's weights; "lora": it is joined with the LoRA of the stage
            that was its teacher.
    """

    merge: str
    scale: float = Field(default=1.0, strict=True, allow_inf_nan=False)
    weights: Literal["full", "lora"] = "full"

    def as_data(self) -> dict[str, Any]:
        return self.model_dump()


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: the name under which later stages refer to it.
        does: the recipe that it trains, or the merge that it makes.
    """

    name: str
    does: Recipe | Merge

    @property
    def recipe(self) -> Recipe | None:
        """The recipe that it trains; None for a merge."""
        return self.does if isinstance(self.does, Recipe) else None

    @property
    def begins_with(self) -> set[str | None]:
        """The names that it refers to: earlier stages, and models."""
        return {self.does.merge} if isinstance(self.does, Merge) else {self.does.teacher.path, self.does.init}

    def as_data(self) -> dict[str, Any]:
        """The stage as it stands in a recipe, every default written out."""
        return {"name": self.name, **self.does.as_data()}


@dataclass(frozen=True)
class Chain:
    """Stages in their order."""

    stages: tuple[Stage, ...]

    def on_first_teacher(self) -> dict[str, Recipe]:
        """Recipes of the stages that train, by name, each on the model that the chain starts from, sampled as there.

        They suffice for figures that depend on shapes alone, before any stage has run.
        """
        made: dict[str, Recipe] = {}
        for stage in self.stages:
            if isinstance(stage.does, Merge):
                made[stage.name] = made[stage.does.merge]
            else:
                does = stage.does
                before = made.get(does.teacher.path, does)
                full = {key: getattr(before.sample, key) for key in ("teacher_steps", "guidance_scale")}
                sample = does.sample.model_copy(update=full)
                made[stage.name] = does.model_copy(update={"teacher": before.teacher, "init": None, "sample": sample})
        return {stage.name: made[stage.name] for stage in self.stages if stage.recipe}

    def on_device(self, device: str | None) -> Chain:
        """The same chain with all training on this device; None: each stage on its own."""
        return Chain(tuple(replace(s, does=s.recipe.on_device(device)) if s.recipe else s for s in self.stages))

    def as_yaml(self) -> str:
        """The resolved chain, every default written out."""
        stages = [stage.as_data() for stage in self.stages]
        return yaml.safe_dump({"stages": stages}, sort_keys=False, allow_unicode=True)


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
    for index, entry in enumerate(given, 1):
        stages.append(_stage(entry, common, index, [stage.name for stage in stages]))
        _check_fits(stages)
    return Chain(tuple(stages))


def _stage(entry: Mapping[str, Any], common: Mapping[str, Any], index: int, earlier: list[str]) -> Stage:
    name = entry.get("name", f"stage-{index}")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or shipped(name):
        raise RecipeError(f"stages: stage {index} needs a name of letters, digits and dashes, not {name!r:.40}.")
    if name in earlier:
        raise RecipeError(f"stages: two stages are called '{name}'.")
    own = spelled_out({key: value for key, value in entry.items() if key != "name"})
    if "merge" in own:
        _check_earlier(own["merge"], f"stages.{name}.merge", earlier, must=True)
        return Stage(name, validated(Merge, own, f"stages.{name}"))
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


@dataclass(frozen=True)
class _Made:
    """What a stage leaves, as far as a recipe's words tell.

    Attributes:
        rank, targets: of its LoRA; rank None: it has full weights.
        under: the model or the earlier stage that it stands on.
    """

    rank: int | None
    targets: tuple[str, ...] | None
    under: str


def _made(does: Recipe | Merge, earlier: Mapping[str, _Made]) -> _Made:
    if isinstance(does, Recipe):
        is_lora = does.student.weights == "lora"
        return _Made(does.student.rank if is_lora else None, does.student.targets, does.teacher.path)
    source = earlier[does.merge]
    if does.weights == "full":
        return _Made(None, None, source.under)
    below = earlier[source.under]  # a joined LoRA has both ranks and stands where the lower one stood
    return _Made((source.rank or 0) + (below.rank or 0), source.targets, below.under)


def _check_fits(stages: Sequence[Stage]) -> None:
    """Refuse a last stage that does not suit the stages it begins with, before these have run."""
    *earlier, stage = stages
    if any(stage.name in before.begins_with for before in stages):
        raise RecipeError(f"stages.{stage.name}: a teacher or init has this name too: give the stage another one.")
    made: dict[str, _Made] = {}
    for before in earlier:
        made[before.name] = _made(before.does, made)
    if isinstance(stage.does, Merge):
        _check_merge(stage.name, stage.does, made)
        return
    recipe = stage.does
    if recipe.teacher.path in made and recipe.teacher.loras:
        raise RecipeError(f"stages.{stage.name}.teacher.loras go with a model, not with an earlier stage.")
    _check_steps(stage.name, recipe, {before.name: before.does for before in earlier}.get(recipe.teacher.path))
    if recipe.init in made:
        _check_start(f"stages.{stage.name}.init", recipe, recipe.init, made)


def _check_merge(name: str, does: Merge, made: Mapping[str, _Made]) -> None:
    source = made[does.merge]
    if source.rank is None:
        raise RecipeError(f"stages.{name}.merge: '{does.merge}' has full weights already.")
    if does.weights == "full":
        return
    below = made.get(source.under)
    if below is None or below.rank is None:
        raise RecipeError(
            f"stages.{name}.weights: the teacher of '{does.merge}' is no stage with a LoRA that it "
            "could be joined with: leave it out, for full weights."
        )
    if below.targets != source.targets:
        raise RecipeError(
            f"stages.{name}.weights: '{does.merge}' and its teacher '{source.under}' adapt different layers "
            "(student.targets), which one LoRA cannot join: leave it out, for full weights."
        )


def _check_start(key: str, recipe: Recipe, init: str, made: Mapping[str, _Made]) -> None:
    """Refuse first weights that would be another function on this stage's teacher.

    A stage whose ``init`` is its teacher begins as that, as it would without it; full weights take any LoRA together
    with the weights that it stands on.
    """
    start, teacher, student = made[init], recipe.teacher.path, recipe.student
    if teacher == init or student.weights == "full":
        return
    if start.rank != student.rank:
        has = "full weights" if start.rank is None else f"rank {start.rank}"
        raise RecipeError(f"{key}: a LoRA of rank {student.rank} cannot start from '{init}', which has {has}.")
    if start.targets != student.targets:
        raise RecipeError(f"{key}: '{init}' adapts other layers than this stage: give both the same student.targets.")
    if start.under != teacher and {start.under, teacher} & made.keys():
        raise RecipeError(
            f"{key}: the LoRA of '{init}' stands on '{start.under}', but this stage's teacher is '{teacher}': "
            f"take that teacher, leave init out to begin as '{teacher}', or set student.weights to full."
        )


def _check_steps(name: str, recipe: Recipe, teacher: Recipe | Merge | None) -> None:
    """A few-step teacher is right on its own grid alone."""
    many = recipe.method_class().num_teacher_steps(recipe.method_settings())
    if isinstance(teacher, Recipe) and many not in (None, teacher.sample.num_inference_steps):
        raise RecipeError(
            f"stages.{name}.method.num_teacher_steps is {many}, but '{recipe.teacher.path}' makes students of "
            f"{teacher.sample.num_inference_steps} steps."
        )


def _over(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """``top`` over ``base``, nested; but another method starts from its own defaults, and another teacher too."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and not _names_another(key, old, value):
            value = _over(old, value)
        merged[key] = value
    return merged


def _names_another(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether ``new`` names another method or teacher than ``old``."""
    name = SHORT_FORMS.get(key)
    return name is not None and name in new and new[name] != old.get(name)
