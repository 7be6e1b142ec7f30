"""The tables of methods at one cost: the pages have what was measured, and the reckoning is that of a few seeds."""

import pytest
import torch

from benchmarks import kept, one_cost, pages
from fewstep.evaluation.result import Result

JOBS = one_cost.by_job(kept.read(one_cost.KEPT))
TABLES = one_cost.tables(JOBS)


def result(fd, steps=4):
    values = torch.linspace(-1, 1, 201).double()
    resampled = {"FD": fd * (1 + values / 10), "spread": 1 + values}
    return Result("a", steps, torch.empty(0), {"FD": fd, "spread": 1.0}, resampled=resampled)


@pytest.mark.parametrize(("page", "mark"), TABLES, ids=[mark for _, mark in TABLES])
def test_a_page_has_the_figures_that_were_measured(page, mark):
    text = page.read_text(encoding="utf-8")
    assert pages.where(text, f"at one cost: {mark}").group() == TABLES[page, mark]


def test_seeds_are_put_together_by_job_and_steps():
    found = {"tcd-s1/4": result(3.0), "tcd-s0/4": result(1.0), "dmd2-1step-s0/1": result(2.0, 1)}
    found |= {"teacher/ddim-4": result(5.0), "teacher/euler-4": result(6.0)}
    jobs = one_cost.by_job(found)
    assert set(jobs) == {("tcd", 4), ("dmd2-1step", 1), ("teacher", 4)}
    assert [r.figures["FD"] for r in jobs["tcd", 4]] == [1.0, 3.0]
    assert one_cost.cell(jobs["tcd", 4], "FD") == "2.000 ± 1.414" and one_cost.cell(jobs["teacher", 4], "FD") == "5.000"


@pytest.mark.parametrize(("mine", "in_words"), [(1.0, "+1.000 [+0.905, +1.095]"), (3.0, "-1.000 [-1.095, -0.905]")])
def test_better_is_lower_and_the_best_is_of_the_others(mine, in_words):
    """The teacher is none of them, nor is the job itself."""
    found = {"a-s0/4": result(mine), "b-s0/4": result(2.0), "c-s0/4": result(9.0), "teacher/ddim-50": result(0.5, 50)}
    said = one_cost.beside_best(one_cost.by_job(found), "a")
    assert said == f"a at 4 steps: better than b by FD {in_words}; spread +0 % of the teacher's"
