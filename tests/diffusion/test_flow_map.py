"""The exact flow map: quantiles against the integrator, both against a single Gaussian in closed form."""

import math

import pytest
import torch
from scipy import stats

from fewstep.diffusion import mixture as module
from fewstep.diffusion.integrate import integrate
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule

VP, EDM, FLOW = Schedule.scaled_linear(), Schedule.edm(), Schedule.flow()
ROUTES = [(VP, 999, 0), (VP, 999, -1), (VP, 500, 19), (VP, 250.5, 999), (EDM, 80.0, 0.002), (EDM, 80.0, 0.0),
          (FLOW, 1.0, 0.0), (FLOW, 0.7, 0.2), (Schedule.cosine().zero_terminal_snr(), 999, -1)]  # fmt: skip
LINES = {
    "gmm-a": GaussianMixture([0.3, 0.7], [-1.2, 0.8], [0.25, 0.35]),
    "gmm-b": GaussianMixture([0.4, 0.6], [-0.6, 0.5], [0.5, 0.4]),
    "tiny": GaussianMixture([0.5, 0.5], [-1.0, 1.0], [1e-3, 2e-3]),
    "unequal": GaussianMixture([1 - 1e-9, 1e-9], [0.0, 4.0], [1.0, 0.2]),
    "three": GaussianMixture([0.2, 0.5, 0.3], [2.0, -1.0, 0.1], [0.3, 0.1, 0.8]),
    "far": GaussianMixture([0.5, 0.5], [-100.0, 100.0], [1.0, 0.5]),
}


def starts(mixture, schedule, t, n=200, label=None):
    return mixture.sample_at(n, schedule, t, torch.Generator().manual_seed(0), label)


def integrated(mixture, x, schedule, t, s, label=None, guidance_scale=1.0, tolerance=1e-13):
    """The same field followed in another time: tan(theta) scaled, i.e. y = x / alpha over log sigma/alpha."""
    (a, b), (c, d) = ((float(v) for v in schedule.alpha_sigma(u)) for u in (t, s))

    def velocity(y, log_eta):
        eta = math.exp(log_eta)
        _, epsilon = mixture.posterior(y, 1.0, eta, label, guidance_scale)
        return eta * epsilon

    return c * integrate(velocity, x / a, math.log(b / a), math.log(d / c), tolerance)


