"""Roles on one base: who is live, whose gradients, what is saved; the teacher never changes by a bit."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from fewstep.data.pairs import PairSource, WithPairs
from fewstep.data.random import Rng
from fewstep.data.sources import MixtureSource
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Progress
from fewstep.methods.registry import METHODS
from fewstep.models import lora
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.extras import ExtraInputs, sinusoid
from fewstep.models.helpers import Helpers, PointEncoder
from fewstep.models.lora import adapter_tensors, add_adapter, live
from fewstep.models.mlp import MLP
from fewstep.models.roles import Roles, Weights
from fewstep.training.players import PlayerState
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import build_roles
from tests.rewards import never_enough

VP = Schedule.scaled_linear()

RING = GaussianMixture.ring(6, 1.0, 0.3, num_classes=3)
CLASSES = range(3)


def points(method):
    """What losses look through, of points in the plane."""
    return Helpers(encoder=PointEncoder(2), rewards=dict.fromkeys(method.rewards, never_enough))


class Small(nn.Module):
    """Convolution, attention, MLP: every layer kind that adapters meet. x is [B, 2, 4, 4]."""

    extra_width = 16

    def __init__(self, checkpoint=lora.checkpoint):
        super().__init__()
        self.inlet, self.outlet = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 2, 3, padding=1)
        self.time, self.norm = nn.Linear(32, 16), nn.LayerNorm(16)
        self.qkv, self.project = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.gradient_checkpointing, self.checkpoint = False, checkpoint

    def forward(self, x, t, cond=None, *, extra=None):
        emb = self.time(sinusoid(t, 32).to(x.dtype))
        if extra is not None:
            emb = emb + extra.to(x.dtype)
        h = self.inlet(x) + emb[:, :, None, None]
        for block in (self._attend, self._mix):
            h = self.checkpoint(block, h) if self.gradient_checkpointing and torch.is_grad_enabled() else block(h)
        return self.outlet(h)

    def _attend(self, h):
        tokens = h.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(tokens)).chunk(3, dim=-1)
        mixed = torch.softmax(q @ k.transpose(1, 2) / 4, dim=-1) @ v
        return h + self.project(mixed).transpose(1, 2).reshape(h.shape)

    def _mix(self, h):
        tokens = h.flatten(2).transpose(1, 2)
        return h + self.down(nn.functional.silu(self.up(tokens))).transpose(1, 2).reshape(h.shape)


def small(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return Small(**options).to(dtype)


def roles_on(network, **options):
    return Roles(Denoiser(network, VP, "epsilon"), **options)


def data(n=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.tensor([999, 500, 19][:n])


def shake(roles, name, seed=0):
    """Move a role away from the teacher (a fresh LoRA has B = 0, which hides A's gradient)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in roles.parameters(name):
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p.dtype))


def train(roles, name, steps=3):
    optimizer = torch.optim.AdamW(roles.parameters(name), lr=1e-2)
    for _ in range(steps):
        getattr(roles, name)(*data()).x0.square().mean().backward(inputs=roles.parameters(name))
        optimizer.step()
        optimizer.zero_grad()
        roles.update_followers(name)


# ------------------------------------------------------------------ the teacher


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_teacher_is_the_same_to_the_bit(kind):
    network = small()
    alone = copy.deepcopy(network)
    before = Denoiser(alone, VP)(*data()).output
    roles = roles_on(network)
    assert torch.equal(roles.teacher(*data()).output, before)
    roles.add("student", Weights(kind, rank=4))
    roles.follow("ema", "student", 0.5)
    assert torch.equal(roles.teacher(*data()).output, before)
    assert torch.equal(roles.student(*data()).output, before)  # every role starts as the teacher
    assert torch.equal(roles.ema(*data()).output, before)
    train(roles, "student")
    assert not torch.equal(roles.student(*data()).output, before)
    assert torch.equal(roles.teacher(*data()).output, before)
    with pytest.raises(RuntimeError), live(("student",)):
        raise RuntimeError  # adapters are put back after exceptions
    assert torch.equal(roles.teacher(*data()).output, before) and not roles.teacher(*data()).output.requires_grad
    assert not any(p.requires_grad for p in lora.base_parameters(network))


def test_an_exception_leaves_no_adapter_live():
    network = small()
    roles = roles_on(network)
    roles.add("student", Weights(rank=4))
    shake(roles, "student")
    bare = network(*data())
    for enter in (live(("student",)), live(("critic",))):
        with pytest.raises(RuntimeError), enter:
            raise RuntimeError
        assert torch.equal(network(*data()), bare)
    with pytest.raises(TypeError):
        roles.student.network(*data(), None, nothing=torch.zeros(3))  # the network itself fails
    assert torch.equal(network(*data()), bare)


