"""What a sampler draws is independent of the noise that it starts from, and of other images', wherever we sample.

With one generator started twice the first fresh noise is the initial noise again: images of a stochastic sampler are
then wrong in a way that no comparison with itself shows.
"""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
import yaml

import fewstep
from fewstep.data.pairs import noise_of
from fewstep.evaluation.compare import Candidate, _spreads, eval_inputs, sample_candidate
from fewstep.evaluation.prompt_set import PromptSet
from fewstep.export.publish import PROMPTS, _latents
from fewstep.inference.model import Model
from fewstep.models.families import as_teacher, load_teacher
from fewstep.recipe.load import load_recipe
from fewstep.recipe.shipped import shipped_recipes
from fewstep.runs.measured_on import NOISE
from fewstep.runs.setup import setup
from fewstep.runs.validation import SampleGrid
from fewstep.sampling import LCMSampler, RenoiseSampler
from fewstep.students.card import Card
from fewstep.students.student import load_student
from tests.export.test_publish import LCM, finished
from tests.models.pipelines import SIZE, build

WORDS = ["a red star", "two shapes"]


def flat(images):
    """Features of images: their pixels."""
    return images.flatten(1)


@pytest.fixture
def normals(monkeypatch):
    """All unit normals of the sampling runs that follow: where each starts, and what its sampler draws."""
    seen, module = [], importlib.import_module("fewstep.sampling.sample")

    class Draws(module._Draws):
        def __init__(self, noises, generator, like, lay_out):
            super().__init__(noises, generator, like, lay_out)
            seen.append(like)

        def __call__(self):
            seen.append(super().__call__())
            return seen[-1]

    monkeypatch.setattr(module, "_Draws", Draws)
    return seen


def largest_correlation(normals):
    """In standard deviations of that of independent numbers."""
    rows = np.stack([normal.double().numpy().reshape(-1) for normal in normals])
    return float(np.abs(np.corrcoef(rows) - np.eye(len(rows))).max() * rows.shape[1] ** 0.5)


@pytest.fixture(scope="module")
def model(tiny):
    teacher = load_teacher(str(tiny))
    return Model(teacher, teacher.denoiser, Card("", "lcm", 4, "full", ""), 1.0)


def test_one_seed_gives_independent_noises(model, normals):
    model.sample(WORDS, seed=3, output_type="latent")
    model.sample(WORDS, seed=4, output_type="latent")
    assert len(normals) == 2 * 4 and largest_correlation(normals) < 6


@pytest.mark.parametrize("sampler", ["lcm", "tcd", "renoise", "euler-ancestral"])
def test_given_noise_is_not_drawn_again(sampler, model, normals):
    """People make ``latents`` by torch's generator of the same seed, often 0: that image is the seed's own."""
    noise = torch.randn(2, *model.teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    given = model.sample(WORDS, latents=noise, sampler=sampler, output_type="latent")
    assert len(normals) >= 3 and largest_correlation(normals) < 6
    assert torch.equal(given, model.sample(WORDS, seed=0, sampler=sampler, output_type="latent"))


def test_packed_latents_are_drawn_independently_too(normals):
    teacher = as_teacher(build("flux"), size=SIZE)
    Model(teacher, teacher.denoiser, Card("", "lcm", 4, "full", ""), 1.0).sample(WORDS, output_type="latent")
    assert len(normals) == 4 and largest_correlation(normals) < 6


def test_sample_grids_of_training_are_the_images_of_their_seed(short, tmp_path, normals, monkeypatch):
    """Both noises of the diversity and what the sampler draws in either; the first is `fewstep sample`'s own."""
    job = setup(load_recipe("scenes-64-lcm", [*short, "seed=7", "sample.teacher_steps=1"]), tmp_path)
    latents = []
    monkeypatch.setattr(job.teacher, "decode", lambda x, decode=job.teacher.decode: (latents.append(x), decode(x))[1])
    SampleGrid(job)(1)
    of_student = normals[3:]  # the teacher is sampled three times, without fresh noise
    assert len(of_student) == 2 * 4 and largest_correlation(of_student) < 6
    mine = Model(job.teacher, job.roles.views()[job.role], job.card(1), 1.0)
    wanted = mine.sample(job.recipe.sample.prompts, seed=7, output_type="latent")
    torch.testing.assert_close(latents[-1], wanted, rtol=0, atol=1e-5)


def test_exports_are_compared_on_independent_noises(tiny, tmp_path, normals):
    run = finished(tmp_path / "mine", tiny)
    teacher = load_teacher(str(tiny))
    mine = _latents(teacher, load_student(teacher, run / "student", LCM), LCM)
    assert len(normals) == 4 and largest_correlation(normals) < 6
    torch.testing.assert_close(mine, fewstep.load(run).sample(list(PROMPTS), seed=0, output_type="latent"))


def test_evaluation_draws_every_batch_anew(model, normals):
    candidate = Candidate("lcm", model.denoiser, LCMSampler(num_inference_steps=3))
    cond, noise = eval_inputs(model.teacher, PromptSet(WORDS * 2, flat), 5)
    sample_candidate(candidate, noise, cond, 5, batch=2)
    assert len(normals) == 2 * 3 and largest_correlation(normals) < 6


def test_the_spread_of_a_prompt_is_measured_on_noises_of_its_own(model, normals):
    candidate = Candidate("renoise", model.denoiser, RenoiseSampler(num_inference_steps=2))
    cond, noise = eval_inputs(model.teacher, PromptSet(WORDS, flat), 5)
    _spreads(model.teacher, candidate, cond, 2, 5, flat)
    every = [image for normal in (noise, *normals) for image in normal.split(1)]
    assert len(every) == 2 + 2 * 4 and largest_correlation(every) < 6


def test_students_are_not_measured_from_the_noises_of_their_pairs():
    """Pair i of a seed starts from the same noise in every set, and so would image i of a validation by that seed."""
    seeds = {0}
    for path in shipped_recipes().values():
        stages = yaml.safe_load(path.read_text(encoding="utf-8"))
        seeds |= {stage.get("pairs", {}).get("seed", 0) for stage in (stages, *stages.get("stages", ()))}
    noises = [noise_of(seed, row, (16, 8, 8)) for seed in (*seeds, NOISE) for row in range(4)]
    assert NOISE not in seeds and largest_correlation(noises) < 6


def test_the_global_generator_is_no_part_of_it(model):
    torch.manual_seed(1)
    first = model.sample(WORDS, seed=3, output_type="latent")
    torch.manual_seed(2)
    assert torch.equal(model.sample(WORDS, seed=3, output_type="latent"), first)
