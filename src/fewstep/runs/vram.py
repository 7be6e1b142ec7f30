"""`--vram N`: the settings with which a recipe fits into a GPU of N GB, at the least cost in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.planning.hardware import SIZES, usable
from fewstep.recipe.chain import Chain, load
from fewstep.recipe.load import own_keys
from fewstep.runs.plan import candidates, changed, plan
from fewstep.training.machine import in_words

WAYS = {
    "training.gradient_checkpointing": "activations are computed again in backward: a third more time, same numbers",
    "training.accumulation": "smaller micro-batches: a GPU works a little less evenly, the same numbers",
    "training.optimizer": "moments in 8 bits: no more time, slightly other updates",
    "teacher.quantize": "the frozen base in fewer bits: more time, and predictions of the teacher that differ a little",
    "training.offload": "blocks of the base come from the host's memory: time that depends on the bus, same numbers",
}
"""What is tried, in this order, until the plan fits: the key, and what it costs."""


@dataclass(frozen=True)
class Fitted:
    """What was chosen.

    Attributes:
        overrides: as for --set.
        lines: what was chosen and why, a line each.
    """

    overrides: list[str]
    lines: list[str]


def fitted(source: str | Path, overrides: Sequence[str], device: str | None, gigabytes: int) -> Fitted:
    """The first of `WAYS`, each as far as it helps, with which the plan of a recipe fits into a GPU of that size.

    What the user has set, by ``overrides`` or in a file of their own, stays as it is.

    Raises:
        ValueError: a size that no GPU has, a recipe of stages or on another device, a recipe that fits by no means.
    """
    if gigabytes not in SIZES:
        raise ValueError(f"--vram is one of {', '.join(map(str, SIZES))}, the sizes of GPUs in GB, not {gigabytes}.")
    loaded = load(source, overrides).on_device(device)
    if isinstance(loaded, Chain):
        raise ValueError(f"--vram is for a recipe without stages, and {source} has some: set each stage's own keys.")
    recipe, own, room = loaded, own_keys(source, overrides), usable(gigabytes)
    if torch.device(recipe.training.device).type != "cuda":
        raise ValueError(
            f"--vram is for training on a GPU, and {source} trains on {recipe.training.device}: add --device cuda, or "
            "leave --vram out."
        )
    planned = plan(recipe, timed=False)
    if planned.estimate is None:
        raise ValueError(planned.why_not)
    peak, chosen = planned.peak, dict[str, str]()
    lines = [f"--vram {gigabytes}: {source} needs {in_words(peak)} as it is, and such a GPU has {in_words(room)}"]
    for key, cost in WAYS.items():
        while peak > room and key not in own and (value := dict(candidates(recipe)).get(key)) is not None:
            planned = plan(changed(recipe, key, value), timed=False)
            if planned.peak >= peak:
                break
            recipe, peak, chosen[key] = planned.recipe, planned.peak, str(value).lower()
        if key in chosen:
            lines.append(f"{key}={chosen[key]}: {in_words(peak)}; {cost}")
    if peak > room:
        taken = f" even with {' and '.join(f'{key}={value}' for key, value in chosen.items())}" if chosen else ""
        raise ValueError(
            f"{source} needs {in_words(peak)}{taken}, and a GPU of {gigabytes} GB has {in_words(room)}: take a larger "
            "one, smaller images (teacher.size), or a smaller student.rank."
        )
    return Fitted([f"{key}={value}" for key, value in chosen.items()], lines)
