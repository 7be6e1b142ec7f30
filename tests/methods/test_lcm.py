"""One LCM step against the same step by hand, on the same draws: intermediates, loss and every gradient."""

import numpy as np
import pytest
import reference
import torch
from reference import (
    CASES,
    HOPS,
    actual,
    assert_same,
    consistency,
    every_step,
    expected,
    grid,
    noises,
    off,
    problem,
    row_scales,
)

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.methods.base import Progress
from fewstep.methods.lcm import LCM, Draws

SETTINGS = {
    "unguided": dict(guidance_scale=1.0, loss="l2"),
    "guided": dict(guidance_scale=4.0, loss="huber", huber_c=0.3),
    "drawn scale": dict(guidance_scale=(2.0, 8.0), loss="l2", target_decay=0.95),
    "told scale": dict(guidance_scale=(2.0, 8.0), guidance_embed=True, loss="huber", target_decay=0.95),
    "told fixed scale": dict(guidance_scale=3.0, guidance_embed=True, loss="l2"),
}


def draws(settings):
    """Every hop, the lowest one twice."""
    return Draws(torch.tensor([0, 1, 2, 3, 4, 0]), *noises(1), row_scales(settings["guidance_scale"]).double())


def by_hand(p, draws, **options):
    def function(pair, x, t):
        at_end = torch.from_numpy(t == grid(p.name)[0]).reshape(-1, 1, 1, 1)
        return torch.where(at_end, x, consistency(p.name, x, pair[0], t))

    told = {"guidance_embed": draws.guidance_scale} if p.method.settings.guidance_embed else None
    return expected(p, draws, function, told, **options)


@every_step(SETTINGS)
def test_a_step_is_the_papers(schedule, kind, variant, weights, native):
    p = problem(LCM, schedule, kind, weights, native, **SETTINGS[variant])
    random = draws(SETTINGS[variant])
    assert_same(actual(p, random), by_hand(p, random))


@pytest.mark.parametrize(("schedule", "kind"), CASES)
def test_the_lowest_hop_is_anchored_to_the_teacher_to_the_bit(schedule, kind):
    p = problem(LCM, schedule, kind)
    step = actual(p, draws(SETTINGS["guided"]))
    lowest = torch.tensor([True, False, False, False, False, True])
    same = (step.target == step.x_u).flatten(1).all(1)
    assert torch.equal(same, lowest)


@pytest.mark.parametrize("schedule", ["vp", "edm", "flow"])
def test_no_gradient_flows_through_the_target(schedule):
    p = problem(LCM, schedule, "v_prediction", loss="l2")
    random = draws(SETTINGS["guided"])
    mine, attached = actual(p, random), by_hand(p, random, detach_target=False)
    assert not mine.target.requires_grad and not mine.x_u.requires_grad
    assert off(mine.loss, attached.loss) <= 1e-10  # the same number, but not the same gradient
    assert min(off(mine.gradients[key], g) for key, g in attached.gradients.items()) > 0.01


def test_the_ema_target_is_the_lagging_weights_not_the_student():
    p = problem(LCM, "vp", "epsilon", target_decay=0.95)
    random = draws(SETTINGS["guided"])
    lagging = actual(p, random)
    with torch.no_grad():
        for key, tensor in p.roles.tensors_of("target").items():
            tensor.copy_(p.roles.tensors_of("student")[key])
    assert off(actual(p, random).target, lagging.target) > 1e-3


@pytest.mark.parametrize("schedule", reference.SCHEDULES)
def test_the_grid_is_the_papers(schedule):
    method = LCM(reference.SCHEDULES[schedule], num_grid_steps=HOPS)
    np.testing.assert_allclose(method.grid.numpy(), grid(schedule), rtol=1e-13)
    fifty = LCM(reference.SCHEDULES["vp"]).grid
    assert fifty.tolist() == [0, *range(19, 1000, 20)]


def test_draws_cover_every_hop_and_the_whole_range_of_scales():
    method = LCM(reference.SCHEDULES["vp"], num_grid_steps=10, guidance_scale=(2.0, 8.0))
    random = method.draw(Batch(torch.zeros(20_000, 2)), Rng(3, 0, 20_000), Progress(0, 1))
    counts = torch.bincount(random.index, minlength=10)
    assert len(counts) == 10 and (counts - 2000).abs().max() < 5 * 2000**0.5
    scale = random.guidance_scale
    assert 2 <= scale.min() < 2.01 and 7.99 < scale.max() < 8 and scale.mean() == pytest.approx(5, abs=0.06)
    assert random.noise.mean() == pytest.approx(0, abs=0.03) and random.noise.std() == pytest.approx(1, abs=0.02)
    fixed = LCM(reference.SCHEDULES["vp"], guidance_scale=4.0)
    assert (fixed.draw(Batch(torch.zeros(9, 2)), Rng(3, 0, 9), Progress(0, 1)).guidance_scale == 4.0).all()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rank": 3}, "LCM has no setting 'rank'"),
        ({"loss": "l1"}, r"loss: input should be .*, not 'l1'"),
        ({"guidance_scale": (8.0, 2.0)}, r"one number or \[low, high\]"),
        ({"num_grid_steps": 0}, "num_grid_steps: input should be greater than or equal to 1, not 0"),
        ({"num_grid_steps": 1001}, "exceeds the 1000 training timesteps"),
    ],
)
def test_wrong_settings_are_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        LCM(reference.SCHEDULES["vp"], **settings)
