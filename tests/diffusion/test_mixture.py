"""Mixtures against automatic differentiation, scipy, brute-force integration, and their own samples."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.prediction import PREDICTION_TYPES, Prediction
from fewstep.diffusion.schedule import Schedule


def covariances(count, dim, seed=0):
    a = torch.randn(count, dim, dim + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.mT / dim + 0.05 * torch.eye(dim, dtype=torch.float64)


CLASSES = [[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]]
MEANS_5 = torch.linspace(-2, 2, 15, dtype=torch.float64).reshape(3, 5).sin() * 2
MIXTURES = {
    "one": GaussianMixture([1.0], [[0.3, -0.4]], [0.5]),
    "one-1d": GaussianMixture([1.0], [0.3], [0.5]),
    "line": GaussianMixture([0.3, 0.7], [-1.2, 0.8], [0.25, 0.35]),
    "isotropic": GaussianMixture([0.2, 0.3, 0.5], [[0, 1], [2, -1], [-1, 0]], [0.3, 0.5, 0.1], class_weights=CLASSES),
    "diagonal": GaussianMixture([0.2, 0.3, 0.5], MEANS_5, torch.rand(3, 5) + 0.1, class_weights=CLASSES),
    "full": GaussianMixture([0.2, 0.3, 0.5], MEANS_5, covariances=covariances(3, 5), class_weights=CLASSES),
    "full-1d": GaussianMixture([0.9, 0.1], [0.0, 2.0], covariances=[[[0.5]], [[0.01]]]),
    "unequal": GaussianMixture([1 - 1e-12, 1e-12], [[0.0, 0.0], [5.0, 5.0]], [1.0, 0.1]),
    "tiny": GaussianMixture.ring(8, 1.0, 1e-3),
    "far": GaussianMixture.ring(8, 100.0, 1.0),
}
SCHEDULES = {"vp": Schedule.scaled_linear(), "edm": Schedule.edm(), "flow": Schedule.flow()}
LEVELS = [(1.0, 0.0), (0.99957, 0.02915), (0.6, 0.8), (0.06826, 0.99767), (0.0, 1.0), (1.0, 80.0), (1.0, 0.002)]


def matrices(mixture):
    c = mixture.components
    diagonal = torch.diag_embed(c.variances.expand(-1, mixture.dim))
    return diagonal if c.basis is None else c.basis @ diagonal @ c.basis.mT


def states(mixture, alpha, sigma, n=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0 = mixture.sample(n, generator)
    return alpha * x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", MIXTURES)
def test_log_prob_is_scipys(name, level):
    mixture, (alpha, sigma) = MIXTURES[name], level
    x = states(mixture, alpha, sigma)
    terms = [
        math.log(w) + stats.multivariate_normal((alpha * m).numpy(), v.numpy()).logpdf(x.numpy())
        for w, m, v in zip(
            mixture.weights.tolist(),
            mixture.means,
            alpha**2 * matrices(mixture) + sigma**2 * torch.eye(mixture.dim, dtype=torch.float64),
            strict=True,
        )
    ]
    expected = np.logaddexp.reduce(np.atleast_2d(terms), axis=0)
    assert mixture.log_prob(x, alpha, sigma).numpy() == pytest.approx(expected, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", MIXTURES)
def test_score_is_the_gradient_of_log_prob(name, level):
    mixture, (alpha, sigma) = MIXTURES[name], level
    labels = [None] + ([1, torch.arange(16) % 3 - 1] if mixture.num_classes else [])
    for label in labels:
        x = states(mixture, alpha, sigma).requires_grad_()
        (gradient,) = torch.autograd.grad(mixture.log_prob(x, alpha, sigma, label).sum(), x)
        score = mixture.score(x.detach(), alpha, sigma, label)
        torch.testing.assert_close(score, gradient, rtol=1e-8, atol=1e-9)
        _, epsilon = mixture.posterior(x.detach(), alpha, sigma, label)
        torch.testing.assert_close(epsilon, -sigma * gradient, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", MIXTURES)
def test_posterior_means_add_up_to_the_state(name, level):
    mixture, (alpha, sigma) = MIXTURES[name], level
    x = states(mixture, alpha, sigma)
    x0, epsilon = mixture.posterior(x, alpha, sigma)
    scale = 1 + float(x.abs().max()) + float(mixture.means.abs().max())
    torch.testing.assert_close(alpha * x0 + sigma * epsilon, x, rtol=1e-12, atol=1e-12 * scale)


def test_ends_are_exact():
    mixture = MIXTURES["full"]
    x = states(mixture, 1, 0)
    x0, epsilon = mixture.posterior(x, 1.0, 0.0)
    assert torch.equal(x0, x) and not epsilon.any()
    x0, epsilon = mixture.posterior(x, 0.0, 1.0)  # pure noise tells nothing about the data
    torch.testing.assert_close(x0, (mixture.weights @ mixture.means).expand_as(x), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(epsilon, x, rtol=1e-14, atol=0)
    rows = mixture.x0(x, np.linspace(1, 0, 16), np.linspace(0, 1, 16))  # one row at each end, the others between
    assert torch.equal(rows[0], x[0]) and rows.isfinite().all()


@pytest.mark.parametrize("name", ["line", "full-1d"])
@pytest.mark.parametrize("level", [(0.6, 0.8), (0.99957, 0.02915), (1.0, 3.0)])
def test_x0_by_brute_force_in_one_dimension(name, level):
    mixture, (alpha, sigma) = MIXTURES[name], level
    grid = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    prior = mixture.log_prob(grid).exp()
    for x in (-1.1, 0.05, 0.9):
        weight = prior * torch.exp(-0.5 * ((x - alpha * grid) / sigma) ** 2)
        expected = float((weight * grid).sum() / weight.sum())
        assert float(mixture.x0(torch.tensor([x], dtype=torch.float64), alpha, sigma)) == pytest.approx(
            expected, abs=1e-9
        )


def test_x0_by_brute_force_in_two_dimensions():
    mixture = GaussianMixture([0.3, 0.7], [[0.5, -0.5], [-1.0, 0.2]], covariances=covariances(2, 2, seed=3))
    axis = torch.linspace(-9, 9, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    prior = mixture.log_prob(grid).exp()
    assert float(prior.sum()) * float(axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=1e-6)
    x, alpha, sigma = torch.tensor([[0.1, 0.3]], dtype=torch.float64), 0.8, 0.6
    weight = prior * torch.exp(-0.5 * ((x - alpha * grid) ** 2).sum(1) / sigma**2)
    expected = (weight[:, None] * grid).sum(0) / weight.sum()
    torch.testing.assert_close(mixture.x0(x, alpha, sigma)[0], expected, rtol=1e-7, atol=1e-7)


def test_equal_mixtures_written_in_three_ways():
    std = torch.tensor([0.3, 0.5, 0.1], dtype=torch.float64)
    means = torch.tensor([[0.0, 1.0], [2.0, -1.0], [-1.0, 0.0]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    one = GaussianMixture([0.2, 0.3, 0.5], means, std)
    x = states(one, 0.6, 0.8)
    for other in (
        GaussianMixture([0.2, 0.3, 0.5], means, std[:, None].expand(3, 2)),
        GaussianMixture([0.2, 0.3, 0.5], means, covariances=std[:, None, None] ** 2 * eye),
    ):
        torch.testing.assert_close(other.log_prob(x, 0.6, 0.8), one.log_prob(x, 0.6, 0.8), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(other.x0(x, 0.6, 0.8), one.x0(x, 0.6, 0.8), rtol=1e-12, atol=1e-13)


def test_a_class_is_the_mixture_of_its_components():
    mixture, x = MIXTURES["full"], states(MIXTURES["full"], 0.6, 0.8)
    alone = GaussianMixture([0.25, 0.75], MEANS_5[1:], covariances=covariances(3, 5)[1:])
    torch.testing.assert_close(mixture.x0(x, 0.6, 0.8, label=1), alone.x0(x, 0.6, 0.8), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixture.x0(x, 0.6, 0.8, label=-1), mixture.x0(x, 0.6, 0.8), rtol=0, atol=0)
    labels = torch.tensor([0, 1, -1, 0] * 4)
    each = torch.cat([mixture.x0(x[i : i + 1], 0.6, 0.8, int(k)) for i, k in enumerate(labels)])
    torch.testing.assert_close(mixture.x0(x, 0.6, 0.8, labels), each, rtol=1e-13, atol=1e-13)


def test_guidance_is_null_plus_w_times_the_difference():
    mixture, x = MIXTURES["isotropic"], states(MIXTURES["isotropic"], 0.6, 0.8)
    w = torch.linspace(0, 8, 16, dtype=torch.float64)
    null, cond = mixture.posterior(x, 0.6, 0.8), mixture.posterior(x, 0.6, 0.8, 0)
    guided = mixture.posterior(x, 0.6, 0.8, 0, w)
    for n, c, g in zip(null, cond, guided, strict=True):
        torch.testing.assert_close(g, n + w[:, None] * (c - n), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_network_of_every_kind_on_every_schedule(name, kind):
    mixture, schedule = MIXTURES["full"], SCHEDULES[name]
    t = torch.linspace(schedule.end, 0.98 * schedule.start, 16, dtype=torch.float64)
    x = mixture.sample_at(16, schedule, t, torch.Generator().manual_seed(0))
    network = mixture.network(schedule, kind)
    said = Prediction(x, network(x, t), t, schedule, kind)
    expected = mixture.x0(x, *schedule.alpha_sigma(t))
    if kind == "epsilon" and name == "edm":  # epsilon's digits of x0 are lost at sigma = 80
        torch.testing.assert_close(said.x0, expected, rtol=1e-9, atol=1e-9)
    elif not (name == "flow" and kind == "sample"):
        torch.testing.assert_close(said.x0, expected, rtol=1e-11, atol=1e-11)
    assert network(x, t).isfinite().all()
    if kind != "epsilon":
        assert network(x, schedule.start).isfinite().all()
    assert network(x, schedule.clean).isfinite().all()


def test_network_reads_its_label_and_keeps_dtype_and_shape():
    mixture, schedule = MIXTURES["isotropic"], SCHEDULES["vp"]
    network, x = mixture.network(schedule, "sample"), states(MIXTURES["isotropic"], 0.5, 0.8, 4)
    labels = torch.tensor([0, 1, -1, 1])
    expected = mixture.x0(x, *schedule.alpha_sigma(500), labels)
    assert torch.equal(network(x, 500, {"label": labels}), expected)
    assert torch.equal(network(x, 500, {"other": labels}), network(x, 500))
    assert torch.equal(network(x.reshape(4, 2, 1, 1), 500), network(x, 500).reshape(4, 2, 1, 1))
    for dtype, out in ((torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        assert network(x.to(dtype), 500).dtype == out
    exact = mixture.x0(x.float().double(), *schedule.alpha_sigma(500))
    torch.testing.assert_close(network(x.float(), 500), exact.float(), rtol=1e-6, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.floats(-3, 2),
    st.sampled_from([0.01, 1.0, 100.0]),
    st.floats(0, math.pi / 2),
    st.integers(0, 10**6),
)
def test_any_mixture_obeys_tweedie(count, dim, log_std, radius, angle, seed):
    """E[x0] = (x + sigma^2 score) / alpha, where alpha is not small."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(count, generator=generator, dtype=torch.float64) ** 8 + 1e-12
    means = radius * torch.randn(count, dim, generator=generator, dtype=torch.float64)
    mixture = GaussianMixture(weights / weights.sum(), means, torch.full((count,), 10**log_std, dtype=torch.float64))
    alpha, sigma = math.cos(angle), math.sin(angle)
    x = states(mixture, alpha, sigma, 8, seed)
    x0, score = mixture.x0(x, alpha, sigma), mixture.score(x, alpha, sigma)
    assert x0.isfinite().all() and score.isfinite().all() and mixture.log_prob(x, alpha, sigma).isfinite().all()
    scale = (1 + x.abs().max() + radius) * 1e-12
    assert float((alpha * x0 - x - sigma**2 * score).abs().max()) <= scale


