"""DiffAugment against the same done by hand, picture after picture."""

import projection_reference as hand
import pytest
import torch

from fewstep.data.random import Rng
from fewstep.methods.parts.augment import POLICIES, augmented, draw_augmentation

EDGES = torch.tensor(
    [[0.0] * 7, [1 - 1e-12] * 7, [0.5] * 7, [0.9, 0.1, 0.4, 0.7, 0.2, 0.05, 0.95]], dtype=torch.float64
)


@pytest.mark.parametrize("policies", [(), *((p,) for p in POLICIES), POLICIES])
@pytest.mark.parametrize("side", [8, 12, 5])
def test_pictures_become_what_they_become_by_hand(policies, side):
    pictures = torch.randn(4, 3, side, side, dtype=torch.float64)
    torch.testing.assert_close(
        augmented(pictures, EDGES, policies), hand.augmented(pictures, EDGES, policies), rtol=1e-12, atol=1e-12
    )


def test_moves_reach_an_eighth_and_cuts_a_half():
    """All moves of a 16x16 picture, -2 ... 2, alike; a cut window may hang over the edge, and is 8x8 inside."""
    numbers = draw_augmentation(Rng(0, 0, 5000), "augment")
    pictures = torch.arange(16.0).reshape(1, 1, 1, 16).expand(5000, 1, 16, 16) + 1
    middle = augmented(pictures, numbers, ("translation",))[:, 0, 8, 8] - 9
    counts = torch.bincount((middle + 2).long(), minlength=5)
    assert len(counts) == 5 and (counts - 1000).abs().max() < 5 * 1000**0.5
    cut = (augmented(torch.ones(5000, 1, 16, 16), numbers, ("cutout",)) == 0).flatten(1).sum(1)
    assert cut.max() == 64 and cut.min() == 16
    assert (cut == 64).double().mean().item() == pytest.approx((9 / 17) ** 2, abs=0.03)


def test_gradients_pass_and_points_are_left_alone():
    pictures = torch.randn(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: augmented(x, EDGES), pictures)
    points = torch.randn(4, 2)
    assert augmented(points, EDGES) is points
