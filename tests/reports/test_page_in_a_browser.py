"""The report's page in headless Chromium, where one is installed: it draws, in both colour schemes, and asks nobody."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import escape

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.reports.blocks import put_differences, put_results
from fewstep.reports.page import Page
from tests.reports.made import comparison, result

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=900,900",
]  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    page = Page("A report")
    page.heading("Images")
    red = torch.tensor([200, 30, 30])[:, None, None].expand(3, 64, 64) / 255
    page.images("red", ["4 steps"], {"teacher": [("teacher", red)]})
    page.chart({"teacher": [(1, 4), (2, 2), (4, 1)], "student": [(1, 2), (4, 1)]}, "steps", "FD", logarithmic=True)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page.html(), encoding="utf-8")
    return path


def chromium(page, folder, *more):
    done = subprocess.run(
        [CHROMIUM, *QUIET, f"--user-data-dir={folder / 'profile'}", *more, page.as_uri()],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


@pytest.mark.parametrize("scheme, dark", [("light", False), ("dark", True)])
def test_it_is_drawn_in_both_colour_schemes(page, tmp_path, scheme, dark):
    shot = tmp_path / "shot.png"
    flags = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    chromium(page, tmp_path, f"--screenshot={shot}", *flags)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert (pixels[2, 2].mean() < 60) == dark  # the paper
    assert (np.abs(pixels - [200, 30, 30]).sum(-1) < 12).sum() >= 64 * 64 * 0.9  # the image
    assert len(np.unique(pixels[400:].reshape(-1, 3), axis=0)) > 10  # the chart, with lines of two colours


def test_the_charts_and_words_are_in_the_document(page, tmp_path):
    document = chromium(page, tmp_path, "--dump-dom")
    assert document.count('role="img"') == 1 and document.count("<img") == 1
    assert "student" in document


WIDTHS = """<script>
const left = one => one.getBoundingClientRect().left;
const tables = [...document.querySelectorAll(".scroll")];
for (const one of tables) one.scrollLeft = 150;
const moved = tables.map(one => Math.abs(left(one.querySelector("tbody th")) - left(one)));
const wide = tables.filter(one => one.scrollWidth > one.clientWidth);
top.document.title = [innerWidth, document.scrollingElement.scrollWidth, wide.length, Math.max(...moved)].join(" ");
</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_a_phone_scrolls_its_tables_and_not_the_page(width, tmp_path):
    """Long names, many columns, long settings: tables alone are wider than the screen, and their first column stays."""
    page, facts = Page("A report of a_run_with_a_name_that_has_no_space_to_be_broken_at"), {"method": "tcd"}
    more = dict.fromkeys(("KID", "recall", "accuracy", "to teacher", "unlike teacher", "perceptual", "spread"), 0.123)
    runs = [f"a_run_with_a_name_that_has_no_space_to_be_broken_at_{i}" for i in range(3)]
    put_results(page, comparison(*(result(run, n, 3.0, facts=facts, **more) for run in runs for n in (1, 2, 4, 8))))
    put_differences(page, {run: {"teacher.path": "/a/very/long/path" * 9, "seed": i} for i, run in enumerate(runs)})
    page.code("x" * 400)
    inside = page.html().replace("</body>", WIDTHS + "</body>").replace("<details", "<details open")
    path = tmp_path / "frame.html"  # a window is never narrower than 500 pixels, a frame is
    path.write_text(f'<iframe style="width: {width}px; border: 0" srcdoc="{escape(inside)}"></iframe>', "utf-8")
    document = chromium(path, tmp_path, "--dump-dom", "--window-size=1400,800")
    inner, whole, wide, moved = map(float, re.search(r"<title>([\d. ]+)</title>", document)[1].split())
    assert inner == width and whole <= width
    assert wide >= 1 and moved < 1
