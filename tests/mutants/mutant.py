"""A planted defect."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Mutant:
    """One line of the library changed for the worse.

    Attributes:
        name: what is wrong, as a sentence that begins with where.
        file: under src/fewstep.
        old, new: a snippet that stands exactly once in the file, and the defect that replaces it.
        test: node id of the test that must fail, from the repository's root.
    """

    name: str
    file: str
    old: str
    new: str
    test: str

    def plant(self, text: str) -> str:
        """The file's text with the defect in it.

        Raises:
            ValueError: when the library has changed and the snippet no longer stands there exactly once.
        """
        if text.count(self.old) != 1:
            raise ValueError(f"'{self.name}': its snippet stands {text.count(self.old)} times in {self.file}.")
        return text.replace(self.old, self.new)


def planted(file: str, tests: str, *rows: tuple[str, str, str, str]) -> list[Mutant]:
    """Rows (name, old, new, test) of one file; a test is named in ``tests`` unless it brings its own path."""
    return [
        Mutant(name, file, old, new, test if test.startswith("tests/") else f"tests/{tests}::{test}")
        for name, old, new, test in rows
    ]
