"""Jobs of `fewstep benchmark`: recipes with seeds, and as many training steps as one compute cost allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PositiveInt, field_validator
from pydantic.dataclasses import dataclass as checked

from fewstep.data.files import text_hash
from fewstep.methods.registry import METHODS
from fewstep.recipe.chain import Chain, load
from fewstep.recipe.resume import flat
from fewstep.recipe.schema import Recipe
from fewstep.recipe.shipped import shipped_recipes
from fewstep.recipe.validate import RecipeError, validated
from fewstep.runs.plan import cost_of_pairs, cost_of_step, memory_of_step


@checked(frozen=True)
class BenchmarkEntry:
    """A job of the benchmark: a recipe that is run once for each seed.

    Attributes:
        name: of its runs. recipe: a name or file that `fewstep distill` takes; set: overrides of its keys.
        seeds: one run each. budget: compute cost of each run in forward passes, pairs and earlier stages included;
            None: as the recipe states. steps: numbers of steps at which the student is measured. count: prompts.
        without: stages of a chain to leave out.
    """

    name: str
    recipe: str
    set: dict[str, Any] = Field(default_factory=dict)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    budget: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    steps: tuple[PositiveInt, ...] = Field(default=(1, 2, 4, 8), min_length=1)
    count: int = Field(default=5000, ge=8)
    without: tuple[str, ...] = ()

    @field_validator("name")
    @classmethod
    def _a_word(cls, name: str) -> str:
        """The name becomes that of a folder."""
        if not name or name.startswith(".") or Path(name).name != name:
            raise ValueError(f"name: '{name}' is to be the name of a folder: take letters, digits, '-' and '_'.")
        return name

    @classmethod
    def of(cls, source: str, **given: Any) -> BenchmarkEntry:
        """A job from its file (YAML with a key ``recipe``), or from a recipe's name or file; ``given`` has precedence.

        Raises:
            RecipeError: an unknown key, an invalid value, or a file that cannot be read.
        """
        path, data = Path(source), None
        if path.suffix in (".yaml", ".yml"):
            try:
                if not path.is_file():
                    raise FileNotFoundError(path)
                data = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
                raise RecipeError(f"{path} cannot be read: give a job's file, or a recipe's name or file.") from None
        if not isinstance(data, dict) or "recipe" not in data:
            data = {"recipe": source}
        known = {f.name for f in fields(cls)}
        for key in data.keys() - known:
            raise RecipeError(f"{path}: a job has no key '{key}': it has {', '.join(sorted(known - {'name'}))}.")
        data = {"name": path.stem} | data | {key: value for key, value in given.items() if value is not None}
        try:
            job = validated(cls, data)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None
        return job

    def runs(self, overrides: Sequence[str] = ()) -> Iterator[Run]:
        """One run for each seed, with ``overrides`` (KEY=VALUE) of its recipe."""
        changes = [*(f"{key}={value}" for key, value in self.set.items()), *overrides]
        share = None
        for seed in self.seeds:
            recipe = _without(load(self.recipe, [*changes, f"seed={seed}"]), self.without)
            if self.budget is not None:
                share = share or share_within(recipe, self.budget)  # in a short trial of each stage, for all seeds
                recipe = _shortened(recipe, share)
            yield Run(self, seed, recipe, tuple(changes))


@dataclass(frozen=True)
class Run:
    """A recipe with one seed."""

    job: BenchmarkEntry
    seed: int
    recipe: Recipe | Chain
    changes: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.job.name}-s{self.seed}"

    @property
    def fingerprint(self) -> str:
        """Hash of the resolved recipe: results of any other recipe are measured again."""
        return text_hash(self.recipe.as_yaml())

    @property
    def steps(self) -> int:
        """Training steps of all stages."""
        return sum(recipe.training.steps for recipe in alone(self.recipe))

    @property
    def last(self) -> Recipe:
        """The recipe of the measured student: that of a chain's last stage, on the model with which the chain began."""
        return alone(self.recipe)[-1]

    @property
    def memory(self) -> int:
        """Peak memory of a training step in bytes, of the stage that needs most."""
        return max(map(memory_of_step, alone(self.recipe)))

    @property
    def measured_at(self) -> tuple[int, ...]:
        """Numbers of steps at which the student is measured: its own alone, if it was trained for no others."""
        recipe = self.last
        wanted = recipe.method_class().sampling(recipe.method_settings())
        own, few = wanted.no_other_steps and recipe.sample.sampler is None, recipe.sample.num_inference_steps
        return tuple(sorted({few, *wanted.others_among(self.job.steps)})) if own else self.job.steps


