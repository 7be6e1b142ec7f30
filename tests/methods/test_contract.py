"""What every method in the registry must keep, whatever it computes: gradients, replays, micro-batches, calls.

A toy method of two players goes through the same tests: its student learns through its critic.
"""

import dataclasses
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from fewstep.data.pairs import PairSource, WithPairs
from fewstep.data.random import Rng
from fewstep.data.sources import LatentSource, MixtureSource
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Loss, Method, Player, Progress, RoleSpec
from fewstep.methods.registry import METHODS
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.helpers import Helpers, PointEncoder, one_hot_labels
from fewstep.models.lora import base_parameters
from fewstep.models.mlp import MLP
from fewstep.models.roles import Weights
from fewstep.training.players import PlayerState
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, build_roles
from tests.rewards import never_enough

VP = Schedule.scaled_linear()
RING = GaussianMixture.ring(6, 1.0, 0.3, num_classes=3)
LABELS = Cond({"label": torch.arange(30) % 3}, null={"label": torch.tensor([-1])})
PAIRS = PairSource(RING.sample(30, torch.Generator().manual_seed(0)), LABELS, seed=0)
SOURCE = WithPairs(MixtureSource(RING, range(3)), PAIRS)
BATCH, SEED = 12, 5
# Beside its defaults: an EMA target, inputs the student is told, a scale drawn per sample, hops without a teacher.
SETTINGS = [
    {},
    {"target_decay": 0.9, "guidance_scale": (2.0, 6.0)},
    {"guidance_embed": True, "guidance_scale": (2.0, 6.0)},
    {"tell_end": True, "target_decay": 0.9},
    {"caption_dropout": 0.3, "guidance_scale": 1.0, "num_phases": 3},
    {"adversarial_weight": 0.0},
    {"solver": "heun", "target_decay": 0.9, "guidance_scale": 3.0},
    {"variant": "ct"},
    {"regression_space": "features"},
    {"variant": "ct", "first_grid_steps": 2, "timestep_sampling": "lognormal", "loss": "sample-huber"},
    {"denoising_weight": 0.0, "solver": "heun"},
    {"num_inference_steps": 1, "discriminator_backbone": "teacher", "head": "residual"},
    {"student_input": "noised", "weighting": "kl", "guidance_scale": 1.0},
    {"rollout": "ode", "match": "x_s", "fake_target": "score", "guidance_apart": True, "fake_pull": 0.1},
    {"rollout": "ode", "first_weight": 0.1, "first_solver_steps": (2, 5), "adversarial_weight": 0.0},
    {"any_steps": 4},
    {"tell_end": True, "any_steps": 4, "rollout": "ode", "match": "x_s"},
    {"loss": "unconditional", "num_inference_steps": 1, "discriminator_weights": "lora", "prediction_type": "sample"},
    {"loss": "mse", "num_teacher_steps": 16, "guidance_scale": 3.0},
    {"loss": "convert"},
    {"adversarial_weight": 0.5, "target_decay": 0.9, "guidance_scale": (2.0, 6.0)},
    {"distillation_weight": 0.0, "terminal": "table", "r1_weight": 0.1},
    {"weighting": "nfsd", "space": "latents", "guidance_scale": 7.5},
    {"loss": "logistic", "warmup_steps": 0, "r1_weight": 0.1},
    {"perceptual_weight": 0.5, "anchor_weight": 0.3, "held_out": "another", "first_exit": 1},
    {"segments": 2, "hop_by": "beginning", "discriminator_weights": "lora"},
    {"segments": 1, "offset_noise": 0.1, "target_decay": 0.0},
    {"velocity": "data", "guidance_scale": 1.0},
    {"windows": 3, "solver": "heun", "guidance_scale": 3.0},
    {"normalize": 0.0, "warmup": 0.0, "guidance_scale": (2.0, 6.0)},
    {"matching_weight": 0.5, "any_steps": 3, "student_every": 2},
    {"solver": "heun", "targets_per_block": 2, "num_inference_steps": (8,)},
    {"solver": "heun", "student_input": "noised", "num_inference_steps": (2, 8)},
]


class Duel(Method):
    """The student, every second step, minimises what the critic makes of its answer; the critic follows the teacher."""

    name = "duel"
    players = (Player("student", every=2), Player("critic"))

    def roles(self):
        return RoleSpec("student"), RoleSpec("critic")

    def draw(self, batch, rng, progress):
        return Noise(rng.sample.normal("noise", batch.x0.shape[1:]), rng.shared.integer("time", 100, 900))

    def prepare(self, roles, batch, draws, due):
        return roles.student(self.schedule.add_noise(batch.x0, draws.noise, draws.time), draws.time, batch.cond).x0

    def student(self, roles, batch, draws, shared):
        return Loss((roles.critic(shared, 300, batch.cond).x0 - batch.x0).square().mean())

    def critic(self, roles, batch, draws, shared):
        shared = shared.detach()
        wanted = roles.teacher(shared, 300, batch.cond).x0
        return Loss((roles.critic(shared, 300, batch.cond).x0 - wanted).square().mean())

    def calls_per_step(self):
        return {"student": 1, "critic": 2, "teacher": 1}


