"""The difference of two scores against the KL divergence in closed form, and in few digits; the fake score's loss."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import CASES, SCHEDULES, alpha_sigma

from fewstep.data.random import Rng
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.prediction import Prediction
from fewstep.methods.parts.score_pair import ScorePair, difference, matching_loss, noise_levels
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser

M, S, B, A = 0.4, 0.6, -0.7, 0.5  # data N(M, S); the student draws B + A z
Z, E = (
    x.flatten()[:, None] for x in torch.meshgrid(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 2, indexing="ij")
)
TIMES = {"vp": [20, 499, 980], "edm": [0.05, 1.0, 40.0], "flow": [0.02, 0.5, 0.98]}


def gaussian(mean, std, schedule, kind):
    return Denoiser(GaussianMixture([1], [mean], [std]).network(schedule, kind), schedule, kind)


def pair(name, kind, fake=(B, A), weighting="kl"):
    schedule = SCHEDULES[name]
    roles = SimpleNamespace(teacher=gaussian(M, S**0.5, schedule, kind), fake=gaussian(*fake, schedule, kind))
    return ScorePair(schedule, weighting=weighting), roles


def kl(b, a, t, name):
    """KL(q_t || p_t) of two Gaussians on a line."""
    alpha, sigma = (c.reshape(()) for c in alpha_sigma(name, np.array([t])))
    p, q = alpha**2 * S + sigma**2, alpha**2 * a**2 + sigma**2
    return 0.5 * (q / p + (alpha * (b - M)) ** 2 / p - 1 + (p / q).log())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_with_the_kl_weight_it_is_the_gradient_of_the_divergence(name, kind):
    """g is linear in z and eps, so that means over +-1 are expectations."""
    scores, roles = pair(name, kind)
    for t in TIMES[name]:
        g = scores.matching(roles, B + A * Z, E, torch.full((4,), float(t), dtype=torch.float64), None).gradient
        b, a = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (B, A))
        by_b, by_a = torch.autograd.grad(kl(b, a, t, name), (b, a))
        torch.testing.assert_close(g.mean(), by_b, rtol=1e-10, atol=0)
        torch.testing.assert_close((g * Z).mean(), by_a, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_is_what_the_best_discriminator_says_turned_round(name):
    """Along x the slope of log q_t / p_t at the noised answer, the logit of data's best discriminator with its sign."""
    schedule, generator = SCHEDULES[name], torch.Generator().manual_seed(0)
    data, drawn = GaussianMixture.ring(5, 1.0, 0.3), GaussianMixture.ring(3, 0.7, 0.4)
    mixtures = {"teacher": data, "fake": drawn}
    roles = SimpleNamespace(**{k: Denoiser(m.network(schedule, "flow"), schedule, "flow") for k, m in mixtures.items()})
    x = drawn.sample(64, generator).requires_grad_()
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    t = torch.tensor(TIMES[name], dtype=torch.float64).repeat(22)[:64]
    alpha, sigma = schedule.alpha_sigma(t)
    x_t = schedule.add_noise(x, noise, t)
    (drawn.log_prob(x_t, alpha, sigma) - data.log_prob(x_t, alpha, sigma)).sum().backward()
    found = ScorePair(schedule, weighting="kl").matching(roles, x.detach(), noise, t, None).gradient
    torch.testing.assert_close(found, x.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("weighting", ["l1", "kl"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_it_vanishes_where_the_student_draws_as_the_teacher(name, kind, weighting):
    scores, roles = pair(name, kind, (M, S**0.5), weighting)
    for t in TIMES[name]:
        assert not scores.matching(
            roles, M + Z, E, torch.full((4,), float(t), dtype=torch.float64), None
        ).gradient.any()


def test_l1_divides_each_answers_gap_by_its_own_mean_distance_to_the_real_score():
    scores, roles = pair("vp", "epsilon", weighting="l1")
    x, noise = (torch.randn(3, 5, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))
    mixtures = [GaussianMixture([1], [[m] * 5], [s]) for m, s in ((M, S**0.5), (B, A))]
    roles = SimpleNamespace(**{role: Denoiser(m.network(scores.schedule), scores.schedule)
                               for role, m in zip(("teacher", "fake"), mixtures, strict=True)})  # fmt: skip
    t = torch.tensor([100.0, 400.0, 800.0], dtype=torch.float64)
    (alpha, sigma), found = alpha_sigma("vp", t), scores.matching(roles, x, noise, t, None)
    alpha, sigma = alpha[..., 0, 0], sigma[..., 0, 0]
    x_t = alpha * x + sigma * noise
    real, fake = (m + alpha * v / (alpha**2 * v + sigma**2) * (x_t - alpha * m) for m, v in ((M, S), (B, A**2)))
    away = (x - real).abs().mean(dim=1, keepdim=True)
    torch.testing.assert_close(found.gradient, (fake - real) / away, rtol=1e-11, atol=0)
    stats = {"fake_error": ((fake - x) ** 2).mean(), "teacher_fake_error": ((real - x) ** 2).mean(),
             "score_gap": ((fake - real) ** 2).mean().sqrt(), "score_scale": away.mean()}  # fmt: skip
    assert {k: found.stats[k].item() for k in stats} == pytest.approx({k: v.item() for k, v in stats.items()})
    rows = (((fake - real) ** 2).mean(1).sqrt() / 3).tolist()
    assert found.stats["score_gap_by_time"].tolist() == pytest.approx([0, rows[0], 0, 0, rows[1], 0, 0, 0, rows[2], 0])
    assert found.stats["score_scale_by_time"][8] == pytest.approx(float(away[2]) / 3)


def test_the_teachers_error_in_the_log_is_that_without_guidance():
    ring = GaussianMixture.ring(6, 1.0, 0.3, num_classes=3)
    schedule = SCHEDULES["vp"]
    roles = SimpleNamespace(**{role: Denoiser(ring.network(schedule), schedule) for role in ("teacher", "fake")})
    cond = Cond({"label": torch.tensor([0, 1, 2])}, null={"label": torch.tensor([-1])})
    x, noise = ring.sample(3), torch.ones(3, 2, dtype=torch.float64)
    found = ScorePair(schedule, 5.0).matching(roles, x, noise, torch.tensor([300.0, 500.0, 700.0]), cond)
    assert found.stats["teacher_fake_error"] == found.stats["fake_error"] and found.gradient.any()
    assert roles.teacher.cost.calls == 1 and roles.teacher.cost.evaluations == 6


def test_the_loss_has_the_gradient_even_next_to_large_answers():
    x = torch.full((2, 3), 1000.0, requires_grad=True)
    g = torch.tensor([[1e-6, -3e-5, 0.5], [7e-9, 2.0, -1e-7]])
    loss = matching_loss(x, g)
    loss.backward()
    torch.testing.assert_close(x.grad, g / 6, rtol=1e-6, atol=0)
    assert loss.item() == pytest.approx(0.5 * g.square().mean().item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_gap_keeps_its_digits_at_high_noise(kind):
    """Outputs 1e-4 apart at t = 999, in float32: converted first, they would be 4 % off in epsilon."""
    schedule, generator = SCHEDULES["vp"], torch.Generator().manual_seed(0)
    x, out, nudge = (torch.randn(8, 16, generator=generator) for _ in range(3))
    outputs = [(out + 1e-4 * nudge).float(), out]
    found = difference(*(Prediction(x, o, 999, schedule, kind) for o in outputs))
    wanted = [Prediction(x.double(), o.double(), 999, schedule, kind).x0 for o in outputs]
    assert ((found - (wanted[0] - wanted[1])).norm() / found.norm()).item() < 1e-6


def test_scores_of_two_kinds_are_compared_too():
    schedule = SCHEDULES["vp"]
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    a, b = (gaussian(*law, schedule, kind)(x, 700) for law, kind in (((M, S), "epsilon"), ((B, A), "v_prediction")))
    torch.testing.assert_close(difference(a, b), a.x0 - b.x0, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_fake_scores_loss_is_the_error_of_what_its_network_predicts(name, kind):
    """As a multiple of the squared error of x0."""
    scores, roles = pair(name, kind)
    x = (B + A * Z).requires_grad_()
    for t in TIMES[name]:
        alpha, sigma = (c.item() for c in alpha_sigma(name, np.array([t])))
        error = roles.fake(alpha * x + sigma * E, float(t)).x0 - x
        of_x0 = {
            "epsilon": alpha / sigma,
            "v_prediction": (alpha**2 + sigma**2) / sigma,
            "flow": (alpha + sigma) / sigma,
        }
        weight = (alpha / sigma) ** 2 + (4 if name == "edm" else 1) if kind == "sample" else of_x0[kind] ** 2
        loss = scores.denoising_loss(roles, x, E, torch.full((4,), float(t), dtype=torch.float64), None)
        torch.testing.assert_close(loss, weight * error.square().mean().detach(), rtol=1e-9, atol=0)
        assert not loss.requires_grad  # nothing here has weights, and answers are not to be moved


def test_levels_and_where_they_are_drawn():
    assert noise_levels(SCHEDULES["vp"]).tolist() == list(range(1000))
    edm, flow = noise_levels(SCHEDULES["edm"]), noise_levels(SCHEDULES["flow"])
    assert (edm[0], edm[-1], len(edm)) == (0.002, 80.0, 1000) and (np.diff(edm) > 0).all()
    assert edm[20] == pytest.approx(0.0032, abs=5e-5) and edm[980] == pytest.approx(72.05, abs=5e-3)
    assert flow[499] == pytest.approx(3 * 0.5 / 2) and flow[-1] == 1
    scores, rng = ScorePair(SCHEDULES["vp"]), Rng(0, 0, 50_000)
    matched, all_of_them = scores.draw_time(rng, "a", 0.02, 0.98), scores.draw_time(rng, "b")
    assert (matched.min(), matched.max(), all_of_them.min(), all_of_them.max()) == (20, 980, 0, 999)
    counts = torch.bincount(all_of_them.long(), minlength=1000)
    assert (counts - 50).abs().max() < 5.5 * 50**0.5


def test_refusals():
    for wrong, said in (({"weighting": "l3"}, "Unknown weighting 'l3'"), ({"guidance_scale": -1.0}, "at least 0")):
        with pytest.raises(ValueError, match=said):
            ScorePair(SCHEDULES["vp"], **wrong)
