"""The command line run in the test's own process, and overrides that make a recipe last seconds."""

from __future__ import annotations

import signal
import sys

import pytest
import torch

from fewstep.cli import main
from fewstep.runs.distill import distill
from fewstep.students.card import load_card
from fewstep.students.lineage import teacher_of
from fewstep.students.student import load_student
from fewstep.training import progress
from fewstep.training.trainer import Trainer, TrainingStopped

SHORT = [
    "training.steps=4", "training.batch_size=4", "training.log_every=2", "training.checkpoint_every=2",
    "training.warmup_steps=1", "data.size=16", "sample.every=4", "sample.teacher_steps=2", "student.rank=4",
]  # fmt: skip


def inside(monkeypatch, capsys, folder, *arguments):
    """Exit code and output of the command line run in this process: the same `main`, without a second's start."""
    monkeypatch.chdir(folder)
    if progress._FIRST:  # output must not depend on how busy the machine is
        monkeypatch.setattr(progress, "_FIRST", 3600.0)
    monkeypatch.setattr(sys, "argv", ["fewstep", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main()
    output, errors = capsys.readouterr()
    return stopped.value.code or 0, output, errors


def sets(short):
    """Overrides as the command line takes them."""
    return [part for item in short for part in ("--set", item)]


def stop_and_go_on(monkeypatch, recipe, folder, done):
    """A run that Ctrl-C stops when ``done`` steps are done, and that is resumed to its end."""
    step = Trainer.step

    def stopping(self, number):
        step(self, number)
        if number + 1 == done:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "step", stopping)
    with pytest.raises(TrainingStopped, match=f"Stopped after step {done} of {recipe.training.steps}"):
        distill(recipe, folder)
    monkeypatch.setattr(Trainer, "step", step)
    distill(recipe, folder, resume=True)


def output(denoiser, teacher):
    """What a model says of two prompts, halfway to noise."""
    x = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return denoiser(x, 500, teacher.encode_prompts(["a red star", "two shapes"])).output


def student(folder):
    """The same of the student in a folder, on its teacher."""
    card = load_card(folder)
    teacher = teacher_of(folder, card)
    return output(load_student(teacher, folder, card), teacher)
