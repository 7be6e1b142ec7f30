"""Prompts without pictures, for methods that learn from the teacher alone: a text file, one a line, or JSON lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fewstep.data.pictures import Skipped, caption_in, caption_of

KINDS = (".txt", ".jsonl")


def read_prompts(
    path: Path, limit: int | None = None, caption_column: str | None = None
) -> tuple[tuple[str, ...], tuple[Skipped, ...]]:
    """(the first ``limit`` prompts of a file, what was passed over before them).

    Args:
        caption_column: key of the prompt in JSON lines; by default text, caption or prompt.

    Raises:
        ValueError: one sentence when there is no such file, or no prompt in it.
    """
    if not path.is_file() or path.suffix.lower() not in KINDS:
        raise ValueError(f"data.path: prompts are a file of {' or '.join(KINDS)}, one a line, not '{path}'.")
    prompts: list[str] = []
    skipped: list[Skipped] = []
    for number, line in _lines(path):
        if limit is not None and len(prompts) == limit:
            break
        try:
            prompts.append(caption_of(line) if path.suffix.lower() == ".txt" else caption_in(line, caption_column))
        except ValueError as error:
            skipped.append(Skipped(f"line {number} of {path.name}", str(error)))
    if not prompts:
        reason = f", the first because {skipped[0]}" if skipped else ""
        raise ValueError(f"data.path: {path} holds no prompts that could be used{reason}.")
    return tuple(prompts), tuple(skipped)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line
