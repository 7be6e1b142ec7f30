"""The catalogue of planted defects fits the library as it is; ``python -m tests.mutants`` runs them."""

import ast
import re
from functools import cache

import pytest

from tests.mutants.catalogue import CATALOGUE
from tests.mutants.mutant import ROOT, Mutant, marked


@cache
def functions(path):
    return {n.name for n in ast.parse((ROOT / path).read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef)}


def library(file):
    text = (ROOT / "src" / "fewstep" / file).read_text(encoding="utf-8")
    return text, parsed(file, text)


def parsed(file, text):
    """Python without its comments, which compiles; the text of any other file."""
    return ast.dump(ast.parse(text), annotate_fields=False) if file.endswith(".py") else text


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in CATALOGUE}))
def test_defects_can_be_planted_and_their_tests_exist(file):
    text, tree = library(file)
    for mutant in (mutant for mutant in CATALOGUE if mutant.file == file):
        planted = mutant.plant(text)  # raises unless its snippet stands there exactly once
        assert parsed(file, planted) != tree, mutant.name  # it compiles, and is more than a comment
        path, name = re.fullmatch(r"(tests/[\w/]+\.py)::(test_\w+)(?:\[.+\])?", mutant.test).groups()
        assert name in functions(path), mutant.name


def test_a_defect_knows_what_its_test_needs():
    """A skipped test passes: without the packages its defect would count as one that survived."""
    tables, trackers = "tests/data/test_tables.py::test_x", "tests/training/test_trackers.py"
    assert marked(tables) == {"pyarrow", "datasets"} and marked(f"{trackers}::test_x[a]") == frozenset()
    assert marked(f"{trackers}::test_the_real_trackio_if_it_is_here[0]") == {"trackio"}
    away = Mutant("room: wrong", "a.py", "x", "y", f"{trackers}::test_x", needs=("sys", "no_such_package"))
    assert away.missing == "no_such_package"
    assert not Mutant("room: wrong", "a.py", "x", "y", f"{trackers}::test_x", needs=("sys",)).missing


def test_names_are_sentences_of_their_own():
    names = [mutant.name for mutant in CATALOGUE]
    assert len(set(names)) == len(names) >= 25
    assert all(re.match(r"[a-z][a-z -]*: \w.*[^.\s]$", name) for name in names)


def test_a_snippet_must_stand_there_exactly_once():
    with pytest.raises(ValueError, match=r"^'room: wrong': its snippet stands 2 times in a\.py\.$"):
        Mutant("room: wrong", "a.py", "x", "y", "tests/test_a.py::test_a").plant("x + x")
