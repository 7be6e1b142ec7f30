"""DMD2's switches on a line, against closed forms written apart: TDM, decoupled guidance, DP-DMD's first step, IDA.

Data N(0, 0.6) or N(0.4, 0.6) on an unshifted flow schedule unless a test says otherwise. Everything is linear in its
noises or the square of that, so that means over noises of +-1 are expectations.
"""

import copy
import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.parts.matching import DistributionMatching, MatchingDraws, MatchingSettings
from fewstep.methods.parts.rollout import Rollout, RolloutDraws
from fewstep.methods.parts.score_pair import Jump, ScorePair
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.roles import Roles
from fewstep.training import checkpoint
from fewstep.training.players import PlayerState
from fewstep.training.trainer import Trainer
from fewstep.verification.bench import Bench, training_settings
from tests.continued import whole_and_continued
from tests.methods import test_contract as contract
from tests.verification.closed_forms.dmd2 import MEAN, VARIANCE, Game, _recurrence, _roots, normal, root

FLOW, S = Schedule.flow(), 0.6
CASES = [(name, kind) for name in ("vp", "edm", "flow") for kind in ("epsilon", "v_prediction", "sample", "flow")]
CASES.remove(("flow", "epsilon"))
SCHEDULES = {"vp": Schedule.scaled_linear(), "edm": Schedule.edm(), "flow": Schedule.flow(3.0)}


def marginal(t):
    return (1 - t) ** 2 * S + t**2


def nodes(count, times):
    """All ways to give ``count`` noises the values +-1 at every time: [2^count times, 1] each, then the times."""
    grids = np.meshgrid(*[[-1.0, 1.0]] * count, np.asarray(times), indexing="ij")
    columns = [torch.from_numpy(grid.ravel().copy()) for grid in grids]
    return (*(column[:, None] for column in columns[:-1]), columns[-1])


# ---------------------------------------------------------------- the rollout


@pytest.mark.parametrize(("steps", "figures"), [(2, {0.5: 0.787}), (4, {0.75: 0.891})])
def test_states_on_the_ode_are_off_the_teachers_marginal_where_predictions_are_matched(steps, figures):
    """A student whose predictions have the data's spread at every time: its states have a variance of their own."""
    times, spread = FLOW.timesteps(steps).tolist(), [1.0]
    for t, s in pairwise(times):
        spread.append(spread[-1] + (s - t) * (spread[-1] - S**0.5) / t)

    def network(x, t, cond=None):
        return S**0.5 / spread[times.index(float(t[0]))] * x

    rollout = Rollout(FLOW, torch.tensor(times, dtype=torch.float64), move="ode")
    z = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    for exit in range(1, steps):
        draws = RolloutDraws(times=tuple(times), exit=exit, noise=z[:, None])
        found = float(rollout.state(Denoiser(network, FLOW, "sample"), z, draws, None).square().mean())
        assert found == pytest.approx(spread[exit] ** 2, rel=1e-12)
        assert found > marginal(times[exit]) * 1.02
        if times[exit] in figures:
            assert found == pytest.approx(figures[times[exit]], abs=6e-4)


# ---------------------------------------------------------------- jumps (TDM)


def landed_variance(t_i, s, target, kind):
    """The variance at s of an affine student from t_i whose averaged gradient vanishes; its fake score is the best
    that the fake score's own loss has.
    """
    taus = np.linspace(s + 0.02 * (t_i - s), t_i - 0.01 * (t_i - s), 400)
    z, n, t = nodes(2, taus)
    scores = ScorePair(FLOW, weighting="kl")
    which = torch.arange(len(taus)).repeat(4)
    alpha, sigma = (torch.from_numpy(c)[:, None] for c in FLOW.alpha_sigma(t))

    def step(c):
        x_i = math.sqrt(marginal(t_i)) * z
        x = c * x_i
        jump = Jump((1 - s) * x + s * (x_i - (1 - t_i) * x) / t_i, s)

        def fake(f):
            return Denoiser(lambda x, t, cond: f[which][:, None] * x, FLOW, kind)

        def slope(value):
            f = torch.full((len(taus),), value, dtype=torch.float64, requires_grad=True)
            loss = scores.denoising_loss(SimpleNamespace(fake=fake(f)), x, n, t, None, jump, target)
            return torch.autograd.grad(loss, f)[0]

        at_0, at_1 = slope(0.0), slope(1.0)
        best = -at_0 / (at_1 - at_0)  # the loss is quadratic in every coefficient
        roles = SimpleNamespace(teacher=normal(FLOW, 0.0, S**0.5), fake=fake(best))
        gap = scores.matching(roles, x, n, t, None, jump).gradient / (alpha / sigma) ** 2  # all times alike
        return float((gap * x_i).mean()), float(jump.x_s.square().mean())

    low, high = 0.02, 3.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if step(middle)[0] > 0 else (middle, high)
    return step((low + high) / 2)[1]


