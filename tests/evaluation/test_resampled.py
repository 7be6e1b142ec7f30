"""Figures under resampling of groups: against the plain metrics of sets that hold each image as often as it counts."""

from __future__ import annotations

import pytest
import torch
from scipy import linalg

from fewstep.evaluation import resampled
from fewstep.evaluation.metrics import GroupedMoments, Moments, distance_to, kid, overlap
from fewstep.evaluation.resampled import frechet_curve, kid_curve, mean_curve, overlap_curves

COUNTS = torch.tensor([7, 6, 6, 5])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def repeated(x, weights):
    """Rows of x, each as often as its group counts."""
    return torch.cat([part.repeat(int(w), 1) for part, w in zip(x.split(COUNTS.tolist()), weights, strict=True)])


def by_scipy(a, b):
    """Frechet distance with the matrix square root of another library."""
    ca, cb = (torch.cov(x.T).numpy() for x in (a, b))
    root = linalg.sqrtm(ca @ cb).real.trace()
    return float((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * root)


@pytest.fixture(scope="module")
def sets():
    return normal(24, 6) * torch.arange(1, 7) / 3 + 0.3, normal(40, 6, seed=1)


WEIGHTS = [(1, 1, 1, 1), (2, 0, 1, 1), (4, 0, 0, 0), (0, 1, 2, 1)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_frechet_distance_by_moments_and_by_inner_products(sets, weights, monkeypatch):
    """Both ways, also with more features than images, give the distance of the repeated rows."""
    a, b = sets
    w = torch.tensor(weights, dtype=torch.float64)
    wanted = by_scipy(repeated(a, weights), b)
    assert frechet_curve(a, b, COUNTS)(w) == pytest.approx(wanted, rel=1e-6)
    wide = torch.linalg.qr(normal(50, 50))[0][:6]  # an isometry into 50 dimensions changes no distance
    monkeypatch.setattr(resampled, "SMALL", 8)
    assert frechet_curve(a @ wide, b @ wide, COUNTS)(w) == pytest.approx(wanted, rel=1e-6)


def test_frechet_distance_with_fewer_images_than_features():
    """Singular covariances: against the distance in a basis of the space that the images span."""
    a, b = normal(24, 700) + 0.1, normal(30, 700, seed=1) * 1.2
    basis = torch.linalg.qr(torch.cat([a, b]).T).Q
    assert frechet_curve(a, b, COUNTS)(None) == pytest.approx(by_scipy(a @ basis, b @ basis), rel=1e-6)


def test_frechet_curve_of_few_features_is_the_plain_distance_to_the_bit(sets):
    a, b = sets
    grouped = GroupedMoments.join(a.split(COUNTS.tolist()))
    assert frechet_curve(a, b, COUNTS)(None) == distance_to(Moments.of(b))(grouped.moments(None))


def test_kid_resampled_leaves_out_pairs_of_a_group(sets):
    """By loops over all pairs of images of different groups; the plain figure takes all pairs."""
    a, b = sets
    assert kid_curve(a, b, COUNTS)(None) == kid(a, b)
    weights, groups = (2.0, 0.0, 1.0, 1.0), [g for g, n in enumerate(COUNTS.tolist()) for _ in range(n)]

    def k(x, y):
        return float(x @ y / 6 + 1) ** 3

    pairs = [
        (weights[g] * weights[h], k(a[i], a[j])) for i, g in enumerate(groups) for j, h in enumerate(groups) if g != h
    ]
    across = [(weights[g], k(a[i], y)) for i, g in enumerate(groups) for y in b]
    real = [k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j]

    def mean(found):
        return sum(w * value for w, value in found) / sum(w for w, _ in found)

    wanted = mean(pairs) + sum(real) / len(real) - 2 * mean(across)
    assert kid_curve(a, b, COUNTS)(torch.tensor(weights)) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_overlap_resampled_by_loops(sets, weights):
    a, b = sets
    k, curves = 3, overlap_curves(*sets, COUNTS, k=3)
    plain = overlap(a, b, k)
    assert {name: curve(None) for name, curve in curves.items()} == plain

    def radius(x):
        return [sorted(float((one - other).norm()) for other in x)[k] for one in x]

    of_real, of_generated = radius(b), radius(a)
    there = [i for i, g in enumerate(torch.arange(4).repeat_interleave(COUNTS)) for _ in range(weights[g])]
    gap = [[float((x - y).norm()) for x in a] for y in b]
    inside = [[gap[j][i] <= of_real[j] for j in range(len(b))] for i in there]
    wanted = {
        "precision": sum(map(any, inside)) / len(there),
        "density": sum(map(sum, inside)) / k / len(there),
        "recall": sum(any(gap[j][i] <= of_generated[i] for i in there) for j in range(len(b))) / len(b),
        "coverage": sum(any(gap[j][i] <= of_real[j] for i in there) for j in range(len(b))) / len(b),
    }
    w = torch.tensor(weights, dtype=torch.float64)
    assert {name: curve(w) for name, curve in curves.items()} == pytest.approx(wanted)


def test_mean_curve():
    values = torch.arange(24.0)
    assert mean_curve(values, COUNTS)(None) == 11.5
    assert mean_curve(values, COUNTS)(torch.tensor([0.0, 2, 0, 1])) == pytest.approx((2 * 57 + 105) / 17)
