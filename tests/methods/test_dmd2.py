"""A DMD2 step of both players against the same step by hand, on the same draws; its inputs, draws and refusals."""

import dataclasses
import weakref
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dmd2_by_hand import SETTINGS, actual, build, by_hand, drawn, sampled_at
from reference import CASES, SCHEDULES, alpha_sigma, off

from fewstep.data.batch import Batch
from fewstep.data.random import Rng, SampleRandom
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Progress
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.parts.rollout import RolloutDraws
from fewstep.methods.registry import find_method
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.hub import Remark
from fewstep.models.mlp import MLP
from fewstep.models.roles import Weights
from fewstep.recipe.load import parse_recipe
from fewstep.recipe.validate import RecipeError
from fewstep.runs.fit import check_fit
from fewstep.sampling import LCMSampler, RenoiseSampler, make_sampler, sample
from fewstep.students.card import Card
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, build_roles


@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("variant", SETTINGS)
@pytest.mark.parametrize(("schedule", "kind"), CASES)
def test_both_players_steps_are_the_papers(schedule, kind, variant, weights):
    p = build(schedule, kind, variant, weights)
    one, jumps = SETTINGS[variant].get("num_inference_steps") == 1, SETTINGS[variant].get("match") == "x_s"
    d = drawn(schedule, variant, 0 if one else 1 if jumps else 2)
    mine, theirs = actual(p, d), by_hand(p, d)
    for field in ("x_t", "x0_student"):
        for row, wanted in zip(getattr(mine, field), getattr(theirs, field), strict=True):
            assert off(row, wanted) <= 1e-10, field
    assert off(mine.loss, theirs.loss) <= 1e-10 and off(mine.critic, theirs.critic) <= 1e-10
    for field in ("gradients", "fake", "heads"):
        found, expected = getattr(mine, field), getattr(theirs, field)
        assert found.keys() == expected.keys()
        for key, wanted in expected.items():
            assert wanted is not None and wanted.abs().max() > 0, key
            assert off(found[key], wanted) <= 1e-9, key
    for name, wanted in zip(("fake_error", "teacher_fake_error"), theirs.errors, strict=True):
        assert off(mine.student.stats[name], wanted) <= 1e-9


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_student_is_trained_where_it_will_be_sampled(schedule):
    """Simulated states are those that its own sampler passes through, to the bit, from the same noises."""
    p = build(schedule, "v_prediction", "guided")
    d = drawn(schedule, "guided", 3)
    d = dataclasses.replace(d, times=tuple(p.method.rollout.timesteps.tolist()))
    noises = list(d.noise.unbind(1))
    run = sample(p.roles.student, RenoiseSampler(num_inference_steps=4), noises[0], p.batch.cond, noises=noises[1:])
    assert torch.equal(run.timesteps, p.method.rollout.timesteps)
    assert run.timesteps.tolist() == pytest.approx(sampled_at(schedule, 4).tolist(), rel=1e-12)
    for exit in range(4):
        there = dataclasses.replace(d, exit=exit, noise=d.noise[:, : exit + 1])
        x_t = p.method.rollout.state(p.roles.student, p.batch.x0, there, p.batch.cond)
        assert torch.equal(x_t, run.states[exit]) and not x_t.requires_grad
    if schedule == "vp":  # and those of other programs' LCM samplers, given its times
        lcm = sample(
            p.roles.student, LCMSampler(timesteps=[999, 749, 499, 249]), noises[0], p.batch.cond, noises=noises[1:]
        )
        torch.testing.assert_close(lcm.x0, run.x0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_student_on_the_ode_is_trained_where_its_sampler_passes(schedule):
    """Its states and the jumps that are matched are those of DDIM's steps at its times, from one noise."""
    p = build(schedule, "v_prediction", "jumps")
    d = dataclasses.replace(drawn(schedule, "jumps", 2), times=tuple(p.method.rollout.timesteps.tolist()))
    assert p.method.sampler == "ddim"
    run = sample(p.roles.student, make_sampler("ddim", num_inference_steps=4), d.noise[:, 0], p.batch.cond)
    assert torch.equal(run.timesteps, p.method.rollout.timesteps)
    for exit in range(4):
        shared = p.method.prepare(p.roles, p.batch, dataclasses.replace(d, exit=exit), {"student"})
        assert torch.equal(shared.x_t, run.states[exit])
        landed = shared.x0_student.detach() if shared.jump is None else shared.jump.x_s
        assert torch.equal(landed, run.states[exit + 1]) and (shared.jump is None) == (exit == 3)


def test_one_step_at_a_lower_time_starts_from_noise_as_it_is():
    method = DMD2(SCHEDULES["vp"], timesteps=(399,))
    noise = torch.randn(3, 1, 2, dtype=torch.float64)
    first = RolloutDraws(times=(399.0,), exit=0, noise=noise)
    assert torch.equal(method.rollout.state(None, torch.zeros(3, 2), first, None), noise[:, 0])
    assert method.sampling(method.settings).timesteps == (399,)
    assert method.sampling(method.settings).num_inference_steps == 1
    table = DMD2(SCHEDULES["vp"], timesteps=(399,), terminal="table")
    sigma = alpha_sigma("vp", np.array([399]))[1].item()
    torch.testing.assert_close(table.rollout.state(None, torch.zeros(3, 2), first, None), sigma * noise[:, 0])


def test_the_first_state_is_noise_even_where_the_others_are_data():
    inputs = DMD2(SCHEDULES["vp"], student_input="noised").rollout
    times = tuple(inputs.timesteps.tolist())
    x0, noise = torch.full((3, 2), 7.0), torch.randn(3, 1, 2)
    first, last = (RolloutDraws(times=times, exit=exit, noise=noise) for exit in (0, 3))
    assert torch.equal(inputs.state(None, x0, first, None), noise[:, 0])
    assert (inputs.state(None, x0, last, None) - noise[:, 0]).abs().min() > 4


def test_draws():
    method = DMD2(SCHEDULES["vp"], num_inference_steps=3)
    batch = Batch(torch.zeros(4, 2))
    exits = [method.draw(batch, Rng(3, step, 4), Progress(step, 1)).exit for step in range(600)]
    assert np.bincount(exits, minlength=3).tolist() == pytest.approx([200] * 3, abs=60)
    step = exits.index(2)
    random = method.draw(Batch(torch.zeros(20_000, 2)), Rng(3, step, 20_000), Progress(0, 1))
    others = ("matching", "fake", "played", "judged", "data")
    noises = torch.cat([*random.noise.unbind(1), *(getattr(random, f"{name}_noise") for name in others)], dim=1)
    assert noises.shape == (20_000, 16)
    assert (torch.corrcoef(noises.T) - torch.eye(16)).abs().max() < 0.04  # each of its own
    times = torch.stack([getattr(random, f"{name}_time") for name in others])
    assert (torch.corrcoef(times) - torch.eye(5, dtype=torch.float64)).abs().max() < 0.04
    assert times.min(dim=1).values.tolist() == [20, 0, 0, 0, 0]
    assert times.max(dim=1).values.tolist() == [980, 999, 999, 999, 999]


def test_what_the_student_alone_would_use_is_not_drawn_where_it_is_not_due():
    """The critic's numbers are the same either way, and so is its loss."""
    method, roles, batch = fresh(5.0, shaken=True)
    both, critic = (
        method.draw(batch, Rng(1, 1, 6, dtype=torch.float64), Progress(1, 9, due=due)) for due in (None, {"critic"})
    )
    assert {name for name, value in vars(critic).items() if value is None} == {
        "matching_time", "matching_noise", "played_time", "played_noise", "guidance_time", "guidance_noise",
    }  # fmt: skip
    for name, value in vars(critic).items():
        assert value is None or torch.equal(torch.as_tensor(value), torch.as_tensor(getattr(both, name))), name
    terms = [[], []]
    for draws, found in zip((both, critic), terms, strict=True):
        shared = method.prepare(roles, batch, draws, {"critic"})
        found += [term.total.item() for term in method.critic(roles, batch, draws, shared).terms()]
    assert len(terms[0]) == 2 and terms[0] == terms[1]


def test_no_noise_is_drawn_for_a_student_that_is_not_due(monkeypatch):
    """By the trainer: two rounds of its players, with two micro-batches each."""
    names, real = [], SampleRandom.normal

    def normal(rng, name, shape):
        names.append(name)
        return real(rng, name, shape)

    monkeypatch.setattr(SampleRandom, "normal", normal)
    method, roles, batch = fresh(1.0)
    source = SimpleNamespace(batch=lambda rng: Batch(batch.x0[rng.rows], batch.cond[rng.rows]))
    method.players = DMD2(SCHEDULES["vp"], student_every=3).players
    run = Trainer(method, roles, source, TrainingSettings(precision="fp64", batch_size=6, accumulation=2))
    for step in range(6):
        run.step(step)
    critic = ["noise", "fake_noise", "judged_noise", "data_noise"]
    assert Counter(names) == dict.fromkeys(critic, 12) | dict.fromkeys(["matching_noise", "played_noise"], 4)


def fresh(scale, checkpointing=False, shaken=False):
    """LoRA roles that are the teacher's yet, on a text network."""
    torch.manual_seed(0)
    method = DMD2(SCHEDULES["vp"], guidance_scale=scale)
    settings = TrainingSettings(precision="fp64", gradient_checkpointing=checkpointing)
    network = MLP(SCHEDULES["vp"], 2, width=16, depth=2, num_classes=3).double()
    roles = build_roles(Denoiser(network, SCHEDULES["vp"]), method, settings, Weights("lora", rank=4))
    if shaken:
        with torch.no_grad():
            for tensor in roles.tensors().values():
                tensor.add_(0.1 * torch.randn_like(tensor))
    cond = Cond({"label": torch.arange(6) % 3}, null={"label": torch.tensor([-1])})
    return method, roles, Batch(torch.randn(6, 2).double(), cond)


def test_before_training_both_scores_agree_up_to_guidance():
    for scale in (1.0, 5.0):
        method, roles, batch = fresh(scale)
        x, noise, t = batch.x0, torch.ones(6, 2, dtype=torch.float64), torch.full((6,), 600.0)
        g = method.matching.scores.matching(roles, x, noise, t, batch.cond).gradient
        x_t = method.schedule.add_noise(x, noise, t)
        with torch.no_grad():
            with_, without = roles.teacher(x_t, t, batch.cond).x0, roles.teacher(x_t, t, batch.cond.null()).x0
        guided = without + scale * (with_ - without)
        expected = -(scale - 1) * (with_ - without) / (x - guided).abs().mean(dim=1, keepdim=True)
        torch.testing.assert_close(g, expected, rtol=1e-10, atol=0)
        assert bool(g.any()) == (scale != 1)


def test_recomputed_activations_are_those_of_their_own_role():
    """Student and fake score are adapters of one shape on one base, and the student is played against the fake's."""
    found = []
    for checkpointing in (False, True):
        method, roles, batch = fresh(5.0, checkpointing, shaken=True)
        random = method.draw(batch, Rng(1, 0, 6, dtype=torch.float64), Progress(0, 1))
        p = SimpleNamespace(method=method, roles=roles, batch=batch)
        step = actual(p, random)
        found.append({**step.gradients, **{f"fake {k}": v for k, v in step.fake.items()}, **step.heads})
    assert len(found[0]) > 20 and all(gradient.any() for gradient in found[0].values())
    for key, gradient in found[0].items():
        assert torch.equal(found[1][key], gradient), key


def test_one_graph_of_a_network_at_a_time():
    """When the critic's second term is made, nothing is left of the first one's graph."""
    method, roles, batch = fresh(1.0)
    random = method.draw(batch, Rng(1, 0, 6, dtype=torch.float64), Progress(0, 1))
    kept = []

    def pack(x):
        saved = [x]
        kept.append(weakref.ref(x))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved[0]):
        shared = method.prepare(roles, batch, random, {"critic"})
        assert not kept and not shared.x0_student.requires_grad  # the student is not due
        loss = method.critic(roles, batch, random, shared)
        first = len(kept)
        loss.total.backward(inputs=roles.parameters("fake"))
        parameters = {id(w) for w in roles.tensors().values()} | {id(w) for w in roles.base.parameters()}
        left = [ref() for ref in kept if ref() is not None and id(ref()) not in parameters]
        assert first > 0 and not [x for x in left if x.requires_grad and x.grad_fn is not None]
        second = loss.then()
        assert len(kept) > first and second.total.requires_grad


