"""What runs in the process of one mutant."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.mutants.mutant import ROOT

FOREIGN, UNREADABLE = 77, 78


class Collected:
    """Tells a test file that cannot even be loaded from a test that fails."""

    whole = True

    def pytest_collectreport(self, report) -> None:
        self.whole &= not report.failed


def run_tests(source: str, tests: list[str], output: str) -> None:
    """In a process of its own: pytest on fewstep as it stands in ``source``; exits with pytest's code."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.chdir(ROOT)
    os.environ |= {  # for processes that the tests start
        "PYTHONPATH": os.pathsep.join([source, str(ROOT)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(Path(output).parent / "hypothesis"),
    }
    sys.dont_write_bytecode = True
    sys.path[:0] = [source, str(ROOT)]
    import fewstep

    if not Path(fewstep.__file__).resolve().is_relative_to(Path(source).resolve()):
        print(f"fewstep was imported from {fewstep.__file__}, not from {source}")
        sys.exit(FOREIGN)
    import pytest

    collected = Collected()
    code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[collected]))
    sys.exit(code if collected.whole else UNREADABLE)
