"""Exports of tiny students of every family, read back by diffusers in one other process that serves them all."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import fewstep
from fewstep.export import round_trip
from fewstep.export.publish import export
from fewstep.students.card import Card
from tests.export.test_publish import LCM, finished, gap
from tests.models.pipelines import PROMPTS, build

EULER = Card("lightning", "euler", 4, "lora", "", rank=4)
STUDENTS = {
    "sd15": replace(EULER, prediction_type="sample", weights="full", rank=0),  # as Lightning's one-step student
    "sdxl": EULER,
    "sd3": EULER,
    "flux": replace(EULER, image_size=64, guidance_embed=2.5),
    "sana": EULER,
    "klein_base": replace(EULER, image_size=64),
    "flux2_dev": replace(EULER, image_size=64, guidance_embed=2.5),
    "chroma": replace(EULER, image_size=64),
    "qwen_image": replace(EULER, image_size=64, guidance_scale=2.0),
    "z_image": replace(EULER, image_size=64),
    "krea2": replace(EULER, image_size=64),
    "qwen_image21": replace(EULER, image_size=64),
    "qwen_image21_turbo": replace(EULER, image_size=64),
}
LOOP = """
import json, sys
from pathlib import Path
from safetensors.torch import save_file
from fewstep.export.round_trip import sample_in_diffusers
from tests.models.pipelines_texts import text_processor
text_processor()
for line in sys.stdin:
    request, place = line.split()
    try:
        save_file(sample_in_diffusers(json.loads(Path(request).read_text())), place)
        print("done", flush=True)
    except Exception as error:
        print(type(error).__name__, *str(error).split(), flush=True)
"""


@pytest.fixture(scope="module")
def elsewhere():
    """Stands for `subprocess.run`: one child of its own interpreter serves all requests, one after the other."""
    child = subprocess.Popen(
        [sys.executable, "-c", LOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def work(command, **_):
        print(*command[-2:], file=child.stdin, flush=True)
        said = child.stdout.readline().strip()
        return subprocess.CompletedProcess(command, said != "done", "", said)

    yield work
    child.stdin.close()
    child.wait()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    for name, card in STUDENTS.items():
        build(name).save_pretrained(folder / name)
        finished(folder / f"{name}-run", folder / name, card, size=0.01 if card.weights == "full" else 0.1)
    return folder


@pytest.mark.parametrize("name, to", [
    pytest.param("sd15", "diffusers", marks=pytest.mark.slow), pytest.param("sdxl", "kohya", marks=pytest.mark.slow),
    pytest.param("sd3", "diffusers", marks=pytest.mark.slow), pytest.param("flux", "lora", marks=pytest.mark.slow),
    pytest.param("sana", "lora", marks=pytest.mark.slow), pytest.param("sana", "diffusers", marks=pytest.mark.slow),
    pytest.param("qwen_image", "lora", marks=pytest.mark.slow),
    pytest.param("qwen_image", "diffusers", marks=pytest.mark.slow),
    pytest.param("z_image", "lora", marks=pytest.mark.slow),
    pytest.param("z_image", "diffusers", marks=pytest.mark.slow),
    pytest.param("klein_base", "lora", marks=pytest.mark.slow),
    pytest.param("klein_base", "diffusers", marks=pytest.mark.slow),
    pytest.param("flux2_dev", "lora", marks=pytest.mark.slow),
    pytest.param("krea2", "lora", marks=pytest.mark.slow),
    pytest.param("krea2", "diffusers", marks=pytest.mark.slow),
    pytest.param("chroma", "lora", marks=pytest.mark.slow),
    pytest.param("chroma", "diffusers", marks=pytest.mark.slow),
    pytest.param("qwen_image21", "lora", marks=pytest.mark.slow),
    pytest.param("qwen_image21", "diffusers", marks=pytest.mark.slow),
    pytest.param("qwen_image21_turbo", "lora", marks=pytest.mark.slow),
    pytest.param("qwen_image21_turbo", "diffusers", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_student_of_every_family_is_read_back_elsewhere(name, to, runs, elsewhere, tmp_path, monkeypatch):
    """Within 1e-5 in float32; `fewstep.load` reads it back too, and it is not the teacher's picture."""
    monkeypatch.setattr(round_trip.subprocess, "run", elsewhere)
    made = export(runs / f"{name}-run", to, tmp_path / "out")
    assert made.round_trip.gap <= 1e-5
    assert (made.round_trip.layers >= 30) == (to in ("lora", "kohya"))
    expected = fewstep.load(runs / f"{name}-run").sample(PROMPTS, output_type="latent", seed=2)
    read = fewstep.load(tmp_path / "out")
    assert gap(read.sample(PROMPTS, output_type="latent", seed=2), expected) <= 1e-5
    wishes = dict(sampler="euler", guidance_scale=1.0, output_type="latent", seed=2)
    steps = None if name.endswith("turbo") else 4  # a pipeline with times of its own takes no other number of steps
    assert gap(fewstep.load(runs / name, size=64).sample(PROMPTS, steps, **wishes), expected) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "sd3", "flux", "sana",
    "qwen_image",
    "klein_base",
    "z_image",
    "krea2",
    "chroma",
    "qwen_image21",
])  # fmt: skip
def test_lcm_on_a_flow_model(name, runs, elsewhere, tmp_path, monkeypatch):
    """Its fresh noises too are drawn as they are there: FLUX's for packed latents."""
    monkeypatch.setattr(round_trip.subprocess, "run", elsewhere)
    torch.manual_seed(0)
    card = replace(LCM, original_inference_steps=50, image_size=STUDENTS[name].image_size)
    run = finished(tmp_path / "run", runs / name, card)
    made = export(run, "lora", tmp_path / "out")
    assert made.round_trip.gap <= 1e-5 and "sigmas" in made.call