def test_no_graph_leads_from_the_critics_losses_to_the_student():
    method, roles, batch = fresh(1.0)
    random = method.draw(batch, Rng(1, 0, 6, dtype=torch.float64), Progress(0, 1))
    shared = method.prepare(roles, batch, random, {"student", "critic"})
    assert shared.x0_student.requires_grad
    for term in method.critic(roles, batch, random, shared).terms():
        found = torch.autograd.grad(term.total, roles.parameters("student"), allow_unused=True, retain_graph=True)
        assert not any(gradient is not None for gradient in found)


def test_without_its_weight_there_is_no_discriminator():
    quiet, loud = DMD2(SCHEDULES["vp"], adversarial_weight=0.0), DMD2(SCHEDULES["vp"])
    assert quiet.heads() == () and quiet.players[1].roles == ("fake",)
    assert loud.players[1].roles == ("fake", "discriminator") and loud.heads()[0].backbone == "fake"
    assert [p.every for p in loud.players] == [5, 1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"timesteps": ()}, "one or more times"),
        ({"timesteps": (249, 499)}, "decrease"),
        ({"timesteps": (1200,)}, "outside this vp schedule"),
        ({"timesteps": (499, -1)}, "above clean data"),
        ({"num_inference_steps": 0}, "num_inference_steps: input should be greater than or equal to 1"),
        ({"student_every": 0}, "student_every"),
        ({"student_input": "data"}, r"student_input: input should be .*, not 'data'"),
        ({"terminal": "zero"}, r"terminal: input should be .*, not 'zero'"),
        ({"adversarial_weight": -1.0}, "adversarial_weight"),
        ({"discriminator_weight": float("nan")}, "discriminator_weight"),
        ({"discriminator_backbone": "dino"}, r"discriminator_backbone: input should be .*, not 'dino'"),
        ({"any_steps": 4, "timesteps": (499,)}, "any_steps draws the student's times"),
        ({"any_steps": -1}, "any_steps: input should be greater than or equal to 0"),
        ({"match": "x_s"}, "set rollout to ode"),
        ({"guidance_apart": True, "guidance_scale": 1}, "set guidance_scale above 1, or leave guidance_apart out"),
        ({"match": "x"}, r"match: input should be .*, not 'x'"),
        ({"rollout": "sde"}, r"rollout: input should be .*, not 'sde'"),
        ({"fake_target": "v"}, r"fake_target: input should be .*, not 'v'"),
        ({"fake_pull": 1.0}, "fake_pull: input should be less than 1"),
        ({"student_start": -3}, "student_start: input should be greater than or equal to 0"),
        ({"first_weight": 0.1}, "first_weight needs rollout ode"),
        ({"first_weight": 0.1, "rollout": "ode", "student_input": "noised"}, "first_weight needs rollout ode"),
        ({"first_weight": 0.1, "rollout": "ode", "num_inference_steps": 1}, "two steps or more"),
        ({"first_weight": 0.1, "rollout": "ode", "timesteps": (399,)}, "two steps or more"),
        ({"first_weight": 0.1, "rollout": "ode", "any_steps": 1}, "two steps or more"),
        ({"first_weight": 0.1, "rollout": "ode", "first_solver_steps": (9, 9)}, r"K below M, not \[9, 9\]"),
        ({"first_weight": 0.1, "rollout": "ode", "timesteps": (99, 9)}, "only 2 of 30 .* below 99, .* not 10: lower K"),
        ({"first_weight": 0.1, "rollout": "ode", "match": "x_s", "tell_end": True}, "leave one of them out"),
        ({"tell_end": True, "rollout": "ode"}, "tell_end with rollout ode .* set match to x_s"),
        ({"halvings": -1}, "halvings: input should be greater than or equal to 0, not -1"),
        ({"head": "vit"}, r"head: input should be .*, not 'vit'"),
    ],
)
def test_refusals(settings, said):
    with pytest.raises(ValueError, match=said):
        DMD2(SCHEDULES["vp"], **settings)


