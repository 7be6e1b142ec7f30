"""8-bit AdamW beside the plain one: its steps, its guard, its checkpoints. Needs bitsandbytes (extra `lowmem`)."""

import math
import sys

import pytest
import torch
from killable import trainer
from test_trainer import Operators, Tampered
from torch import nn

from fewstep.data.batch import Batch
from fewstep.methods.base import Player
from fewstep.training import checkpoint, optimizers
from fewstep.training.optimizers import check_optimizer, make_optimizer, moment_bytes, saved_state
from fewstep.training.players import PlayerState
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import NotFinite

EIGHT = TrainingSettings(optimizer="adamw8bit", learning_rate=1e-2, weight_decay=0.1)


def without_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    optimizers._adamw8bit.cache_clear()


def test_without_bitsandbytes_it_is_one_sentence(monkeypatch):
    without_it(monkeypatch)
    with pytest.raises(ValueError, match=r"needs bitsandbytes: install it with pip install 'fewstep\[lowmem\]'"):
        check_optimizer(EIGHT)
    check_optimizer(TrainingSettings())
    optimizers._adamw8bit.cache_clear()


def test_names_and_precisions_that_do_not_go_are_refused():
    with pytest.raises(ValueError, match="optimizer: input should be 'adamw' or 'adamw8bit', not 'adam'"):
        TrainingSettings(optimizer="adam")
    with pytest.raises(ValueError, match="does not go with training"):
        TrainingSettings(optimizer="adamw8bit", precision="fp64")


@pytest.mark.needs("bitsandbytes")
def test_a_bitsandbytes_that_does_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(optimizers._adamw8bit(), "update_step", lambda *_: None)
    with pytest.raises(ValueError, match="cannot update weights on cpu"):
        check_optimizer(EIGHT)


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((64, 100), (5000,), (30, 3))]


def run(optimizer, weights, steps, bad=()):
    """Noisy gradients of a common direction; NaN in the first element at the steps ``bad``."""
    generator = torch.Generator().manual_seed(1)
    guarded = not isinstance(optimizer, torch.optim.AdamW)
    if guarded:
        optimizer.found_inf = torch.zeros(())
    for step in range(steps):
        for p in weights:
            p.grad = torch.randn(p.shape, generator=generator) + 0.3
        if step in bad:
            weights[0].grad.view(-1)[0] = math.nan
            optimizer.found_inf = torch.ones(())
        optimizer.step()


@pytest.mark.needs("bitsandbytes")
def test_it_walks_as_adamw_does():
    """Within a few per cent of the way; small tensors, whose moments stay in float32, to rounding."""
    mine, exact, start = parameters(), parameters(), parameters()
    eight = make_optimizer(mine, EIGHT)
    run(eight, mine, 30)
    run(torch.optim.AdamW(exact, lr=1e-2, weight_decay=0.1), exact, 30)
    for p, q, p0 in zip(mine, exact, start, strict=True):
        way = (q - p0).norm()
        assert (p - q).norm() < 0.05 * way
    torch.testing.assert_close(mine[2], exact[2], rtol=1e-5, atol=1e-6)
    moments = [saved_state(eight, p) for p in mine]
    held = sum(t.nbytes for state in moments for name, t in state.items() if name != "step")
    assert held == moment_bytes(mine, "adamw8bit") < 0.3 * moment_bytes(mine, "adamw")


@pytest.mark.needs("bitsandbytes")
def test_a_bad_step_leaves_weights_and_moments():
    """NaN in the gradient, and all steps after it skipped: what a run without them has, to the bit."""
    mine, good = parameters(), parameters()
    broken, whole = make_optimizer(mine, EIGHT), make_optimizer(good, EIGHT)
    run(broken, mine, 9, bad=(6,))
    run(whole, good, 6)
    for p, q in zip(mine, good, strict=True):
        assert torch.equal(p, q)
        states = [{k: v for k, v in saved_state(o, w).items() if k != "step"} for o, w in ((broken, p), (whole, q))]
        assert checkpoint.same(*states) and states[0]


@pytest.mark.needs("bitsandbytes")
def test_the_guard_of_a_run_keeps_the_good_weights(tmp_path):
    def tamper(step, batch):
        return Batch(batch.x0 * math.nan, batch.cond) if step == 7 else batch

    options = dict(kind="full", optimizer="adamw8bit", log_every=5, checkpoint_every=5)
    broken = trainer("plain", tmp_path, source=Tampered(tamper), steps=20, **options)
    with pytest.raises(NotFinite, match=r"Step 7: .*step-0000005"):
        broken.run()
    good = trainer("plain", steps=20, **options)
    for step in range(7):
        good.step(step)
    assert checkpoint.same(broken.roles.tensors(), good.roles.tensors())


def player(weights):
    return PlayerState(Player("student"), weights, EIGHT)


def walk(state, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in state.parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        state.update(step)


@pytest.mark.needs("bitsandbytes")
def test_resumed_to_the_bit(tmp_path):
    """Through a checkpoint file; 8-bit tensors among the moments."""
    whole, first, resumed = player(parameters()), player(parameters()), player(parameters())
    walk(whole, 0, 9)
    walk(first, 0, 5)
    saved = {f"weights/{i}": p.detach() for i, p in enumerate(first.parameters)}
    saved |= {f"o/{key}": t for key, t in first.tensors().items()}
    tensors, _ = checkpoint.load(checkpoint.save(tmp_path, 5, saved, {}))
    with torch.no_grad():
        for i, p in enumerate(resumed.parameters):
            p.copy_(tensors[f"weights/{i}"])
    resumed.load_tensors(checkpoint.split(tensors, "o"))
    walk(resumed, 5, 9)
    assert checkpoint.same(resumed.tensors(), whole.tensors())
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters, whole.parameters, strict=True))
    assert sum(t.dtype == torch.uint8 for t in whole.tensors().values()) == 4
    assert {float(t) for key, t in whole.tensors().items() if key.endswith("step")} == {9.0}


@pytest.mark.needs("bitsandbytes")
def test_a_run_resumes_to_the_bit(tmp_path):
    options = dict(kind="full", optimizer="adamw8bit", ema_decay=0.9, checkpoint_every=6)
    whole, cut = trainer("plain", steps=12, **options), trainer("plain", tmp_path, steps=6, **options)
    whole.run()
    cut.run()
    resumed = trainer("plain", tmp_path, steps=12, **options)
    resumed.run(resume=True)
    assert resumed.done == 12 and checkpoint.same(resumed.tensors(), whole.tensors())


@pytest.mark.needs("bitsandbytes")
def test_moments_of_the_other_optimiser_are_refused():
    plain, eight = (trainer("plain", steps=2, optimizer=name) for name in ("adamw", "adamw8bit"))
    for run_ in (plain, eight):
        run_.step(0)
    for mine, other in ((plain, eight), (eight, plain)):
        with pytest.raises(ValueError, match="'student' is of another optimiser"):
            mine.players[0].load_tensors(other.players[0].tensors())


@pytest.mark.needs("bitsandbytes")
def test_nothing_waits_for_the_device():
    state = player(parameters())
    walk(state, 0, 1)
    with Operators() as operators:
        walk(state, 1, 3)
    assert operators.counts["masked_fill_"] == 2 * 3 and not operators.waits
