"""One step of ADD's players against the same step by hand, on the same draws; its weights, its draws, its refusals."""

from types import SimpleNamespace

import projection_reference as hand
import pytest
import torch
from projection_reference import ROWS, actual, gradients, problem
from reference import CASES, SCHEDULES, alpha_sigma, off

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.methods.base import Progress
from fewstep.methods.turbo import Draws, Turbo
from fewstep.models.denoiser import Denoiser
from fewstep.models.roles import Roles

SETTINGS = {
    "the paper's": dict(guidance_scale=1.0, r1_weight=0.3),
    "guided sds in latents": dict(weighting="sds", space="latents", guidance_scale=4.0, augment=("color",)),
    "nfsd, table": dict(weighting="nfsd", guidance_scale=7.5, terminal="table", augment=("translation", "cutout")),
    "advice alone": dict(adversarial_weight=0.0, guidance_scale=3.0, distillation_weight=2.0),
    "game alone": dict(distillation_weight=0.0, adversarial_weight=0.7, augment=(), r1_weight=0.0),
}


def draws(settings):
    """Every student level, the first twice; teacher levels from the lowest to the highest."""
    generator = torch.Generator().manual_seed(1)
    noise, other = (torch.randn(ROWS, 2, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    numbers = [torch.rand(ROWS, 7, generator=generator, dtype=torch.float64) for _ in range(2)]
    level, above = torch.tensor([0, 1, 2, 3, 0, 2]), torch.tensor([2, 199, 200, 555, 880, 998])
    return Draws(level, noise, above, other, *(numbers if settings.get("adversarial_weight", 1) else (None, None)))


def teacher_times(name, index):
    if name == "vp":
        return index.numpy().astype(float)
    if name == "edm":
        low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
        return (low + index.numpy() / 999 * (high - low)) ** 7
    k = (index.numpy() + 1) / 1000
    return 3 * k / (1 + 2 * k)


def weight(name, kind, t):
    alpha, sigma = alpha_sigma(name, t)
    if name == "edm":
        alpha, sigma = alpha / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
    return (alpha if kind == "exponential" else alpha * sigma / 2).flatten()


def advice(p, settings, x0_student, random):
    """(times, x_psi), both of which nothing flows into."""
    t = teacher_times(p.name, random.teacher_level)
    alpha, sigma = alpha_sigma(p.name, t)
    x0_student = x0_student.detach()
    x_t = alpha * x0_student + sigma * random.teacher_noise
    given, without = hand.teacher(p, x_t, t)
    if settings.weighting != "nfsd":
        return t, without[0] + settings.guidance_scale * (given[0] - without[0])
    low = random.teacher_level < (200 if p.name != "flow" else 199)  # of 999 levels there: alpha is 0 at the last
    direction = settings.guidance_scale * (given[1] - without[1])
    direction = direction + low.reshape(-1, 1, 1, 1) * without[1]
    return t, x0_student - sigma / alpha * direction


def by_hand(p, random):
    settings, (decode, encoder) = p.method.settings, p.roles.helpers.networks
    student = p.leaves("student")
    x_s, x0_student = hand.student_answer(p, student, random.noise, random.level, settings.terminal)
    step = SimpleNamespace(x_s=x_s, x0_student=x0_student, critic=None, heads={})
    pixels = settings.space == "pixels"
    seen = decode(x0_student) if pixels else x0_student
    step.loss = 0
    if settings.distillation_weight:
        t, target = advice(p, settings, x0_student, random)
        away = (seen - (decode(target) if pixels else target)) ** 2
        each = weight(p.name, settings.weighting, t) * away.flatten(1).mean(1)
        step.loss = step.loss + settings.distillation_weight * each.mean()
    if settings.adversarial_weight:
        weights, data = p.leaves("discriminator"), decode(p.batch.x0)
        sides = (decode(x0_student), random.fake_augment), (data, random.real_augment)
        views = [hand.augmented(x, numbers, settings.augment) for x, numbers in sides]
        fake, real = (dict(zip(("rows", "maps"), encoder.features(x, ("rows", "maps")), strict=True)) for x in views)
        fake, real = ({tap: f.flatten(2) for tap, f in side.items()} for side in (fake, real))
        summary = encoder.summary(data)
        blind = (random.level == 0) & (settings.terminal == "noise" or p.name == "flow")
        condition = torch.cat([hand.sized(p.batch.cond["text"]), hand.sized(summary) * ~blind[:, None]], dim=1)
        said = hand.heads(weights, fake, condition)
        step.loss = step.loss - settings.adversarial_weight * sum(f.mean() for f in said) / 2
        said = hand.heads(weights, {tap: f.detach() for tap, f in fake.items()}, condition)
        step.critic = hand.hinge(hand.heads(weights, real, condition), said)
        step.critic = step.critic + settings.r1_weight * hand.slopes_at_heads(weights, real, condition)
        step.heads = gradients(step.critic, weights)
    step.gradients = gradients(step.loss, student)
    return step


@pytest.mark.parametrize("variant", SETTINGS)
@pytest.mark.parametrize(("schedule", "kind"), CASES)
def test_both_players_steps_are_the_papers(schedule, kind, variant):
    weights = "lora" if variant.startswith("guided") else "full"
    p, random = problem(Turbo, schedule, kind, weights, **SETTINGS[variant]), draws(SETTINGS[variant])
    mine, theirs = actual(p, random), by_hand(p, random)
    for field in ("x_s", "x0_student"):
        for row, wanted in zip(getattr(mine, field), getattr(theirs, field), strict=True):
            assert off(row, wanted) <= 1e-10, field
    assert off(mine.loss, theirs.loss) <= 1e-9
    assert mine.gradients.keys() == theirs.gradients.keys() and mine.heads.keys() == theirs.heads.keys()
    if theirs.critic is not None:
        assert off(mine.critic, theirs.critic) <= 1e-9 and mine.critic.item() != pytest.approx(2, abs=0.01)
    for key, wanted in {**theirs.gradients, **theirs.heads}.items():
        assert wanted.abs().max() > 0, key
        assert off({**mine.gradients, **mine.heads}[key], wanted) <= 1e-9, key


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_pass_through_decoder_and_encoder_and_stay_in_neither(schedule):
    """The x0_student feels every logit; the frozen networks, the target and the other side feel nothing."""
    p, random = problem(Turbo, schedule, "v_prediction", guidance_scale=3.0), draws({})
    shared = p.method.prepare(p.roles, p.batch, random, {"student", "discriminator"})
    logits = p.roles.heads["discriminator"](shared.fake, shared.condition)
    for head in logits:
        (slope,) = torch.autograd.grad(head.sum(), shared.x0_student, retain_graph=True)
        assert (slope.flatten(1).abs().sum(1) > 0).all()
    assert not any(x.requires_grad for x in (*shared.real, shared.condition, shared.x_s))
    p.method.student(p.roles, p.batch, random, shared).total.backward(inputs=p.roles.parameters("student"))
    frozen = [*p.roles.base.parameters(), *(w for n in p.roles.helpers.networks for w in n.parameters())]
    assert all(w.grad is None and not w.requires_grad for w in frozen)
    loss = p.method.discriminator(p.roles, p.batch, random, shared).total
    found = torch.autograd.grad(loss, p.roles.parameters("student"), allow_unused=True)
    assert not any(gradient is not None for gradient in found)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_in_latents_sds_has_the_gradient_of_score_distillation(schedule):
    """w(t) (eps_teacher - eps') at every element, w the noise's share of the variance (spec 1.8)."""
    p = problem(Turbo, schedule, "v_prediction", weighting="sds", space="latents", guidance_scale=5.0,
                distillation_weight=1.0)  # fmt: skip
    random = draws({})
    shared = p.method.prepare(p.roles, p.batch, random, {"student"})
    loss = p.method.distillation(p.roles, p.batch.cond, random, shared)
    (found,) = torch.autograd.grad(loss * shared.x0_student.numel(), shared.x0_student)
    t = teacher_times(schedule, random.teacher_level)
    alpha, sigma = alpha_sigma(schedule, t)
    x_t = alpha * shared.x0_student.detach() + sigma * random.teacher_noise
    given, without = hand.teacher(p, x_t, t)
    epsilon = without[1] + 5 * (given[1] - without[1])
    share = sigma**2 / (1 + sigma**2) if schedule == "edm" else sigma**2
    for row, wanted in zip(found, share * (epsilon - random.teacher_noise), strict=True):
        assert off(row, wanted) <= 1e-7  # of a difference of numbers up to 10,000 times larger


def test_heads_are_told_the_picture_where_the_student_saw_it():
    """At the level of noise alone D would else demand the very picture that the student never saw."""
    p, random = problem(Turbo, "vp", "epsilon"), draws({})
    told = p.method.prepare(p.roles, p.batch, random, {"student"}).condition
    torch.testing.assert_close(told[:, :3], hand.sized(p.batch.cond["text"]), rtol=1e-12, atol=0)
    assert (told[:, 3:] == 0).all(1).tolist() == [True, False, False, False, True, False]
    p = problem(Turbo, "vp", "epsilon", terminal="table")
    assert (p.method.prepare(p.roles, p.batch, random, {"student"}).condition != 0).all()


def test_draws_cover_all_levels_evenly_and_noises_are_their_own():
    method = Turbo(SCHEDULES["vp"])
    random = method.draw(Batch(torch.zeros(20_000, 2)), Rng(3, 0, 20_000), Progress(0, 1))
    counts = torch.bincount(random.level, minlength=4)
    assert len(counts) == 4 and (counts - 5000).abs().max() < 5 * 5000**0.5
    counts = torch.bincount(random.teacher_level, minlength=1000)
    assert len(counts) == 1000 and (counts - 20).abs().max() < 6 * 20**0.5
    noises = torch.stack([random.noise, random.teacher_noise]).flatten(1)
    assert torch.corrcoef(noises)[0, 1].abs() < 0.03
    numbers = torch.cat([random.fake_augment, random.real_augment], dim=1)
    assert numbers.shape == (20_000, 14) and numbers.min() >= 0 and numbers.max() < 1
    assert (torch.corrcoef(numbers.T) - torch.eye(14)).abs().max() < 0.04


@pytest.mark.parametrize(("schedule", "levels"), [("vp", 1000), ("edm", 1000), ("flow", 999)])
def test_the_teacher_is_asked_wherever_something_of_the_answer_is_left(schedule, levels):
    method = Turbo(SCHEDULES[schedule])
    assert len(method.levels) == levels and (SCHEDULES[schedule].alpha_sigma(method.levels)[0] > 0).all()
    assert method.timesteps.tolist() == pytest.approx(hand.student_times(schedule).tolist(), rel=1e-12)


def test_weights_of_zero_leave_out_what_they_weigh():
    vp = SCHEDULES["vp"]
    advice, game = Turbo(vp, adversarial_weight=0.0), Turbo(vp, distillation_weight=0.0)
    assert [p.name for p in advice.players] == ["student"] and advice.heads() == () and advice.encoder == ""
    assert [p.name for p in game.players] == ["student", "discriminator"] and game.encoder == "facebook/dinov2-small"
    assert advice.calls_per_step() == {"student": 1, "teacher": 1}
    assert game.calls_per_step() == {"student": 1, "teacher": 0}
    assert Turbo(vp, weighting="nfsd").calls_per_step() == {"student": 1, "teacher": 2}


def test_students_are_sampled_by_ancestral_steps_on_their_own_levels():
    from fewstep.sampling import make_sampler

    wanted = Turbo.sampling(Turbo.Settings(num_levels=2))
    assert (wanted.num_inference_steps, wanted.eta, wanted.guidance_scale) == (2, 1.0, 1.0)
    for n, times in ((1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])):
        sampler = make_sampler(Turbo.sampler, num_inference_steps=n)
        assert sampler.times(SCHEDULES["vp"])[:-1].tolist() == times
        demo = make_sampler(Turbo.sampler, num_inference_steps=n, timestep_spacing="turbo")
        assert demo.times(SCHEDULES["vp"])[:-1].tolist() == [999, 899, 799, 699][:n]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"weighting": "vsd"}, r"weighting: input should be .*, not 'vsd'"),
        ({"space": "rgb"}, r"space: input should be .*, not 'rgb'"),
        ({"terminal": "zero"}, r"terminal: input should be .*, not 'zero'"),
        ({"augment": ("blur",)}, r"augment\.0: input should be .*, not 'blur'"),
        ({"adversarial_weight": -1.0}, "adversarial_weight: input should be greater than or equal to 0, not -1.0"),
        ({"guidance_scale": float("inf")}, "guidance_scale: input should be a finite number, not inf"),
        ({"adversarial_weight": 0.0, "distillation_weight": 0.0}, "nothing is left to learn from"),
        ({"num_levels": 0}, "num_levels: input should be greater than or equal to 1, not 0"),
    ],
)
def test_wrong_settings_are_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Turbo(SCHEDULES["vp"], **settings)


def test_what_is_missing_is_one_sentence():
    method = Turbo(SCHEDULES["vp"])
    with pytest.raises(ValueError, match="no image encoder here"):
        roles = Roles(Denoiser(lambda x, t, cond: x, SCHEDULES["vp"], "sample"))
        roles.add_heads("discriminator", method.heads()[0].build, "encoder", True)
    p = problem(Turbo, "vp", "epsilon", weighting="nfsd", adversarial_weight=0.0)
    shared = SimpleNamespace(x0_student=p.batch.x0, seen=p.batch.x0)
    with pytest.raises(ValueError, match="nfsd needs data with a condition"):
        p.method.distillation(p.roles, None, draws({"adversarial_weight": 0}), shared)
