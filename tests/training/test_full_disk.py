"""The disk fills up while a run writes: what was safe stays safe, and the run goes on when there is room."""

import resource
import shutil
import signal
from contextlib import contextmanager

import pytest
import torch
from killable import trainer

from fewstep.data.files import save_tensors
from fewstep.training import checkpoint
from fewstep.training.logging import JsonLines


@contextmanager
def no_room():
    """Yields ``fill(size)``: from then until the end of the block no file of ours may grow past so many bytes.

    As on a disk that is full. It must end inside the test: pytest writes files too.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_full_disk_costs_the_newest_steps_alone(size, tmp_path):
    """Nothing, a part or nearly all of the third checkpoint fits."""
    options = dict(steps=20, checkpoint_every=2, log_every=100)
    said = r"step 6 could not be written .*step-0000004, is intact: make room"
    with no_room() as fill, pytest.raises(OSError, match=said) as caught:
        trainer("plain", tmp_path, hooks=((1, lambda done: fill(size) if done == 5 else None),), **options).run()
    assert "\n" not in str(caught.value)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-0000002", "step-0000004"}  # and no half of a third
    resumed, whole = trainer("plain", tmp_path, **options), trainer("plain", **options)
    resumed.run(resume=True)
    whole.run()
    assert checkpoint.same(resumed.tensors(), whole.tensors())


def test_a_log_that_cannot_be_written_says_what_to_do(tmp_path):
    said = r"log .*log.jsonl could not be written \(File too large\): make room"
    with no_room() as fill, pytest.raises(OSError, match=said):
        hooks = ((1, lambda done: fill(10) if done == 3 else None),)
        trainer("plain", tmp_path, hooks=hooks, steps=8, checkpoint_every=100, log_every=4).run()


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="cannot be written"):
        save_tensors(tmp_path / "no" / "folder.safetensors", {"x": torch.zeros(1)})


def test_a_flipped_bit_is_noticed(tmp_path):
    """Anywhere in the tensors' file, also where safetensors itself would read other numbers without a word."""
    trainer("plain", tmp_path, steps=2).run()
    path = checkpoint.latest(tmp_path / "checkpoints") / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"not those that were saved.*delete it to use an older one"):
        trainer("plain", tmp_path, steps=4).run(resume=True)


def test_a_log_that_cannot_be_tidied_is_not_lost(tmp_path):
    """A resumed run drops the lines after its checkpoint: on a full disk too, those before stay."""
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f'{{"step": {step}}}\n' for step in range(9)))
    before = log.read_text()
    with no_room() as fill, pytest.raises(OSError, match="File too large"):
        fill(10)
        JsonLines(log, 5)
    assert log.read_text() == before


def test_copies_of_checkpoints_are_left_alone(tmp_path):
    """They are neither gone on from nor cleared away, and more than seven digits are in order."""
    for step in (9_999_998, 9_999_999, 10_000_000):
        checkpoint.save(tmp_path, step, {"a": torch.zeros(1)}, {}, keep=2)
        (tmp_path / f"step-{step:07d}").joinpath("mine").touch()
    shutil.copytree(tmp_path / "step-9999999", tmp_path / "step-9999999-before-the-change")
    newest = checkpoint.save(tmp_path, 10_000_001, {"a": torch.zeros(1)}, {}, keep=1)
    assert checkpoint.complete(tmp_path) == [newest]
    assert (tmp_path / "step-9999999-before-the-change" / "mine").is_file()
