"""The tables of plans on the methods' pages: every recipe is there, with what its plan says now."""

import json

import pytest

from benchmarks import pages, plans

KEPT = json.loads(plans.RESULTS.read_text(encoding="utf-8"))
NAMES = [name for kind in plans.TABLES for name in plans.recipes(kind)]


def test_every_recipe_of_these_methods_is_planned():
    assert set(NAMES) == KEPT.keys() and len(NAMES) > 40


@pytest.mark.parametrize("kind", plans.TABLES)
def test_a_page_has_the_table_that_the_command_writes(kind):
    text = plans.page(kind).read_text(encoding="utf-8")
    assert pages.where(text, f"plans {kind}").group() == plans.table(kind, KEPT)


def test_a_page_without_a_mark_is_told_so():
    with pytest.raises(ValueError, match="has no table behind the mark <!-- plans scm -->: put one there"):
        pages.where("## Cost\n\n| Recipe |\n", "plans scm")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("scenes-64", "sd15"))])
def test_the_table_is_the_plan(name):
    """Of the small teachers; the others take twenty seconds each: `python -m benchmarks.plans --again`."""
    assert plans.row(name) == KEPT[name]
