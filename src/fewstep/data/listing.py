"""A data set is listed once by each process: a folder of a million images takes minutes, and many parts ask for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

T = TypeVar("T")
_LISTED: ContextVar[dict[Hashable, Any] | None] = ContextVar("listed", default=None)


@contextmanager
def listed_once() -> Iterator[None]:
    """Within this block, and those inside it, `once` remembers."""
    if _LISTED.get() is not None:
        yield
        return
    before = _LISTED.set({})
    try:
        yield
    finally:
        _LISTED.reset(before)


def once(key: Hashable, make: Callable[[], T]) -> T:
    """``make()``; within `listed_once` it is called once for each ``key``."""
    known = _LISTED.get()
    if known is None:
        return make()
    if key not in known:
        known[key] = make()
    return cast(T, known[key])


def forget() -> None:
    """Free the memory of what was listed, once nobody will ask for it: the images of large data sets are gigabytes."""
    (_LISTED.get() or {}).clear()
