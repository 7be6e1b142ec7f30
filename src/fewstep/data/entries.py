"""Entries of a data set: each is used, or skipped with a reason. One bad entry does not end a run of days."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


class Unusable(ValueError):
    """Why one entry of a data set cannot be used; the others can."""


@dataclass(frozen=True)
class Skipped:
    """Something that was passed over, and why."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


def attempt(name: str, make: Callable[..., T], *args: object) -> T | Skipped:
    """``make(*args)``, or the reason why the entry ``name`` cannot be used."""
    try:
        return make(*args)
    except Unusable as error:
        return Skipped(name, str(error))
    except OSError as error:
        return unread(name, error)


def one_line(text: str) -> str:
    """The text in one line that a file in UTF-8 can hold: names of files need not be text."""
    return " ".join(text.split()).encode("utf-8", "backslashreplace").decode()


def unread(name: str, error: OSError) -> Skipped:
    """A file or folder that the system does not let us read."""
    return Skipped(name, f"it cannot be read ({error.strerror or type(error).__name__})")


def usable(
    found: Iterable[T | Skipped],
    where: str,
    kind: str,
    limit: int | None = None,
    hint: str = "",
    key: str = "data.path",
) -> tuple[tuple[T, ...], tuple[Skipped, ...]]:
    """The first ``limit`` usable entries of a data set, and what was passed over before them.

    Args:
        where: the data set. kind: "images" or "prompts". hint: added to the error where nothing was found at all.
        key: of the recipe, which names the data set.

    Raises:
        ValueError: one sentence when there is none.
    """
    kept: list[T] = []
    skipped: list[Skipped] = []
    for entry in found:
        if limit is not None and len(kept) == limit:
            break
        if isinstance(entry, Skipped):
            skipped.append(entry)
        else:
            kept.append(entry)
    if not kept:
        reason = f", the first because {skipped[0]}" if skipped else hint
        raise ValueError(f"{key}: {where} holds no {kind} that could be used{reason}.")
    return tuple(kept), tuple(skipped)
