"""One sCM step against the same step by hand; its times, its fixed point, its float32."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import CASES, SCHEDULES, alpha_sigma, ask, captioned, gradients, off, row_scales, shake, student_on
from reference import x0_epsilon as clean_and_noise

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule, expand
from fewstep.methods.base import Progress
from fewstep.methods.scm import SCM, Draws, angle
from fewstep.methods.tcd import TCD
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.mlp import MLP
from fewstep.models.roles import Roles
from fewstep.recipe.load import parse_recipe
from fewstep.recipe.validate import RecipeError
from fewstep.training import checkpoint
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, build_roles, exact_products
from fewstep.verification.bench import Bench, training_settings
from fewstep.verification.scm import ExactConsistency, fixed_rows, matching_rows, tangent_size
from tests.continued import whole_and_continued

SETTINGS = {
    "unguided": dict(guidance_scale=1.0, normalize=0.0),
    "drawn scale": dict(guidance_scale=(2.0, 8.0)),
    "warming up": dict(guidance_scale=3.0, normalize=0.5),
    "matched": dict(guidance_scale=3.0, matching_weight=0.7, any_steps=3),
}
TIMES = {  # t and u
    "vp": ([999.0, 700.0, 410.5, 300.0, 99.0, 620.0], [980.0, 690.0, 400.0, 299.5, 90.0, 619.0]),
    "edm": ([80.0, 12.0, 3.0, 1.5, 0.4, 20.0], [60.0, 11.0, 2.9, 1.4, 0.39, 19.0]),
    "flow": ([1.0, 0.8, 0.5, 0.3, 0.05, 0.6], [0.99, 0.78, 0.49, 0.29, 0.04, 0.598]),
}
OWN = {"vp": (999.0, 620.0, 250.0), "edm": (80.0, 9.0, 0.5), "flow": (1.0, 0.7, 0.2)}  # of a matched rollout
COMPARED = {  # where scores are compared, and where the fake one learns
    "vp": ([30.0, 300.0, 500.0, 700.0, 970.0, 100.0], [0.0, 999.0, 400.0, 50.0, 800.0, 600.0]),
    "edm": ([0.01, 0.2, 1.0, 7.0, 60.0, 3.0], [0.002, 80.0, 0.5, 2.0, 9.0, 30.0]),
    "flow": ([0.02, 0.3, 0.5, 0.8, 0.98, 0.6], [0.001, 1.0, 0.2, 0.6, 0.4, 0.9]),
}


def build(name, kind, variant, weights="full"):
    method = SCM(SCHEDULES[name], **SETTINGS[variant])
    roles, base = student_on(method, name, kind, weights)
    if variant == "matched":
        shake(roles.tensors_of("fake").values())
    return method, roles, base, *captioned(6)


def draws(name, variant):
    scale = SETTINGS[variant]["guidance_scale"]
    scales = row_scales(scale)
    noise = torch.randn(6, 2, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, u = (torch.tensor(times, dtype=torch.float64) for times in TIMES[name])
    drawn = Draws(t, u, noise, scales.double(), 0.4 if variant == "warming up" else 1.0)
    if variant != "matched":
        return drawn
    own, *noises = torch.randn(5, 6, 2, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64).split(
        [3, 1, 1]
    )
    at, fake_at = (torch.tensor(times, dtype=torch.float64) for times in COMPARED[name])
    rollout = {"times": OWN[name], "exit": 2, "rollout_noise": own.movedim(0, 1)}
    scores = {"matching_time": at, "matching_noise": noises[0][0], "fake_time": fake_at, "fake_noise": noises[1][0]}
    return dataclasses.replace(drawn, **rollout, **scores)


def by_hand(name, kind, variant, p, random):
    """Algorithm 1 of the paper on the circle, with its JVP replaced by a difference along the teacher's path."""
    _, roles, base, batch, null = p
    text, x0, c = batch.cond["text"], batch.x0, SETTINGS[variant].get("normalize", 0.1)
    student = {key: q.detach().clone().requires_grad_() for key, q in roles.tensors_of("student").items()}

    def on_circle(pair, time):
        alpha, sigma = alpha_sigma(name, time)
        radius = (alpha**2 + sigma**2).sqrt()
        cos, sin = alpha / radius, sigma / radius
        return cos, sin, radius, cos * pair[1] - sin * pair[0]

    t, u = random.t.numpy(), random.u.numpy()
    alpha, sigma = alpha_sigma(name, t)
    x_t = alpha * x0 + sigma * random.noise
    w = random.guidance_scale.reshape(-1, 1, 1, 1)
    said = [ask(base, {}, name, x_t, t, c) for c in (text, null.expand(6, 3))]
    pairs = [clean_and_noise(name, kind, x_t, output, t) for output in said]
    teacher = tuple(without + w * (with_ - without) for with_, without in zip(*pairs, strict=True))
    cos, sin, radius, F_T = on_circle(teacher, t)
    a_u, s_u = alpha_sigma(name, u)
    h = torch.atan2(sigma, alpha) - torch.atan2(s_u, a_u)
    y = x_t / radius
    x_u = (a_u**2 + s_u**2).sqrt() * (torch.cos(h) * y - torch.sin(h) * F_T)  # a turn of the circle by h
    below = on_circle(clean_and_noise(name, kind, x_u, ask(base, student, name, x_u, u, text), u), u)[3]
    F = on_circle(clean_and_noise(name, kind, x_t, ask(base, student, name, x_t, t, text), t), t)[3]
    r = random.warmup
    rate = (F - below) / torch.sin(h)
    g = -cos * (1 - r**2 * sin**2).sqrt() * (F - F_T) - r * cos * sin * (y + rate)
    if c:
        g = g / (g.flatten(1).square().mean(1).sqrt() + c).reshape(-1, 1, 1, 1)
    gain = {"epsilon": 1 / cos, "sample": 1 / sin}.get(kind, torch.ones(()))  # of an error of the output in F
    loss = ((15 / gain).clamp_max(1) * (F - (F + g).detach()) ** 2).mean()
    if variant == "matched":
        loss = loss + 0.7 * matching_by_hand(name, kind, p, random, student)
    return x_t, loss, dict(zip(student, torch.autograd.grad(loss, student.values()), strict=True))