SEGMENTS = [(1.0, 0.75, 0.600, 0.638), (1.0, 0.5, 0.400, 0.551), (0.5, 0.25, 0.400, 0.475), (0.25, 0.0, 0.600, 0.600)]


@pytest.mark.parametrize(("t", "s", "exact", "released"), SEGMENTS)
def test_a_jump_lands_on_the_teachers_marginal_with_the_exact_score_and_wider_with_the_released_target(
    t, s, exact, released
):
    assert marginal(s) == pytest.approx(exact, abs=1e-9)
    found = landed_variance(t, s, "score", "flow")
    assert found == pytest.approx(marginal(s), abs=2e-4)
    assert landed_variance(t, s, "x0", "flow") == pytest.approx(released, abs=6e-4)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_exact_target_is_the_teachers_score_of_a_student_that_lands_where_the_teacher_is(name, kind):
    """Of any x_s with the teacher's marginal N(alpha_s M, alpha_s^2 S + sigma_s^2), whatever the prediction was."""
    schedule = SCHEDULES[name]
    s, times = {"vp": (300.0, [310.0, 500.0, 700.0]), "edm": (0.7, [0.75, 2.0, 9.0]), "flow": (0.4, [0.45, 0.6, 0.9])}[
        name
    ]
    scores, (alpha, sigma) = ScorePair(schedule), (float(c) for c in schedule.alpha_sigma(s))
    z, n, t = nodes(2, times)
    x_s = alpha * MEAN + math.sqrt(alpha**2 * VARIANCE + sigma**2) * z
    teacher = GaussianMixture([1.0], [MEAN], [VARIANCE**0.5]).network(schedule, kind)
    which = torch.arange(len(times)).repeat(4)
    shift, slope = (torch.zeros(len(times), dtype=torch.float64, requires_grad=True) for _ in range(2))

    def network(x, t, cond):
        return teacher(x, t) + shift[which][:, None] + slope[which][:, None] * x

    roles = SimpleNamespace(fake=Denoiser(network, schedule, kind))
    loss = scores.denoising_loss(roles, 3.0 + 0 * x_s, n, t, None, Jump(x_s, s), "score")
    found = torch.autograd.grad(loss, (shift, slope))
    assert max(float(g.abs().max()) for g in found) < 1e-12 * max(1.0, loss.item())


def test_a_jump_has_no_graph():
    settings = dict(rollout="ode", match="x_s", adversarial_weight=0.0, guidance_scale=1.0, num_inference_steps=8)
    method, roles, _ = contract.build(DMD2, settings)
    batch = contract.SOURCE.batch(contract.rng_of())
    shared = method.prepare(roles, batch, method.draw(batch, contract.rng_of(), contract.Progress(0, 1)), {"student"})
    assert shared.x0_student.requires_grad and not shared.jump.x_s.requires_grad


# ---------------------------------------------------------------- guidance apart


