"""``data.caption_dropout`` in the batches that a run trains on: whatever its data are; pairs keep their captions."""

from __future__ import annotations

import pytest
import torch

from fewstep.data.random import Rng
from fewstep.recipe.load import load_recipe
from fewstep.runs.dataset import build_dataset
from fewstep.runs.setup import setup
from fewstep.runs.teacher_samples import pair_files, sample_teacher

SHARE, STEPS, ROWS = 0.4, 60, 8
ERROR = 4 * (SHARE * (1 - SHARE) / (STEPS * ROWS)) ** 0.5  # four standard deviations of the share


def batches(short, folder, name, *more):
    """Batches of a run, and a function that tells which rows of a condition are without caption."""
    recipe = load_recipe(name, [*short, "training.steps=2", "data.size=8", *more])
    job = setup(recipe, folder)
    pairs = pair_files(job)
    if pairs is not None:
        pairs = sample_teacher(job, pairs)
    source = build_dataset(job, pairs, folder / "data")
    empty = job.teacher.encode_prompts([""])["prompt_embeds"].half()

    def without(cond):
        return torch.tensor([torch.allclose(row.float(), empty[0].float(), atol=1e-3) for row in cond["prompt_embeds"]])

    return [source.batch(Rng(0, step, ROWS)) for step in range(STEPS)], without


@pytest.mark.parametrize("share", [0.0, SHARE])
def test_captions_are_dropped_at_their_share(share, short, tmp_path):
    drawn, without = batches(short, tmp_path, "scenes-64-tcd", f"data.caption_dropout={share}")
    found = torch.stack([without(batch.cond) for batch in drawn])
    assert abs(float(found.double().mean()) - share) <= (ERROR if share else 0)
    if share:
        assert len({tuple(row.tolist()) for row in found}) > STEPS / 2  # other rows in every step


@pytest.mark.slow
def test_pairs_keep_their_captions(short, tmp_path):
    more = [f"data.caption_dropout={SHARE}", "pairs.num_inference_steps=1", "pairs.size=8"]
    drawn, without = batches(short, tmp_path, "scenes-64-dmd", *more)
    found = torch.cat([without(batch.cond) for batch in drawn])
    assert abs(float(found.double().mean()) - SHARE) <= ERROR
    assert not any(without(batch.pairs.cond).any() for batch in drawn)


@pytest.mark.slow
def test_prompts_and_the_teachers_samples_are_trained_without_captions_too(short, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo shapes\na blue star\n")
    place = f"data.path={tmp_path / 'prompts.txt'}"
    alone = ["data.source=prompts", "method.adversarial_weight=0", "data.size=3", place]
    made = ["data.source=teacher", "pairs.num_inference_steps=1", "data.size=3", place]
    for number, (name, more) in enumerate((("scenes-64-dmd2", alone), ("scenes-64-tcd", made))):
        drawn, without = batches(short, tmp_path / str(number), name, f"data.caption_dropout={SHARE}", *more)
        found = torch.cat([without(batch.cond) for batch in drawn])
        assert abs(float(found.double().mean()) - SHARE) <= ERROR
