"""Checkpoints at any moment of death: the process is ended at every single change it makes to the disk."""

import builtins
import os
import shutil

import pytest
import torch

from fewstep.training import checkpoint

CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "chmod")


class Died(BaseException):
    """Like kill -9: nothing that catches errors catches this."""


@pytest.fixture
def disk(monkeypatch):
    """Notes every change to the disk (name, path or flushed inode) and dies at the one numbered ``disk.dies``."""

    class Disk:
        dies, done = None, []

        def note(self, name, path):
            if len(self.done) == self.dies:
                raise Died
            self.done.append((name, path))

    disk = Disk()

    def watched(name, real):
        def call(path, *args, **kwargs):
            disk.note(name, os.fstat(path).st_ino if isinstance(path, int) else str(path))
            return real(path, *args, **kwargs)

        return call

    def opened(path, mode="r", *args, **kwargs):
        if "w" in mode:
            disk.note("open", str(path))
        return real_open(path, mode, *args, **kwargs)

    real_open = builtins.open
    for name in CALLS:
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))
    monkeypatch.setattr(builtins, "open", opened)
    return disk


def tensors(step):
    return {"roles/student/weight": torch.full((3, 2), float(step)), "count": torch.tensor(step)}


def save(folder, step, keep=2):
    return checkpoint.save(folder, step, tensors(step), {"seed": 0}, keep)


def whole(path):
    """The step of a checkpoint that is all there."""
    found, state = checkpoint.load(path)
    assert checkpoint.same(found, tensors(state["step"])) and path.name == f"step-{state['step']:07d}"
    return state["step"]


@pytest.mark.parametrize("again", [6, 4], ids=["the next step", "the same step again"])
def test_whenever_the_process_dies_the_newest_checkpoint_is_whole(again, tmp_path, disk):
    moments, seen = 0, set()
    while True:
        folder = tmp_path / str(moments)
        disk.dies = None
        save(folder, 2), save(folder, 4)
        disk.dies = len(disk.done) + moments
        try:
            save(folder, again)
        except Died:
            seen.add(whole(checkpoint.latest(folder)))
            disk.dies = None
            save(folder, 8)  # the next run goes on, and clears away what was half written
            assert [whole(path) for path in checkpoint.complete(folder)][-1] == 8
            assert not list(folder.glob(".part-*"))
            moments += 1
        else:
            break
    assert moments >= 10 and seen == ({4, 6} if again == 6 else {2, 4})


def test_files_are_on_disk_before_the_folder_gets_its_name(tmp_path, disk):
    disk.done.clear()
    final = save(tmp_path, 2)
    events = [name for name, _ in disk.done]
    renamed = events.index("rename")
    flushed = {inode for name, inode in disk.done[:renamed] if name == "fsync"}
    assert flushed == {path.stat().st_ino for path in (final, *final.iterdir())}
    assert disk.done[renamed + 1 :] == [("fsync", tmp_path.stat().st_ino)]
    assert {path.name for path in final.iterdir()} == {"tensors.safetensors", "state.json"}


def test_the_newest_are_kept(tmp_path):
    for step in (2, 4, 10, 6):
        save(tmp_path, step, keep=3)
    assert [whole(path) for path in checkpoint.complete(tmp_path)] == [4, 6, 10]
    assert whole(checkpoint.latest(tmp_path)) == 10
    assert checkpoint.latest(tmp_path / "nothing") is None
    shutil.rmtree(tmp_path / "step-0000010")
    assert whole(checkpoint.latest(tmp_path)) == 6


def test_a_checkpoint_whose_renaming_fails_leaves_the_one_of_the_same_step(tmp_path, monkeypatch):
    save(tmp_path, 2), save(tmp_path, 4)
    real = os.rename

    def rename(path, to):
        if path.name.startswith(".part-") and not path.name.endswith("-before"):
            raise OSError(28, "No space left on device")
        real(path, to)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match=r"^The checkpoint of step 4 could not be written .*step-0000004, is intact"):
        save(tmp_path, 4)
    assert [whole(path) for path in checkpoint.complete(tmp_path)] == [2, 4] and not list(tmp_path.glob(".part-*"))


def test_a_negative_step_is_no_step(tmp_path):
    path = checkpoint.save(tmp_path, 3, {"a": torch.ones(2)}, {})
    (path / "state.json").write_text('{"format": 1, "step": -3}')
    with pytest.raises(ValueError, match="not a fewstep checkpoint"):
        checkpoint.load(path)
