"""The report's page: self-contained, escaped, with charts that can be drawn."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from fewstep.reports.page import Page


def svg_of(series, x, y, logarithmic=False):
    """The one figure of a page with one chart, without the figure's own tag."""
    page = Page("")
    page.chart(series, x, y, logarithmic)
    return re.search(r"<figure>(.*)</figure>", page.html(), re.DOTALL)[1]


def test_a_page_refers_to_nothing_outside():
    page = Page("A <b>title</b> & more")
    page.heading("Losses")
    page.text("1 < 2")
    page.code("a: <b>")
    page.table(["", "value"], [["<run>", "1.5"]])
    page.image(Image.new("RGB", (8, 8)), 'an "image"')
    page.chart({"loss": [(0, 1), (1, 0.5)]}, "steps", "loss")
    html = page.html()
    assert not re.search(r"(https?:)?//(?!www\\.w3)", html.replace("data:image/png;base64,", ""))
    assert "<script" not in html
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