QUIET = {"adversarial_weight": 0.0, "guidance_scale": 1.0}
DDPM = Schedule.from_betas(np.linspace(1e-4, 0.02, 1000))


ZERO_SNR = Schedule.scaled_linear().zero_terminal_snr()
FIRST = {
    "vp": (SCHEDULES["vp"], {}),
    "flow": (SCHEDULES["flow"], {}),
    "edm": (SCHEDULES["edm"], {}),
    "times": (SCHEDULES["vp"], {"timesteps": (749, 499)}),
    "ill-posed": (DDPM, {}),
    "any steps": (SCHEDULES["flow"], {"any_steps": 4}),
    "zero snr": (ZERO_SNR, {"timesteps": (899, 499)}),
}


@pytest.mark.parametrize("case", FIRST)
def test_the_first_step_is_fitted_where_the_student_meets_noise(case):
    """The loss of its own and the states of the rollout begin at one time, on every schedule."""
    schedule, settings = FIRST[case]
    method = DMD2(schedule, rollout="ode", first_weight=0.1, first_solver_steps=(3, 30), **QUIET, **settings)
    batch = Batch(torch.zeros(4, 1))
    draws, asked = method.draw(batch, Rng(0, 0, 4), Progress(0, 9)), []

    def network(x, t, cond):
        asked.append(float(t[0]))
        return x

    roles = SimpleNamespace(
        **dict.fromkeys(("student", "teacher", "fake"), Denoiser(network, schedule, "v_prediction"))
    )
    shared = method.prepare(roles, batch, draws, {"student"})
    start = draws.times[0]
    assert asked[0] == pytest.approx(start)
    loss, before = method.student(roles, batch, draws, shared), len(asked)
    loss.then()
    grid = [t for t in schedule.timesteps(30).tolist() if t < start]
    assert method.first.times.tolist() == [start, *grid[:3]]
    assert asked[before:] == pytest.approx([start, *grid[:2], start])  # the teacher's calls, and the student's