# ------------------------------------------------------------------ samples


@pytest.mark.parametrize("name", ["line", "isotropic", "diagonal", "full"])
def test_samples_have_the_mixtures_moments(name):
    mixture, n = MIXTURES[name], 200_000
    for label in (None, 1) if mixture.num_classes else (None,):
        w = mixture.weights if label is None else torch.tensor(CLASSES[label], dtype=torch.float64)
        mean = w @ mixture.means
        spread = mixture.means - mean
        covariance = torch.einsum("k,kde->de", w, matrices(mixture) + spread[:, :, None] * spread[:, None, :])
        x = mixture.sample(n, torch.Generator().manual_seed(1), label)
        limit = 5 * covariance.diagonal().max().sqrt() / math.sqrt(n)
        assert x.dtype == torch.float64 and float((x.mean(0) - mean).abs().max()) < limit
        assert float((x.T.cov() - covariance).abs().max()) < 8 * covariance.diagonal().max() / math.sqrt(n)


def test_samples_per_label_and_their_components():
    mixture = GaussianMixture.ring(8, std=0.02, num_classes=4)
    labels = torch.arange(4000) % 4
    x = mixture.sample(4000, torch.Generator().manual_seed(0), labels)
    assert torch.equal(mixture.assign(x) % 4, labels)
    assert torch.equal(
        mixture.sample(5, torch.Generator().manual_seed(7)), mixture.sample(5, torch.Generator().manual_seed(7))
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_noised_samples_follow_the_noised_density(name):
    mixture, schedule = MIXTURES["line"], SCHEDULES[name]
    t = 0.5 * schedule.start
    x = mixture.sample_at(20_000, schedule, t, torch.Generator().manual_seed(0))[:, 0].numpy()
    alpha, sigma = (float(c) for c in schedule.alpha_sigma(t))

    def cdf(value):
        parts = zip((0.3, 0.7), (-1.2, 0.8), (0.25, 0.35), strict=True)
        return sum(w * stats.norm(alpha * m, math.hypot(alpha * s, sigma)).cdf(value) for w, m, s in parts)

    assert stats.kstest(x, cdf).pvalue > 1e-3


# ------------------------------------------------------------------ shapes and errors


def test_shapes():
    line = MIXTURES["line"]
    for shape in ((6,), (6, 1), (6, 1, 1, 1)):
        x = torch.linspace(-1, 1, 6).reshape(shape)
        assert line.x0(x, 0.6, 0.8).shape == line.score(x).shape == shape and line.log_prob(x).shape == (6,)
    assert line.x0(torch.empty(0, 1), 0.6, 0.8).shape == (0, 1)
    assert MIXTURES["full"].responsibilities(torch.zeros(2, 5)).shape == (2, 3)


def test_wrong_states_and_labels_are_one_sentence():
    with pytest.raises(ValueError, match=r"dimension 5: a state of shape \[3, 4\] does not fit"):
        MIXTURES["full"].score(torch.zeros(3, 4))
    for label in (2, -2, torch.tensor([0, 5])):
        with pytest.raises(ValueError, match=r"from -1 \(no condition\) to 1: it has 2 classes"):
            MIXTURES["full"].score(torch.zeros(2, 5), label=label)
    with pytest.raises(ValueError, match="it has 0 classes"):
        MIXTURES["line"].score(torch.zeros(2, 1), label=0)


def test_ring():
    ring = GaussianMixture.ring(8, 2.0, 0.1, num_classes=3)
    assert ring.means.norm(dim=1).tolist() == pytest.approx([2.0] * 8) and ring.num_classes == 3
    assert repr(ring) == "GaussianMixture(num_components=8, dim=2, num_classes=3)"