def own_prediction(name, kind, p, random, student):
    """Clean data of a matched rollout's last call, and the functions that read a network and noise data."""
    _, _, base, batch, _ = p

    def clean(tensors, x, t, text=batch.cond["text"]):
        t = np.broadcast_to(np.asarray(t, dtype=np.float64), 6).copy()
        return clean_and_noise(name, kind, x, ask(base, tensors, name, x, t, text), t)[0]

    def noised(x, noise, t):
        alpha, sigma = alpha_sigma(name, np.broadcast_to(np.asarray(t, dtype=np.float64), 6))
        return alpha * x + sigma * noise

    first, second, third = OWN[name]
    x = random.rollout_noise[:, 0] * (80.0 if name == "edm" else 1.0)
    for i, (t, s) in enumerate([(first, second), (second, third)]):
        x = noised(clean(student, x, t), random.rollout_noise[:, i + 1], s).detach()
    return clean(student, x, third), clean, noised


def matching_by_hand(name, kind, p, random, student):
    """DMD's term of rCM: g = (fake - guided real) / mean |x - guided real|, where x is noised, at a guidance of 3."""
    _, roles, _, _, null = p
    x, clean, noised = own_prediction(name, kind, p, random, student)
    at, fake = random.matching_time.numpy(), dict(roles.tensors_of("fake"))
    with torch.no_grad():
        state = noised(x, random.matching_noise, at)
        given, without = clean({}, state, at), clean({}, state, at, null.expand(6, 3))
        real = without + 3 * (given - without)
        g = (clean(fake, state, at) - real) / (x - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    return 0.5 * ((x - (x - g).detach()) ** 2).mean()


@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("variant", SETTINGS)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_step_is_the_papers(name, kind, variant, weights):
    p, random = build(name, kind, variant, weights), draws(name, variant)
    method, roles, _, batch, _ = p
    x_t, loss, slopes = by_hand(name, kind, variant, p, random)
    shared = method.prepare(roles, batch, random, {"student"})
    terms = list(method.student(roles, batch, random, shared).terms())
    assert off(shared.along.x_t, x_t) <= 1e-10 and not shared.along.below.requires_grad
    mine = sum(term.total for term in terms)
    assert len(terms) == (2 if variant == "matched" else 1) and off(mine, loss) <= 1e-9
    for key, gradient in gradients(mine, roles, "student").items():
        assert slopes[key].abs().max() > 0 and off(gradient, slopes[key]) <= 1e-9, key


@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_fake_score_denoises_the_students_own_predictions(name, kind, weights):
    p, random = build(name, kind, "matched", weights), draws(name, "matched")
    method, roles, base, batch, _ = p
    x, _, noised = own_prediction(name, kind, p, random, dict(roles.tensors_of("student")))
    a, at = x.detach(), random.fake_time.numpy()
    fake = {key: q.detach().clone().requires_grad_() for key, q in roles.tensors_of("fake").items()}
    said = ask(base, fake, name, noised(a, random.fake_noise, at), at, batch.cond["text"])
    (alpha, sigma), eps = alpha_sigma(name, at), random.fake_noise
    wanted = {"epsilon": eps, "sample": a, "v_prediction": alpha * eps - sigma * a, "flow": eps - a}[kind]
    weight = (alpha / sigma) ** 2 + (4.0 if name == "edm" else 1.0) if kind == "sample" else 1.0
    loss = (weight * (said - wanted) ** 2).mean()
    slopes = dict(zip(fake, torch.autograd.grad(loss, fake.values()), strict=True))
    before = roles.student.cost.calls
    shared = method.prepare(roles, batch, random, {"critic"})
    assert roles.student.cost.calls - before == 3  # two to get there, and both terms of consistency beside it:
    assert method.calls(random) == {"student": 5, "teacher": 2, "fake": 2}
    assert shared.along is None and not shared.x0_student.requires_grad  # a step of the critic alone asks no more
    mine = method.critic(roles, batch, random, shared).total
    assert off(mine, loss) <= 1e-9
    for key, gradient in gradients(mine, roles, "fake").items():
        assert slopes[key].abs().max() > 0 and off(gradient, slopes[key]) <= 1e-9, key


def test_a_row_of_large_gain_moves_the_output_as_one_of_15():
    """The tangent is normalised in F, whose error is 1 / cos a times that of the noise: 157 at the end of DDPM's."""
    schedule = Schedule.from_betas(np.linspace(1e-4, 0.02, 1000))
    method, x0 = SCM(schedule, guidance_scale=1.0, normalize=1e-9), torch.ones(3, 4).double()
    t, output = torch.tensor([999.0, 500.0, 100.0]).double(), torch.full((3, 4), 0.3).double().requires_grad_()
    u = method.time_at(angle(schedule, t) - 0.01)
    random = Draws(t, u, torch.full((3, 4), 0.7).double(), torch.ones(3).double(), 0.5)
    other = Denoiser(lambda x, t, cond: 0.1 * x, schedule, "epsilon")
    shared = method.prepare(type("Roles", (), {"teacher": other, "student": other}), Batch(x0), random, {"student"})
    student = Denoiser(lambda x, t, cond: output, schedule, "epsilon")
    method.student(type("Roles", (), {"student": student}), Batch(x0), random, shared).total.backward()
    pull = output.grad.square().mean(1).sqrt().numpy() * output.numel() / 2
    assert pull == pytest.approx(np.minimum(1 / np.cos(angle(schedule, t)), 15), rel=1e-6)
    assert pull[0] == pytest.approx(15) and pull[1] < 15


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), Schedule.scaled_linear().zero_terminal_snr()])
def test_times_are_log_normal_angles_and_one_step_below(schedule):
    method = SCM(schedule, P_mean=0.2, P_std=0.7, angle_step=0.02)
    random = method.draw(Batch(torch.zeros(20_000, 1)), Rng(3, 0, 20_000), Progress(0, 10))
    a, below = angle(schedule, random.t), angle(schedule, random.u)
    inside = (a > method.lowest + 0.05) & (a < method.highest - 0.05)
    level = np.log(np.tan(a[inside]))
    assert inside.mean() > 0.95 and np.median(level) == pytest.approx(0.2, abs=0.03)
    assert np.quantile(level, 0.84) - np.quantile(level, 0.16) == pytest.approx(1.4, abs=0.06)
    assert a[inside] - below[inside] == pytest.approx(0.02, abs=1e-4)
    assert (below < a).all() and below.min() > method.lowest and a.max() <= method.highest