def test_a_flow_map_is_continued_with_its_end_alone():
    """Refused from its card, with what to set, before a weight is looked at."""
    start = Card("flowmap", "ctm", 4, "lora", "scenes-64", rank=4, extra_inputs=("end",))
    told = {"tell_end": True, "rollout": "ode", "match": "x_s"}

    def checked(name, start=start, **settings):
        recipe = parse_recipe({"method": {"name": name, **settings}, "init": "runs/map"})
        method = find_method(name)(SCHEDULES["vp"], recipe.method_settings())
        check_fit(recipe, method, "epsilon", None, start, begins=True)

    checked("dmd2", **told)
    checked("dmd2", replace(start, extra_inputs=()))
    with pytest.raises(
        RecipeError, match=r"init: the student 'runs/map' is conditioned on end, .* set method.tell_end"
    ):
        checked("dmd2")
    with pytest.raises(RecipeError, match=r"conditioned on end, .* begin with a student without it"):
        checked("lightning")


def test_a_student_that_does_not_learn_is_spoken_of():
    def checked(start):
        recipe = parse_recipe(
            {"method": {"name": "dmd2", "student_start": start}, "training": {"steps": 100, "batch_size": 2}}
        )
        check_fit(recipe, DMD2(SCHEDULES["vp"], recipe.method_settings()), "epsilon", None, None, begins=False)

    checked(99)  # a warning would be an error here
    with pytest.warns(Remark, match=r"method.student_start \(100\) is not below training.steps \(100\)"):
        checked(100)