def test_two_adapters_do_not_see_each_other():
    roles = roles_on(small())
    for name in ("student", "critic"):
        roles.add(name, Weights(rank=4))
    student = roles.student(*data()).output
    train(roles, "critic")
    assert torch.equal(roles.student(*data()).output, student)
    assert not torch.equal(roles.critic(*data()).output, student)
    assert all(p.requires_grad for name in ("student", "critic") for p in roles.parameters(name))


def test_an_adapter_is_w_plus_scale_b_a():
    layer = nn.Sequential(nn.Linear(5, 3))
    weight, bias = layer[0].weight.clone(), layer[0].bias.clone()
    add_adapter(layer, "student", rank=2, alpha=3.0)
    tensors = adapter_tensors(layer, "student")
    assert not tensors["0.lora_B.weight"].any() and tensors["0.lora_A.weight"].any()
    with torch.no_grad():
        tensors["0.lora_B.weight"].normal_()
    x = torch.randn(4, 5)
    changed = weight + 1.5 * tensors["0.lora_B.weight"] @ tensors["0.lora_A.weight"]
    with live(("student",)):
        torch.testing.assert_close(layer(x), x @ changed.T + bias)
    assert torch.equal(layer(x), nn.functional.linear(x, weight, bias))


def test_alpha_defaults_to_rank_and_a_is_seeded():
    a, b, c = (roles_on(small(), seed=seed) for seed in (5, 5, 6))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for roles in (a, b, c):
        roles.add("student", Weights(rank=4))
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers move
    assert lora.adapter_scale(a.base, "student") == 1.0
    same = [torch.equal(p, q) for p, q in zip(a.parameters("student"), b.parameters("student"), strict=True)]
    other = [torch.equal(p, q) for p, q in zip(a.parameters("student"), c.parameters("student"), strict=True)]
    assert all(same) and not all(other)


def test_targets():
    roles = roles_on(small())
    roles.add("student", Weights(rank=2, targets=("qkv", "inlet")))
    assert {k.split(".lora_")[0] for k in roles.tensors_of("student")} == {"qkv", "inlet"}
    with pytest.raises(ValueError, match=r"No layer of Small matches the LoRA targets \['nothing'\]"):
        roles.add("critic", Weights(targets=("nothing",)))
    with pytest.raises(ValueError, match="rank must be at least 1"):
        roles.add("critic", Weights(rank=0))


def test_a_networks_own_targets_are_the_default():
    network = small()
    network.lora_targets = ("qkv", "down")
    roles = roles_on(network)
    roles.add("student", Weights(rank=2))
    roles.add("critic", Weights(rank=2, targets=("inlet",)))
    assert {k.split(".lora_")[0] for k in roles.tensors_of("student")} == {"qkv", "down"}
    assert {k.split(".lora_")[0] for k in roles.tensors_of("critic")} == {"inlet"}


def test_views_ask_as_the_teacher_does():
    """Guidance in two calls where the teacher is set to it; an average answers in its leader's kind."""
    teacher = Denoiser(small(), VP, "v_prediction", batched_guidance=False)
    roles = Roles(teacher)
    roles.add("student", Weights(rank=2))
    roles.follow("ema", "student", 0.5)
    cond = Cond({"label": torch.zeros(3, 1)}, null={"label": torch.zeros(1, 1)})
    for name in ("teacher", "student", "ema"):
        view = getattr(roles, name)
        view(*data(), cond, guidance_scale=3.0)
        assert (view.cost.calls, view.prediction_type) == (2, "v_prediction")
    roles.add_network("other", small(), "sample")
    roles.follow("other_ema", "other", 0.5)
    assert roles.other_ema.prediction_type == roles.other.prediction_type == "sample"
    assert torch.equal(roles.other_ema(*data()).x0, roles.other(*data()).x0)


def test_the_teacher_has_no_dropout():
    layers = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    network = MLP(VP, 2, width=16, depth=1)
    network.outlet = nn.Sequential(network.outlet, layers)
    roles = Roles(Denoiser(network.train(), VP))
    says = [roles.teacher(torch.ones(8, 2), 500).output for _ in range(2)]
    assert torch.equal(*says)