@dataclasses.dataclass
class Noise:
    noise: Tensor
    time: int


def known(cls, settings):
    """Whether a method has these settings, and its ``loss`` is one of its own."""
    if not settings.keys() <= {field.name for field in dataclasses.fields(cls.Settings)}:
        return False
    return settings.get("loss") in (None, *get_args(get_type_hints(cls.Settings).get("loss")))


VARIANTS = [
    pytest.param(cls, settings, id="-".join([name, *settings]))
    for name, cls in (METHODS | {"duel": Duel}).items()
    for settings in SETTINGS
    if known(cls, settings)
]
every_method = pytest.mark.parametrize(("cls", "settings"), VARIANTS)
every_kind = pytest.mark.parametrize("kind", ["lora", "full"])
lora_first = pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
"""Where the kind of weights makes no difference to a method."""


class Teacher(MLP):
    """Counts its own calls, independently of the Denoiser."""

    calls = 0
    extra_width = 16

    def forward(self, x, t, cond=None, *, extra=None, **inputs):
        Teacher.calls += 1
        said = super().forward(x, t, cond, **inputs)
        return said if extra is None else said + extra[:, :2]

    def features(self, *inputs):
        Teacher.calls += 1
        return super().features(*inputs)


def build(cls, settings, kind="lora", **training):
    """The method with every role shaken off the teacher (a fresh LoRA has B = 0, which hides A's gradient)."""
    torch.manual_seed(0)
    method = cls(VP, **settings)
    network = Teacher(VP, 2, width=16, depth=2, num_classes=3).double()
    training = TrainingSettings(**{"precision": "fp64", "batch_size": BATCH, "learning_rate": 1e-2} | training)
    liked = dict.fromkeys((*method.rewards, *method.measures), never_enough)
    helpers = Helpers(encoder=PointEncoder(2), rewards=liked, **one_hot_labels(3))
    roles = build_roles(Denoiser(network, VP, "epsilon"), method, training, Weights(kind, rank=4), helpers=helpers)
    with torch.no_grad():
        for tensor in roles.tensors().values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return method, roles, training


def step(method, roles, rng):
    """Draws of a step and every player's loss."""
    batch = SOURCE.batch(rng)
    draws = method.draw(batch, rng, Progress(rng.step, 10))
    shared = method.prepare(roles, batch, draws, {player.name for player in method.players})
    losses = {player.name: getattr(method, player.name)(roles, batch, draws, shared) for player in method.players}
    return draws, losses


def rng_of(rows=None, step=0):
    return Rng(SEED, step, BATCH, rows, dtype=torch.float64)


@every_kind
@every_method
def test_each_loss_reaches_its_players_parameters_and_nobody_elses(cls, settings, kind):
    method, roles, training = build(cls, settings, kind, ema_decay=0.9)
    players = [PlayerState(p, [w for r in p.roles for w in roles.parameters(r)], training) for p in method.players]
    everybody = {id(w): w for view in roles.views().values() for w in view.network.network.parameters()}
    everybody |= {id(w): w for w in roles.tensors().values()}
    assert not any(w.requires_grad for w in base_parameters(roles.base))
    for player in players:
        loss = step(method, roles, rng_of())[1][player.player.name]
        player.learn(loss, 1)
        reached = {key for key, w in everybody.items() if w.grad is not None}
        assert reached == {id(w) for w in player.parameters}
        assert all(w.grad.any() for w in player.parameters)
        others = {key: w.detach().clone() for key, w in everybody.items() if key not in reached}
        player.update(0)
        assert all(torch.equal(everybody[key], value) for key, value in others.items())


@lora_first
@every_method
def test_same_draws_same_loss_to_the_bit_and_other_draws_another(cls, settings, kind):
    """And every loss is a scalar, with detached parts."""
    method, roles, _ = build(cls, settings, kind)
    torch.manual_seed(1)
    _, first = step(method, roles, rng_of())
    for loss in (term for whole in first.values() for term in whole.terms()):
        assert loss.total.shape == () and loss.total.dtype == torch.float64 and loss.total.requires_grad
        assert all(v.shape == () for v in loss.parts.values())
        assert all(v.shape in ((), (10,)) for v in loss.stats.values())  # or one for each tenth of time
        assert not any(v.requires_grad for v in (loss.parts | loss.stats).values())
    torch.manual_seed(2)  # nothing may depend on the global generator
    _, again = step(method, roles, rng_of())
    _, other = step(method, roles, rng_of(step=1))
    for name in first:
        for one, same, another in zip(first[name].terms(), again[name].terms(), other[name].terms(), strict=True):
            assert torch.equal(one.total, same.total)
            assert not torch.equal(one.total, another.total)


