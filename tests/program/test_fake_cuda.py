"""A training step on a pretended CUDA device (`tests.fake_cuda`), where a CUDA build of torch is installed."""

import json
import os
import subprocess
import sys

import pytest

from tests.fake_cuda.launch import missing
from tests.mutants.mutant import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]
CASES = ("sdxl-lcm-lora", "flux-dmd2-lora", "sd15-lightning-full")


def pretend(*command):
    """What a program of this folder prints."""
    places = os.pathsep.join(str(place) for place in (ROOT, ROOT / "src"))
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, encoding="utf-8", check=False,
        env={**os.environ, "PYTHONPATH": places},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_steps_mix_no_devices_and_wait_for_nothing(tmp_path):
    """All methods and more families are rows of benchmarks/results/fake-cuda.json."""
    pretend("benchmarks/fake_cuda.py", *CASES, "--results", tmp_path / "results.json")
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert len(rows) == len(CASES)
    for row in rows:
        assert row.get("waits") == {} and row["operators"] > 1000 and row["copies"] > 2, row


def test_the_device_sees_what_waits_and_refuses_what_is_mixed():
    """Without this the test above could pass by doing nothing."""
    assert pretend("-m", "tests.fake_cuda").split() == ["blocking", "copy", "read", "read", "copy", "mixed"]
