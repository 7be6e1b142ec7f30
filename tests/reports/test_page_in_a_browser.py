"""The report's page in headless Chromium, where one is installed: it draws, in both colour schemes, and asks nobody."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from fewstep.reports.page import Page

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
    page.image(Image.new("RGB", (64, 64), (200, 30, 30)), "red")
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
    assert document.count("<svg") == 1 and document.count("<img") == 1
    assert "student" in document