# ------------------------------------------------------------------ closed form


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_one_gaussian_written_as_two(route, dim):
    """Two equal components force the general path (quantiles or integrator); one takes the linear formula."""
    schedule, t, s = route
    generator = torch.Generator().manual_seed(dim)
    root = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    covariance, mean = root @ root.T + 0.1 * torch.eye(dim, dtype=torch.float64), torch.arange(1.0, dim + 1).double()
    one = GaussianMixture([1.0], mean[None], covariances=covariance[None])
    two = GaussianMixture([0.25, 0.75], mean.expand(2, dim), covariances=covariance.expand(2, dim, dim))
    x = starts(one, schedule, t, 50)
    (a, b), (c, d) = ((float(v) for v in schedule.alpha_sigma(u)) for u in (t, s))
    values, axes = torch.linalg.eigh(covariance)
    ratio = ((c**2 * values + d**2) / (a**2 * values + b**2)).sqrt()
    expected = c * mean + ((x - a * mean) @ axes * ratio) @ axes.T
    torch.testing.assert_close(one.flow_map(x, schedule, t, s), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(two.flow_map(x, schedule, t, s), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("route", ROUTES[2:4])
def test_products_of_lines_act_per_coordinate(route):
    schedule, t, s = route
    line = GaussianMixture([0.3, 0.7], [-1.2, 0.8], [0.3, 0.3])
    weights = torch.outer(line.weights, line.weights).reshape(-1)
    plane = GaussianMixture(weights, torch.cartesian_prod(line.means[:, 0], line.means[:, 0]), [0.3] * 4)
    x = starts(plane, schedule, t, 100)
    each = torch.stack([line.flow_map(x[:, i], schedule, t, s) for i in range(2)], dim=1)
    torch.testing.assert_close(plane.flow_map(x, schedule, t, s), each, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------ quantiles


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("route", ROUTES)
def test_quantiles_agree_with_the_integrator(name, route):
    schedule, t, s = route
    mixture = LINES[name]
    x = starts(mixture, schedule, t, 64)
    by_quantiles = mixture.flow_map(x, schedule, t, s)
    lifted = GaussianMixture(  # the same line with an idle second coordinate takes the integrator's path
        mixture.weights,
        torch.cat([mixture.means, torch.zeros_like(mixture.means)], 1),
        torch.cat([mixture.components.variances.sqrt(), torch.ones_like(mixture.means)], 1),
    )
    by_integrator = lifted.flow_map(torch.cat([x, torch.zeros_like(x)], 1), schedule, t, s)[:, :1]
    back = mixture.flow_map(by_quantiles, schedule, s, t)  # where this fails the map itself amplifies rounding
    sound = (back - x).abs() < 1e-9
    assert sound.double().mean() > 0.9
    torch.testing.assert_close(by_integrator[sound], by_quantiles[sound], rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("name", ["gmm-a", "gmm-b", "three"])
def test_quantiles_keep_probability(name):
    mixture, x = LINES[name], starts(LINES[name], VP, 999, 300)
    y = mixture.flow_map(x, VP, 999, 0)

    def cdf(value, t):
        alpha, sigma = (float(v) for v in VP.alpha_sigma(t))
        parts = zip(mixture.weights, mixture.means[:, 0], mixture.components.variances[:, 0], strict=True)
        return sum(
            float(w) * stats.norm(alpha * float(m), math.sqrt(alpha**2 * float(v) + sigma**2)).cdf(value.numpy())
            for w, m, v in parts
        )

    assert cdf(y, 0) == pytest.approx(cdf(x, 999), abs=1e-13)


def test_far_tails_and_gaps_keep_their_digits():
    mixture = LINES["gmm-a"]
    x = torch.tensor([-30.0, -12.0, 9.0, 12.0, 40.0], dtype=torch.float64)
    y = mixture.flow_map(x, VP, 999, 0)
    assert (y.diff() > 0).all()
    torch.testing.assert_close(mixture.flow_map(y, VP, 0, 999), x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(integrated(mixture, x, VP, 999, 0), y, rtol=1e-9, atol=1e-9)
    far = GaussianMixture([0.5, 0.5], [-10.0, 10.0], [1.0, 1.0])
    gap = torch.linspace(-4, 4, 9, dtype=torch.float64)  # here F is 1/2 to 9 to 23 digits
    up = far.flow_map(gap, VP, 0, 400)
    torch.testing.assert_close(up, -up.flip(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(far.flow_map(up, VP, 400, 0), gap, rtol=1e-5, atol=1e-9)  # its slope is up to 1e9
    assert LINES["far"].flow_map(gap * 20, VP, 0, 999).isfinite().all()


def test_classes_with_absent_components():
    mixture = GaussianMixture(
        [0.3, 0.3, 0.4], [-1.0, 0.5, 2.0], [0.2, 0.3, 0.4], class_weights=[[0.5, 0.5, 0], [0, 0, 1]]
    )
    x = torch.linspace(-2, 2, 40, dtype=torch.float64)
    labels = torch.arange(40) % 3 - 1
    y = mixture.flow_map(x, VP, 999, 0, label=labels)
    two = GaussianMixture([0.5, 0.5], [-1.0, 0.5], [0.2, 0.3])
    one = GaussianMixture([1.0], [2.0], [0.4])
    for value, alone in ((-1, mixture), (0, two), (1, one)):
        rows = labels == value
        torch.testing.assert_close(y[rows], alone.flow_map(x[rows], VP, 999, 0), rtol=1e-11, atol=1e-11)


# ------------------------------------------------------------------ the integrated map


@pytest.mark.slow
@pytest.mark.parametrize(
    "mixture",
    [
        GaussianMixture.ring(8, 1.0, 0.1),
        GaussianMixture.ring(8, 1.0, 1e-3),
        GaussianMixture.ring(3, 100.0, 1.0),
        GaussianMixture([0.99, 0.01], torch.zeros(2, 3) + torch.tensor([[0.0], [2.0]]), [0.5, 0.1]),
    ],
    ids=["ring", "tiny", "far", "3-d"],
)
@pytest.mark.parametrize("route", [(VP, 999, 0), (EDM, 80.0, 0.002), (FLOW, 0.999, 0.001)], ids=["vp", "edm", "flow"])
def test_integrated_map_in_another_time_variable(mixture, route):
    schedule, t, s = route
    x = starts(mixture, schedule, t, 32)
    y = mixture.flow_map(x, schedule, t, s)
    torch.testing.assert_close(integrated(mixture, x, schedule, t, s), y, rtol=1e-9, atol=1e-8)


GUIDED = {
    "plane": GaussianMixture.ring(6, 1.0, 0.2, num_classes=2),
    "line": GaussianMixture([0.3, 0.7], [-1.2, 0.8], [0.25, 0.35], class_weights=[[1, 0], [0, 1]]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize("guidance_scale", [0.0, 3.0, 7.5, "rows"])
def test_guided_map(name, guidance_scale):
    mixture, label = GUIDED[name], torch.arange(32) % 2
    scale = torch.linspace(0, 6, 32) if guidance_scale == "rows" else guidance_scale
    x = starts(mixture, VP, 999, 32)
    y = mixture.flow_map(x, VP, 999, 0, label, scale)
    torch.testing.assert_close(integrated(mixture, x, VP, 999, 0, label, scale), y, rtol=1e-9, atol=1e-8)
    if guidance_scale == 0.0:
        torch.testing.assert_close(y, mixture.flow_map(x, VP, 999, 0), rtol=1e-9, atol=1e-9)


def test_guidance_of_one_is_the_conditional_map():
    mixture = LINES["gmm-a"]
    classed = GaussianMixture([0.3, 0.7], [-1.2, 0.8], [0.25, 0.35], class_weights=[[0.3, 0.7], [0.5, 0.5]])
    x = starts(mixture, VP, 999)
    assert torch.equal(classed.flow_map(x, VP, 999, 0, 0, 1.0), mixture.flow_map(x, VP, 999, 0))


def test_maps_compose_and_invert():
    ring, x = GaussianMixture.ring(5, 1.0, 0.2), starts(GaussianMixture.ring(5, 1.0, 0.2), VP, 999, 32)
    once, twice = ring.flow_map(x, VP, 999, 0), ring.flow_map(ring.flow_map(x, VP, 999, 400.25), VP, 400.25, 0)
    torch.testing.assert_close(once, twice, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ring.flow_map(once, VP, 0, 999), x, rtol=1e-9, atol=1e-9)
    assert torch.equal(ring.flow_map(x, VP, 300, 300), x)


def test_the_schedule_only_changes_coordinates():
    """Phi(x; t -> s) of any schedule is alpha_s Phi_VE(x / alpha_t; eta_t -> eta_s)."""
    ring, x = GaussianMixture.ring(5, 1.0, 0.2), starts(GaussianMixture.ring(5, 1.0, 0.2), VP, 700, 32)
    a, c = float(VP.alpha(700)), float(VP.alpha(50))
    ve = c * ring.flow_map(x / a, EDM, float(VP.noise_to_signal(700)), float(VP.noise_to_signal(50)))
    torch.testing.assert_close(ring.flow_map(x, VP, 700, 50), ve, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_the_map_carries_samples_to_samples():
    ring = GaussianMixture.ring(4, 1.0, 0.15)
    y = ring.flow_map(starts(ring, VP, 999, 4000), VP, 999, -1)
    mass = torch.bincount(ring.assign(y), minlength=4) / 4000
    assert float((mass - 0.25).abs().max()) < 0.03
    for k in range(4):
        assert float((y[ring.assign(y) == k] - ring.means[k]).std(0).mean()) == pytest.approx(0.15, rel=0.06)


# ------------------------------------------------------------------ types, shapes, errors


@pytest.mark.parametrize("mixture", [LINES["gmm-a"], GaussianMixture([1.0], [0.5], [2.0])])
def test_types_and_shapes(mixture):
    for shape in ((6,), (6, 1), (6, 1, 1)):
        x = torch.linspace(-1, 1, 6).reshape(shape)
        y = mixture.flow_map(x, VP, 999, 0)
        assert y.shape == shape and y.dtype == torch.float32
        torch.testing.assert_close(y, mixture.flow_map(x.double(), VP, 999, 0).float())
    assert mixture.flow_map(x.double(), VP, 999, 0).dtype == torch.float64
    assert mixture.flow_map(torch.empty(0), VP, 999, 0).shape == (0,)


def test_errors():
    ring = GaussianMixture.ring(num_classes=2)
    with pytest.raises(ValueError, match="outside this vp schedule"):
        ring.flow_map(torch.zeros(1, 2), VP, 1000, 0)
    with pytest.raises(ValueError, match="finite states"):
        ring.flow_map(torch.full((1, 2), math.nan), VP, 999, 0)
    with pytest.raises(ValueError, match="2 classes"):
        ring.flow_map(torch.zeros(1, 2), VP, 999, 0, label=2)
    with pytest.raises(ValueError, match="cannot be followed"):
        integrate(lambda y, t: y / 0, torch.ones(1), 0.0, 1.0)


# ------------------------------------------------------------------ the integrator alone


def test_integrator_order_and_direction():
    y = torch.tensor([1.0, -2.0], dtype=torch.float64)
    for start, stop in ((0.0, 3.0), (3.0, 0.0)):
        grown = integrate(lambda y, t: y * math.cos(t), y, start, stop)
        torch.testing.assert_close(grown, y * math.exp(math.sin(stop) - math.sin(start)), rtol=1e-11, atol=1e-11)
    from fewstep.diffusion.integrate import _step

    def error(h):
        after, _ = _step(lambda y, t: -(y**2), y[:1], -(y[:1] ** 2), 0.0, h)
        return abs(float(after) - 1 / (1 + h))

    assert math.log2(error(0.4) / error(0.2)) > 11


def test_paths_are_chosen_as_documented(monkeypatch):
    called = []
    real = module.integrate
    monkeypatch.setattr(module, "integrate", lambda *a: called.append("ode") or real(*a))
    x = torch.zeros(2, 1)
    LINES["gmm-a"].flow_map(x, VP, 999, 0)
    GaussianMixture([1.0], [[0.0, 1.0]], [1.0]).flow_map(torch.zeros(2, 2), VP, 999, 0)
    assert not called
    GaussianMixture.ring().flow_map(torch.ones(2, 2), VP, 999, 900)
    assert called == ["ode"]


@pytest.mark.parametrize("schedule", [Schedule.flow(), Schedule.edm(sigma_max=3e4)], ids=["flow", "edm"])
def test_the_first_step_sees_modes_ten_thousand_widths_apart(schedule):
    """With means (+-1e4, 0) and unit widths the first axis moves as in one dimension, where quantiles are exact."""
    means = 1e4 * torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    plane, line = (GaussianMixture([0.3, 0.7], m, [1.0, 1.0]) for m in (means, means[:, 0]))
    x = plane.sample_at(64, schedule, schedule.start, torch.Generator().manual_seed(0))
    mapped = plane.flow_map(x, schedule, schedule.start, schedule.end)
    torch.testing.assert_close(
        mapped[:, 0], line.flow_map(x[:, 0], schedule, schedule.start, schedule.end), rtol=1e-9, atol=1e-6
    )
