"""The report's page: self-contained, escaped, with charts that can be drawn."""

from __future__ import annotations

import math
import re
from html import unescape
from xml.etree import ElementTree

import pytest
import torch

from fewstep.evaluation.figures import FIGURES, figure
from fewstep.evaluation.tables import Table
from fewstep.reports.blocks import put_differences, put_results
from fewstep.reports.page import Page
from fewstep.reports.results import meaning, quality_table, verdict
from tests.reports.made import CAPTIONS, comparison, result


def svg_of(series, x, y, logarithmic=False):
    """The drawing of a page with one chart, or its words where there is nothing to draw."""
    page = Page("")
    page.chart(series, x, y, logarithmic)
    figure = re.search(r"<figure class=.chart.>(.*)</figure>", page.html(), re.DOTALL)[1]
    return figure[figure.find("<svg") : figure.find("</svg>") + 6] if "<svg" in figure else figure


@pytest.fixture(scope="module")
def found():
    facts = {"method": "tcd", "forward_equivalents": 1000.0}
    return comparison(
        *(result("tcd", n, 2.0 + 1 / n, facts=facts, accuracy=0.5) for n in (1, 2, 4)),
        floors={"FD": 0.25}, about="captions held out of training, against the teacher's images", count=64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def html(found):
    page = Page("A report")
    put_results(page, found)
    put_differences(page, {"a": {"training.steps": 3, "seed": 0}, "b": {"training.steps": 4, "seed": 0}})
    return page.html()


def test_a_page_refers_to_nothing_outside():
    page = Page("A <b>title</b> & more")
    page.heading("Losses")
    page.text("1 < 2")
    page.code("a: <b>")
    page.table(Table(["", "value"], [["<run>", "1.5"]]))
    page.images('an "image"', ["1 step"], {"<run>": [("<run>, 1 step", torch.rand(3, 8, 8))]})
    page.chart({"loss": [(0, 1), (1, 0.5)]}, "steps", "loss")
    html = page.html()
    without = re.sub(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+", "", html)
    assert without.count("<img") == 1 and not re.search(r"//|url\(|@import|<script|<link|<iframe", without)
    assert "A &lt;b&gt;title&lt;/b&gt; &amp; more" in html
    assert "&lt;run&gt;" in html
    assert "prefers-color-scheme: dark" in html


@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_chart_maps_values_to_pixels(logarithmic):
    svg = ElementTree.fromstring(svg_of({"a": [(0, 1), (10, 100)], "b": [(5, 10)]}, "steps", "loss", logarithmic))
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in svg.iter("circle")]
    (x0, y0), (x1, y1), (xb, yb) = circles
    assert xb == pytest.approx((x0 + x1) / 2, abs=0.2)
    share = 0.5 if logarithmic else 9 / 99
    assert (y0 - yb) / (y0 - y1) == pytest.approx(share, abs=0.01)


def test_points_that_cannot_be_plotted_are_left_out():
    svg = svg_of({"a": [(0, 1.0), (1, math.nan), (2, 0.0), (3, 2.0)]}, "steps", "loss", True)
    assert svg.count("<circle") == 2
    assert "nothing to plot" in svg_of({"a": [(0, math.nan)]}, "steps", "loss")
    ElementTree.fromstring(svg_of({"flat": [(0, 3.0), (1, 3.0)]}, "steps & more", "<loss>"))


# ---------------------------------------------------------------- results on a page


def test_the_verdict_stands_first_then_images_figures_and_settings(html, found):
    text = unescape(html)
    places = [text.index(part) for part in (
        "FD to the teacher's images; as many real images have 0.25:", *verdict(found), "<h2>Images", "<h2>Figures",
        "64 images of each; in brackets 95 % intervals", "<svg", "<h2>Differences of settings",
    )]  # fmt: skip
    assert places == sorted(places)


def rows_of(html):
    """Tables of the page: for each its head, and its rows as (name, [(title, text)])."""
    for table in re.findall(r'<div class="scroll".*?</div>', html, re.DOTALL):
        head = re.findall(r'<th scope="col"[^>]*>(.*?)</th>', table)
        body = [
            (re.search(r'<th scope="row">(.*?)</th>', row)[1], re.findall(r'<td(?: title="(.*?)")?>(.*?)</td>', row))
            for row in re.findall(r"<tr>(.*?)</tr>", table.partition("<tbody>")[2])
        ]
        yield head, body


def test_every_figure_has_a_name_a_direction_and_its_interval(html, found):
    head, body = next(rows_of(html))
    table = quality_table(found)
    arrows = {"lower": ' <span class="good">↓</span>', "higher": ' <span class="good">↑</span>', "": ""}
    assert head == [table.head[0], *(name + arrows[meaning(name).better] for name in table.head[1:])]
    assert 'FD <span class="good">↓' in html and 'accuracy <span class="good">↑' in html
    assert [name for name, _ in body] == [row[0] for row in table.rows]
    for row, (_, cells) in zip(table.rows, body, strict=True):
        assert [text for _, text in cells] == row[1:]
        named = [f"{row[0]} · {name}" if cell else "" for name, cell in zip(table.head[1:], row[1:], strict=True)]
        assert [title for title, _ in cells] == named
    for name in table.head[1:]:
        assert f'title="{meaning(name)}">{name}' in unescape(html)
        assert f"<dt>{name}</dt><dd>{meaning(name)}</dd>" in unescape(html)
    assert all(any(cell for _, cell in column) for column in zip(*(cells for _, cells in body), strict=True))


def test_the_direction_of_a_figure_by_steps_is_that_of_the_figure():
    page = Page("")
    put_results(page, comparison(*(result("tcd", 4, fd, seed=i, accuracy=0.5) for i, fd in enumerate((2.0, 3.0)))))
    by_steps = {head[0]: head[1:] for head, _ in rows_of(page.html()) if "1 step" in head[1] or "4 steps" in head[1]}
    assert by_steps.keys() == {"FD", "detail FD", "accuracy"}
    for name, columns in by_steps.items():
        arrow = {"lower": "↓", "higher": "↑"}[FIGURES[name].better]
        assert all(column.endswith(f' <span class="good">{arrow}</span>') for column in columns)
    assert figure("a figure of another version").better == ""


def test_a_column_that_applies_to_nothing_is_left_out():
    page = Page("")
    page.table(Table(["", "full", "empty"], [["a", "1", ""], ["b", "", ""]]))
    page.table(Table(["", "empty"], [["a", ""]]))
    assert [head for head, _ in rows_of(page.html())] == [["", "full"]]


def test_images_stand_under_their_steps_each_with_its_label(html, found):
    grids = re.findall(r'<figure class="grid".*?</figure>', html, re.DOTALL)
    assert [unescape(re.search(r"<figcaption>(.*?)<", grid)[1]) for grid in grids] == CAPTIONS
    first, head, *rows = re.findall(r"<tr>(.*?)</tr>", grids[0], re.DOTALL)
    assert first.count("<img") == 1 and 'alt="teacher, 50 steps: a red circle"' in first
    assert re.findall(r"<th[^>]*>(.*?)</th>", head) == ["1 step", "2 steps", "4 steps", "8 steps"]
    for name, row, images in zip(("teacher", "tcd"), rows, (4, 3), strict=True):
        steps = ("1 step", "2 steps", "4 steps", "8 steps")[:images]
        cells = [re.findall(r'alt="(.*?)"', cell) for cell in re.findall(r"<td>(.*?)</td>", row)]
        assert cells == [[f"{name}, {n}: a red circle"] for n in steps] + [[]] * (4 - images)
    assert len(set(re.findall(r'src="(.*?)"', "".join(rows)))) > 1
    assert "<details><summary>More prompts" in html and html.count("<img") == 4 * 8


def test_one_run_has_no_differences_and_equal_ones_say_so():
    for settings, said in (({"a": {"x": 1}}, None), ({"a": {"x": 1}, "b": {"x": 1}}, "Their recipes are the same.")):
        page = Page("")
        put_differences(page, settings)
        assert ("Differences" in page.html()) == (said is not None) and (said or "") in page.html()


def luminance(colour):
    """Relative luminance of #rrggbb, WCAG 2.1."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_words_and_lines_stand_out_in_light_and_dark(html, scheme):
    """4.5 for words and 3 for lines (WCAG 2.1, 1.4.3 and 1.4.11)."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    blocks = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    assert len(blocks) == 2 and "prefers-color-scheme: dark" in html[: html.index(blocks[1])]
    colours = dict(re.findall(r"--(\w+): (#\w{6});", blocks[scheme]))
    assert (luminance(colours["paper"]) < 0.1) == bool(scheme)
    for behind in ("paper", "card"):
        for word in ("ink", "faint"):
            assert contrast(colours[word], colours[behind]) >= 4.5, (word, behind)
    for i in range(6):
        assert contrast(colours[f"c{i}"], colours["paper"]) >= 3, i
