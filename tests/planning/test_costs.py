"""Costs that a plan states before anything runs, against what was counted apart from it."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

from fewstep.diffusion.schedule import Schedule
from fewstep.methods.lcm import LCM
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.meta_pipeline import outline
from fewstep.models.roles import Weights
from fewstep.planning.estimate import estimate
from fewstep.planning.rehearsal import Rehearsal
from fewstep.recipe.load import parse_recipe
from fewstep.runs.plan import cost_of_pairs
from fewstep.sampling import sample
from fewstep.sampling.solvers import SOLVERS
from fewstep.training.settings import TrainingSettings

SIZE, STEPS = 6, 5


def rows_seen(solver, scale):
    """Rows that a network is asked for while ``SIZE`` samples are made."""
    seen = []

    def network(x, t, cond=None, **_):
        seen.append(len(x))
        return 0.1 * x

    cond = Cond({"label": torch.zeros(SIZE, 1)}, null={"label": torch.ones(1, 1)})
    denoiser = Denoiser(network, Schedule.scaled_linear(), "epsilon")
    sample(denoiser, SOLVERS[solver](num_inference_steps=STEPS), torch.randn(SIZE, 2), cond, scale)
    return sum(seen)


@pytest.mark.parametrize("scale, branches", [(1.0, 1), (3.0, 2)])
@pytest.mark.parametrize("solver, calls", [("ddim", STEPS), ("heun", 2 * STEPS - 1), ("dpm++2m", STEPS)])
def test_the_teachers_samples_cost_what_their_solver_asks(solver, calls, scale, branches):
    """Heun calls twice in each step but the last, which ends at clean data: the plan says "up to"."""
    pairs = {"size": SIZE, "solver": solver, "num_inference_steps": STEPS, "guidance_scale": scale}
    recipe = parse_recipe({"method": {"name": "dmd", "guidance_scale": 3.0}, "pairs": pairs, "data": {"size": SIZE}})
    stated, counted = cost_of_pairs(recipe), rows_seen(solver, scale)
    assert counted == SIZE * calls * branches
    assert counted <= stated < counted + SIZE * branches + 1
    assert cost_of_pairs(parse_recipe({"method": "lcm", "pairs": pairs})) == 0  # which needs none


def test_every_part_of_a_pipeline_takes_memory_while_images_are_encoded(monkeypatch):
    """Text encoders and autoencoder by their own bytes; the text encoders are gone when training begins."""
    module = importlib.import_module("fewstep.planning.estimate")
    monkeypatch.setattr(module, "rehearse", lambda *_: Rehearsal(10**9, 1.0, 0.0))  # a step is not the subject
    whole = outline("scenes-64")
    texts = {name: part for name, part in whole.parts.items() if name.startswith("text_encoder")}
    size = sum(t.nbytes for part in texts.values() for t in (*part.parameters(), *part.buffers()))
    assert size > 10**5 and whole.parts.keys() > texts.keys()
    without = dataclasses.replace(whole, parts={k: v for k, v in whole.parts.items() if k not in texts})
    settings, weights = TrainingSettings(batch_size=2), Weights("lora", rank=2)

    def needed(pipeline):
        return estimate(pipeline, LCM, LCM.Settings(), settings, weights, 8, prompts=2)

    mine, theirs = needed(whole), needed(without)
    assert mine.encoding - theirs.encoding == size and mine.training == theirs.training
    vae = whole.parts["vae"]
    held = sum(t.nbytes for t in (*vae.parameters(), *vae.buffers()))
    assert mine.training["autoencoder"] == held and mine.encoding > size + held + 8 * 3 * 64 * 64 * 4
    assert mine.sampling > 0 and needed(whole).peak == max(sum(mine.training.values()), mine.encoding, mine.sampling)
