"""Checkpoints of sharded weights that are written while training goes on."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from killable import trainer
from several import spawn
from test_processes import toy

from fewstep.models.sharding import Part
from fewstep.training import checkpoint, distributed
from fewstep.training import trainer as training
from fewstep.training.trainer import NotFinite

SETTINGS = {"steps": 6, "log_every": 1, "checkpoint_every": 2, "keep_checkpoints": 9}


def rows(tensor, like=None):
    """One process has all rows of every tensor."""
    return Part(tensor.detach(), tensor.shape, 0) if tensor.ndim else tensor


@pytest.fixture
def writer(monkeypatch):
    """Notes (what, step) of every file of rows, and calls ``writer.before(step)`` before it is written."""

    class Writer:
        def __init__(self):
            self.notes = []

        def before(self, step):
            pass

        def write(self, path, parts):
            step = int(path.parent.name.split("-")[1])
            self.notes.append(("begin", step))
            self.before(step)
            write(path, parts)
            self.notes.append(("end", step))

    write, writer = checkpoint.write_parts, Writer()
    monkeypatch.setattr(checkpoint, "write_parts", writer.write)
    monkeypatch.setattr(training, "part", rows)
    return writer


def found(folder):
    return {path.name: checkpoint.load(path)[0] for path in checkpoint.complete(folder / "checkpoints")}


def test_a_checkpoint_holds_the_weights_of_its_step_whatever_changes_them_while_it_is_written(tmp_path, writer):
    changed = threading.Event()
    writer.before = lambda step: changed.wait(10)
    weight = torch.arange(6.0).view(3, 2)
    writing = checkpoint.Writing(tmp_path, 4, {"w": rows(weight), "n": torch.tensor(3.0)}, {}, background=True)
    weight.zero_()
    assert writing.at_work and not checkpoint.complete(tmp_path)
    changed.set()
    path = writing.finish()
    assert checkpoint.complete(tmp_path) == [path] and not writing.at_work
    assert torch.equal(checkpoint.load(path)[0]["w"], torch.arange(6.0).view(3, 2))


@pytest.mark.parametrize("wanted", [True, False])
def test_steps_go_on_while_a_checkpoint_is_written_where_the_settings_let_them(tmp_path, writer, wanted):
    third, seen = threading.Event(), []
    writer.before = lambda step: seen.append(third.wait(10 if wanted else 0.1)) if step == 2 else None
    run = trainer("everything", tmp_path, ((3, lambda step: third.set()),), async_checkpoints=wanted, **SETTINGS)
    run.run()
    assert seen == [wanted]
    plain = trainer("everything", tmp_path / "plain", async_checkpoints=False, **SETTINGS)
    plain.run()
    ours, theirs = found(tmp_path), found(tmp_path / "plain")
    assert ours.keys() == theirs.keys() == {f"step-000000{step}" for step in (2, 4, 6)}
    assert all(checkpoint.same(dict(ours[name]), dict(theirs[name])) for name in ours)


def test_the_next_checkpoint_waits_for_the_one_before_and_the_end_for_the_last(tmp_path, writer):
    writer.before = lambda step: time.sleep(0.3)
    trainer("everything", tmp_path, **SETTINGS).run()
    assert writer.notes == [(what, step) for step in (2, 4, 6) for what in ("begin", "end")]
    assert "step-0000006" in found(tmp_path)
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


def test_a_checkpoint_gets_its_name_as_soon_as_it_is_written(tmp_path, writer):
    settings = {**SETTINGS, "checkpoint_every": 3}
    there = {}

    def look(step):
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join(60)
        there[step] = "step-0000003" in found(tmp_path)

    trainer("everything", tmp_path, ((1, look),), **settings).run()
    assert there == {1: False, 2: False, 3: False, 4: True, 5: True, 6: True}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyError("float4")])
def test_a_checkpoint_that_could_not_be_written_ends_the_run_in_a_sentence(tmp_path, writer, error):
    def fails(step):
        if step == 4:
            raise error

    writer.before = fails
    run = trainer("everything", tmp_path, **SETTINGS)
    with pytest.raises(OSError, match=r"^The checkpoint of step 4 could not be written \(.*(No space|float4).*\); the "
                                      r"last one, .*step-0000002, is intact: make room or .* --resume\.$"):  # fmt: skip
        run.run()
    assert run.done in (5, 6) and list(found(tmp_path)) == ["step-0000002"]
    assert not list((tmp_path / "checkpoints").glob(".part-*"))


def test_a_run_that_breaks_names_the_checkpoint_that_was_being_written(tmp_path, writer):
    writer.before = lambda step: time.sleep(0.3)
    run = trainer("everything", tmp_path, **{**SETTINGS, "checkpoint_every": 4})

    def spoil(step):
        if step == 4:
            next(iter(run.players[0].parameters)).data.fill_(torch.nan)

    run.hooks = ((1, spoil),)
    with pytest.raises(NotFinite, match=r"the last good checkpoint is .*step-0000004"):
        run.run()
    assert all(tensor.isfinite().all() for tensor in found(tmp_path)["step-0000004"].values())


def test_what_was_written_in_the_background_is_resumed_to_the_bit(tmp_path, writer):
    whole = trainer("everything", tmp_path / "whole", **SETTINGS)
    whole.run()
    first = trainer("everything", tmp_path / "run", ((5, lambda step: True),), **{**SETTINGS, "checkpoint_every": 4})
    first.run()
    again = trainer("everything", tmp_path / "run", **SETTINGS)
    again.run(resume=True)
    assert again.done == 6 and checkpoint.same(whole.tensors(), again.tensors())


def test_a_hook_that_ends_the_run_costs_no_second_checkpoint(tmp_path, writer):
    trainer("everything", tmp_path, ((4, lambda step: True),), **SETTINGS).run()
    assert writer.notes == [(what, step) for step in (2, 4) for what in ("begin", "end")]
    assert list(found(tmp_path)) == ["step-0000002", "step-0000004"]


def test_no_process_goes_on_before_a_checkpoint_has_its_name(tmp_path, writer, monkeypatch):
    """The first one deletes the oldest too, which may take longer than another may wait in a step."""
    notes, put = [], checkpoint._put
    monkeypatch.setattr(checkpoint, "_put", lambda *given: (put(*given), notes.append("named")))
    monkeypatch.setattr(distributed, "wait", lambda: notes.append("wait"))
    run = trainer("everything", tmp_path, **SETTINGS)
    step, after = run.step, []
    monkeypatch.setattr(run, "step", lambda number: (after.append(notes[-1]), step(number)))
    run.run()
    assert notes.count("named") == 3 and after == ["wait"] * 6


def _both(folder):
    write = checkpoint.write_parts

    def late(path, parts):
        time.sleep(0.05 + 0.4 * distributed.rank())
        write(path, parts)

    for name in ("at once", "beside"):
        checkpoint.write_parts = write if name == "at once" else late
        settings = {"steps": 9, "checkpoint_every": 3, "keep_checkpoints": 9, "fsdp": True}
        toy("full", Path(folder) / name, async_checkpoints=name == "beside", **settings).run()


@pytest.mark.slow
def test_two_processes_complete_a_checkpoint_when_the_slower_one_has_written(tmp_path):
    spawn(_both, str(tmp_path))
    ours, theirs = found(tmp_path / "beside"), found(tmp_path / "at once")
    assert ours.keys() == theirs.keys() and len(ours) == 3
    assert all(checkpoint.same(dict(ours[name]), dict(theirs[name])) for name in ours)


def _unnamed(folder):
    """Renaming fails in the first process alone."""
    if distributed.first():
        os.rename = _no_room
    tensors = {"w": Part(torch.full((1, 2), float(distributed.rank())), torch.Size((2, 2)), distributed.rank())}
    try:
        checkpoint.save(Path(folder), 4, tensors, {})
    except OSError as error:
        (Path(folder) / f"said-{distributed.rank()}").write_text(str(error))


def _no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
def test_all_processes_end_where_the_first_cannot_name_a_checkpoint(tmp_path):
    spawn(_unnamed, str(tmp_path))
    said = {(tmp_path / f"said-{rank}").read_text() for rank in (0, 1)}
    assert len(said) == 1 and "step 4 could not be written ([Errno 28] No space left on device)" in said.pop()
    assert not checkpoint.complete(tmp_path) and not list(tmp_path.glob(".part-*"))
