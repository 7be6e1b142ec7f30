"""Aspect buckets: their sizes, which picture goes where, and an order that follows from the step alone."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from fewstep.data.buckets import bucket_sizes, nearest
from fewstep.data.random import Rng
from fewstep.data.sources import Buckets, CaptionDropout, LatentSource, Prompts
from fewstep.models.cond import Cond

# Podell et al. 2023, appendix I: (height, width); the other half is turned.
SDXL = {
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600),
    (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152),
    (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024),
}  # fmt: skip


def test_sizes_at_1024_are_sdxls():
    sizes = bucket_sizes(1024, 32)
    assert len(sizes) == 33 and {tuple(sorted(size)) for size in sizes} <= SDXL
    assert {(512, 2048), (832, 1216), (1216, 832), (1024, 1024)} <= set(sizes)


@pytest.mark.parametrize(("side", "multiple"), [(512, 64), (1024, 16), (64, 8), (64, 16), (96, 32), (768, 64)])
def test_sizes_keep_to_the_area_and_the_multiple(side, multiple):
    sizes = bucket_sizes(side, multiple)
    assert (side, side) in sizes and {(w, h) for h, w in sizes} == set(sizes) and len(sizes) > 2
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert height * width <= side * side and max(height, width) <= 4 * min(height, width)
        assert height * width > 0.5 * side * side


def test_a_picture_goes_where_it_loses_least():
    sizes = bucket_sizes(1024, 32)
    for (height, width), wanted in {
        (1000, 1000): (1024, 1024), (3, 2): (1216, 832), (4000, 6000): (832, 1216), (1080, 1920): (768, 1344),
        (100, 5000): (512, 2048), (5000, 100): (2048, 512),
    }.items():  # fmt: skip
        assert nearest(height, width, sizes) == wanted

    def lost(size, height=1080, width=1920):
        scale = min(height / size[0], width / size[1])
        return 1 - scale**2 * size[0] * size[1] / (height * width)

    assert nearest(1080, 1920, sizes) == min(sizes, key=lost)


# ---------------------------------------------------------------- order

COUNTS = (10, 3, 1, 25)


def buckets(counts=COUNTS):
    """Items whose first number is their bucket's and second their own; each bucket has a width of its own."""
    made = []
    for bucket, count in enumerate(counts):
        rows = torch.arange(count)
        mean = torch.stack([torch.full((count,), bucket), rows]).T[..., None].expand(-1, -1, bucket + 1).float()
        null = {"row": torch.full((1, 1), -1)}
        made.append(LatentSource(mean, torch.zeros(()).expand_as(mean), Cond({"row": rows[:, None]}, null)))
    return Buckets(made)


def items(source, steps, batch_size=4, seed=0):
    """(bucket, item) pairs of each step."""
    batches = [source.batch(Rng(seed, step, batch_size)).x0[..., 0] for step in steps]
    return [[tuple(map(int, row)) for row in batch] for batch in batches]


def test_every_batch_is_of_one_size_and_conditions_stay_with_their_items():
    source = buckets()
    for step in range(30):
        batch = source.batch(Rng(0, step, 4))
        bucket = batch.x0[0, 0, 0].int().item()
        assert (batch.x0[:, 0] == bucket).all() and batch.x0.shape == (4, 2, bucket + 1)
        assert batch.cond["row"][:, 0].tolist() == batch.x0[:, 1, 0].tolist()


@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
def test_all_pictures_are_visited_equally_often(batch_size):
    """In any number of steps each bucket is at most a batch ahead of, or a round behind, its share."""
    source, total = buckets(), sum(COUNTS)
    seen = Counter()
    for step in range(400):
        seen.update(items(source, [step], batch_size)[0])
        if step % 50 == 49:
            passes = (step + 1) * batch_size / total
            for bucket, count in enumerate(COUNTS):
                visits = [seen[bucket, item] for item in range(count)]
                assert max(visits) - min(visits) <= 1 and sum(visits) % batch_size == 0
                assert abs(sum(visits) - passes * count) <= (len(COUNTS) + 1) * batch_size + count


def test_the_order_follows_from_the_step_alone():
    """Any first step, any split over processes and micro-batches; another seed is another order."""
    order = items(buckets(), range(60))
    assert items(buckets(), [37, 5, 59]) == [order[37], order[5], order[59]]
    fresh = buckets()
    for step in (12, 3, 44):
        parts = [fresh.batch(Rng(0, step, 4, rows)).x0[..., 0] for rows in (slice(3, 4), slice(0, 3))]
        assert torch.cat([parts[1], parts[0]]).int().tolist() == [list(pair) for pair in order[step]]
    assert items(buckets(), range(60), seed=1) != order
    sizes = [batch[0][0] for batch in order]
    assert sum(a > b for a, b in pairwise(sizes)) > 12  # rounds of ten batches are shuffled


def test_posterior_noise_is_drawn_by_the_step_not_by_the_visit():
    mean = torch.zeros(3, 500)
    source = Buckets([LatentSource(mean, torch.ones_like(mean), None)])
    first, again, later = (source.batch(Rng(0, step, 2)).x0 for step in (0, 0, 3))
    assert torch.equal(first, again) and not torch.equal(first, later)
    assert abs(float(first.std()) - 1) < 0.1


# ---------------------------------------------------------------- captions


def rows_of(source, step, rows=None):
    return source.batch(Rng(5, step, 8, rows)).cond["row"][:, 0].tolist()


def test_captions_are_dropped_at_their_share_and_by_a_draw():
    plain, source = buckets((40,)), CaptionDropout(buckets((40,)), 0.25)
    dropped = []
    for step in range(200):
        before, after = rows_of(plain, step), rows_of(source, step)
        assert all(b in (a, -1) for a, b in zip(before, after, strict=True))
        assert torch.equal(source.batch(Rng(5, step, 8)).x0, plain.batch(Rng(5, step, 8)).x0)
        dropped.append([row == -1 for row in after])
        assert rows_of(source, step, slice(2, 5)) == after[2:5]
    share = np.mean(dropped)
    assert abs(share - 0.25) < 0.04 and np.std(np.mean(dropped, axis=0)) < 0.06  # no row of the batch is special


def test_prompts_give_conditions_and_nothing_that_could_pass_for_a_picture():
    null = {"row": torch.full((1, 1), -1)}
    source = Prompts(Cond({"row": torch.arange(5)[:, None]}, null), (2, 3, 3))
    batches = [source.batch(Rng(0, step, 5)) for step in range(2)]
    assert all(b.x0.shape == (5, 2, 3, 3) and b.x0.isnan().all() and not b.has_data for b in batches)
    assert [sorted(b.cond["row"][:, 0].tolist()) for b in batches] == [list(range(5))] * 2
    assert source.batch(Rng(0, 1, 5, slice(1, 3))).cond["row"].tolist() == batches[1].cond["row"][1:3].tolist()
