"""PDD: a step by hand, solver step after solver step; exact fixed points; grids; what a student says of its steps."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.data.sources import MixtureSource
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Progress
from fewstep.methods.pdd import PDD, Draws
from fewstep.models.denoiser import Denoiser
from fewstep.models.mlp import MLP
from fewstep.models.roles import Roles, Weights
from fewstep.recipe.load import parse_recipe
from fewstep.recipe.validate import RecipeError
from fewstep.runs.fit import check_fit, foreseen_card
from fewstep.sampling import DDIMSampler, sample
from fewstep.students.card import sampler_of
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import build_roles
from fewstep.verification.bench import Bench
from fewstep.verification.pdd import FixedPoint, composition_gap, fixed_point_loss

BENT = Schedule.flow(3.0)  # on an even grid a mixture without weights is the weighted one
VP = Schedule.scaled_linear()
SCHEDULES = {"flow": BENT, "vp": VP}
KINDS = {"flow": "flow", "vp": "epsilon"}
MIXTURES = {
    "gaussian": GaussianMixture([1.0], [0.4], [0.6**0.5]),
    "mixture": GaussianMixture([0.3, 0.7], [-1.2, 0.8], [0.25, 0.35]),
    "ring": GaussianMixture.ring(),
}
SPECIAL = {
    "shifted": Schedule.flow(3.0),
    "by number": Schedule.flow(lambda n: 1 + n / 10),
    "stretched": Schedule.flow(2.0, terminal=0.02),
    "vp": VP,
    "edm": Schedule.edm(),
}
CLASSES = GaussianMixture.ring(6, 1.0, 0.3, num_classes=3)
ROWS = 6


def levels(name, t):
    """(alpha, sigma) by the formulas."""
    if name == "flow":
        return 1 - t, t
    bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    return (1.0, 0.0) if t < 0 else (bar[int(t)] ** 0.5, (1 - bar[int(t)]) ** 0.5)


def grid_of(name, count):
    if name == "flow":
        u = np.arange(count, -1, -1) / count
        return (3 * u / (1 + 2 * u)).tolist()
    return [round(1000 * k / count) - 1 for k in range(count, -1, -1)]


def built(name, **settings):
    torch.manual_seed(0)
    method = PDD(
        SCHEDULES[name], **{"num_grid_steps": 8, "num_inference_steps": (2,), "guidance_scale": 2.5} | settings
    )
    teacher = MLP(SCHEDULES[name], 2, width=16, depth=2, num_classes=3).double()
    roles = Roles(Denoiser(teacher, SCHEDULES[name], KINDS[name]))
    roles.add("student", Weights("lora", 4), bank=method.roles()[0].bank)
    with torch.no_grad():
        for tensor in roles.tensors().values():
            tensor.add_(0.2 * torch.randn_like(tensor))
    rng = Rng(3, 1, ROWS, dtype=torch.float64)
    batch = MixtureSource(CLASSES, range(3)).batch(rng)
    return method, roles, batch, method.draw(batch, rng, Progress(1, 10))


def by_hand(name, method, roles, batch, draws):
    """The loss of one step from single layers and single solver steps, with a graph to the slopes that are learned."""
    settings, grid = method.settings, grid_of(name, method.settings.num_grid_steps)
    alphas = [levels(name, t)[0] for t in grid]
    way = [t if name == "flow" else levels(name, t)[1] / levels(name, t)[0] for t in grid]
    scale = [1.0] * len(grid) if name == "flow" else alphas

    def teacher(x, i):
        null, own = (roles.teacher(x, grid[i], cond).output for cond in (batch.cond.null(), batch.cond))
        return null + settings.guidance_scale * (own - null)

    def slope(z, k):
        first, d = teacher(scale[k] * z, k), way[k + 1] - way[k]
        if settings.solver == "ddim" or k + 1 == len(way) - 1:
            return first
        return (first + teacher(scale[k + 1] * (z + d * first), k + 1)) / 2

    begin = draws.starts[0]
    alpha, sigma = levels(name, grid[begin])
    x = alpha * batch.x0 + sigma * draws.noise if begin else draws.noise
    z, total = x / scale[begin], 0.0
    for n, targets in zip(draws.starts, draws.targets, strict=True):
        x, stop = scale[n] * z, n + draws.length
        layers = [roles.student.mixtures(x, grid[n], batch.cond, np.eye(len(way) - 1)[i : i + 1])[0].output
                  for i in range(n, stop)]  # fmt: skip
        states = [z]
        for i in range(n, stop):
            states.append(states[-1] + (way[i + 1] - way[i]) * layers[i - n].detach())
        for k in targets:
            wanted = slope(states[k - n], k).detach()
            total = total + (layers[k - n] - wanted).square().mean() / len(targets) / len(draws.starts)
        z = states[-1]
    return total


SETTINGS = [
    {},
    {"solver": "heun", "targets_per_block": 3},
    {"student_input": "noised", "targets_per_block": 2},
    {"num_inference_steps": (1, 2, 4), "targets_per_block": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "heun", "noised", "several"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_is_the_papers(name, settings):
    method, roles, batch, draws = built(name, **settings)
    assert method.grid.tolist() == pytest.approx(grid_of(name, 8))
    loss = method.student(roles, batch, draws, method.prepare(roles, batch, draws, {"student"}))
    found = sum(term.total.detach() for term in loss.terms())
    wanted = by_hand(name, method, roles, batch, draws)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-10, atol=1e-12)
    parameters = roles.parameters("student")
    gradients = torch.autograd.grad(wanted, parameters)
    sums = [torch.zeros_like(p) for p in parameters]
    loss = method.student(roles, batch, draws, method.prepare(roles, batch, draws, {"student"}))
    for term in loss.terms():
        for held, part in zip(sums, torch.autograd.grad(term.total, parameters), strict=True):
            held += part
    for mine, theirs in zip(sums, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_only_layers_that_are_drawn_learn(name):
    method, roles, batch, draws = built(name)
    loss = method.student(roles, batch, draws, method.prepare(roles, batch, draws, {"student"}))
    for term, targets in zip(loss.terms(), draws.targets, strict=True):
        bank = roles.tensors_of("student")["bank.weight"]
        (gradient,) = torch.autograd.grad(term.total, [bank])
        assert gradient.flatten(1).any(1).nonzero().flatten().tolist() == sorted(set(targets))


@pytest.mark.parametrize("name", SPECIAL)
def test_the_teacher_is_not_asked_at_clean_data(name):
    """Heun's second call would be there in the last solver step; a table of noise levels has no such time."""
    method = PDD(SPECIAL[name], num_grid_steps=4, num_inference_steps=(1,), solver="heun", guidance_scale=1.0)
    asked = []

    def teacher(x, t, cond=None):
        asked.append(float(t[0]))
        return 0.1 * x

    kind = "flow" if method.schedule.family == "flow" else "epsilon"
    bench = Bench(MIXTURES["gaussian"], method.schedule)
    roles = SimpleNamespace(teacher=Denoiser(teacher, method.schedule, kind), student=FixedPoint(bench, method))
    draws = Draws((0,), 4, ((3,),), torch.ones(2, 1, dtype=torch.float64))
    method.student(roles, Batch(torch.zeros(2, 1, dtype=torch.float64), None), draws, draws.noise)
    assert asked == pytest.approx([method.grid[3]]) and method.calls(draws)["teacher"] == 1
    assert method.calls(replace(draws, targets=((2,),)))["teacher"] == 2


