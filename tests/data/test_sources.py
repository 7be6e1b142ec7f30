"""Sources: epochs, posteriors, conditions; all pure functions of seed, step and rows."""

import numpy as np
import torch

from fewstep.data.random import Rng
from fewstep.data.sources import LatentSource, MixtureSource, Null, Order
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.models.cond import Cond


def halves(step, batch_size=8, seed=0):
    half = batch_size // 2
    return [Rng(seed, step, batch_size, rows) for rows in (slice(0, half), slice(half, batch_size))]


def test_every_epoch_is_all_items_in_an_order_of_its_own():
    """Batches of 8 from 20 items: they run across the ends of epochs, which are in the middle of a batch."""
    order = Order(20)
    visited = np.concatenate([order.rows(Rng(0, step, 8)) for step in range(10)]).reshape(4, 20)
    assert all(sorted(epoch) == list(range(20)) for epoch in visited)
    assert len({tuple(epoch) for epoch in visited}) == 4
    assert visited[0].tolist() != list(range(20))
    parts = np.concatenate([Order(20).rows(rng) for step in range(10) for rng in halves(step)])
    assert parts.tolist() == visited.reshape(-1).tolist()  # nothing is carried: any split, any first step
    assert Order(20).rows(Rng(0, 7, 8)).tolist() == visited.reshape(-1)[56:64].tolist()
    assert Order(20).rows(Rng(1, 0, 8)).tolist() != visited[0, :8].tolist()


def test_latents_are_sampled_anew_at_every_visit():
    mean, std = (torch.tensor(rows)[:, None].expand(4, 500) for rows in ([0.0, 1.0, 2.0, 3.0], [0.5, 1.0, 2.0, 0.0]))
    source = LatentSource(mean, std, Cond({"item": torch.arange(4)}))
    visits = {item: [] for item in range(4)}
    for step in range(20):
        batch = source.batch(Rng(0, step, 4))
        for x, item in zip(batch.x0, batch.cond["item"].tolist(), strict=True):
            visits[item].append(x)
    for item, drawn in visits.items():
        values = torch.stack(drawn)
        assert len(drawn) == 20 and abs(float(values.mean()) - item) < 0.1
        torch.testing.assert_close(values.std(), std[item, 0], rtol=0.05, atol=0)
        torch.testing.assert_close(values.std(0).mean(), std[item, 0], rtol=0.05, atol=0)  # from visit to visit
    assert source.batch(Rng(0, 3, 4, dtype=torch.float64)).x0.dtype == torch.float64


def test_mixtures_are_drawn_anew_at_every_step():
    source = MixtureSource(GaussianMixture.ring(6), None)
    drawn = [source.batch(Rng(seed, step, 4)).x0 for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert torch.equal(drawn[0], drawn[3]) and source.batch(Rng(0, 0, 4)).cond is None
    assert all(not torch.equal(drawn[0], other) for other in drawn[1:3])


def test_conditions_stay_with_their_items():
    latents = torch.arange(9.0)[:, None]
    source = LatentSource(latents, torch.zeros(9, 1), Cond({"item": torch.arange(9)}))
    ring = GaussianMixture.ring(6, std=0.01, num_classes=3)
    classes = MixtureSource(ring, (0, 2))
    for step in range(4):
        for rng in halves(step):
            batch = source.batch(rng)
            assert batch.x0[:, 0].tolist() == batch.cond["item"].tolist()
            batch = classes.batch(rng)
            assert torch.equal(ring.assign(batch.x0) % 3, batch.cond["label"])
            assert set(batch.cond["label"].tolist()) <= {0, 2} and len(batch.x0) == 4
            assert batch.cond.null()["label"].tolist() == [-1] * 4


def test_the_null_condition_is_copied_and_its_lengths_stay_on_the_host():
    null = Null({"null.prompt_embeds": torch.ones(1, 3, 2), "null.prompt_length": torch.tensor([3])})
    there = null.on(torch.device("meta"))
    assert {name: t.device.type for name, t in there.items()} == {
        "null.prompt_embeds": "meta", "null.prompt_length": "cpu",
    }  # fmt: skip
    assert null.on(torch.device("meta")) is there
