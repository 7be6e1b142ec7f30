"""Apple GPUs, which have no float64: sampling, and a training step of every method.

On a machine with one the real device is used. Elsewhere `tests.accelerator` pretends to be one, in a process of its
own, and the same numbers must come out as on the CPU.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch

import fewstep
from fewstep.methods.registry import METHODS
from fewstep.planning.doctor import difference, lora_step
from fewstep.training.logging import Meter
from tests.mutants.mutant import ROOT

needs_apple = pytest.mark.skipif(not torch.backends.mps.is_available(), reason="there is no Apple GPU")


def pretend(*arguments):
    """What `tests.on_apple` prints."""
    command = [sys.executable, "-m", "tests.on_apple", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


@pytest.mark.slow
def test_the_pretended_device_has_its_rules():
    """Without this the tests below could pass by doing nothing."""
    assert pretend("rules") == ["7", "refused"]


@pytest.mark.slow
def test_images_of_scenes_64_are_those_of_the_cpu():
    assert pretend("sample") == ["equal"]


@pytest.mark.slow
def test_the_numbers_of_the_doctor_agree():
    assert pretend("numbers") == ["agree"]


@pytest.mark.slow
def test_every_method_takes_its_step():
    assert pretend("steps", *METHODS) == [*METHODS]


@needs_apple
def test_the_real_device_samples_and_trains():
    model = fewstep.load("scenes-64", device="mps")
    [there], [here] = (m.sample(["a red star"], 4, seed=1) for m in (model, fewstep.load("scenes-64")))
    assert np.abs(np.asarray(there, dtype=int) - np.asarray(here, dtype=int)).mean() < 2
    exact, _ = lora_step("cpu", "fp64")
    assert difference(lora_step("mps", "fp32")[0], exact) < 0.01


def test_the_means_of_a_log_need_no_float64_on_the_device():
    meter = Meter()
    asked = []
    to = torch.Tensor.to
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda self, *a, **k: asked.extend(a) or to(self, *a, **k))
        for value in (0.1, 0.25):
            meter.add("loss", torch.tensor(value))
            meter.add("half", torch.tensor([value, 1.0], dtype=torch.bfloat16))
        means = meter.read()
    assert torch.float64 not in asked
    assert means["loss"] == float(torch.tensor(0.1) + torch.tensor(0.25)) / 2
    assert means["half/1"] == 1.0
