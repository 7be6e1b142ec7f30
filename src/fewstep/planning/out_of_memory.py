"""When the memory of a run does not suffice: one sentence with sizes, and what helps *this* recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewstep.planning.plan import Change, cheaper, plan
from fewstep.recipe.schema import Recipe
from fewstep.training import checkpoint
from fewstep.training.machine import asked_for, in_words, is_out_of_memory, memory
from fewstep.training.run_files import RunFiles


class OutOfMemory(ValueError):
    """A run did not fit into memory; the message says how much was missing and what to change."""


@contextmanager
def explained(recipe: Recipe, folder: Path) -> Iterator[None]:
    """Within this block, running out of memory becomes one sentence about ``recipe``.

    Raises:
        OutOfMemory: in place of what PyTorch or Python raises.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = _missing(recipe.training.device, error)
        error.__traceback__ = None  # its frames hold the tensors of the step
        raise OutOfMemory(f"{said} {_advice(recipe)} {_where(folder)}") from None


def _missing(device: str, error: BaseException) -> str:
    size, room = asked_for(error), memory(device)
    wanted = "" if size is None else f": {in_words(size)} more were asked for"
    there = "" if room is None else f" ({in_words(room[0])} of {in_words(room[1])} are free)"
    return f"Out of memory on {device}{wanted}{there}."


def _advice(recipe: Recipe) -> str:
    """What helps, by rehearsing the changes; without figures where the rehearsal fails too."""
    try:
        planned = plan(recipe, timed=False)
        changes = cheaper(planned)
    except (ValueError, RuntimeError, MemoryError):
        return "Raise training.accumulation, or turn training.gradient_checkpointing on."
    needs = planned.estimate
    size = "" if needs is None else f"This run needs about {in_words(needs.peak)} at its peak. "
    if not changes:
        return f"{size}Nothing in this recipe would lower that: free some memory, or take a larger device."
    return f"{size}What helps, most effective first: {', '.join(map(str, changes))}; {_kept(changes)}"


def _kept(changes: list[Change]) -> str:
    keys = [change.key for change in changes if change.same_run]
    rest = "the others need another --out" if len(keys) < len(changes) else ""
    kept = f"with {' and '.join(keys)} a run may go on by --resume" if keys else ""
    return ", ".join(filter(None, (kept, rest))) + "."


def _where(folder: Path) -> str:
    safe = checkpoint.latest(RunFiles(folder).checkpoints)
    return f"The last checkpoint is {safe}." if safe else "No checkpoint was written yet."