def test_the_warm_up_grows_over_its_share_of_the_steps():
    method, batch = SCM(SCHEDULES["flow"], warmup=0.2), Batch(torch.zeros(4, 1))
    grown = [method.draw(batch, Rng(3, 0, 4), Progress(step, 100)).warmup for step in (0, 10, 20, 99)]
    assert grown == pytest.approx([0.0, 0.5, 1.0, 1.0])
    assert SCM(SCHEDULES["flow"], warmup=0.0).draw(batch, Rng(3, 0, 4), Progress(0, 100)).warmup == 1.0
    assert SCM.depends_on_length(SCM.Settings()) and not SCM.depends_on_length(SCM.Settings(warmup=0))


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), Schedule.scaled_linear().zero_terminal_snr()])
def test_at_the_exact_consistency_function_the_squared_tangent_falls_as_the_step_squared(schedule):
    gaussian = Bench(GaussianMixture([1.0], [0.4], [0.6**0.5]), schedule)
    method = SCM(schedule, guidance_scale=1.0)
    rows = fixed_rows(gaussian, method)
    assert len(rows) == 13 and all(row.passed for row in rows), rows
    assert tangent_size(gaussian, method, 1.0, 1e-4) < 1e-9


def test_the_exact_consistency_function_of_a_gaussian_is_the_known_one():
    """F* = (cos a - sqrt(S / V)) / sin a y for N(0, S), V = S cos^2 a + sin^2 a."""
    bench = Bench(GaussianMixture([1.0], [0.0], [0.6**0.5]), Schedule.flow())
    x, t = torch.linspace(-2, 2, 5).double()[:, None], torch.full((5,), 0.7).double()
    prediction = Denoiser(ExactConsistency(bench), bench.schedule, "sample")(x, t)
    a = np.arctan2(0.7, 0.3)
    known = (np.cos(a) - np.sqrt(0.6 / (0.6 * np.cos(a) ** 2 + np.sin(a) ** 2))) / np.sin(a) * x / np.hypot(0.7, 0.3)
    assert torch.allclose(prediction.combine(-np.sin(a), np.cos(a)), known, atol=1e-12)


