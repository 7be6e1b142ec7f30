"""A step of the trainer against the same step written out with plain PyTorch; its log; its players' rates."""

import dataclasses
import math

import pytest
import torch
from killable import SOURCE, VP, roles_for, trainer
from torch import nn

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.methods.base import Loss, Method, Player, RoleSpec
from fewstep.methods.lcm import LCM
from fewstep.models.denoiser import Denoiser
from fewstep.models.roles import Roles
from fewstep.training import checkpoint, distributed
from fewstep.training.logging import Meter, read_log
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import NotFinite, Trainer

RATE, LIMIT, DECAY = 1e-2, 0.05, 0.7
ADAM = {"betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.3}


class Pull(Method):
    """Student and critic, each pulled to the data by a squared error of its own; the target trails the student."""

    name = "pull"
    players = (Player("student"), Player("critic", every=2))

    def roles(self):
        return RoleSpec("student"), RoleSpec("critic"), RoleSpec("target", follows="student", decay=DECAY)

    def draw(self, batch, rng, progress):
        return rng.sample.normal("noise", batch.x0.shape[1:])

    def student(self, roles, batch, draws, shared):
        return Loss((roles.student(draws, 500).output - batch.x0).square().mean())

    def critic(self, roles, batch, draws, shared):
        return Loss((roles.critic(draws, 500).output - 2 * batch.x0).square().mean())


class PullInParts(Pull):
    """The critic's error in three terms, each made after the one before."""

    def critic(self, roles, batch, draws, shared):
        def part(number):
            error = (roles.critic(draws, 500).output - 2 * batch.x0).square().mean()
            then = (lambda: part(number + 1)) if number < 2 else None
            return Loss((0.5, 0.3, 0.2)[number] * error, {f"part{number}": error.detach()}, then=then)

        return part(0)


class Affine(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x, t, cond=None):
        return self.layer(x)


def pull(cls=Pull, **settings):
    torch.manual_seed(0)
    networks = {name: Affine().double() for name in ("student", "critic")}
    roles = Roles(Denoiser(Affine().double(), VP, "sample"))
    for name, network in networks.items():
        roles.add_network(name, network, "sample")
    roles.follow("target", "student", DECAY)
    settings = {"precision": "fp64", "batch_size": 8, "learning_rate": RATE, "max_grad_norm": LIMIT} | settings
    return Trainer(cls(VP), roles, SOURCE, TrainingSettings(**settings), seed=5), networks


@pytest.mark.parametrize("accumulation", [1, 4])
def test_steps_are_adamw_on_clipped_gradients_then_the_average(accumulation):
    run, mine = pull(accumulation=accumulation, **ADAM)
    _, plain = pull()
    average = {key: p.detach().clone() for key, p in plain["student"].named_parameters()}
    optimizers = {name: torch.optim.AdamW(net.parameters(), lr=RATE, **ADAM) for name, net in plain.items()}
    for step in range(5):
        run.step(step)
        rng = Rng(5, step, 8, dtype=torch.float64)
        batch, noise = SOURCE.batch(rng), rng.sample.normal("noise", (2,))
        for name, goal in (("student", batch.x0), ("critic", 2 * batch.x0)):
            if name == "critic" and step % 2:
                continue
            optimizers[name].zero_grad()
            (plain[name](noise, 500) - goal).square().mean().backward()
            norm = nn.utils.clip_grad_norm_(plain[name].parameters(), LIMIT)
            assert norm > 2 * LIMIT
            optimizers[name].step()
        for key, p in plain["student"].named_parameters():
            average[key] = DECAY * average[key] + (1 - DECAY) * p.detach()
        for name, network in plain.items():
            for p, q in zip(mine[name].parameters(), network.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
        for key, p in run.roles.tensors_of("target").items():
            torch.testing.assert_close(p, average[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_terms_that_go_backward_one_after_the_other_are_one_loss(accumulation):
    (whole, _), (parts, _) = pull(accumulation=accumulation), pull(PullInParts, accumulation=accumulation)
    for step in range(3):
        whole.step(step)
        parts.step(step)
    a, b = whole.tensors(), parts.tensors()
    assert a.keys() == b.keys() and all(torch.allclose(a[key], b[key], rtol=1e-12, atol=1e-14) for key in a)
    said, in_parts = whole.meter.read(), parts.meter.read()
    assert in_parts["critic/loss"] == pytest.approx(said["critic/loss"], rel=1e-12)
    assert all(in_parts[f"critic/part{i}"] == pytest.approx(said["critic/loss"], rel=1e-12) for i in range(3))


def test_a_method_is_told_where_it_stands_and_who_is_due():
    run, _ = pull(steps=3)
    told = []

    class Curious(Pull):
        def draw(self, batch, rng, progress):
            told.append((progress.step, progress.total, rng.step))
            assert [name for name in ("student", "critic") if progress.plays(name)] == list(progress.due)
            return super().draw(batch, rng, progress)

        def prepare(self, roles, batch, draws, due):
            told[-1] += (set(due),)

    Trainer(Curious(VP), run.roles, SOURCE, run.settings).run()
    both = {"student", "critic"}
    assert told == [(0, 3, 0, both), (1, 3, 1, {"student"}), (2, 3, 2, both)]


def test_hooks_run_when_due_and_after_the_last_step():
    run, _ = pull(steps=5)
    called = []
    run.hooks = ((2, lambda done: called.append(("two", done))), (4, lambda done: called.append(("four", done))))
    run.run()
    assert called == [("two", 2), ("two", 4), ("four", 4), ("two", 5), ("four", 5)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_settings_reach_the_roles(precision):
    """Precision and checkpointing; states and losses stay in float32 or above."""
    settings = TrainingSettings(precision=precision, gradient_checkpointing=True, ema_decay=0.9, batch_size=8)
    method = LCM(VP)
    roles = roles_for(method, settings)
    assert roles.base.gradient_checkpointing and "ema" in roles
    assert roles.autocast == settings.autocast == (torch.bfloat16 if precision == "bf16" else None)
    assert settings.dtype == (torch.float64 if precision == "fp64" else torch.float32)
    said = roles.student(torch.randn(8, 2), 500).output
    assert torch.equal(said, said.bfloat16().float()) == (precision == "bf16")


@pytest.mark.parametrize(("scale", "evaluations"), [(1.0, 8), (3.0, 16), ((1.0, 3.0), 16)])
def test_a_scale_of_one_costs_no_null_branch(scale, evaluations):
    run = trainer(LCM(VP, guidance_scale=scale))
    run.step(0)
    assert run.roles.teacher.cost.evaluations == evaluations


def test_each_player_has_its_own_rate():
    run, networks = pull(critic_learning_rate=10 * RATE)
    before = {name: [p.detach().clone() for p in network.parameters()] for name, network in networks.items()}
    run.step(0)  # AdamW's first step moves every weight by its rate
    for name, rate in (("student", RATE), ("critic", 10 * RATE)):
        for p, old in zip(networks[name].parameters(), before[name], strict=True):
            torch.testing.assert_close((p - old).abs(), torch.full_like(p, rate), rtol=1e-4, atol=0)


def test_the_guard_names_the_first_of_several_bad_steps():
    class Bad:
        def batch(self, rng):
            batch = SOURCE.batch(rng)
            return Batch(batch.x0 * math.nan, batch.cond) if rng.step in (3, 5, 6) else batch

    with pytest.raises(NotFinite, match="Step 3: the gradient of 'student'"):
        trainer("plain", source=Bad(), steps=10, log_every=10).run()


def test_no_checkpoint_is_written_after_a_bad_step(tmp_path):
    """Even where nothing was logged in between."""

    class Bad:
        def batch(self, rng):
            batch = SOURCE.batch(rng)
            return Batch(batch.x0 * math.nan, batch.cond) if rng.step == 7 else batch

    with pytest.raises(NotFinite, match=r"Step 7: .*step-0000005"):
        trainer("plain", tmp_path, source=Bad(), steps=40, log_every=25, checkpoint_every=5).run()
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-0000005"


def test_dropout_is_keyed_by_seed_step_and_process(monkeypatch):
    """The global generator, from which dropout draws, starts every step from a key of its own.

    Processes have other rows of the batch, and so other masks; within one, micro-batches draw one after the other.
    """

    def drawn(seed, step, rank):
        run = trainer("plain", seed=seed)
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "rows", lambda size: slice(0, size))
        torch.manual_seed(99)
        torch.rand(step)
        run.step(step)
        return tuple(torch.rand(4).tolist())

    assert drawn(0, 3, 0) == drawn(0, 3, 0)
    assert len({drawn(*key) for key in ((0, 3, 0), (0, 4, 0), (1, 3, 0), (0, 3, 1), (0, 3, 2))}) == 5


def test_a_meter_means_over_the_steps_that_gave_a_value():
    meter = Meter()
    for step in range(4):
        meter.add("student/loss", torch.tensor(float(step)))
        if step % 2 == 0:
            meter.add("critic/loss", torch.tensor(10.0 + step, requires_grad=True))
    assert meter.read() == {"student/loss": 1.5, "critic/loss": 11.0}
    meter.add("student/loss", torch.tensor(7.0))
    for values in ([1.0, 2.0], [3.0, 2.0]):
        meter.add("critic/by_time", torch.tensor(values))
    assert meter.read() == {"student/loss": 7.0, "critic/by_time/0": 2.0, "critic/by_time/1": 2.0}
    assert meter.read() == {}


def test_the_log_holds_means_since_the_last_line(tmp_path):
    losses = []

    class Noted(LCM):
        def student(self, roles, batch, draws, shared):
            loss = super().student(roles, batch, draws, shared)
            losses.append(float(loss.total.detach()))
            return loss

    run = trainer(Noted(VP), tmp_path, steps=6, log_every=3)
    run.run()
    assert run.last_record["student/loss"] == pytest.approx(sum(losses[3:]) / 3, rel=1e-6)


def test_the_log_says_how_often_gradients_were_clipped_and_each_players_rate(tmp_path):
    run, _ = pull(steps=4, log_every=4, critic_learning_rate=3 * RATE)
    run.run_dir = tmp_path
    norms = []
    for player in run.players:
        update = player.update
        player.update = lambda step, player=player, update=update: (update(step), norms.append(float(player.grad_norm)))
    run.settings = dataclasses.replace(run.settings, max_grad_norm=0.0)
    run.run()
    assert "student/clipped" not in run.last_record  # nothing is clipped without a limit
    limit = sorted(norms)[len(norms) // 2] * 0.999
    run, _ = pull(steps=4, log_every=4, critic_learning_rate=3 * RATE, max_grad_norm=limit)
    seen = {"student": [], "critic": []}
    for player in run.players:
        update = player.update
        player.update = lambda step, player=player, update=update: (
            update(step),
            seen[player.player.name].append(float(player.grad_norm) > limit),
        )
    run.run()
    for name, clipped in seen.items():
        assert run.last_record[f"{name}/clipped"] == sum(clipped) / len(clipped)
    assert 0 < sum(sum(clipped) for clipped in seen.values()) < 6
    assert run.last_record["learning_rate"] == RATE and run.last_record["critic/learning_rate"] == 3 * RATE


def test_a_logged_rate_is_that_of_the_step_it_stands_beside(tmp_path):
    """Cosine over four steps, by hand, after one step of warm-up: the rate with which the last step was made."""
    run, _ = pull(steps=5, log_every=1, lr_schedule="cosine", warmup_steps=1, critic_learning_rate=3 * RATE)
    run.run_dir, made = tmp_path, []
    update = run.players[0].update
    run.players[0].update = lambda step: (
        update(step), made.append(run.players[0].optimizer.param_groups[0]["lr"])
    )  # fmt: skip
    run.run()
    wanted = [1.0, 1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]
    lines = list(read_log(tmp_path / "log.jsonl"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert made == pytest.approx([RATE * share for share in wanted], rel=1e-12)
    assert [line["learning_rate"] for line in lines] == pytest.approx(made, rel=1e-12)
    assert [line["critic/learning_rate"] for line in lines] == pytest.approx([3 * rate for rate in made], rel=1e-12)


def test_a_run_that_dies_leaves_its_last_words_in_the_log(tmp_path):
    class Bad:
        def batch(self, rng):
            batch = SOURCE.batch(rng)
            return Batch(batch.x0 * math.nan, batch.cond) if rng.step == 13 else batch

    with pytest.raises(NotFinite):
        trainer("plain", tmp_path, source=Bad(), steps=40, log_every=10, checkpoint_every=100).run()
    lines = list(read_log(tmp_path / "log.jsonl"))
    assert [line["step"] for line in lines] == [10, 20]
    assert lines[1] == {
        "step": 20,
        "not_finite": "student",
        "first_bad_step": 13,
        "learning_rate": 1e-2,
        "forward_equivalents": lines[1]["forward_equivalents"],
    }
    assert lines[1]["forward_equivalents"] == 2 * lines[0]["forward_equivalents"]
