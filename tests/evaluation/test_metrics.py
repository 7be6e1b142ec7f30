"""Metrics: against closed forms, against independent computations, and under damage of known strength."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg

from fewstep.evaluation.metrics import (
    Moments,
    centred_interval,
    detail_features,
    frechet_distance,
    kid,
    overlap,
)
from fewstep.scenes64.scenes import Scenes


def fd(a, b):
    """Frechet distance of two sets of features [N, D]."""
    return frechet_distance(Moments.of(a), Moments.of(b))


def detail_fd(a, b):
    """Frechet distance of the patches of two sets of images [N, C, H, W] in [0, 1]."""
    return fd(detail_features(a), detail_features(b))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def split_half(metric, features, seed=0, times=10):
    """Mean of a metric between random halves of one set: its floor for equal distributions, at half the samples."""
    generator = torch.Generator().manual_seed(seed)
    half, values = len(features) // 2, []
    for _ in range(times):
        order = torch.randperm(len(features), generator=generator)
        values.append(metric(features[order[:half]], features[order[half : 2 * half]]))
    return sum(values) / times


def bootstrap(metric, a, b, seed=0, times=100, level=0.95):
    """Interval of a metric over resamplings of both sets, with replacement."""
    generator = torch.Generator().manual_seed(seed)

    def again(x):
        return x[torch.randint(len(x), (len(x),), generator=generator)]

    values = torch.tensor([metric(again(a), again(b)) for _ in range(times)], dtype=torch.float64)
    return centred_interval(values, metric(a, b), level)


@pytest.fixture(scope="module")
def pictures():
    """Two sets of 64 scenes, [64, 3, 64, 64] in [0, 1]."""
    return [torch.from_numpy(Scenes(s).render(range(64)).images).permute(0, 3, 1, 2).double() / 255 for s in (0, 1)]


def test_frechet_distance_of_known_gaussians():
    """Diagonal covariances: the sum of (m_a - m_b)^2 + (s_a - s_b)^2; turning both changes nothing."""
    q = torch.linalg.qr(normal(3, 3))[0]
    a = Moments(torch.tensor([1.0, 2.0, 3.0]).double(), torch.diag(torch.tensor([1.0, 4.0, 9.0]).double()), 10)
    b = Moments(torch.tensor([0.0, 2.0, 5.0]).double(), torch.diag(torch.tensor([4.0, 4.0, 1.0]).double()), 10)
    turned = [Moments(q @ m.mean, q @ m.covariance @ q.T, 10) for m in (a, b)]
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 1 + 4, abs=1e-9)
    assert frechet_distance(*turned) == pytest.approx(10, abs=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("n", [50, 5])
def test_frechet_distance_against_numpy_and_scipy(n):
    """With fewer samples than dimensions too, where the covariances are singular."""
    x, y = normal(n, 6, seed=1) @ normal(6, 6, seed=2), normal(n, 6, seed=3) @ normal(6, 6, seed=4) + 1
    ca, cb = np.cov(x.T.numpy()), np.cov(y.T.numpy())
    root = linalg.sqrtm(ca @ cb + 1e-14 * np.eye(6)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(ca) + np.trace(cb) - 2 * np.trace(root)
    assert fd(x, y) == pytest.approx(expected, rel=1e-4)


def test_kid_against_its_definition():
    x, y = normal(7, 3, seed=1), normal(5, 3, seed=2) + 0.5
    k = lambda a, b: (float(a @ b) / 3 + 1) ** 3  # noqa: E731
    xx = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (7 * 6)
    yy = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (5 * 4)
    xy = sum(k(a, b) for a in x for b in y) / 35
    assert kid(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)


def test_kid_is_unbiased():
    values = [kid(normal(30, 4, seed=2 * s), normal(30, 4, seed=2 * s + 1)) for s in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)
    assert min(values) < 0


def test_overlap_against_loops():
    generated, real, k = normal(20, 2, seed=1) * 0.6 + 0.4, normal(25, 2, seed=2), 3

    def radius(points, i):
        return sorted(float((points[i] - p).norm()) for p in points)[k]

    inside = [[float((g - r).norm()) <= radius(real, j) for g in generated] for j, r in enumerate(real)]
    back = [[float((g - r).norm()) <= radius(generated, i) for i, g in enumerate(generated)] for r in real]
    got = overlap(generated, real, k)
    assert got["precision"] == pytest.approx(np.mean([any(row[i] for row in inside) for i in range(20)]))
    assert got["recall"] == pytest.approx(np.mean([any(row) for row in back]))
    assert got["density"] == pytest.approx(np.sum(inside) / (k * 20))
    assert got["coverage"] == pytest.approx(np.mean([any(row) for row in inside]))


def test_overlap_of_far_and_of_collapsed_sets():
    real = normal(100, 2)
    far = overlap(real + 100, real)
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    collapsed = overlap(real[:1] + 0.01 * normal(100, 2, seed=1), real)
    assert collapsed["precision"] > 0.9
    assert collapsed["recall"] < 0.1
    assert collapsed["coverage"] < 0.2


def test_a_bootstrap_interval_holds_the_value_and_shrinks():
    def gap(a, b):
        return float((a.mean() - b.mean()).abs())

    wide = bootstrap(gap, normal(50, 1) + 2, normal(50, 1, seed=1))
    narrow = bootstrap(gap, normal(5000, 1) + 2, normal(5000, 1, seed=1))
    for low, high in (wide, narrow):
        assert low < 2 < high
    assert narrow[1] - narrow[0] < 0.25 * (wide[1] - wide[0])
    # the means of 50 have a standard error of 0.2 between two sets: 95 % is 3.9 of them across
    assert wide[1] - wide[0] == pytest.approx(3.92 * 0.2, rel=0.35)


def test_the_floor_falls_with_the_number_of_samples():
    floors = [split_half(fd, normal(n, 8)) for n in (50, 200, 800)]
    assert floors[0] > 2 * floors[1] > 4 * floors[2] > 0


DAMAGES = {
    "blur": lambda x, a: (1 - a) * x + a * torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "noise": lambda x, a: x + 0.05 * a * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double(),
    "saturation": lambda x, a: x + 0.3 * a * (x.mean(dim=1, keepdim=True) - x),
    "a weaker colour": lambda x, a: x * torch.tensor([1.0, 1 - 0.2 * a, 1.0]).reshape(3, 1, 1),
    "duplicates": lambda x, a: x[torch.arange(len(x)) % max(2, round(len(x) * (1 - 0.95 * a)))],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_detail_fd_rises_with_damage(damage, pictures):
    real, other = pictures
    values = [detail_fd(real, DAMAGES[damage](other, amount)) for amount in (0.0, 0.5, 1.0)]
    assert values[0] < values[1] < values[2]


@pytest.mark.parametrize("call, sentence", [
    (lambda: Moments.of(normal(1, 3)), "at least two samples"),
    (lambda: kid(normal(4, 3), normal(4, 2)), "equal D"),
    (lambda: overlap(normal(4, 3), normal(40, 3)), "more than 5 samples"),
    (lambda: detail_fd(normal(2, 3, 4, 4), normal(2, 3, 4, 4)), "at least 8 pixels"),
])  # fmt: skip
def test_errors_say_what_is_needed(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
