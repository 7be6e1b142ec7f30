"""Plain data that people wrote, validated: every refusal is one sentence that names the key."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from fewstep.methods.settings import explain

T = TypeVar("T")


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the key and the remedy."""


def validated(kind: type[T], data: Any, prefix: str = "") -> T:
    """``data`` as an instance of ``kind``; ``prefix`` is the key under which it stood.

    Raises:
        RecipeError: one sentence.
    """
    try:
        return TypeAdapter(kind).validate_python(_with_numbers(data))
    except ValidationError as error:
        raise RecipeError(_sentence(error, kind, prefix)) from None


def number(text: str) -> float | str:
    """A string as a number where it is one: YAML 1.1 reads 1e-4 as a string."""
    try:
        return float(text)
    except ValueError:
        return text


def _with_numbers(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _with_numbers(value) for key, value in data.items()}
    return number(data) if isinstance(data, str) and data[:1].isdigit() and "e" in data else data


def _sentence(error: ValidationError, of: type, prefix: str) -> str:
    """The first of pydantic's errors as a sentence."""
    first = error.errors()[0]
    where = ".".join(map(str, (*([prefix] if prefix else []), *first["loc"])))
    kind = first["type"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument", "invalid_key"):
        return unknown_key(where, first["loc"][-1], _keys(of, first["loc"][:-1]))
    if kind == "missing":
        return f"{where} is missing{': for example method: tcd' if where == 'method' else ''}."
    if kind in ("model_type", "dataclass_type"):
        return f"{where} must hold keys of its own, as in '{where}: {{key: value}}', not {first['input']!r:.80}."
    return explain(error, prefix)


def _keys(of: Any, path: tuple[int | str, ...]) -> list[str]:
    """The keys that are known under ``path``."""
    for part in path:
        of = get_args(of)[0] if isinstance(part, int) else of.__pydantic_fields__[part].annotation
    return [field.name for field in dataclasses.fields(of)] if dataclasses.is_dataclass(of) else list(of.model_fields)


def unknown_key(where: str, key: object, known: list[str]) -> str:
    near = difflib.get_close_matches(str(key), known, n=1)  # YAML has keys that are no strings
    hint = f"did you mean '{near[0]}'?" if near else f"known keys are {', '.join(known)}."
    return f"Unknown key '{where}': {hint}"
