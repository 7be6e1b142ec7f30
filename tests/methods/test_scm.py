"""One sCM step against the same step by hand; its times, its fixed point, its float32."""

import numpy as np
import pytest
import torch
from reference import CASES, SCHEDULES, alpha_sigma, ask, captioned, gradients, off, row_scales, student_on
from reference import x0_epsilon as clean_and_noise

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Progress
from fewstep.methods.scm import SCM, Draws, angle
from fewstep.methods.tcd import TCD
from fewstep.models.denoiser import Denoiser
from fewstep.models.mlp import MLP
from fewstep.models.roles import Roles
from fewstep.recipe.load import parse_recipe
from fewstep.recipe.validate import RecipeError
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, build_roles, exact_products
from fewstep.verification.bench import Bench
from fewstep.verification.scm import ExactConsistency, fixed_rows, tangent_size

SETTINGS = {
    "unguided": dict(guidance_scale=1.0, normalize=0.0),
    "drawn scale": dict(guidance_scale=(2.0, 8.0)),
    "warming up": dict(guidance_scale=3.0, normalize=0.5),
}
TIMES = {  # t and u
    "vp": ([999.0, 700.0, 410.5, 300.0, 99.0, 620.0], [980.0, 690.0, 400.0, 299.5, 90.0, 619.0]),
    "edm": ([80.0, 12.0, 3.0, 1.5, 0.4, 20.0], [60.0, 11.0, 2.9, 1.4, 0.39, 19.0]),
    "flow": ([1.0, 0.8, 0.5, 0.3, 0.05, 0.6], [0.99, 0.78, 0.49, 0.29, 0.04, 0.598]),
}


def build(name, kind, variant, weights="full"):
    method = SCM(SCHEDULES[name], **SETTINGS[variant])
    return method, *student_on(method, name, kind, weights), *captioned(6)


def draws(name, variant):
    scale = SETTINGS[variant]["guidance_scale"]
    scales = row_scales(scale)
    noise = torch.randn(6, 2, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, u = (torch.tensor(times, dtype=torch.float64) for times in TIMES[name])
    return Draws(t, u, noise, scales.double(), 0.4 if variant == "warming up" else 1.0)


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
    return x_t, loss, dict(zip(student, torch.autograd.grad(loss, student.values()), strict=True))


@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("variant", SETTINGS)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_step_is_the_papers(name, kind, variant, weights):
    p, random = build(name, kind, variant, weights), draws(name, variant)
    method, roles, _, batch, _ = p
    x_t, loss, slopes = by_hand(name, kind, variant, p, random)
    shared = method.prepare(roles, batch, random, {"student"})
    mine = method.student(roles, batch, random, shared)
    assert off(shared.x_t, x_t) <= 1e-10 and not shared.below.requires_grad
    assert off(mine.total, loss) <= 1e-9
    for key, gradient in gradients(mine.total, roles, "student").items():
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
    assert len(rows) == 3 and all(row.passed for row in rows), rows
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
    assert method.tangent(shared.below, still, shared).isfinite().all()


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
    ],
)
def test_wrong_settings_are_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        SCM(SCHEDULES["vp"], **settings)