def test_features_are_the_roles_own_and_counted():
    class Tapped(Small):
        def features(self, x, t, cond, taps):
            return [self.inlet(x) for _ in taps]

    torch.manual_seed(0)
    network = Tapped()
    roles = roles_on(network)
    roles.add("critic", Weights(rank=2))
    shake(roles, "critic")
    x, t = data()
    (mine,), (base,) = roles.critic.features(x, t, None, ("mid",)), roles.teacher.features(x, t, None, ("mid",))
    assert torch.equal(base, network.inlet(x)) and not torch.equal(mine, base)
    with live(("critic",)):
        assert torch.equal(mine, network.inlet(x))
    assert (roles.critic.cost.calls, roles.critic.cost.evaluations) == (1, 1.5)


# ------------------------------------------------------------------ activation checkpointing


def gradients(checkpoint, checkpointing, live_in_backward):
    roles = roles_on(small(torch.float64, checkpoint=checkpoint), gradient_checkpointing=checkpointing)
    for seed, name in enumerate(("student", "critic")):
        roles.add(name, Weights(rank=4))
        for p in roles.parameters(name):
            p.data = p.data.double()
        shake(roles, name, seed)
    loss = roles.student(*data(dtype=torch.float64)).x0.square().mean()
    with live(live_in_backward):
        return torch.autograd.grad(loss, roles.parameters("student"), allow_unused=True)


@pytest.mark.parametrize("live_in_backward", [(), ("critic",), ("student",)])
def test_checkpointing_recomputes_under_its_own_adapter(live_in_backward):
    plain = gradients(lora.checkpoint, False, ("critic",))
    recomputed = gradients(lora.checkpoint, True, live_in_backward)
    assert all(torch.equal(p, q) for p, q in zip(plain, recomputed, strict=True))


def test_uncaptured_checkpointing_is_wrong_and_says_nothing():
    """Why `fewstep.models.lora.checkpoint` exists: torch's own, with the other adapter live, is silently wrong."""

    def uncaptured(function, *args):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)

    plain = gradients(uncaptured, False, ("critic",))
    wrong = gradients(uncaptured, True, ("critic",))
    assert all(q is not None and q.isfinite().all() for q in wrong)
    missed = [float((p - q).norm() / p.norm()) for p, q in zip(plain, wrong, strict=True)]
    assert max(missed) > 0.5 and sum(m > 0.05 for m in missed) >= 6


def test_checkpointing_must_be_offered():
    with pytest.raises(ValueError, match="Linear offers no gradient checkpointing"):
        roles_on(nn.Linear(2, 2), gradient_checkpointing=True)


# ------------------------------------------------------------------ every method: each loss to its own player


def mlp_teacher(method=None):
    """Takes as its own whatever ``method`` must tell its roles."""
    torch.manual_seed(0)
    told = frozenset(name for spec in (method.roles() if method else ()) for name in spec.extra_inputs)
    network = MLP(VP, 2, width=16, depth=2, num_classes=3, accepts=told)
    return Denoiser(network, VP, "epsilon")


def losses(method, roles, step=0):
    rng = Rng(0, step, 8)
    labels = Cond({"label": torch.arange(12) % 3}, null={"label": torch.tensor([-1])})
    pairs = PairSource(RING.sample(12, torch.Generator().manual_seed(0)), labels, seed=0)
    batch = WithPairs(MixtureSource(RING, CLASSES), pairs).batch(rng)
    draws = method.draw(batch, rng, Progress(step, 1))
    shared = method.prepare(roles, batch, draws, {p.name for p in method.players})
    return {p.name: getattr(method, p.name)(roles, batch, draws, shared) for p in method.players}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", METHODS)
def test_each_loss_reaches_its_players_parameters_and_no_others(name, kind, checkpointing):
    settings = TrainingSettings(batch_size=8, ema_decay=0.9, gradient_checkpointing=checkpointing)
    method = METHODS[name](VP)
    roles = build_roles(mlp_teacher(method), method, settings, Weights(kind, rank=4), helpers=points(method))
    teacher_says = roles.teacher(torch.zeros(1, 2), 500).output
    players = []
    for seed, player in enumerate(method.players):
        for role in player.roles:
            shake(roles, role, seed)
        players.append(PlayerState(player, [p for r in player.roles for p in roles.parameters(r)], settings))
    every = {id(p): p for view in roles.views().values() for p in view.network.network.parameters()}
    for state in players:
        every |= {id(p): p for p in state.parameters}
    for state in players:
        state.learn(losses(method, roles)[state.player.name], 1)
        reached = {key for key, p in every.items() if p.grad is not None}
        assert reached == {id(p) for p in state.parameters}
        assert all(p.grad.any() for p in state.parameters)
        others = {key: p.detach().clone() for key, p in every.items() if key not in reached}
        state.update(0)
        assert all(torch.equal(every[key], value) for key, value in others.items())
    assert torch.equal(roles.teacher(torch.zeros(1, 2), 500).output, teacher_says)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", METHODS)
