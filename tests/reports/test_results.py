"""What reports, benchmarks and evaluations say of results: verdict, tables, differences of settings, text."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.evaluation.figures import FIGURES
from fewstep.evaluation.result import mean_over_seeds
from fewstep.evaluation.tables import Table, as_text, figure_table
from fewstep.recipe.load import parse_recipe
from fewstep.recipe.resume import flat
from fewstep.reports.blocks import differences
from fewstep.reports.jobs import BenchmarkEntry, settings_of
from fewstep.reports.results import as_csv, as_markdown, in_short, meaning, quality_table, summary, verdict
from tests.reports.made import comparison, noise, result


def interval(values, centre):
    """Percentiles of a bootstrap around its plain value, by numpy; the median is the lower of the two middle values."""
    low, high = np.percentile(values.numpy(), [2.5, 97.5]) + centre - np.sort(values.numpy())[(len(values) - 1) // 2]
    return low, high


# ---------------------------------------------------------------- the verdict


def test_the_verdict_is_that_of_each_number_of_steps():
    """FD, gap and cost at 2 and at 4 steps, against the teacher at just as many steps; by numpy."""
    found = comparison(result("student", 2, 6.0, noise(7)), result("student", 4, 3.0, noise(8)))
    two, four = verdict(found)
    for sentence, n, fd, spread in ((two, 2, 6.0, noise(7)), (four, 4, 3.0, noise(8))):
        few = 1 + 40 / n
        closed = (few - fd) / (few - 1)
        resampled = ((few + noise(n)) - (fd + spread)) / ((few + noise(n)) - (1 + noise()))
        low, high = interval(resampled, closed)
        fd_low, fd_high = interval(fd + spread, fd)
        assert sentence == (
            f"student, {n} steps: FD {fd:.3g} [{fd_low:.3g}, {fd_high:.3g}], closes {100 * closed:.0f} % "
            f"[{100 * low:.0f}, {100 * high:.0f}] of the teacher's {n}-step gap; {100 / n:g} × faster "
            f"({n} network evaluations per image; teacher, 50 steps: 100)."
        )


@pytest.mark.parametrize(
    ("student", "teachers", "said"),
    [
        (result("s", 4, 11.0, noise(8)), (4,), "not distinguishable from the teacher at 4 steps: "),
        (result("s", 4, 15.0, noise(8)), (4,), "worse than the teacher at 4 steps: -40 % ["),
        (result("s", 4, 2.0, noise(8)), (1,), "]; 25 × faster (4 network evaluations"),
        (result("s", 50, 2.0, noise(8)), (50,), ", worse than the teacher at 50 steps: higher by 1"),
        (result("s", 50, 1.0, noise(8)), (50,), "(the teacher at 50 steps has no measurable gap to close)"),
        (result("s", 4, 2.0, evaluations=200.0), (1,), "; not faster (200 network evaluations per image;"),
        (result("s", 1, 2.0), (4,), "100 × faster (1 network evaluation per image; teacher, 50 steps: 100)."),
    ],
)
def test_a_verdict_says_what_was_not_reached(student, teachers, said):
    found = comparison(student, teachers=teachers)
    if teachers == (50,):  # the same teacher again
        found.results[1] = result("teacher", 50, 1.0, evaluations=100.0)
    (sentence,) = verdict(found)
    assert said in sentence and ("closes" in sentence) is False


def test_students_at_as_many_steps_are_told_apart_or_not():
    """Resampled together: alike are those whose difference to the best has an interval with 0 in it."""
    best = result("a", 4, 2.0, noise(7))
    near, far = result("b", 4, 2.1, noise(8)), result("c", 4, 3.0, noise(9), evaluations=8.0)
    sentences = verdict(comparison(far, near, best))
    assert [sentence[0] for sentence in sentences] == ["a", "b", "c"]
    low, high = interval((2.1 + noise(8)) - (2.0 + noise(7)), 0.1)
    assert low < 0 < high
    assert sentences[1].endswith(f"gap; not distinguishable from a (FD higher by 0.1 [{low:.3g}, {high:.3g}]).")
    assert "; behind a: FD higher by 1" in sentences[2] and "12.5 × faster (8 network" in sentences[2]
    many = [result(name, 4, 5.0, noise(ord(name))) for name in "defg"]
    (sentence,) = verdict(comparison(*many, best, near))
    assert sentence.endswith("; the lowest FD of 6 students at as many steps, not distinguishable from b.")
    (sentence,) = verdict(comparison(*many, best))
    assert sentence.endswith("the lowest FD of 5 students at as many steps, distinguishable from all others.")


def test_seeds_count_together():
    ones = [result("tcd", 4, fd, noise(i), seed=i, facts={"method": "tcd"}) for i, fd in enumerate((2.0, 3.0, 7.0))]
    mean = mean_over_seeds(ones)
    assert mean.figures["FD"] == 4.0 and torch.equal(mean.resampled["FD"], sum(r.resampled["FD"] for r in ones) / 3)
    (sentence,) = verdict(comparison(*ones))
    assert sentence.startswith(f"tcd, mean of 3 seeds, 4 steps: FD {mean.in_words('FD')}, closes 70 % [")
    assert verdict(comparison(ones[1]))[0].startswith("tcd, 4 steps: FD 3 [")


def test_a_teacher_by_another_sampler_is_no_student_and_a_job_called_teacher_is():
    found = comparison(result("teacher, euler", 4, 9.0), result("teacher", 4, 3.0, facts={"method": "lcm"}, seed=0))
    assert [r.figures["FD"] for r in found.students] == [3.0]


# ---------------------------------------------------------------- tables


def test_a_cell_is_that_of_its_row_and_column_and_an_empty_column_is_left_out():
    cost = {"forward_equivalents": 12345.6, "memory": None}
    found = comparison(result("student", 4, 3.0, facts=cost, accuracy=0.5), floors={"FD": 0.25})
    table = quality_table(found)
    assert table.head == ["", "FD", "FD closed", "detail FD", "detail FD closed", "accuracy", "evaluations", "cost"]
    by_name = {row[0]: dict(zip(table.head, row, strict=True)) for row in table.rows}
    student, teacher = by_name["student, 4 steps"], by_name["teacher, 4 steps"]
    assert student["FD"].startswith("3 [") and student["FD closed"].startswith("80 % [")
    assert (student["accuracy"], student["cost"], student["evaluations"]) == ("0.5", "12,346", "4")
    assert teacher["FD"].startswith("11 [") and teacher["FD closed"] == teacher["cost"] == teacher["accuracy"] == ""
    assert by_name["real images (floor)"]["FD"] == "0.25" and by_name["real images (floor)"]["cost"] == ""
    assert [row[0] for row in table.rows] == [*(r.label for r in found.results), "real images (floor)"]
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert (rows[-1]["FD"], rows[-1]["FD closed"], rows[-1]["forward_equivalents"]) == ("3.0", "0.8", "12345.6")


def test_the_good_direction_is_that_of_the_documents():
    """docs/measuring.md lists it by hand."""
    lines = (Path(__file__).parents[2] / "docs" / "measuring.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines if line.startswith("| ")]
    listed = {name.strip(): good for names, good in cells for name in names.split(",") if good in ("lower", "higher")}
    assert listed.keys() >= {"FD", "KID", "detail FD", "recall", "accuracy", "unlike teacher", "CLIP score", "spread"}
    for name, good in listed.items():
        assert FIGURES[name].better == meaning(name).better == good, name
    assert meaning("FD closed").better == meaning("accuracy of colour").better == "higher"
    assert meaning("cost").better == "lower" and meaning("evaluations").better == ""


def test_markdown_has_the_verdict_first_and_a_line_for_every_column():
    found = comparison(result("a|b", 4, 3.0, seed=0, facts={"method": "lcm"}), about="prompts of x.txt", count=64)
    text = as_markdown(found)
    assert text.startswith(f"- {verdict(found)[0]}\n") and "64 prompts of x.txt; 95 % intervals" in text
    for name in quality_table(found).head[1:]:
        assert f"\n- {name}: {meaning(name)}" in text
    assert "a\\|b" in text


def test_the_summary_of_a_figure_is_over_seeds():
    ones = [result("tcd", 4, fd, noise(i), seed=i) for i, fd in enumerate((2.0, 3.0))]
    table = summary(comparison(*ones, result("lcm", 4, 5.0, seed=0)), "FD")
    assert table.head == ["FD", "1 step", "2 steps", "4 steps", "8 steps", "50 steps"]
    assert table.rows[1] == ["tcd, seeds 0, 1", "", "", "2.50 ± 0.71", "", ""]
    assert table.rows[2][3].startswith("5 [") and [row[0] for row in table.rows[::2]] == ["teacher", "lcm, seed 0"]


# ---------------------------------------------------------------- text for a terminal


@pytest.mark.parametrize("width", [40, 80, 200])
def test_columns_of_text_are_as_wide_as_the_terminal(width, monkeypatch):
    """Every value stands once below its column's name, and on the line of its row, whatever the width."""
    monkeypatch.setenv("COLUMNS", str(width))
    label = "student of a run with a long name, LoRA 0.8, guidance 1.5, eta 0.3"
    found = comparison(result(label, 4, 3.0), result("student", 8, 2.0, accuracy=0.25), floors={"FD": 0.2})
    names = ["evaluations", "FD", "detail FD", "accuracy"]
    text = as_text(found, names)
    assert max(map(len, text.splitlines())) <= width
    table, blocks = figure_table(found, names), text.partition("\n\nOver")[0].split("\n\n")
    for i, name in enumerate(names, 1):
        (block,) = [block for block in blocks if re.search(rf"(^|  ){name}(  |$)", block.splitlines()[0])]
        head, *lines = block.splitlines()
        end = re.search(rf"(^|  ){name}(?=  |$)", head).end()
        rows = [line for line in lines if not line.startswith("  ")]  # further lines of long names are indented
        assert len(rows) == len(table.rows)
        for row, line in zip(table.rows, rows, strict=True):
            assert line[:end].endswith(row[i] or " ") or not row[i], (name, line)
            assert row[0].startswith(line[:10].strip())
    assert all(part in text.replace("\n  ", " ") for part in ("student of a run", "guidance 1.5", "(floor)"))


