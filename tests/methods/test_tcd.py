"""One TCD step against the same step by hand, on the same draws: intermediates, loss and every gradient."""

import pytest
import reference
import torch
from reference import CASES, actual, assert_same, every_step, expected, grid, jump, noises, off, problem, row_scales

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.methods.base import Progress
from fewstep.methods.tcd import TCD, Draws

SETTINGS = {
    "unguided": dict(guidance_scale=1.0),
    "guided": dict(guidance_scale=4.0, loss="huber", huber_c=0.3),
    "drawn scale": dict(guidance_scale=(2.0, 8.0), target_decay=0.95),
    "told end": dict(guidance_scale=3.0, tell_end=True),
    "told end, lagging": dict(guidance_scale=(2.0, 8.0), tell_end=True, loss="huber", target_decay=0.95),
}


def draws(settings):
    """Every hop; rows 0, 1 and 3 end at s = u, the others below."""
    index, ends = torch.tensor([0, 1, 2, 3, 4, 2]), torch.tensor([0, 1, 1, 3, 2, 0])
    return Draws(index, ends, *noises(1), row_scales(settings["guidance_scale"]).double())


def by_hand(p, draws, **options):
    s = grid(p.name)[draws.end_index]

    def function(pair, x, t):
        still = torch.from_numpy(t == s).reshape(-1, 1, 1, 1)
        return torch.where(still, x, jump(p.name, pair, s))

    told = {"end": torch.from_numpy(s)} if p.method.settings.tell_end else None
    return expected(p, draws, function, told, **options)


@every_step(SETTINGS)
def test_a_step_is_the_papers(schedule, kind, variant, weights, native):
    p = problem(TCD, schedule, kind, weights, native, **SETTINGS[variant])
    random = draws(SETTINGS[variant])
    assert_same(actual(p, random), by_hand(p, random))


@pytest.mark.parametrize(("schedule", "kind"), CASES)
def test_ending_where_the_teacher_landed_the_target_is_its_landing_point_to_the_bit(schedule, kind):
    step = actual(problem(TCD, schedule, kind), draws(SETTINGS["guided"]))
    same = (step.target == step.x_u).flatten(1).all(1)
    assert same.tolist() == [True, True, False, True, False, False]


@pytest.mark.parametrize("schedule", ["vp", "edm", "flow"])
def test_no_gradient_flows_through_the_target(schedule):
    p = problem(TCD, schedule, "v_prediction")
    random = draws(SETTINGS["guided"])
    mine, attached = actual(p, random), by_hand(p, random, detach_target=False)
    assert not mine.target.requires_grad and not mine.x_u.requires_grad
    assert off(mine.loss, attached.loss) <= 1e-10  # the same number, but not the same gradient
    assert min(off(mine.gradients[key], g) for key, g in attached.gradients.items()) > 0.01


def test_draws_cover_every_hop_and_every_end_below_it():
    method = TCD(reference.SCHEDULES["vp"], num_grid_steps=5)
    random = method.draw(Batch(torch.zeros(30_000, 2)), Rng(3, 0, 30_000), Progress(0, 1))
    for hop in range(5):
        ends = torch.bincount(random.end_index[random.index == hop], minlength=5)
        wanted = 30_000 / 5 / (hop + 1)
        assert not ends[hop + 1 :].any()  # never above u
        assert (ends[: hop + 1] - wanted).abs().max() < 5 * wanted**0.5  # uniform, s = u and s = 0 included


def test_a_single_end_is_always_the_grids():
    method = TCD(reference.SCHEDULES["vp"], num_grid_steps=5, single_end=True)
    random = method.draw(Batch(torch.zeros(100, 2)), Rng(3, 0, 100), Progress(0, 1))
    assert random.index.unique().tolist() == [0, 1, 2, 3, 4] and not random.end_index.any()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"eta": 0.3}, "TCD has no setting 'eta'"),
        ({"loss": "lpips"}, r"loss: input should be .*, not 'lpips'"),
        ({"guidance_scale": (1.0, 2.0, 3.0)}, r"one number or \[low, high\]"),
    ],
)
def test_wrong_settings_are_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        TCD(reference.SCHEDULES["vp"], **settings)
