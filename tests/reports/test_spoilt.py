"""Runs that are trained here and now: the spoilt ones are told by name, the others are left alone."""

import contextlib

import pytest

from fewstep.reports.diagnose import diagnose
from fewstep.training.trainer import NotFinite
from tests.reports.spoilt import HEALTHY, SPOILT, trainer


@pytest.mark.parametrize(
    ("case", "seed"),
    [
        pytest.param(case, seed, marks=() if (case, seed) == ("duel", 0) else pytest.mark.slow)
        for case, seed in [*((case, 0) for case in HEALTHY), ("duel", 1), ("match", 1)]
    ],
)
def test_healthy_runs_are_called_healthy(case, seed, tmp_path):
    method, settings = HEALTHY[case]
    trainer(method, tmp_path, seed, **settings).run()
    found = diagnose(tmp_path)
    assert found.healthy, str(found)
    assert len(found.checked) >= 9


QUICK = ("data moved", "no adversary", "rate next to nothing")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in SPOILT]
)
def test_what_is_spoilt_is_named_first(case, tmp_path):
    method, settings, name = SPOILT[case]
    with contextlib.suppress(NotFinite):
        trainer(method, tmp_path, **settings).run()
    found = diagnose(tmp_path)
    assert not found.healthy
    assert found.findings[0].name == name, str(found)