def test_a_benchmark_is_printed_in_short(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    jobs = [
        result(f"job-{i}", n, 2.0 + i + 1 / n, seed=0, facts={"method": "lcm"}) for i in range(6) for n in (1, 2, 4, 8)
    ]
    text = in_short(comparison(*jobs, about="captions held out of training, against the teacher's images", count=64))
    assert max(map(len, text.splitlines())) <= 80
    assert "Over 64 captions held out of training, against the teacher's images" in text.replace("\n", " ")
    assert "lower is better" in text


def test_a_table_without_rows():
    assert Table(["", "a"], []).without_empty().head == [""]
    assert Table(["", "a"], []).as_text() == "  a"


# ---------------------------------------------------------------- differences of settings


def test_differences_are_the_keys_that_differ_defaults_filled_in():
    recipes = {
        "one": {"method": "lcm", "training": {"steps": 7}},
        "two": {"method": {"name": "lcm", "num_grid_steps": 25}, "training": {"steps": 7}, "student": {"rank": 4}},
        "three": {"method": "tcd", "training": {"steps": 7, "ema_decay": 0.9}, "data": {"size": 4000}},
    }
    table = differences({name: flat(parse_recipe(recipe).as_data()) for name, recipe in recipes.items()})
    assert table.head == ["setting", "one", "two", "three"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["student.rank"] == ["32", "4", "32"] and rows["training.ema_decay"] == ["0.0", "0.0", "0.9"]
    assert rows["method.name"] == ["lcm", "lcm", "tcd"] and rows["method.guidance_embed"][2] == "–"
    assert "training.steps" not in rows and "data.size" not in rows
    sections = [key.partition(".")[0] for key in rows]
    assert sections == sorted(sections, key=list(dict.fromkeys(sections)).index)
    assert differences({"a": {"x": None, "y": [1, True]}, "b": {"x": 1, "y": [1, True]}}).rows == [["x", "empty", "1"]]


def test_settings_of_a_job_are_those_of_all_its_stages_and_seeds():
    short = BenchmarkEntry("short", "scenes-64-lightning", {"training.batch_size": 4}, seeds=(0, 1))
    long = BenchmarkEntry("long", "scenes-64-lightning", {"training.batch_size": 8}, seeds=(0, 2))
    table = differences({job.name: settings_of(list(job.runs())) for job in (short, long)})
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["seed"] == ["0, 1", "0, 2"] and rows["training.batch_size"] == ["4", "8"]
    assert rows["conditional.training.batch_size"] == ["4", "8"] if "conditional.seed" in rows else True
    assert sum(key.endswith("training.batch_size") for key in rows) == len(next(short.runs()).recipe.stages)
