"""Prompts without images, for methods that learn from the teacher alone: a text file, one a line, or JSON lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fewstep.data.entries import Skipped, attempt, usable
from fewstep.data.text import UTF_16, caption_in, caption_of

PROMPT_SUFFIXES = (".txt", ".jsonl")


def read_prompts(
    path: Path, limit: int | None = None, caption_column: str | None = None
) -> tuple[tuple[str, ...], tuple[Skipped, ...]]:
    """(the first ``limit`` prompts of a file, what was passed over before them).

    Args:
        caption_column: key of the prompt in JSON lines; by default text, caption or prompt.

    Raises:
        ValueError: one sentence when there is no such file, or no prompt in it.
    """
    if not path.is_file() or path.suffix.lower() not in PROMPT_SUFFIXES:
        raise ValueError(f"data.path: prompts are a file of {' or '.join(PROMPT_SUFFIXES)}, one a line, not '{path}'.")
    return usable(_prompts(path, caption_column), str(path), "prompts", limit)


def _prompts(path: Path, column: str | None) -> Iterator[str | Skipped]:
    json_lines = path.suffix.lower() == ".jsonl"
    with open(path, "rb") as file:  # whose lines end at a line feed alone
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith(UTF_16):  # whose lines would be taken for text with NUL in it
                yield Skipped(f"line 1 of {path.name}", "it is text in UTF-16, not in UTF-8: what follows is lost")
                return
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                name = f"line {number} of {path.name}"
                yield attempt(name, caption_in, line, column) if json_lines else attempt(name, caption_of, line)