def decoupled(high, mixture, apart=True, scale=4.0, count=60):
    """(mean, variance) where nothing pulls at a Gaussian student, flow schedule, "kl"."""
    teacher = Denoiser(mixture.network(FLOW, "sample"), FLOW, "sample")
    matching = DistributionMatching(FLOW, MatchingSettings(guidance_scale=scale, guidance_apart=apart, weighting="kl"))
    z, n, m, _ = nodes(3, np.zeros(count))
    t1, t2 = (torch.from_numpy(np.tile(np.linspace(0.02, top, count), 8)) for top in (0.98, high))
    cond = Cond({"label": torch.zeros(len(z), dtype=torch.int64)}, null={"label": torch.tensor([-1])})
    draws = MatchingDraws(matching_time=t1, matching_noise=n, guidance_time=t2, guidance_noise=m)
    batch = SimpleNamespace(cond=cond, has_data=False)

    def gradient(mean, std):
        roles = SimpleNamespace(teacher=teacher, fake=normal(FLOW, mean, std))
        x = (mean + std * z).requires_grad_()
        loss = matching.student(roles, batch, x, draws, None).total
        g = torch.autograd.grad(loss, x)[0] * x.numel()
        return float(g.mean()), float((g * z).mean())

    mean, std = root(gradient, 1.5, 0.6)
    return mean, std**2


@pytest.mark.parametrize(("high", "figure"), [(0.98, 3.035), (0.75, 2.589), (0.5, 1.884), (0.25, 1.220)])
def test_guidance_apart_moves_the_mean_as_the_closed_form_says(high, figure):
    """mc + (w - 1) (mc - mu) E[t2^2 / g(t2)] / E[(1 - t1)^2 / g(t1)]; the variance stays."""
    mixture = GaussianMixture([0.0, 1.0], [1.0, 0.0], [0.5**0.5, 0.5**0.5], class_weights=[[1.0, 0.0]])
    t1, t2 = np.linspace(0.02, 0.98, 60), np.linspace(0.02, high, 60)
    ratio = np.mean(t2**2 / (0.5 * (1 - t2) ** 2 + t2**2)) / np.mean((1 - t1) ** 2 / (0.5 * (1 - t1) ** 2 + t1**2))
    mean, variance = decoupled(high, mixture)
    assert mean == pytest.approx(1 + 3 * ratio, abs=1e-8) and mean == pytest.approx(figure, abs=5e-4)
    assert variance == pytest.approx(0.5, abs=1e-8)


def test_guidance_apart_keeps_the_variance_that_guided_matching_loses():
    equal = GaussianMixture([0.0, 1.0], [1.0, 0.0], [0.5**0.5, 0.5**0.5], class_weights=[[1.0, 0.0]])
    assert decoupled(0.98, equal, apart=False)[0] == pytest.approx(4.0, abs=1e-8)
    unequal = GaussianMixture([0.0, 1.0], [1.0, 0.0], [0.3**0.5, 1.3**0.5], class_weights=[[1.0, 0.0]])
    assert decoupled(0.98, unequal, apart=False)[1] == pytest.approx(0.059, abs=5e-4)
    for high, variance in ((0.98, 0.190), (0.5, 0.174), (0.25, 0.240)):
        assert decoupled(high, unequal)[1] == pytest.approx(variance, abs=5e-4)


# ---------------------------------------------------------------- the first step (DP-DMD)


def euler(schedule, times):
    """(offset, factor) of the teacher's Euler steps from x at times[0] to times[-1], on N(MEAN, VARIANCE)."""
    offset, factor = 0.0, 1.0
    for t, s in pairwise(times):
        (alpha, sigma), (low, above) = (map(float, schedule.alpha_sigma(u)) for u in (t, s))
        gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
        keep = above / sigma + (low - alpha * above / sigma) * gain  # of x - alpha MEAN in the next state
        offset, factor = low * MEAN + keep * (offset - alpha * MEAN), keep * factor
    return offset, factor