def test_same_draws_same_loss(name, kind):
    method = METHODS[name](VP)
    roles = build_roles(mlp_teacher(method), method, TrainingSettings(), Weights(kind, rank=4), helpers=points(method))
    shake(roles, "student")
    first, again = losses(method, roles), losses(method, roles)
    assert all(torch.equal(first[k].total, again[k].total) for k in first)
    assert any(not torch.equal(first[k].total, losses(method, roles, step=1)[k].total) for k in first)


# ------------------------------------------------------------------ EMA


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_follower_is_the_exact_moving_average(kind):
    roles = roles_on(small())
    roles.add("student", Weights(kind, rank=4), extra_inputs=("end",))
    roles.follow("slow", "student", 0.999)
    roles.follow("fast", "student", 0.5)
    expected = {n: {k: p.detach().double() for k, p in roles.tensors_of("student").items()} for n in ("slow", "fast")}
    for step in range(5):
        shake(roles, "student", step)
        roles.update_followers("student")
        for n, decay in (("slow", 0.999), ("fast", 0.5)):
            for k, p in roles.tensors_of("student").items():
                expected[n][k] = decay * expected[n][k] + (1 - decay) * p.detach().double()
    for n in ("slow", "fast"):
        assert not roles.parameters(n)
        for k, p in roles.tensors_of(n).items():
            torch.testing.assert_close(p.double(), expected[n][k], rtol=1e-6, atol=1e-7)
        assert any(k.startswith("extras.") for k in roles.tensors_of(n))


def test_a_follower_with_another_scale_answers_as_its_leader():
    roles = roles_on(small())
    roles.add("student", Weights(rank=4, alpha=2.0))
    shake(roles, "student")
    roles.follow("target", "student", 0.9)
    # copies lie at other addresses, for which a processor's kernels may sum in another order: a rounding apart
    assert torch.allclose(roles.target(*data()).output, roles.student(*data()).output, rtol=0, atol=1e-6)


def test_decay_zero_is_the_student_itself():
    roles = roles_on(small())
    roles.add("student", Weights(rank=4))
    assert roles.follow("target", "student", 0.0) is roles.student
    for decay in (1.1, -0.1):
        with pytest.raises(ValueError, match=r"EMA decay must be in \[0, 1\]"):
            roles.follow("other", "student", decay)


# ------------------------------------------------------------------ precision


def test_fp16_training_is_refused():
    with pytest.raises(ValueError, match="fp16 diverges"):
        roles_on(small(), autocast=torch.float16)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masters_are_float32_whatever_the_base_holds(kind, dtype):
    roles = roles_on(small(dtype))
    roles.add("student", Weights(kind, rank=4))
    assert {p.dtype for p in roles.parameters("student")} == {torch.float32}
    assert {p.dtype for p in lora.base_parameters(roles.base)} == {dtype}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_autocast_wraps_the_network_alone(kind):
    roles = roles_on(small(), autocast=torch.bfloat16)
    roles.add("student", Weights(kind, rank=4))
    said = roles.student(*data())
    assert said.x0.dtype == torch.float32
    assert torch.equal(said.output, said.output.to(torch.bfloat16).float())  # computed in bf16, promoted after
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a caller's own region keeps the weight cache alive
        with torch.no_grad():
            roles.student(*data())  # a weight cached here would carry no graph below
        said = roles.student(*data())
    said.x0.square().mean().backward(inputs=roles.parameters("student"))
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in roles.parameters("student"))


# ------------------------------------------------------------------ saving


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_tensors_round_trip_bit_for_bit(kind):
    def fresh(rank=4):
        roles = roles_on(small(), seed=1)
        roles.add("student", Weights(kind, rank=rank), extra_inputs=("guidance_embed",))
        roles.follow("ema", "student", 0.9)
        return roles

    one, two = fresh(), fresh()
    shake(one, "student")
    one.update_followers("student")
    blob = save({k: p.detach().contiguous() for k, p in one.tensors().items()})
    two.load_tensors(load(blob))
    assert one.tensors().keys() == two.tensors().keys()
    assert all(torch.equal(p, two.tensors()[k]) for k, p in one.tensors().items())
    for name in ("student", "ema"):
        mine, theirs = (getattr(r, name)(*data(), guidance_embed=3.0).output for r in (one, two))
        assert torch.equal(mine, theirs)
    assert all(p.requires_grad for p in two.parameters("student")) and not two.parameters("ema")
    saved = load(blob)
    saved.pop(next(iter(saved)))
    with pytest.raises(ValueError, match="belongs to another student"):
        two.load_tensors(saved)
    if kind == "lora":
        with pytest.raises(ValueError, match="belongs to another student"):
            fresh(rank=2).load_tensors(load(blob))