def test_rows_without_a_time_in_between_are_finite():
    """Just before pure noise a table has no times: both states of such a row are the same."""
    schedule = Schedule.cosine(20).zero_terminal_snr()
    method = SCM(schedule, guidance_scale=1.0, angle_step=0.001)
    t = method.time_at(np.array([1.55, 1.4]))
    u = method.time_at(np.array([1.549, 1.399]))
    assert t[0] == u[0] == 18 and u[1] < t[1]
    still = Draws(t, u, torch.ones(2, 1).double(), torch.ones(2).double(), 1.0)
    shared = method.prepare(_roles(schedule), Batch(torch.ones(2, 1).double()), still, {"student"})
    assert method.tangent(shared.along.below, still, shared.along).isfinite().all()


# ---------------------------------------------------------------- distribution matching (rCM)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_guided_gaussians_of_one_width_have_one_optimum_of_both_terms(schedule):
    """N(1, S) against N(0, S) without condition, w 3: the guided trajectory and the guided scores are those of N(3, S).

    Both terms vanish at its exact map. A fake score that is off by b in its mean moves the student by its own error at
    the noise where both are compared: b sigma^2 / (alpha^2 S + sigma^2), over the mean distance to the guided score.
    """
    spread, mean = 0.6**0.5, 3.0
    data = GaussianMixture([0.0, 1.0], [1.0, 0.0], [spread, spread], class_weights=[[1.0, 0.0]])
    teacher = Denoiser(data.network(schedule, "sample"), schedule, "sample")

    def student(x, t, cond=None):
        alpha, sigma = (expand(c, x) for c in schedule.alpha_sigma(t))
        return mean + spread / (alpha**2 * spread**2 + sigma**2).sqrt() * (x - alpha * mean)

    def score(x, t, cond=None, mean=mean):
        alpha, sigma = (expand(c, x) for c in schedule.alpha_sigma(t))
        return mean + alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * (x - alpha * mean)

    method = SCM(schedule, guidance_scale=3.0, matching_weight=1.0, angle_step=1e-4, normalize=0.0)
    cond = Cond({"label": torch.zeros(64, dtype=torch.int64)}, null={"label": torch.tensor([-1])})
    rng = Rng(1, 0, 64, dtype=torch.float64)
    batch = Batch(1 + spread * rng.sample.normal("data", (1,)), cond)
    draws = method.draw(batch, rng, Progress(99, 100))
    alpha, sigma = (expand(c, batch.x0) for c in schedule.alpha_sigma(draws.matching_time))
    for b in (0.0, 0.5):
        fake = Denoiser(lambda x, t, cond, b=b: score(x, t, mean=mean + b), schedule, "sample")
        roles = SimpleNamespace(teacher=teacher, student=Denoiser(student, schedule, "sample"), fake=fake)
        shared = method.prepare(roles, batch, draws, {"student"})
        x = shared.x0_student = shared.x0_student.detach().requires_grad_()
        matching, tangent = method.student(roles, batch, draws, shared).terms()
        (pull,) = torch.autograd.grad(matching.total, x)
        real = score(alpha * x + sigma * draws.matching_noise, draws.matching_time)
        wanted = b * sigma**2 / (alpha**2 * spread**2 + sigma**2) / (x - real).abs()
        assert torch.allclose(len(x) * pull, wanted, rtol=1e-8, atol=1e-10) and float(tangent.total) < 1e-6