@pytest.mark.parametrize("kind", ["v_prediction", "flow", "sample"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_first_step_with_the_teachers_mean_slope_has_no_loss(name, kind):
    """Its target is a product of Euler factors on the teacher's own grid of 30, the slope down to the tenth of them."""
    schedule = SCHEDULES[name]
    method = DMD2(schedule, guidance_scale=1.0, rollout="ode", first_weight=0.7, adversarial_weight=0.0)
    times = schedule.timesteps(30)[:11].double().tolist()
    offset, factor = euler(schedule, times)
    (alpha, sigma), (low, above) = (map(float, schedule.alpha_sigma(u)) for u in (times[0], times[-1]))

    def network(x, t, cond, off=0.0):
        z = offset + factor * x
        x0 = (z - above / sigma * x) / (low - alpha * above / sigma)  # the jump to times[-1] is z
        eps = (x - alpha * x0) / sigma
        x0, eps = (x0 - off, eps) if name == "flow" else (x0 - off * sigma / alpha, eps + off)  # an error of the slope
        return {"v_prediction": alpha * eps - sigma * x0, "flow": eps - x0, "sample": x0}[kind]

    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None] * (80.0 if name == "edm" else 1.0)
    teacher = normal(schedule, MEAN, VARIANCE**0.5)
    for off, wanted in ((0.0, 0.0), (1e-3, 0.7e-6)):
        student = Denoiser(lambda x, t, cond, off=off: network(x, t, cond, off), schedule, kind)
        loss = method.first.loss(SimpleNamespace(teacher=teacher, student=student), x, None)
        assert loss.total.item() == pytest.approx(wanted, rel=1e-6, abs=1e-25)
    assert times[-1] == pytest.approx(schedule.timesteps(30)[10].item()) and teacher.cost.calls == 20


def test_the_first_steps_variance_at_its_target():
    """Of N(0, 0.6), 10 of 30 steps: 0.504, where the flow map has 0.511 and a student on the ODE alone 0.855."""
    schedule = Schedule.flow()
    times = schedule.timesteps(30)[:11].double().tolist()
    _, factor = euler(schedule, times)
    assert factor**2 == pytest.approx(0.504, abs=5e-4)
    assert marginal(times[-1]) == pytest.approx(0.511, abs=5e-4)
    assert (1 - (1 - times[-1]) * (1 - S**0.5)) ** 2 == pytest.approx(0.855, abs=6e-4)


@pytest.mark.parametrize("exit", [1, 3])
def test_the_matching_reaches_no_first_step(exit):
    """With a first step of its own the matching's exits begin with the second time, and its states are detached."""
    settings = dict(rollout="ode", first_weight=0.5, adversarial_weight=0.0, guidance_scale=1.0)
    method, roles, _ = contract.build(DMD2, settings)
    batch = contract.SOURCE.batch(contract.rng_of())
    steps = [method.draw(batch, contract.rng_of(step=i), contract.Progress(i, 10)) for i in range(60)]
    assert {draws.exit for draws in steps} == {1, 2, 3}
    draws = next(draws for draws in steps if draws.exit == exit)
    before = roles.student.cost.graph_evaluations
    shared = method.prepare(roles, batch, draws, {"student"})
    assert roles.student.cost.graph_evaluations - before == contract.BATCH and not shared.x_t.requires_grad
    loss = method.student(roles, batch, draws, shared)
    assert roles.student.cost.graph_evaluations - before == contract.BATCH  # the first step's is made later
    assert loss.then().parts.keys() == {"first"}
    assert roles.student.cost.graph_evaluations - before == 2 * contract.BATCH


# ---------------------------------------------------------------- a fake score that is pulled (IDA)


class Number(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor([value], dtype=torch.float64))

    def forward(self, x, t, cond=None):
        return self.value + 0 * x


class Pulled(Game):
    """After each of the student's updates the fake score's number moves towards the student's (`Roles.pull`)."""

    share = 0.03

    def play(self, rounds):
        schedule = self.schedule
        roles = Roles(normal(schedule, MEAN, VARIANCE**0.5))
        for name in ("student", "fake"):
            roles.add_network(name, Number(0.0), "sample")
        roles.pull("fake", "student", self.share)
        student, fake = (roles.parameters(name)[0] for name in ("student", "fake"))
        scores, (g, r, n) = ScorePair(schedule, weighting="kl"), (self.g, self.rate, self.updates)
        assert scores.weighting == "kl"
        errors = [1.0]
        with torch.no_grad():
            student.fill_(1.0), fake.fill_(1.0)
            for _ in range(rounds):
                student -= g * fake  # e' = e - g h
                roles.update_followers("student")
                for _ in range(n):
                    fake += r * (student - fake)
                errors.append(float(student))
        return errors


@pytest.mark.parametrize(("rate", "updates"), [(0.15, 1), (0.005, 1), (0.005, 5)])
def test_a_pull_multiplies_what_the_critic_leaves(rate, updates):
    """q -> 0.97 q: the factor by which student and fake score swing, to nine digits."""
    game = Pulled(FLOW, 0.5, rate, updates)
    q = 0.97 * game.q
    wanted = _roots(1 + q - game.g * (1 - q), q)[0]
    assert _roots(*_recurrence(game.play(4)))[0] == pytest.approx(wanted, rel=1e-9)
    assert abs(wanted - _roots(1 + game.q - game.g * (1 - game.q), game.q)[0]) > 1e-3


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_trainer_pulls_the_fake_score_after_the_students_update(kind):
    """Adam's step is the same wherever the fake score is: pulled by 0.1, then moved by it, at steps of the student."""
    found = {}
    for share in (0.0, 0.1):
        settings = {"fake_pull": share, "adversarial_weight": 0.0, "student_every": 2, "guidance_scale": 1.0}
        method, roles, training = contract.build(DMD2, settings, kind, weight_decay=0.0, max_grad_norm=0.0)
        before = copy.deepcopy(roles.tensors_of("fake"))
        trainer = Trainer(method, roles, contract.SOURCE, training, seed=contract.SEED)
        trainer.step(0)
        found[share] = before, {r: copy.deepcopy(roles.tensors_of(r)) for r in ("student", "fake")}
        if share:
            trainer.step(1)  # the student's is not due
            moved = [(t - u).abs().max().item() for t, u in zip(roles.tensors_of("fake").values(),
                     found[share][1]["fake"].values(), strict=True)]  # fmt: skip
            assert max(moved) < 3 * training.learning_rate  # by Adam alone
    before, plain = found[0.0]
    for key, pulled in found[0.1][1]["fake"].items():
        moved = plain["fake"][key] - before[key]
        wanted = before[key] + 0.1 * (plain["student"][key] - before[key]) + moved
        torch.testing.assert_close(pulled, wanted, rtol=0, atol=1e-12)


def test_roles_of_different_kinds_are_not_pulled():
    roles = Roles(normal(FLOW, 0.0, 1.0))
    roles.add_network("student", Number(0.0), "sample")
    roles.add_network("fake", torch.nn.Linear(1, 1), "sample")
    roles.add_network("other", Number(0.0), "flow")
    for name in ("fake", "other"):
        with pytest.raises(ValueError, match=f"The {name} cannot be pulled to the student"):
            roles.pull(name, "student", 0.1)
    with pytest.raises(ValueError, match="at least 0 and below 1, not 1"):
        roles.pull("student", "student", 1.0)


# ---------------------------------------------------------------- times, and who begins


@pytest.mark.parametrize("name", SCHEDULES)
def test_random_times_begin_with_the_start_and_are_levels_without_their_ends(name):
    """One grid for the whole batch; one to four steps, each as often; inner times uniform over the levels."""
    method = DMD2(SCHEDULES[name], any_steps=4, adversarial_weight=0.0)
    schedule, levels = SCHEDULES[name], method.matching.scores.levels
    grids = [method.rollout.draw_times(contract.Rng(3, step, 4)) for step in range(400)]
    assert {grid[0] for grid in grids} == {float(schedule.start)}
    assert all(a > b for grid in grids for a, b in pairwise(grid))
    assert np.bincount([len(grid) for grid in grids], minlength=5)[1:] == pytest.approx([100] * 4, abs=40)
    inner = torch.tensor([t for grid in grids for t in grid[1:]], dtype=torch.float64)
    index = torch.searchsorted(levels, inner.to(levels.dtype))
    assert torch.equal(levels[index].double(), inner) and int(index.max()) <= 980
    assert int(index.min()) >= (0 if name == "edm" else 20)  # EDM's samplers ask sigma_min
    assert float(index.double().mean()) == pytest.approx(500, abs=60) and float(index.double().std()) > 250
    sampling = method.sampling(method.settings)
    assert sampling.no_other_steps and sorted(sampling.trained_steps) == [1, 2, 3, 4]
    calls = [1 + method.rollout.draw_exit(contract.Rng(3, step, 4), len(grid)) for step, grid in enumerate(grids)]
    assert np.mean(calls) == pytest.approx(method.calls_per_step()["student"], abs=0.2)


def test_every_row_and_process_has_the_same_random_times():
    method = DMD2(SCHEDULES["vp"], any_steps=8)
    whole, part = (method.rollout.draw_times(contract.rng_of(rows)) for rows in (None, slice(4, 8)))
    assert whole == part


def test_times_of_a_jump_lie_between_its_two_and_those_of_guidance_below_the_student():
    settings = dict(rollout="ode", match="x_s", guidance_apart=True, adversarial_weight=0.0)
    method = DMD2(SCHEDULES["vp"], **settings)
    batch = contract.SOURCE.batch(contract.Rng(0, 0, 4000))
    lowest = {}
    for step in range(20):
        draws = method.draw(batch, contract.Rng(0, step, 4000), contract.Progress(step, 20))
        t, s = draws.times[draws.exit], (*draws.times, -1.0)[draws.exit + 1]
        for found in (draws.matching_time, draws.fake_time):
            assert found.min() > s and found.max() <= t
        assert draws.fake_time.min() == s + 1 and draws.fake_time.max() == t
        lowest[draws.exit] = float(draws.matching_time.min()), float(draws.matching_time.max())
        assert draws.guidance_time.min() >= 20 and draws.guidance_time.max() <= min(t, 980)
    assert lowest == {0: (750, 980), 1: (500, 749), 2: (250, 499), 3: (20, 249)}


def test_guidance_acts_no_noisier_than_a_late_time_of_the_student():
    method = DMD2(SCHEDULES["vp"], timesteps=(999, 9, 0), guidance_apart=True, adversarial_weight=0.0)
    batch, found = contract.SOURCE.batch(contract.Rng(0, 0, 50)), {}
    for step in range(20):
        draws = method.draw(batch, contract.Rng(0, step, 50), contract.Progress(step, 20))
        found[draws.times[draws.exit]] = set(draws.guidance_time.tolist())
    assert found[9.0] == {9.0} and found[0.0] == {0.0} and min(found[999.0]) >= 20


def test_a_student_that_starts_later_lets_the_critic_learn_alone():
    method = DMD2(SCHEDULES["vp"], student_every=3, student_start=4)
    due = [[player.name for player in method.players if player.due(step)] for step in range(11)]
    both, critic = ["student", "critic"], ["critic"]
    assert due == [critic] * 4 + [both] + [critic] * 2 + [both] + [critic] * 2 + [both]


def test_a_late_student_warms_up_over_its_own_steps():
    """Its first update is no larger than that of a student that starts at once; the critic's rates are as they were."""
    settings = training_settings(20, warmup_steps=5, lr_schedule="cosine", learning_rate=1.0)
    method = DMD2(SCHEDULES["vp"], adversarial_weight=0.0, student_start=8, student_every=2)
    student, critic = (PlayerState(p, [torch.nn.Parameter(torch.zeros(1))], settings) for p in method.players)
    assert [student.rate(step) for step in (0, 8, 10, 12, 13)] == pytest.approx([0.2, 0.2, 0.6, 1.0, 1.0])
    assert student.rate(16) == pytest.approx(0.5 * (1 + math.cos(math.pi * 3 / 7)))
    assert all(critic.rate(step) == settings.rate(step) for step in range(20))


@pytest.mark.parametrize("stop", [4, 8])
def test_a_run_is_continued_before_and_after_a_late_students_first_step(stop, tmp_path):
    method = DMD2(SCHEDULES["vp"], num_inference_steps=2, adversarial_weight=0.0, guidance_scale=1.0, student_start=6)
    bench = Bench(GaussianMixture([0.5, 0.5], [-1.0, 1.0], [0.3, 0.3]), SCHEDULES["vp"])
    settings = training_settings(10, batch_size=8, checkpoint_every=1)

    def trainer(name, hooks=()):
        folder = tmp_path / name
        return Trainer(method, bench.roles(method), bench.source_of(method), settings, run_dir=folder, hooks=hooks)

    whole, rest = whole_and_continued(trainer, stop)
    assert checkpoint.same(whole.tensors(), rest.tensors())
