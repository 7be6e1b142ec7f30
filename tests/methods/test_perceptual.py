"""Instance and perceptual feedback: cell by cell by hand, and on the shipped encoder."""

import math

import pytest
import torch

from fewstep.methods.parts.distances import feature_distance
from fewstep.methods.parts.perceptual import instance_loss, perceptual_loss
from fewstep.models.encoders import open_encoder
from fewstep.models.helpers import PointEncoder
from fewstep.scenes64.scenes import Scenes

torch.set_num_threads(1)


def answers(seed, rows=2, cells=3):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return 2 * torch.randn(rows, cells, cells, *shape, generator=generator, dtype=torch.float64)

    return {"near": normal(), "geometry": normal(3), "shape": normal(4), "size": normal(2)}


def by_hand(said, wanted):
    total = 0.0
    for row in range(2):
        sure = [[1 / (1 + math.exp(-float(wanted["near"][row, i, j]))) for j in range(3)] for i in range(3)]
        mass = sum(map(sum, sure))
        for i in range(3):
            for j in range(3):
                p, logit = sure[i][j], float(said["near"][row, i, j])
                q = 1 / (1 + math.exp(-logit))
                total += (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / mass
                for a, b in zip(said["geometry"][row, i, j], wanted["geometry"][row, i, j], strict=True):
                    apart = abs(float(a - b))
                    total += p / mass * (apart**2 / 2 if apart < 1 else apart - 0.5)
                for name in ("shape", "size"):
                    mine, theirs = (side[name][row, i, j].exp() for side in (said, wanted))
                    mine, theirs = mine / mine.sum(), theirs / theirs.sum()
                    total += p / mass * float((theirs * (theirs / mine).log()).sum())
    return total / 2


def test_instances_by_hand():
    said, wanted = answers(0), answers(1)
    assert float(instance_loss(said, wanted)) == pytest.approx(by_hand(said, wanted), rel=1e-12)
    assert float(instance_loss(wanted, wanted)) == pytest.approx(0, abs=1e-14)


def test_the_encoder_tells_scenes_apart_and_gradients_come_back():
    """Nothing is missing where pictures are the data; another scene is further off than the same one dimmed."""
    encoder = open_encoder("scenes-64")
    images = torch.from_numpy(Scenes(6).render(range(4)).images).permute(0, 3, 1, 2).float() / 127.5 - 1
    one, other = images[:2], images[2:]
    assert float(perceptual_loss(encoder, one, one)) == pytest.approx(0, abs=1e-5)
    dimmed = (0.9 * one).requires_grad_()
    loss = perceptual_loss(encoder, dimmed, one)
    assert 0 < float(loss) < float(perceptual_loss(encoder, other, one)) / 5
    (slope,) = torch.autograd.grad(loss, dimmed)
    assert (slope.flatten(1).abs().sum(dim=1) > 0).all()
    leaf = one.clone().requires_grad_()
    assert not torch.autograd.grad(perceptual_loss(encoder, dimmed, leaf), leaf, allow_unused=True)[0]


def test_other_encoders_compare_features_at_all_taps():
    encoder, a, b = PointEncoder(2), torch.randn(3, 2), torch.randn(3, 2)
    taps = ("products", "long", "short")
    wanted = feature_distance(encoder.features(a, taps), encoder.features(b, taps))
    assert torch.equal(perceptual_loss(encoder, a, b), wanted) and float(wanted) > 0
