"""`fewstep app`: the images it generates, and its page in headless Chromium, if gradio and Chromium are there."""

from __future__ import annotations

import base64
import io
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep.evaluation.grids import to_images
from fewstep.inference import app
from fewstep.inference.load import load_model
from tests.command_line import inside
from tests.export.test_publish import finished

DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    return finished(tmp_path_factory.mktemp("app") / "runs" / "mine", tiny)


def test_a_row_of_the_student_and_one_of_its_teacher(run, tiny):
    picture, words = app.generate(str(run), "", "a red star\n\n two shapes \n", 2, 3, 5)
    grid = np.asarray(picture)
    for name, steps in ((run, 2), (tiny, 5)):  # both from the same seed, enlarged three times
        for drawn in to_images(load_model(str(name)).generate(["a red star", "two shapes"], steps, seed=3).images):
            assert holds(grid, np.asarray(drawn.resize((192, 192), Image.Resampling.NEAREST)))
    assert f"**{run}**: lcm, timesteps 999, 499; guidance 1; seed 3" in words
    assert f"**teacher, {tiny}**: ddim, timesteps 999, 799, 599, 399, 199; guidance 3; seed 3" in words
    alone, words = app.generate(str(run), "", "a red star", 0, 0, 0)
    assert alone.size[1] < 250 and "teacher" not in words and "timesteps 999, 759, 499, 259" in words


def holds(grid, part):
    """Whether ``part`` stands somewhere in ``grid``."""
    height, width, _ = part.shape
    rows, columns, _ = grid.shape
    corners = (grid[: rows - height + 1, : columns - width + 1] == part[0, 0]).all(-1)
    return any((grid[y : y + height, x : x + width] == part).all() for y, x in zip(*np.nonzero(corners), strict=True))


def test_what_is_offered(run, tmp_path):
    known = app.models(run.parent)
    assert known[0] == str(run) and "scenes-64" in known and "sdxl-lightning-4step-lora" in known
    assert app.models(tmp_path)[0] == "scenes-64"


@pytest.mark.parametrize("text, match", [("", "one prompt a line"), ("\n".join("abcdefghijklmnopq"), "16 at most")])
def test_prompts_without_sense(text, match, run):
    with pytest.raises(ValueError, match=match):
        app.generate(str(run), "", text, 1, 0, 0)


def test_without_gradio_it_is_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, errors = inside(monkeypatch, capsys, tmp_path, "app")
    assert (code, errors) == (2, "Error: fewstep app needs gradio: pip install 'fewstep[app]'.\n")


# ---------------------------------------------------------------- in a browser


class Browser:
    """As much of the WebDriver protocol as is needed here."""

    def __init__(self, folder):
        self.port = free_port()
        self.process = subprocess.Popen([DRIVER, f"--port={self.port}"], stdout=subprocess.DEVNULL)
        options = {
            "args": ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                     "--disable-background-networking", "--disable-component-update", "--disable-sync",
                     "--window-size=1200,1000", f"--user-data-dir={folder}"],
        }  # fmt: skip
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL"}}
        self.path = ""
        answer = wait(lambda: self.ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}}))
        self.path = f"/session/{answer['sessionId']}"

    def ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{self.path}{path}", data, method=method)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["value"]

    def run(self, script):
        return self.ask("POST", "/execute/sync", {"script": script, "args": []})

    def asked(self):
        """Addresses that pages asked for since the last time."""
        entries = self.ask("POST", "/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def close(self):
        try:
            self.ask("DELETE", "")
        finally:
            self.process.terminate()
            self.process.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait(what, seconds=60):
    """What ``what`` gives as soon as it gives something."""
    end, said = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            found = what()
            if found:
                return found
        except OSError as error:
            said = error
        time.sleep(0.2)
    raise AssertionError(f"nothing after {seconds} seconds ({said})")


@pytest.fixture(scope="module")
def served(run):
    if DRIVER is None:
        pytest.skip("chromedriver and Chromium are not installed")
    port = free_port()
    blocks, address = app.serve(str(run), port)
    yield address, port
    blocks.close()


@pytest.mark.needs("gradio")
def test_the_page_generates_and_asks_nobody_else(served, tmp_path):
    address, port = served
    browser = Browser(tmp_path / "profile")
    try:
        browser.ask("POST", "/url", {"url": address})
        wait(lambda: browser.run("return !!document.querySelector('#generate')"))
        browser.run("document.querySelector('#generate').click()")
        source = wait(lambda: browser.run("return document.querySelector('#image img')?.src"))
        words = wait(lambda: browser.run("return document.querySelector('#words').innerText"))
        assert "timesteps 999, 759, 499, 259; guidance 1; seed 0" in words and "teacher, " in words
        with urllib.request.urlopen(source) as answer:
            assert Image.open(io.BytesIO(answer.read())).size[1] > 2 * 192
        shot = Image.open(io.BytesIO(base64.b64decode(browser.ask("GET", "/screenshot"))))
        shot.save(tmp_path / "page.png")
        browser.run("""
            const box = document.querySelector('#prompts textarea');
            box.value = ''; box.dispatchEvent(new Event('input', {bubbles: true}));
            document.querySelector('#generate').click()""")
        said = "Nothing was generated. Write one prompt a line"
        wait(lambda: said in browser.run("return document.querySelector('#words').innerText"))
        asked = browser.asked()
        assert any("/gradio_api/" in url for url in asked)
        others = [u for u in asked if not u.startswith((f"http://127.0.0.1:{port}/", "data:", "blob:", "chrome"))]
        assert not others
    finally:
        browser.close()


@pytest.mark.needs("gradio")
def test_it_is_served_to_this_machine_alone(served):
    address, port = served
    with urllib.request.urlopen(address) as answer:
        assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    strange = urllib.request.Request(address, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(strange)
    table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [row[1] for row in table if row[3] == "0A"]
    assert {entry.split(":")[0] for entry in listening if int(entry.split(":")[1], 16) == port} == {"0100007F"}
    with pytest.raises(ValueError, match=f"Port {port} cannot be used"):
        app.serve("scenes-64", port)