def test_matching_leaves_the_consistency_terms_numbers_alone():
    """To the bit: the same draws, the same loss."""
    bench = Bench(GaussianMixture([1.0], [0.4], [0.7]), SCHEDULES["flow"], prediction_type="flow")
    plain, matched = (SCM(bench.schedule, guidance_scale=1.0, matching_weight=weight) for weight in (0.0, 2.0))
    roles, found = bench.roles(matched, torch.float64), []
    for method in (plain, matched):
        batch, draws = bench.draw(method, 8)
        *_, last = method.student(roles, batch, draws, method.prepare(roles, batch, draws, {"student"})).terms()
        found.append(last.total)
    assert torch.equal(*found) and [len(method.players) for method in (plain, matched)] == [1, 2]
    assert [[spec.name for spec in method.roles()] for method in (plain, matched)] == [["student"], ["student", "fake"]]


@pytest.mark.parametrize("any_steps", [1, 64])
def test_a_student_of_any_number_of_steps_is_verified(any_steps):
    """After its first call, and after one of the first four, which random times reach often enough."""
    bench = Bench(GaussianMixture([1.0], [0.4], [0.7]), SCHEDULES["flow"], prediction_type="flow")
    rows = matching_rows(bench, SCM(bench.schedule, guidance_scale=1.0, matching_weight=1.0, any_steps=any_steps))
    assert len(rows) == min(any_steps, 2) and all(row.passed for row in rows)


@pytest.mark.parametrize("stop", [3, 5])
def test_a_matched_run_is_continued(stop, tmp_path):
    """Stopped between two of the student's steps, or before one."""
    bench = Bench(GaussianMixture([1.0], [0.4], [0.7]), SCHEDULES["flow"], prediction_type="flow")
    method = SCM(bench.schedule, guidance_scale=1.0, matching_weight=0.5, student_every=2)
    settings = training_settings(8, batch_size=4, checkpoint_every=1)

    def trainer(name, hooks=()):
        return Trainer(method, bench.roles(method), bench.source, settings, run_dir=tmp_path / name, hooks=hooks)

    whole, rest = whole_and_continued(trainer, stop)
    assert checkpoint.same(whole.tensors(), rest.tensors())


