"""A few of the broken recipes and files of `python -m tests.fuzz`, at every run of the tests."""

from __future__ import annotations

import signal

import pytest

from tests.fuzz import mutate
from tests.fuzz.__main__ import CHAIN, Runner, commands, files, recipes


@pytest.mark.parametrize(
    ("job", "count"), [(recipes, 10), (commands, 10), pytest.param(files, 5, marks=pytest.mark.slow)]
)
def test_broken_input_is_one_sentence(job, count, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fewstep"])
    before = signal.getsignal(signal.SIGALRM)
    runner = Runner()
    job(runner, count, 7, tmp_path, tiny)
    signal.signal(signal.SIGALRM, before)
    assert not runner.faults, "\n".join(runner.faults)
    assert runner.ends["one sentence"] > 0 and runner.ends.total() >= count


def test_most_mutations_change_something():
    """And are the same for the same seed: a fault can be looked at again."""
    import random

    texts = [mutate.recipe_text(CHAIN, random.Random(i)) for i in range(50)]
    assert texts == [mutate.recipe_text(CHAIN, random.Random(i)) for i in range(50)]
    assert len({*texts, CHAIN}) > 45
