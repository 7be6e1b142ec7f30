"""`fewstep teacher` and `fewstep reward` from the command line, with settings that make them last seconds."""

from __future__ import annotations

import signal
from dataclasses import replace
from functools import partial

import pytest
from safetensors.torch import load_file

from fewstep.scenes64 import train_detector, train_rewards, train_teacher
from fewstep.training import checkpoint
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer
from tests.command_line import inside

TINY = TrainingSettings(steps=2, batch_size=2, learning_rate=1e-3, ema_decay=0.9, log_every=2)


@pytest.fixture(autouse=True)
def tiny_settings(monkeypatch):
    settings = partial(train_teacher.TeacherSettings, vae=TINY, unet=TINY, pool=8, tellings=1)
    monkeypatch.setattr(train_teacher, "TeacherSettings", settings)
    of = train_detector.DetectorSettings.of
    monkeypatch.setattr(
        train_detector.DetectorSettings, "of", lambda *given: replace(of(*given), training=TINY, pool=4)
    )


def stop_after(monkeypatch, steps):
    """Ctrl-C in the middle of a training."""
    step = Trainer.step

    def stopping(self, number):
        step(self, number)
        if number + 1 == steps:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "step", stopping)


def test_a_teacher_and_its_detector(tmp_path, monkeypatch, capsys):
    """Stopped, continued, exported; then a detector on its autoencoder, and that detector's ceilings."""
    here = [monkeypatch, capsys, tmp_path]
    arguments = ["teacher", "train", "--out", "run", "--seed", "3", "--export", "made"]
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        code, _, errors = inside(*here, *arguments)
    assert code == 130 and "Stopped after step 1 of 2" in errors
    assert "continue with: fewstep teacher train --out run --seed 3 --device cpu --export made" in errors
    code, output, errors = inside(*here, *arguments)
    assert code == 0, errors
    assert "Wrote made (" in output and (tmp_path / "made" / "model_index.json").is_file()
    assert (tmp_path / "run" / "vae" / "log.jsonl").is_file() and (tmp_path / "run" / "unet" / "log.jsonl").is_file()
    arguments = ["teacher", "detector", "--out", "detector", "--teacher", "made", "--export", "detector.safetensors"]
    code, output, errors = inside(*here, *arguments)
    assert code == 0 and "Wrote detector.safetensors (" in output, errors
    code, output, errors = inside(*here, "teacher", "ceilings", "--detector", "detector.safetensors", "--count", "8")
    assert code == 0, errors
    assert [line.split(" n = ")[0].strip() for line in output.splitlines()] == ["renders", "after the VAE"]
    code, _, errors = inside(*here, "teacher", "detector", "--network", "critic")
    assert code == 2 and "Unknown --network 'critic': use detector or encoder." in errors


def test_a_reward_by_the_trunks_former_name_too(tmp_path, monkeypatch, capsys):
    here = [monkeypatch, capsys, tmp_path]
    code, _, errors = inside(*here, "reward", "scenes", "choices", "--count", "12", "--teacher", "", "-q")
    assert code == 0, errors
    for trunk in ("detector", "reader"):
        arguments = ["reward", "train", "choices", "--out", trunk, "--trunk", trunk, "--steps", "3", "-q"]
        code, output, errors = inside(*here, *arguments)
        assert code == 0 and "held-out choices" in output, errors
    files = [load_file(tmp_path / trunk / train_rewards.FILE) for trunk in ("detector", "reader")]
    assert checkpoint.same(*files)
    code, _, errors = inside(*here, "reward", "train", "choices", "--trunk", "teller")
    assert code == 2 and "Unknown --trunk 'teller': use encoder or detector." in errors


@pytest.mark.slow
def test_figures_of_a_teacher(tiny, tmp_path, monkeypatch, capsys):
    """Its reference is written and used; the scale of lowest FD is named."""
    from fewstep.scenes64 import prompts

    monkeypatch.setattr(prompts.make_reference, "__defaults__", (40,))
    monkeypatch.setattr(prompts, "STEPS", (2, 1))
    arguments = ["teacher", "measure", tiny, "--count", "32", "--guidance", "2", "--out", "figures.json"]
    code, output, errors = inside(monkeypatch, capsys, tmp_path, *arguments, "--reference", "reference.safetensors")
    assert code == 0, errors
    assert "guidance 2, 1 step" in output and "Guidance of lowest FD" in output
    assert (tmp_path / "figures.json").is_file() and (tmp_path / "reference.safetensors").is_file()