def _roles(schedule):
    one = Denoiser(lambda x, t, cond: 0.3 * x, schedule, "v_prediction")
    return type("Roles", (), {"teacher": one, "student": one})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"training": {"precision": "bf16"}},
            "training.precision: scm learns from small differences .*: set it to fp32",
        ),
        ({"teacher": {"path": "scenes-64", "dtype": "bf16"}}, "teacher.dtype: scm learns .*: set it to fp32"),
        ({"teacher": {"path": "scenes-64", "quantize": "int8"}}, "teacher.quantize: scm learns .*: leave it empty"),
    ],
)
def test_a_recipe_of_coarse_numbers_is_refused(changes, sentence):
    recipe = {"method": "scm", "teacher": "scenes-64"}
    parse_recipe(recipe)
    parse_recipe({"method": "tcd", "teacher": "scenes-64"} | changes)
    with pytest.raises(RecipeError, match=sentence):
        parse_recipe(recipe | changes)


@pytest.fixture
def tf32():
    """Both kinds of products may round to TF32, within a test."""
    products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [of.allow_tf32 for of in products]
    for of in products:
        of.allow_tf32 = True
    yield
    for of, value in zip(products, before, strict=True):
        of.allow_tf32 = value


def test_training_lets_no_product_round_to_tf32(tf32):
    schedule, source = SCHEDULES["vp"], Bench(GaussianMixture([1.0], [0.4], [0.7]), SCHEDULES["vp"]).source

    def trainer(method, precision="fp32"):
        settings = TrainingSettings(precision=precision)
        teacher = Denoiser(MLP(schedule, 1, width=8, depth=1), schedule, "epsilon")
        return Trainer(method, build_roles(teacher, method, settings), source, settings)

    def flags():
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    seen = {}
    for cls in (TCD, SCM, TCD):
        one = trainer(cls(schedule, guidance_scale=1.0))
        prepare = one.method.prepare
        one.method.prepare = lambda *given, name=cls.name, prepare=prepare: (
            seen.update({name: flags()}),
            prepare(*given),
        )[1]
        assert flags() == (True, True)  # not by a Trainer alone
        one.step(0)
        assert flags() == (True, True)  # and not after it
    assert seen == {"tcd": (True, True), "scm": (False, False)}
    with pytest.raises(ValueError, match=r"scm learns .* set training\.precision to fp32"):
        trainer(SCM(schedule), "bf16")


def test_the_flags_are_given_back_after_an_error(tf32):
    with pytest.raises(KeyError), exact_products():
        assert not torch.backends.cudnn.allow_tf32
        raise KeyError
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("coarse", ["teacher", "student"])
def test_weights_in_bf16_are_refused(coarse):
    bench = Bench(GaussianMixture([1.0], [0.4], [0.7]), SCHEDULES["flow"], prediction_type="flow")
    method = SCM(bench.schedule, guidance_scale=1.0)
    roles = bench.roles(method, torch.bfloat16 if coarse == "student" else torch.float32)
    if coarse == "teacher":
        network = MLP(bench.schedule, 1, width=8, depth=1).bfloat16()
        roles = Roles(Denoiser(network, bench.schedule, "flow"))
        roles.add_network("student", MLP(bench.schedule, 1, width=8, depth=1), "flow")
    with pytest.raises(ValueError, match=f"scm learns .* the weights of '{coarse}' are torch.bfloat16; load"):
        Trainer(method, roles, bench.source, TrainingSettings())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"angle_step": 1.0}, "angle_step: input should be less than 1"),
        ({"P_std": 0}, "P_std: input should be greater than 0"),
        ({"warmup": 1.5}, "warmup: input should be less than or equal to 1"),
        ({"normalize": -1}, "normalize: input should be greater than or equal to 0"),
        ({"mean": 0}, "SCM has no setting 'mean'"),
        (
            {"matching_weight": 1.0, "guidance_scale": (2.0, 4.0)},
            "matching_weight compares scores at one guidance_scale: give one number, not a range",
        ),
    ],
)
def test_wrong_settings_are_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        SCM(SCHEDULES["vp"], **settings)
