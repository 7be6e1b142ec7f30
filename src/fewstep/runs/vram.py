"""`--vram N`: the settings with which a recipe fits into a GPU of N GB, at the least cost in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from fewstep.planning.hardware import SIZES, usable
from fewstep.recipe.chain import Chain, load
from fewstep.recipe.load import own_keys
from fewstep.recipe.resume import may_change
from fewstep.recipe.schema import Recipe
from fewstep.runs.plan import candidates, changed, plan
from fewstep.training.machine import in_words
from fewstep.training.trainer import check_batch

WAYS = {
    "training.gradient_checkpointing": "activations are computed again in backward: a third more time, same numbers",
    "training.accumulation": "smaller micro-batches: a GPU works a little less evenly, the same numbers",
    "training.optimizer": "moments in 8 bits: no more time, slightly other updates",
    "teacher.quantize": "the frozen base in fewer bits: more time, and predictions of the teacher that differ a little",
    "training.offload": "blocks of the base come from the host's memory: time that depends on the bus, same numbers",
}
"""What is tried, in this order, until the plan fits: the key, and what it costs."""
_LIBRARIES = {"adamw8bit": "bitsandbytes", "int8": "torchao", "nf4": "bitsandbytes"}


@dataclass(frozen=True)
class Fitted:
    """What was chosen.

    Attributes:
        overrides: as for --set.
        lines: what was chosen and why, a line each.
    """

    overrides: list[str]
    lines: list[str]


def fitted(
    source: str | Path,
    overrides: Sequence[str],
    device: str | None,
    gigabytes: int,
    processes: int = 1,
    elsewhere: bool = True,
    begun: Path | None = None,
) -> Fitted:
    """The first of `WAYS`, each as far as it helps, with which the plan of a recipe fits into a GPU of that size.

    What the user has set, by ``overrides`` or in a file of their own, stays as it is.

    Args:
        processes: how many share every batch, each on a GPU of that size.
        elsewhere: it may run on another machine; else what needs a library that is not installed here is left out.
        begun: the recipe file of a run that is resumed; what a resumed run must not change stays as it is there.

    Raises:
        ValueError: a size that no GPU has, a recipe of stages or on another device, a batch that cannot be shared, a
            recipe that fits by no means.
    """
    if gigabytes not in SIZES:
        raise ValueError(f"--vram is one of {', '.join(map(str, SIZES))}, the sizes of GPUs in GB, not {gigabytes}.")
    loaded = load(source, overrides).on_device(device)
    if isinstance(loaded, Chain):
        raise ValueError(f"--vram is for a recipe without stages, and {source} has some: set each stage's own keys.")
    recipe, own, room = _share(loaded, processes), own_keys(source, overrides), usable(gigabytes)
    if torch.device(recipe.training.device).type != "cuda":
        raise ValueError(
            f"--vram is for training on a GPU, and {source} trains on {recipe.training.device}: add --device cuda, or "
            "leave --vram out."
        )
    kept = {} if begun is None else _kept(load(begun), own)
    chosen = {key: _text(value) for key, value in kept.items() if _value(recipe, key) != value}
    for key in chosen:
        recipe = changed(recipe, key, kept[key])
    planned = plan(recipe, timed=False)
    if planned.estimate is None:
        raise ValueError(planned.why_not)
    peak = planned.peak
    lines = [f"--vram {gigabytes}: {source} needs {in_words(peak)} as it is, and such a GPU has {in_words(room)}"]
    lines += [f"{key}={value}: as this run was begun" for key, value in chosen.items()]
    lacked: dict[str, str] = {}
    for key, cost in WAYS.items():
        if key in kept:
            continue
        while peak > room and key not in own and (value := _next(recipe, key, elsewhere, lacked)) is not None:
            planned = plan(changed(recipe, key, value), timed=False)
            if planned.peak >= peak:
                break
            recipe, peak, chosen[key] = planned.recipe, planned.peak, _text(value)
        if key in chosen:
            lines.append(f"{key}={chosen[key]}: {in_words(peak)}; {cost}")
    lines += [f"{value} is left out: {why}" for value, why in lacked.items()]
    if peak > room:
        taken = f" even with {' and '.join(f'{key}={value}' for key, value in chosen.items())}" if chosen else ""
        held = [
            f"leave out {key}, which you have set" for key in WAYS if key in own and key in dict(candidates(recipe))
        ]
        absent = [f"install what {value} needs ({why})" for value, why in lacked.items()]
        raise ValueError(
            f"{source} needs {in_words(peak)}{taken}, and a GPU of {gigabytes} GB has {in_words(room)}: take a larger "
            f"one, {', '.join(['smaller images (teacher.size)', *held, *absent])}, or a smaller student.rank."
        )
    return Fitted([f"{key}={value}" for key, value in chosen.items()], lines)


def _share(recipe: Recipe, processes: int) -> Recipe:
    """The recipe with one process's share of the batch, whose divisors are those by which the whole can be split."""
    check_batch(recipe.training, processes)
    return recipe.model_copy(
        update={"training": replace(recipe.training, batch_size=recipe.training.batch_size // processes)}
    )


def _kept(begun: Recipe | Chain, own: set[str]) -> dict[str, Any]:
    """What a run that has begun must go on with, of `WAYS`; {} for one of stages, which `fitted` refuses."""
    if isinstance(begun, Chain):
        return {}
    return {key: _value(begun, key) for key in WAYS if not (key in own or may_change(key))}


def _next(recipe: Recipe, key: str, elsewhere: bool, lacked: dict[str, str]) -> Any:
    """The next value of ``key`` that may lower the peak and whose library is there; notes others in ``lacked``."""
    value = dict(candidates(recipe)).get(key)
    library = _LIBRARIES.get(str(value))
    if elsewhere or library is None or find_spec(library) is not None:
        return value
    lacked[f"{key}={value}"] = f"{library} is not installed here: pip install 'fewstep[lowmem]'"
    return _next(changed(recipe, key, value), key, elsewhere, lacked)


def _value(recipe: Recipe, key: str) -> Any:
    return attrgetter(key)(recipe)


def _text(value: Any) -> str:
    """A value as for --set."""
    return "null" if value is None else str(value).lower()
