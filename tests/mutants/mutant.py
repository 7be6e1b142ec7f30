"""A planted defect."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
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
        needs: packages of extras without which that test is skipped, beside those of its marks.
    """

    name: str
    file: str
    old: str
    new: str
    test: str
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> str:
        """A package that its test needs and that is not installed; empty where all are."""
        return next((name for name in sorted({*self.needs, *marked(self.test)}) if find_spec(name) is None), "")

    def plant(self, text: str) -> str:
        """The file's text with the defect in it.

        Raises:
            ValueError: when the library has changed and the snippet no longer stands there exactly once.
        """
        if text.count(self.old) != 1:
            raise ValueError(f"'{self.name}': its snippet stands {text.count(self.old)} times in {self.file}.")
        return text.replace(self.old, self.new)


@cache
def marked(test: str) -> frozenset[str]:
    """The packages in the ``needs`` marks of a test and of its file."""
    path, _, name = test.partition("[")[0].partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    marks = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "pytestmark"]
    marks += [d for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name for d in n.decorator_list]
    calls = [call for mark in marks for call in ast.walk(mark) if isinstance(call, ast.Call)]
    found = [arg for call in calls if ast.unparse(call.func) == "pytest.mark.needs" for arg in call.args]
    return frozenset(arg.value for arg in found if isinstance(arg, ast.Constant))


def planted(file: str, tests: str, *rows: tuple[str, str, str, str], needs: tuple[str, ...] = ()) -> list[Mutant]:
    """Rows (name, old, new, test) of one file; a test is named in ``tests`` unless it brings its own path."""
    return [
        Mutant(name, file, old, new, test if test.startswith("tests/") else f"tests/{tests}::{test}", needs)
        for name, old, new, test in rows
    ]
