"""Every figure of a set of images against numpy and scipy in float64, written apart, from the same features: 1e-6."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from fewstep.evaluation.figures import FIGURES, OF_FIRST
from fewstep.evaluation.measured import RESAMPLINGS, Judgement, Reference
from fewstep.evaluation.metrics import centred_interval, spread
from fewstep.evaluation.prompt_set import PromptSet

torch.set_num_threads(1)
COUNT, MORE, K = 40, 60, 5
COSTS = {"evaluations", "ms"}


def images(count, seed):
    """Noise of many scales, [count, 3, 24, 20] in [0, 1]: patches of full rank."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 5, generator=generator)
    fine = torch.rand(count, 3, 24, 20, generator=generator)
    return 0.7 * torch.nn.functional.interpolate(coarse, (24, 20)) + 0.3 * fine


def features(x):
    """[N, 12]: no linear form of the pixels."""
    return torch.nn.functional.adaptive_avg_pool2d(x.square(), 2).flatten(1).sin()


def judge(x):
    """Every third prompt states nothing; brightness tells whether all is right."""
    bright = x.mean(dim=(1, 2, 3)) > 0.5
    return [Judgement({"number": (int(b), 1)} if i % 3 else {}, bool(b), i % 3 > 0) for i, b in enumerate(bright)]


def rated(x):
    return x[:, 0].mean(dim=(1, 2)) - x[:, 1].std(dim=(1, 2))


def apart(a, b):
    """A distance of pairs of images, [N]."""
    return (a - b).abs().amax(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def sets():
    """Generated images, the teacher's of the same prompts, and reference images."""
    own, teacher = images(COUNT, 0), images(COUNT, 1)
    shift = torch.tensor([0.08, 0, 0])[:, None, None]
    return (0.6 * teacher + 0.4 * own + shift).clamp(0, 1), teacher, images(MORE, 2)


@pytest.fixture(scope="module")
def measured(sets):
    generated, teacher, real = sets
    scores = dict.fromkeys(("CLIP score", "PickScore", "aesthetic"), rated)
    reference = Reference.of_batches(real.split(7), features)
    prompts = PromptSet([""] * COUNT, features, reference, judge, teacher=teacher, scores=scores, perceptual=apart)
    return prompts.measure(generated), reference


def frechet(a, b):
    """By the eigenvalues of the covariances' product, which is not symmetric."""
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(ca @ cb).astype(complex)).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * roots.sum()


def patches(x):
    """All 8 x 8 patches at a stride of 4, pixels in tenths."""
    rows = [
        image[:, top : top + 8, left : left + 8].ravel()
        for image in x
        for top in range(0, x.shape[2] - 7, 4)
        for left in range(0, x.shape[3] - 7, 4)
    ]
    return 10 * np.stack(rows)


def kernel_distance(a, b):
    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    n, m = len(a), len(b)
    within = [(kernel(x, x).sum() - np.diag(kernel(x, x)).sum()) / (len(x) * (len(x) - 1)) for x in (a, b)]
    return sum(within) - 2 * kernel(a, b).sum() / (n * m)


def overlap(a, b):
    """By sorted distances; a sample's nearest one is itself."""
    radius_a, radius_b = (np.sort(cdist(x, x), axis=1)[:, K] for x in (a, b))
    inside, reached = cdist(a, b) <= radius_b, cdist(b, a) <= radius_a
    return {
        "precision": inside.any(1).mean(), "recall": reached.any(1).mean(),
        "density": inside.sum(1).mean() / K, "coverage": inside.any(0).mean(),
    }  # fmt: skip


def by_numpy(sets):
    """Every figure that a set of images has, from float64 copies of pixels and features."""
    generated, teacher, real = (x.double().numpy() for x in sets)
    a, t, b = (features(x).double().numpy() for x in sets)
    stated = np.arange(COUNT) % 3 > 0
    bright = generated.mean(axis=(1, 2, 3)) > 0.5
    lengths = np.sqrt((a**2).sum(1) * (t**2).sum(1))
    ratings = np.mean([x[0].mean() - np.sqrt(((x[1] - x[1].mean()) ** 2).sum() / (x[1].size - 1)) for x in generated])
    return {
        "FD": frechet(a, b), "KID": kernel_distance(a, b), "detail FD": frechet(patches(generated), patches(real)),
        "accuracy": (bright & stated).sum() / stated.sum(), **overlap(a, b[:COUNT]),
        "to teacher": np.sqrt(((generated - teacher) ** 2).mean()),
        "unlike teacher": 1 - ((a * t).sum(1) / lengths).mean(),
        "perceptual": np.abs(generated - teacher).max(axis=(1, 2, 3)).mean(),
        **dict.fromkeys(("CLIP score", "PickScore", "aesthetic"), ratings),
    }  # fmt: skip


def test_every_figure_against_numpy(sets, measured):
    """A figure that is added without an independent computation fails here."""
    found, wanted = measured[0].figures(measured[1]), by_numpy(sets)
    assert wanted.keys() == FIGURES.keys() - COSTS - {"spread", *OF_FIRST}  # below, and in test_compare.py
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert 0 < wanted["precision"] < 1 and 0 < wanted["coverage"] < 1 and 0 < wanted["accuracy"] < 1


def test_every_resampling_against_numpy(sets, measured):
    """A resampling is the figure of the groups that it drew, each as often as it was drawn."""
    generated, teacher, real = sets
    numbers = torch.arange(COUNT).tensor_split(32)
    draws = torch.randint(32, (RESAMPLINGS, 32), generator=torch.Generator().manual_seed(0))
    found = measured[0].resampled(measured[1])
    for which in (0, 7):
        rows = torch.cat([numbers[group] for group in draws[which].tolist()])
        a, t, b = (features(x).double().numpy() for x in (generated[rows], teacher[rows], real))
        pixels = generated[rows].double().numpy()
        assert found["FD"][which] == pytest.approx(frechet(a, b), rel=1e-6)
        assert found["detail FD"][which] == pytest.approx(frechet(patches(pixels), patches(real.numpy())), rel=1e-6)
        gap = np.sqrt(((pixels - teacher[rows].numpy()) ** 2).mean())
        assert found["to teacher"][which] == pytest.approx(gap, rel=1e-6)
        cosines = (a * t).sum(1) / np.sqrt((a**2).sum(1) * (t**2).sum(1))
        assert found["unlike teacher"][which] == pytest.approx(1 - cosines.mean(), rel=1e-6)


def test_spread_and_intervals_against_numpy():
    values = images(COUNT, 3).flatten(1)
    pairs = [np.triu(cdist(x, x)).sum() / 6 for x in values.double().numpy().reshape(10, 4, -1)]
    assert spread(values, 4) == pytest.approx(np.mean(pairs), rel=1e-6)
    draws = torch.from_numpy(np.random.default_rng(0).gamma(2, size=RESAMPLINGS))
    middle = np.sort(draws.numpy())[(RESAMPLINGS - 1) // 2]
    ends = np.percentile(draws, [2.5, 97.5]) - middle + 1.3
    assert centred_interval(draws, 1.3) == pytest.approx(ends, rel=1e-6)