def fields(draws):
    return {f.name: getattr(draws, f.name) for f in dataclasses.fields(draws)}


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [2, 4])
@every_method
def test_micro_batches_see_the_numbers_of_the_whole_batch(cls, settings, accumulation):
    method, roles, _ = build(cls, settings)
    size = BATCH // accumulation
    parts = [rng_of(slice(i * size, (i + 1) * size)) for i in range(accumulation)]
    whole = fields(step(method, roles, rng_of())[0])
    pieces = [fields(step(method, roles, rng)[0]) for rng in parts]
    for name, value in whole.items():
        if isinstance(value, Tensor):
            assert len(value) == BATCH and torch.equal(torch.cat([piece[name] for piece in pieces]), value)
        else:
            assert all(piece[name] == value for piece in pieces)
    for pick in (lambda batch: batch.x0, lambda batch: batch.pairs.x0, lambda batch: batch.pairs.noise):
        assert torch.equal(torch.cat([pick(SOURCE.batch(rng)) for rng in parts]), pick(SOURCE.batch(rng_of())))


@pytest.mark.slow
@every_kind
@every_method
def test_accumulation_changes_a_step_by_rounding_only(cls, settings, kind):
    """Weights and AdamW's moments: the moments are gradients unscaled, the weights' first step hides their size."""
    after = []
    for accumulation in (1, 3):
        method, roles, training = build(cls, settings, kind, accumulation=accumulation, max_grad_norm=0.0)
        trainer = Trainer(method, roles, SOURCE, training, seed=SEED)
        trainer.step(0)
        after.append(trainer.tensors())
    assert any(name.endswith("/exp_avg") and value.any() for name, value in after[0].items())
    assert after[0].keys() == after[1].keys()
    for name, value in after[0].items():
        torch.testing.assert_close(after[1][name], value, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_recomputed_activations_change_a_step_by_rounding_only(name):
    """Also where two players go back through one forward."""
    after = []
    for recomputed in (False, True):
        method, roles, training = build(METHODS[name], {}, gradient_checkpointing=recomputed, max_grad_norm=0.0)
        trainer = Trainer(method, roles, SOURCE, training, seed=SEED)
        trainer.step(0)
        after.append(trainer.tensors())
    for key, value in after[0].items():
        torch.testing.assert_close(after[1][key], value, rtol=1e-9, atol=1e-12)


@lora_first
@every_method
def test_calls_per_step_are_those_the_denoisers_counted(cls, settings, kind):
    method, roles, training = build(cls, settings, kind)
    draws, _ = step(method, roles, rng_of())
    declared, views = method.calls(draws), roles.views()
    for view in views.values():
        view.cost.calls = 0
    Teacher.calls = 0
    Trainer(method, roles, SOURCE, training, seed=SEED).step(0)  # at step 0 every player is due
    assert declared.keys() <= views.keys()
    for view in {id(v): v for v in views.values()}.values():  # a target without an EMA is the student's own view
        names = [name for name, other in views.items() if other is view]
        assert view.cost.calls == sum(declared.get(name, 0) for name in names), names
    assert Teacher.calls == roles.cost().calls == sum(declared.values())


@every_method
def test_calls_per_step_are_the_mean_over_steps(cls, settings):
    """Exact, unless a step's draws say how much it asks: then over 500 steps. No noise is needed for that."""
    method, batch = cls(VP, **settings), SOURCE.batch(rng_of())
    batch = dataclasses.replace(batch, x0=batch.x0.to("meta"))
    random = range(500 if type(method).calls is not Method.calls else 1)
    draws = (method.draw(batch, Rng(SEED, i, BATCH, device="meta"), Progress(i, 1)) for i in random)
    asked = [method.calls(drawn) for drawn in draws]
    for role, declared in method.calls_per_step().items():
        found = torch.tensor([calls[role] for calls in asked], dtype=torch.float64)
        error = 4 * float(found.std() / len(found) ** 0.5) if len(found) > 1 else 0.0
        assert abs(float(found.mean()) - declared) <= error, role


@every_kind
@every_method
def test_the_teacher_is_the_same_to_the_bit_after_training(cls, settings, kind):
    method, roles, training = build(cls, settings, kind, steps=2, ema_decay=0.9, log_every=1)
    batch = SOURCE.batch(rng_of())
    bank = roles.student.network.bank
    times = torch.linspace(0, 999, BATCH).long() if bank is None else float(bank.times[4])
    before = roles.teacher(batch.x0, times, batch.cond, guidance_scale=3.0).output
    student = roles.student(batch.x0, times, batch.cond, **told(roles)).output
    Trainer(method, roles, SOURCE, training, seed=SEED).run()
    assert torch.equal(roles.teacher(batch.x0, times, batch.cond, guidance_scale=3.0).output, before)
    assert not torch.equal(roles.student(batch.x0, times, batch.cond, **told(roles)).output, student)


def told(roles):
    bank = roles.student.network.bank
    return {name: 3.0 if bank is None else float(bank.times[12]) for name in roles.student.accepts}


def test_a_source_of_latents_gives_micro_batches_the_rows_of_the_whole_batch():
    generator = torch.Generator().manual_seed(0)
    source = LatentSource(torch.randn(7, 2, generator=generator), torch.rand(7, 2, generator=generator), None)
    whole = [source.batch(rng_of(step=s)).x0 for s in range(3)]
    parts = [torch.cat([source.batch(rng_of(slice(i, i + 4), s)).x0 for i in (0, 4, 8)]) for s in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert not torch.equal(whole[0], whole[1])