def test_targets_of_blocks_are_drawn_apart():
    method = PDD(BENT, num_grid_steps=32, num_inference_steps=(4,))
    batch = MixtureSource(CLASSES, range(3)).batch(Rng(0, 0, 2))
    found = [method.draw(batch, Rng(0, i, 2), Progress(i, 10)) for i in range(40)]
    places = np.array([[k - n for n, (k,) in zip(d.starts, d.targets, strict=True)] for d in found])
    assert places.min() == 0 and places.max() == 7  # every solver step of a block
    assert (places != places[:, :1]).any(1).mean() > 0.9


def test_targets_of_one_block_differ():
    """Two of the same would cost a call of the teacher for nothing; all pairs of a block are equally likely."""
    method = PDD(BENT, num_grid_steps=16, num_inference_steps=(4,), targets_per_block=2)
    found = [method.draw(Batch(torch.zeros(2, 1)), Rng(0, i, 2), Progress(i, 10)).targets for i in range(300)]
    pairs = [tuple(sorted(k % 4 for k in targets)) for one in found for targets in one]
    assert all(a != b for a, b in pairs) and len(set(pairs)) == 6
    assert min(pairs.count(pair) for pair in set(pairs)) > 150  # of 200
    with pytest.raises(ValueError, match=r"targets_per_block \(5\) must be at most the 4 solver steps of a block"):
        PDD(BENT, num_grid_steps=16, num_inference_steps=(2, 4), targets_per_block=5)


