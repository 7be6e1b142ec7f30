"""Settings and fixtures shared by all tests: one thread (the machine may be shared; sums come out in one order); Ctrl-C
counts; a pipeline folder with random weights, and overrides of a recipe that distil it in seconds."""

import gc
import signal
from importlib.util import find_spec

import pytest
import torch

torch.set_num_threads(1)
gc.set_threshold(10_000, 20, 20)  # as the command line: loading libraries takes a fifth less

# A shell starts its background jobs with Ctrl-C ignored, and they would pass that on to the programs under test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--extras", action="store_true", help="fail, not skip, where a package of an extra is missing")


def pytest_runtest_setup(item):
    """A test that needs packages of an extra is skipped where one is missing, and fails under ``--extras``."""
    missing = [name for mark in item.iter_markers("needs") for name in mark.args if find_spec(name) is None]
    if missing:
        absent = pytest.fail if item.config.getoption("--extras") else pytest.skip
        absent(f"{missing[0]} is not installed: `make extras` does it")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The architecture of scenes-64 with random weights, as a diffusers folder."""
    from fewstep.scenes64 import architecture
    from fewstep.scenes64.scenes import WORDS

    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    architecture.save_pipeline(architecture.build_pipeline(WORDS), folder)
    return folder


@pytest.fixture
def few_resamplings(monkeypatch):
    """A tenth of the resamplings: those of a few images take most of the time of a test that looks at no interval."""
    monkeypatch.setattr("fewstep.evaluation.measured.RESAMPLINGS", 20)


@pytest.fixture(scope="session")
def short(tiny):
    """Overrides that make a shipped recipe short."""
    from tests.command_line import SHORT

    return [f"teacher.path={tiny}", *SHORT]
