"""Recipes from YAML files and shipped names, with overrides on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fewstep.data.files import at_home
from fewstep.recipe.resume import flat
from fewstep.recipe.schema import Recipe
from fewstep.recipe.shipped import find_recipe, shipped_recipes
from fewstep.recipe.validate import RecipeError, number, validated

SHORT_FORMS = {"method": "name", "teacher": "path"}
"""Sections that a string alone may stand for, and the key that it then is."""
_DEEPEST = 50  # levels of a recipe; its own keys lie on five


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file or a shipped name, with ``a.b=c`` overrides on top.

    Raises:
        RecipeError: one sentence: what is wrong, where, what to do.
    """
    return parse_recipe(read_recipe(source, overrides))


def read_recipe(source: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain data of a recipe, overridden but not validated."""
    data = spelled_out(_read(find_recipe(source)))
    for item in overrides:
        _override(data, item)
    _check_small(data, f"The recipe {source}")
    return data


def own_keys(source: str | Path, overrides: Sequence[str] = ()) -> set[str]:
    """The keys, dotted, that a user has set: by overrides and in files of their own; not those of shipped recipes.

    In a file without ``like``, which may be a copy or what a run has written, a default is nobody's choice.
    """
    given: dict[str, Any] = {}
    for item in overrides:
        _override(given, item)
    path = find_recipe(source)
    if path in shipped_recipes().values():
        return set(flat(given))
    data, found = yaml.safe_load(path.read_text(encoding="utf-8")), set(flat(given))
    if "like" not in data:
        return found | {key for key, value in flat(spelled_out(data)).items() if not _is_default(key, value)}
    below = own_keys(data.pop("like"))
    return found | below | set(flat(spelled_out(data)))


def _is_default(key: str, value: object) -> bool:
    """Whether ``value`` is what a recipe that leaves ``key``, dotted, out has there."""
    section, _, name = key.partition(".")
    whole = Recipe.model_fields[section].default if section in Recipe.model_fields else None
    return hasattr(whole, name) and bool(getattr(whole, name) == value)


def parse_recipe(data: Mapping[str, Any]) -> Recipe:
    """A validated recipe from plain data, with what it leaves open taken from its method and its data."""
    if "stages" in data:
        raise RecipeError("This recipe has stages: run it with fewstep distill.")
    _check_small(data, "This")
    return _with_pairs(_with_sampling(validated(Recipe, _at_home(data))))


def _at_home(data: Any) -> Any:
    """``data`` with the home folder for ~ at the beginning of every path; prompts are left as they are."""
    if isinstance(data, Mapping):
        return {key: value if key == "prompts" else _at_home(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_at_home(value) for value in data]
    return at_home(data) if isinstance(data, str) else data


def _with_sampling(recipe: Recipe) -> Recipe:
    """The recipe with its method's number of steps and eta where it gives none; another sampler has no fixed number."""
    wanted, given = recipe.method_class().sampling(recipe.method_settings()), recipe.sample
    own = {key: getattr(wanted, key) for key in {"num_inference_steps", "eta"} - given.model_fields_set}
    steps = given.num_inference_steps
    bound = wanted.no_other_steps and given.sampler is None
    if bound and "num_inference_steps" not in own and steps not in wanted.trained_steps:
        trained = " or ".join(map(str, wanted.trained_steps))
        raise RecipeError(
            f"sample.num_inference_steps is {steps}, but this method's students take {trained}: leave it out, or "
            "change the method's own number."
        )
    return recipe.model_copy(update={"sample": given.model_copy(update=own)})


def _with_pairs(recipe: Recipe) -> Recipe:
    """The recipe with number and guidance scale of the teacher's samples, where it needs these."""
    if not recipe.needs_pairs:
        return recipe
    pairs, guidance = recipe.pairs, recipe.method_class().teacher_guidance(recipe.method_settings())
    if pairs.guidance_scale is None:
        scale = guidance.low if guidance and guidance.fixed else recipe.sample.guidance_scale
        pairs = pairs.model_copy(update={"guidance_scale": scale})
    if pairs.size is None and not recipe.lacks_data:
        pairs = pairs.model_copy(update={"size": recipe.captions()})
    return recipe.model_copy(update={"pairs": pairs})


def _read(path: Path, begun: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The data of a file; with ``like: NAME`` those of that recipe, with the file's own in their place."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error}.") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise RecipeError(f"The recipe {path} is not valid YAML{where}.") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RecipeError(f"The recipe {path} must be a mapping that starts with 'method: ...'.")
    if "like" not in data:
        return data
    like, begun = data.pop("like"), (*begun, path)
    if not isinstance(like, str) or (other := find_recipe(like)) in begun:
        raise RecipeError(f"The recipe {path}: like must name another recipe, not {like!r:.80}.")
    return _merged(spelled_out(_read(other, begun)), spelled_out(data))


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``own`` in place of its own, section by section."""
    both = {key: (base[key], own[key]) for key in base.keys() & own.keys()}
    inner = {k: _merged(a, b) for k, (a, b) in both.items() if isinstance(a, Mapping) and isinstance(b, Mapping)}
    return {**base, **own, **inner}


def _check_small(data: Any, what: str, limit: int = 100_000) -> None:
    """Refuse data that do not end: a few lines of YAML anchors can stand for billions of entries, or for themselves."""
    waiting = [(data, 0)]
    while waiting and limit > 0:
        entry, depth = waiting.pop()
        limit -= 1
        inside = entry.values() if isinstance(entry, Mapping) else entry if isinstance(entry, list) else ()
        waiting += [(each, depth + 1) for each in inside]
        if inside and depth == _DEEPEST:
            break
    if waiting:
        raise RecipeError(
            f"{what} is no recipe: it has more than {limit:,} entries, is nested deeper than {_DEEPEST} levels, or "
            "holds itself."
        )


def spelled_out(data: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with ``method: tcd`` as ``method: {name: tcd}``, and the teacher likewise."""
    return {k: {SHORT_FORMS[k]: v} if k in SHORT_FORMS and isinstance(v, str) else v for k, v in data.items()}


def _override(data: dict[str, Any], item: str) -> None:
    """Set one ``a.b=value`` of the command line in ``data``."""
    path, equals, text = item.partition("=")
    if not equals or not path or any(not part for part in path.split(".")):
        raise RecipeError(f"--set needs key.subkey=value, not '{item:.80}'.")
    if path.count(".") > _DEEPEST:
        raise RecipeError(f"--set {path:.80}: no key of a recipe lies so deep.")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):  # ValueError: a number of thousands of digits
        raise RecipeError(f"--set {path:.80}: the value '{text:.80}' is not valid YAML.") from None
    *parents, last = path.split(".")
    place, parents = _stage(data, path, parents)
    value = number(value) if isinstance(value, str) else value
    if not parents:
        value = spelled_out({last: value})[last]
    for key in parents:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise RecipeError(f"--set {path}: '{key}' has no sub-keys.")
    place[last] = value


def _stage(data: dict[str, Any], path: str, parents: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Where an override begins: ``stages.NAME.key`` inside the stage of that name, anything else at the top."""
    stages = data.get("stages")
    if not parents or parents[0] != "stages" or not isinstance(stages, list):
        return data, parents
    for stage in stages:
        if isinstance(stage, dict) and len(parents) > 1 and stage.get("name") == parents[1]:
            stage.update(spelled_out(stage))
            return stage, parents[2:]
    names = [str(stage.get("name")) for stage in stages if isinstance(stage, dict)]
    raise RecipeError(f"--set {path}: there is no such stage: the stages are {', '.join(names)}.")