@pytest.mark.parametrize("solver", ["ddim", "heun"])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_at_the_fixed_point_there_is_no_loss_and_blocks_are_the_solver_steps(name, mixture, solver):
    bench = Bench(MIXTURES[mixture], SCHEDULES[name])
    for student_input in ("simulated", "noised"):
        method = PDD(bench.schedule, num_grid_steps=16, num_inference_steps=(4, 2), guidance_scale=1.0, solver=solver,
                     targets_per_block=2, student_input=student_input)  # fmt: skip
        assert fixed_point_loss(bench, method, draws=4) <= 1e-25
    assert composition_gap(bench, method) <= 1e-14


def test_the_fixed_point_is_the_guided_teachers():
    bench = Bench(CLASSES, BENT, guidance_scale=3.0)
    method = PDD(BENT, num_grid_steps=8, num_inference_steps=(2,), guidance_scale=3.0)
    assert fixed_point_loss(bench, method, draws=3) <= 1e-25
    other = replace(bench, guidance_scale=1.0)
    assert fixed_point_loss(bench, method, FixedPoint(other, method), draws=3) > 1e-2


@pytest.mark.parametrize("name", SPECIAL)
def test_steps_are_every_lth_time_of_the_grid_of_all_steps(name):
    """Not a grid of few steps, which would be shifted and stretched anew."""
    schedule = SPECIAL[name]
    recipe = parse_recipe({"method": {"name": "pdd", "num_inference_steps": [4, 2, 8]}})
    card = foreseen_card(recipe, PDD(schedule, recipe.method_settings()), "flow")
    everything = [*schedule.timesteps(32).tolist(), schedule.clean]
    for n in (4, 2, 8):
        times = sampler_of(card, num_inference_steps=n).times(schedule)
        assert times.tolist() == everything[:: 32 // n]
    assert len(sampler_of(card).times(schedule)) == 5
    if name in ("by number", "stretched"):
        assert not np.allclose(sampler_of(card).times(schedule)[:-1], schedule.timesteps(4))


@pytest.mark.parametrize(("kind", "usual"), [("lora", 0.1), ("full", 1.0)])
def test_the_last_layers_have_a_rate_of_their_own(kind, usual):
    """As the trainer builds them; a rate of 0 would leave them as they are."""
    for share in (None, 0.5):
        method = PDD(BENT, last_layer_rate=share)
        teacher = Denoiser(MLP(BENT, 2, width=8, depth=1), BENT, "flow")
        roles = build_roles(teacher, method, TrainingSettings(), Weights(kind, rank=2))
        assert roles.student.network.bank.rate == (usual if share is None else share)
    with pytest.raises(ValueError, match="last_layer_rate: input should be greater than 0"):
        PDD(BENT, last_layer_rate=0.0)


def test_a_sampler_asks_for_the_blocks_of_the_student():
    method, roles, batch, _ = built("vp", num_inference_steps=(2, 4))
    grid = method.grid.tolist()
    x = z = batch.x0
    run = sample(roles.student, DDIMSampler(timesteps=[grid[0], grid[4], grid[6]]), x, batch.cond)  # unequal blocks
    alphas = [levels("vp", t)[0] for t in grid]
    way = [levels("vp", t)[1] / levels("vp", t)[0] for t in grid]
    z = x / alphas[0]
    for n, stop in ((0, 4), (4, 6), (6, 8)):
        layers = [roles.student.mixtures(alphas[n] * z, grid[n], batch.cond, np.eye(8)[i : i + 1])[0].output
                  for i in range(n, stop)]  # fmt: skip
        z = z + sum((way[i + 1] - way[i]) * layers[i - n] for i in range(n, stop))
    torch.testing.assert_close(run.x0, z.detach(), rtol=1e-10, atol=1e-10)


def test_numbers_of_steps_that_were_not_trained_are_refused():
    recipe = parse_recipe({"method": {"name": "pdd", "num_inference_steps": [8, 4]}})
    card = foreseen_card(recipe, PDD(VP, recipe.method_settings()), "epsilon")
    assert (card.num_inference_steps, card.bank_steps, len(card.bank)) == (8, (8, 4), 33)
    with pytest.raises(ValueError, match="has 32 last layers and was trained to take 4 or 8 steps, not 16"):
        sampler_of(card, num_inference_steps=16)
    with pytest.raises(RecipeError, match="num_inference_steps is 2, but this method's students take 8 or 4: leave it"):
        parse_recipe({"method": {"name": "pdd", "num_inference_steps": [8, 4]}, "sample": {"num_inference_steps": 2}})
    four = parse_recipe(
        {"method": {"name": "pdd", "num_inference_steps": [8, 4]}, "sample": {"num_inference_steps": 4}}
    )
    assert foreseen_card(four, PDD(VP, four.method_settings()), "epsilon").num_inference_steps == 4


@pytest.mark.parametrize(("settings", "why"), [
    ({"num_inference_steps": [5]}, r"num_grid_steps \(32\) must be a multiple of 5 steps"),
    ({"num_inference_steps": []}, "num_inference_steps"),
    ({"num_inference_steps": [4, 4]}, r"num_inference_steps must differ, not \[4, 4\]"),
    ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"solver": "euler"}, "solver"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings, why):
    with pytest.raises(RecipeError, match=why):
        parse_recipe({"method": {"name": "pdd", **settings}})


def test_one_number_is_a_list_of_one():
    assert parse_recipe({"method": {"name": "pdd", "num_inference_steps": 8}}).sample.num_inference_steps == 8


def test_a_schedule_that_begins_at_pure_noise_is_refused():
    with pytest.raises(ValueError, match="begins at pure noise, where sigma/alpha is infinite"):
        PDD(VP.zero_terminal_snr())
    assert PDD(Schedule.flow()).grid[0] == 1.0  # a slope in t has no such end


def test_prompts_are_enough_unless_data_are_noised():
    prompts = {"source": "prompts", "path": "prompts.txt"}
    parse_recipe({"method": "pdd", "data": prompts})
    with pytest.raises(RecipeError, match="pdd needs images"):
        parse_recipe({"method": {"name": "pdd", "student_input": "noised"}, "data": prompts})


def test_layers_of_another_grid_are_no_beginning():
    recipe = parse_recipe({"method": "pdd", "init": "runs/other"})
    method = PDD(VP, recipe.method_settings())
    card = foreseen_card(recipe, method, "epsilon")
    check_fit(recipe, method, "epsilon", None, card, begins=True)
    with pytest.raises(RecipeError, match="has 32 last layers for its own times, and this one has 32 on other times"):
        check_fit(recipe, method, "epsilon", None, replace(card, bank=(998.0, *card.bank[1:])), begins=True)
    with pytest.raises(RecipeError, match="has 32 last layers and cannot be a teacher"):
        check_fit(recipe, method, "epsilon", card, None, begins=False)