# ------------------------------------------------------------------ extra inputs


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_extra_inputs_start_at_zero_and_learn(kind):
    roles = roles_on(small())
    roles.add("student", Weights(kind, rank=4), extra_inputs=("guidance_embed", "end"))
    assert roles.student.accepts == {"guidance_embed", "end"} and not roles.teacher.accepts
    told = roles.student(*data(), end=torch.tensor([0, 19, 3]), guidance_embed=torch.tensor([2.0, 3.0, 8.0]))
    assert torch.equal(told.output, roles.teacher(*data()).output)
    told.output.square().mean().backward(inputs=roles.parameters("student"))
    extras = {k: p for k, p in roles.tensors_of("student").items() if k.startswith("extras.")}
    assert len(extras) == 2 and all(p.grad.any() for p in extras.values())
    shake(roles, "student")
    answers = [roles.student(*data(), end=e, guidance_embed=w).output for e, w in ((0, 2.0), (19, 2.0), (0, 3.0))]
    assert not torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])
    with pytest.raises(ValueError, match="no input 'end'"):
        roles.teacher(*data(), end=0)


def test_extra_inputs_need_a_place_to_go():
    with pytest.raises(ValueError, match="MLP takes no extra inputs"):
        Roles(mlp_teacher()).add("student", extra_inputs=("end",))
    native = Denoiser(MLP(VP, 2, width=16, depth=1, accepts=frozenset({"end"})), VP)
    roles = Roles(native)
    roles.add("student", Weights(rank=2), extra_inputs=("end",))
    assert not any(k.startswith("extras.") for k in roles.tensors_of("student"))  # the network has the input itself


def test_embeddings_are_lcms():
    """sin and cos of 1000 (w - 1) at frequencies 10000^(-i/(d/2 - 1)), formed in float32 at least."""
    extras = ExtraInputs({"guidance_embed"}, 3, VP)
    nn.init.normal_(extras.project["guidance_embed"].weight)
    w = torch.tensor([1.0, 8.5], dtype=torch.float64)
    phase = (
        1000 * (w[:, None] - 1) * torch.exp(-torch.arange(128).double() * torch.log(torch.tensor(1e4).double()) / 127)
    )
    expected = torch.cat([phase.sin(), phase.cos()], 1).float() @ extras.project["guidance_embed"].weight.T
    torch.testing.assert_close(extras(guidance_embed=w), expected, rtol=1e-5, atol=1e-5)
    assert sinusoid(w.half(), 256).dtype == torch.float32


# ------------------------------------------------------------------ the house rules


def test_mistakes_are_one_sentence():
    roles = roles_on(small())
    with pytest.raises(AttributeError, match="no role 'critic' here: the roles are teacher"):
        _ = roles.critic
    roles.add("student", Weights(rank=4))
    with pytest.raises(ValueError, match="Add full-weight roles before LoRA roles"):
        roles.add("critic", Weights("full"))
    with pytest.raises(ValueError, match=r"is no nn\.Module and cannot be copied"):
        Roles(Denoiser(RING.network(VP), VP)).add("student")


def test_cost_adds_up_over_roles():
    roles = roles_on(small())
    roles.add("student", Weights(rank=4))
    roles.follow("target", "student", 0.0)
    roles.teacher(*data())
    roles.student(*data())
    roles.target(*data())
    cost = roles.cost()
    assert (cost.calls, cost.evaluations, cost.graph_evaluations, cost.forward_equivalents) == (3, 9, 6, 21)


def test_conditions_reach_the_network():
    cond = Cond({"label": torch.tensor([0, 2])}, null={"label": torch.tensor([-1])})
    roles = Roles(mlp_teacher())
    roles.add("student", Weights(rank=2))
    x = torch.ones(2, 2)
    assert not torch.equal(roles.student(x, 500, cond).output[0], roles.student(x, 500, cond).output[1])


def test_an_adapter_that_is_added_freezes_none_that_learns(monkeypatch):
    """peft below 0.21 freezes those that are there: the student of a role with a follower would not learn."""
    inject = peft.inject_adapter_in_model

    def older(config, module, adapter_name):
        inject(config, module, adapter_name)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(f".{adapter_name}." in name)

    monkeypatch.setattr(peft, "inject_adapter_in_model", older)
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    for name in ("student", "critic"):
        add_adapter(network, name, rank=1)
    learning = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert learning == {f"{i}.lora_{m}.{name}.weight" for i in (0, 1) for m in "AB" for name in ("student", "critic")}
