"""What a resumed run may set otherwise than it was started with, and what follows: the one owner of that rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewstep.recipe.schema import Recipe

MAY_CHANGE = (
    "training.steps", "training.log_every", "training.checkpoint_every", "training.keep_checkpoints",
    "training.trackers", "pairs.path", "evaluate.path", "sample",
    "training.timeout_minutes", "training.async_checkpoints",
    "training.accumulation", "training.gradient_checkpointing", "training.fsdp", "training.offload",  # memory alone
)  # fmt: skip
"""Keys, or whole sections, that a resumed run may set otherwise than it was started with."""


def may_change(key: str) -> bool:
    """Whether a resumed run may set ``key``, dotted, otherwise than it was started with."""
    return any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE)


def refused(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key that differs and must not, with both its values; None where a run may go on with ``now``."""
    old, new = flat(before), flat(now)
    for key in sorted(old.keys() | new.keys()):
        if not may_change(key) and old.get(key) != new.get(key):
            return key, old.get(key), new.get(key)
    return None


def consequences(before: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Sentences about changes that are allowed, but after which the run is no longer one of ``recipe`` alone."""
    training = before.get("training")
    old, new = training.get("steps") if isinstance(training, Mapping) else None, recipe.training.steps
    if old is None or old == new:
        return []
    found, curve = [], f"up to here this run has followed the curve of {old} steps, from here it follows that of {new}"
    if recipe.training.lr_schedule == "cosine":
        found.append(f"training.lr_schedule cosine ends at the last step: {curve}")
    if recipe.method_class().depends_on_length(recipe.method_settings()):
        found.append(f"the method {recipe.method['name']} changes its settings on the way to the last step: {curve}")
    instead = f"Choose another --out for a run of {new} steps"
    return [f"training.steps is {new} now, and {sentence}. {instead}." for sentence in found]


def flat(data: object, prefix: str = "") -> dict[str, object]:
    """Nested data as one level of dotted keys."""
    if not isinstance(data, Mapping):
        return {prefix: data}
    found: dict[str, object] = {}
    for key, value in data.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found
