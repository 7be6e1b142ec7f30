"""0 is a value: an option that is set to it is not "left out", wherever people may write it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewstep.checkpoints.registry import find_checkpoint
from fewstep.diffusion.schedule import Schedule
from fewstep.inference.model import Model
from fewstep.methods.hyper import Hyper
from fewstep.models.families import load_teacher
from fewstep.recipe.load import load_recipe, parse_recipe
from fewstep.runs.setup import setup
from fewstep.students.card import Card, sampler_of
from tests.command_line import inside
from tests.export.test_publish import LCM, finished

TCD = Card("tcd", "tcd", 4, "full", "", eta=0.3)


@pytest.fixture(scope="module")
def teacher(tiny):
    return load_teacher(str(tiny))


@pytest.mark.parametrize("eta", [0.0, 0, 0.25, None])
def test_eta_of_a_student_and_of_a_published_file(eta, teacher):
    wanted = 0.3 if eta is None else eta
    assert sampler_of(TCD, eta=eta).eta == wanted
    assert sampler_of(TCD, "tcd", eta=eta, num_inference_steps=2).eta == wanted
    published = Model(teacher, teacher.denoiser, TCD, 1.0, find_checkpoint("tcd-sd15"))
    assert published.sampler(None, {"eta": eta}).eta == wanted
    assert published.sampler("tcd", {"eta": eta}).eta == wanted


def test_images_without_fresh_noise_are_others_than_the_default(teacher):
    """And they are those of a card that says 0."""
    model = Model(teacher, teacher.denoiser, TCD, 1.0)
    none = Model(teacher, teacher.denoiser, Card("tcd", "tcd", 4, "full", "", eta=0.0), 1.0)
    images = {eta: model.sample("a red star", eta=eta, output_type="latent") for eta in (0.0, None)}
    assert not torch.equal(images[0.0], images[None])
    assert torch.equal(images[0.0], none.sample("a red star", output_type="latent"))
    assert torch.equal(images[None], none.sample("a red star", eta=0.3, output_type="latent"))


def test_the_command_line_hands_zero_on(tiny, tmp_path, monkeypatch, capsys):
    run = finished(tmp_path / "mine", tiny, replace(LCM, sampler="tcd", eta=0.3))
    files = {}
    for name, more in (("none", ["--eta", 0]), ("default", []), ("same", ["--eta", 0.3])):
        code, _, err = inside(
            monkeypatch, capsys, tmp_path, "sample", run, "-p", "a star", "--out", f"{name}.png", *more
        )
        assert code == 0, err
        files[name] = (tmp_path / f"{name}.png").read_bytes()
    assert files["default"] == files["same"] != files["none"]


@pytest.mark.parametrize("given, wanted", [([], 0.3), (["sample.eta=0"], 0.0), (["sample.eta=0.5"], 0.5)])
def test_eta_of_a_recipe_is_that_of_its_student(given, wanted, short, tmp_path):
    recipe = load_recipe("scenes-64-tcd", [*short, *given])
    assert recipe.sample.eta == wanted
    if given != ["sample.eta=0.5"]:
        assert setup(recipe, tmp_path).card(4).eta == wanted


@pytest.mark.parametrize("segments, eta, sampler", [(8, 0.0, "phased"), (2, 0.0, "phased"), (1, 0.3, "tcd")])
def test_hyper_of_one_segment_is_sampled_as_tcd(segments, eta, sampler):
    """One segment is TCD's student, which TCD's authors sample with eta 0.3; phases are ended where they end."""
    recipe = parse_recipe({"method": {"name": "hyper", "segments": segments}})
    assert recipe.sample.eta == eta and recipe.sample.num_inference_steps == segments
    method = Hyper(Schedule.scaled_linear(), segments=segments)
    assert method.sampler == sampler and Hyper.sampling(method.settings).eta == eta
    freed = parse_recipe({"method": {"name": "hyper", "segments": segments}, "sample": {"eta": 0.0}})
    assert freed.sample.eta == 0.0


def test_an_embedded_guidance_scale_of_zero_is_not_the_default(teacher):
    model = Model(teacher, teacher.denoiser, Card("lcm", "lcm", 4, "full", "", guidance_embed=3.0), 1.0)
    model.denoiser = type("Accepts", (), {"accepts": frozenset({"guidance_embed"})})()
    assert model.guidance(None, 0.0) == (1.0, 0.0) and model.guidance(None, None) == (1.0, 3.0)