def settings_of(runs: Sequence[Run]) -> dict[str, object]:
    """The recipe of one job's runs by dotted keys, of a chain that of every stage; where seeds differ all values."""
    found: dict[str, list[object]] = {}
    for run in runs:
        of_stages = {"": run.recipe} if isinstance(run.recipe, Recipe) else run.recipe.on_first_teacher()
        for i, (stage, recipe) in enumerate(of_stages.items(), 1):
            for key, value in flat(recipe.as_data(), "" if i == len(of_stages) else stage).items():
                found.setdefault(key, []).append(value)
    return {key: values[0] if all(v == values[0] for v in values) else values for key, values in found.items()}


def every_method() -> list[str]:
    """The shipped recipes for scenes-64 that are named after a method."""
    return [name for name in (f"scenes-64-{method}" for method in METHODS) if name in shipped_recipes()]


def alone(recipe: Recipe | Chain) -> list[Recipe]:
    """The recipe itself, or those of a chain's trained stages, on the model with which the chain began."""
    return [recipe] if isinstance(recipe, Recipe) else list(recipe.on_first_teacher().values())


# ---------------------------------------------------------------- one cost for all


def within(recipe: Recipe | Chain, budget: float) -> Recipe | Chain:
    """The recipe with as many training steps as ``budget`` forward passes allow; a chain's stages in proportion.

    Raises:
        RecipeError: the teacher's samples, or one step of every stage, cost more.
    """
    return _shortened(recipe, share_within(recipe, budget))


def share_within(recipe: Recipe | Chain, budget: float) -> float:
    """The share of its training steps that `within` leaves a recipe, and each stage of a chain. Raises as `within`."""
    stages = alone(recipe)
    left = budget - sum(cost_of_pairs(one) for one in stages)
    share = left / sum(cost_of_step(one) * one.training.steps for one in stages)
    if min(_part(one, share) for one in stages) < 1:
        raise RecipeError(f"A budget of {budget:,.0f} forward passes is too small for this recipe: give more.")
    return share


def _part(recipe: Recipe, share: float) -> int:
    """So many training steps are this share of a recipe's."""
    return int(share * recipe.training.steps + 1e-9)


def _shortened(recipe: Recipe | Chain, share: float) -> Recipe | Chain:
    """The recipe, or each stage of a chain, with this share of its training steps, and warm-up in proportion."""
    if isinstance(recipe, Recipe):
        return _short(recipe, share)
    stages = (replace(stage, does=_short(stage.recipe, share)) if stage.recipe else stage for stage in recipe.stages)
    return Chain(tuple(stages))


def _short(recipe: Recipe, share: float) -> Recipe:
    training, steps = recipe.training, _part(recipe, share)
    warmup = min(training.warmup_steps, max(1, steps // 10))
    return recipe.model_copy(update={"training": dataclasses.replace(training, steps=steps, warmup_steps=warmup)})


def _without(recipe: Recipe | Chain, left_out: Sequence[str]) -> Recipe | Chain:
    """The chain without some of its stages.

    Raises:
        RecipeError: there is no such stage, or a later one begins with it.
    """
    if not left_out:
        return recipe
    stages = recipe.stages if isinstance(recipe, Chain) else ()
    kept = tuple(stage for stage in stages if stage.name not in left_out)
    needed = {name for stage in kept for name in stage.begins_with}
    for name in left_out:
        if name not in {stage.name for stage in stages}:
            raise RecipeError(
                f"without: {name} is no stage of this recipe: {', '.join(s.name for s in stages) or 'it has none'}."
            )
        if name in needed:
            raise RecipeError(f"without: a later stage begins with {name}: leave that one out, too.")
    return Chain(kept)
