"""When the memory of a run does not suffice: one sentence with sizes, and the changes that help *this* recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewstep.recipe.schema import Recipe
from fewstep.runs.plan import cheaper, plan
from fewstep.training import checkpoint
from fewstep.training.machine import asked_for, in_words, is_out_of_memory, memory
from fewstep.training.run_files import RunFiles


class OutOfMemory(ValueError):
    """A run did not fit into memory; the message gives the missing size and the changes that help."""


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
        missing = _missing(recipe.training.device, error)
        error.__traceback__ = None  # its frames hold the tensors of the step
        newest = checkpoint.latest(RunFiles(folder).checkpoints)
        saved = f"The last checkpoint is {newest}." if newest else "No checkpoint was written yet."
        raise OutOfMemory(f"{missing} {_what_helps(recipe)} {saved}") from None


def _missing(device: str, error: BaseException) -> str:
    size, room = asked_for(error), memory(device)
    requested = "" if size is None else f": {in_words(size)} more were asked for"
    free = "" if room is None else f" ({in_words(room[0])} of {in_words(room[1])} are free)"
    return f"Out of memory on {device}{requested}{free}."


def _what_helps(recipe: Recipe) -> str:
    """Changes with the memory that each saves, from a memory trace; without figures where the trace fails too."""
    try:
        planned = plan(recipe, timed=False)
        changes = cheaper(planned)
    except (ValueError, RuntimeError, MemoryError):
        return "Raise training.accumulation, or turn training.gradient_checkpointing on."
    needs = planned.estimate
    size = "" if needs is None else f"This run needs about {in_words(needs.peak)} at its peak. "
    if not changes:
        return f"{size}Nothing in this recipe would lower that: free some memory, or take a larger device."
    keys = [change.key for change in changes if change.same_run]
    resume = [f"with {' and '.join(keys)} a run may be resumed"] if keys else []
    other = ["the others need another --out"] if len(keys) < len(changes) else []
    listed = ", ".join(map(str, changes))
    return f"{size}What helps, most effective first: {listed}; {', '.join(resume + other)}."
