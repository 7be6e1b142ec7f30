"""Tests that need packages of an extra: skipped where one is missing, but never in `make test-all`."""

import re
from types import SimpleNamespace

import pytest

from tests.conftest import pytest_runtest_setup
from tests.mutants.mutant import ROOT


def item(extras, *needed):
    config = SimpleNamespace(getoption=lambda name: {"--extras": extras}[name])
    marks = [SimpleNamespace(args=needed)]
    return SimpleNamespace(config=config, iter_markers=lambda name: marks if name == "needs" else [])


def test_what_is_missing_is_a_skip_by_itself_and_an_error_with_all_extras():
    for extras in (False, True):
        pytest_runtest_setup(item(extras, "sys", "json"))
    with pytest.raises(pytest.skip.Exception, match="no_such_package is not installed: `make extras` does it"):
        pytest_runtest_setup(item(False, "sys", "no_such_package"))
    with pytest.raises(pytest.fail.Exception, match="no_such_package is not installed"):
        pytest_runtest_setup(item(True, "sys", "no_such_package"))


def test_the_commands_that_must_skip_nothing_install_every_extra():
    """`make test-all` names every other skip in its summary (-rs); planted defects are seen by tests with extras."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    rules = {name: body for name, body in re.findall(r"^([\w$()/.-]+):(.*(?:\n\t.*)*)", text, re.M)}
    assert "extras" in rules["test-all"] and "--extras -rs" in rules["test-all"]
    assert rules["mutants"].split()[0] == "extras"
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = set(
        re.findall(r"^(\w+) = \[", project.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.M)
    )
    assert "$(VENV)/.docs" in rules["test-all"] and "$(VENV)/.extras" in rules["extras"]
    installed = [re.search(r"\.\[([\w,]+)\]", rules[f"$(VENV)/.{name}"])[1].split(",") for name in ("extras", "docs")]
    with_dev = set(re.search(r"fewstep\[([\w,]+)\]", project)[1].split(","))  # which `make install` has brought already
    assert named - {"dev"} - with_dev == {*installed[0], *installed[1]}
