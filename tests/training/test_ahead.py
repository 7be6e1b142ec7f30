"""The next micro-batch is read while the last one trains: the right rows, at any first step; nothing outlives a run."""

import signal
import threading

import pytest
import torch
from killable import VP, Teacher
from safetensors.torch import save_file

from fewstep.data.random import Rng
from fewstep.data.rows import Stored
from fewstep.data.sources import CaptionDropout, LatentSource
from fewstep.methods.lcm import LCM
from fewstep.models.denoiser import Denoiser
from fewstep.models.roles import Weights
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, TrainingStopped, build_roles

SIZE, BATCH = 14, 4


class Watched(Stored):
    """Rows that note who reads which."""

    def take(self, picked, pin=False):
        self.read.append((picked.tolist(), threading.current_thread() is threading.main_thread()))
        return super().take(picked, pin)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "0.safetensors"
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(SIZE, 2, generator=generator)
    tensors = {"mean": mean, "std": torch.rand(SIZE, 2, generator=generator), "cond.label": torch.arange(SIZE) % 3}
    save_file(tensors | {"null.label": torch.tensor([-1])}, path)
    return path


def trainer(file, folder=None, steps=6, hooks=()):
    method = LCM(VP, guidance_scale=(2.0, 6.0))
    settings = TrainingSettings(
        steps=steps, batch_size=BATCH, accumulation=2, log_every=2, checkpoint_every=3, precision="fp64"
    )
    torch.manual_seed(0)
    teacher = Teacher(VP, 2, width=15, depth=2, num_classes=3).to(settings.dtype)
    rows = Watched([file])
    rows.read = []
    source = LatentSource.of(rows)
    roles = build_roles(Denoiser(teacher, VP, "epsilon"), method, settings, Weights("lora", rank=2))
    return Trainer(method, roles, CaptionDropout(source, 0.3), settings, run_dir=folder, hooks=hooks), source


def readers():
    return [t for t in threading.enumerate() if t.name == "fewstep-rows"]


def of_steps(source, first, end):
    """The rows of each micro-batch of these steps, in their order."""
    halves = (slice(0, 2), slice(2, 4))
    return [source.order.rows(Rng(0, step, BATCH, half)).tolist() for step in range(first, end) for half in halves]


def test_every_micro_batch_but_the_first_was_read_ahead_and_none_twice(file, tmp_path):
    job, source = trainer(file, tmp_path, steps=3)
    job.run()
    wanted = of_steps(source, 0, 3)
    assert source.rows.read == [(rows, number == 0) for number, rows in enumerate(wanted)]
    again, source = trainer(file, tmp_path, steps=6)
    again.run(resume=True)
    assert again.done == 6
    assert source.rows.read == [(rows, number == 0) for number, rows in enumerate(of_steps(source, 3, 6))]
    at_once, _ = trainer(file, steps=6)
    at_once.run()
    mine, theirs = again.tensors(), at_once.tensors()
    assert all(torch.equal(mine[name], t) for name, t in theirs.items())
    for thread in readers():
        thread.join(5)
    assert not readers()


def test_an_error_of_the_thread_ends_the_run_as_itself(file, tmp_path):
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(file.read_bytes())
    job, source = trainer(moved, hooks=((1, lambda done: moved.unlink() if done == 2 else None),))
    with pytest.raises(FileNotFoundError) as caught:
        job.run()
    assert caught.value.filename == str(moved) and job.done in (2, 3)  # rows of the next step may have been read before
    assert not any(main for _, main in source.rows.read[1:])


def test_a_request_to_stop_ends_the_thread(file, tmp_path):
    stop = ((1, lambda done: signal.raise_signal(signal.SIGINT) if done == 2 else None),)
    job, _ = trainer(file, tmp_path, hooks=stop)
    with pytest.raises(TrainingStopped):
        job.run()
    for thread in readers():
        thread.join(5)
    assert not readers() and job.done == 3
