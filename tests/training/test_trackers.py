"""TensorBoard's files are read back; trackio's part is played by a stand-in, unless the package is here."""

import importlib.util
import json
import sys
import types

import pytest
from killable import trainer

from fewstep.training.settings import TrainingSettings
from fewstep.training.trackers import check_trackers
from fewstep.training.trainer import TrainingStopped


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def stop_at(step):
    def hook(done):
        if done == step:
            raise TrainingStopped("", done)

    return ((1, hook),)


def stopped_and_resumed(folder, tracker):
    """Killed at step 35 with a checkpoint at 20 and lines up to 30; the same steps are then done again."""
    options = dict(steps=60, log_every=10, checkpoint_every=20, trackers=(tracker,))
    with pytest.raises(TrainingStopped):
        trainer("plain", folder, hooks=stop_at(35), **options).run()
    trainer("plain", folder, **options).run(resume=True)


def test_tensorboard_holds_the_log_and_no_step_twice_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stopped_and_resumed(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = log(tmp_path)
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    for name in ("student/loss", "student/grad_norm", "learning_rate"):
        assert [(e.step, e.value) for e in events.Scalars(name)] == [
            (line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines
        ]
    assert set(events.Tags()["scalars"]) == lines[0].keys() - {"step"}


class StandIn(types.ModuleType):
    """As much of trackio as is used, with the signatures of its version 0.43."""

    def __init__(self):
        super().__init__("trackio")
        self.__spec__ = importlib.util.spec_from_loader("trackio", None)
        self.sittings, self.lines, self.finished = [], [], 0

    def init(self, project, name=None, resume="never", embed=True, auto_log_gpu=None, auto_log_cpu=None):
        self.sittings.append((project, name, resume, embed, auto_log_gpu, auto_log_cpu))
        return self

    def log(self, metrics, step=None):
        self.lines.append({"step": step, **metrics})

    def finish(self):
        self.finished += 1


def test_trackio_gets_the_log_and_no_step_twice_after_a_resume(tmp_path, monkeypatch):
    trackio = StandIn()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    stopped_and_resumed(tmp_path / "mine", "trackio")
    assert trackio.sittings == [
        ("fewstep", "mine", "never", False, False, False),
        ("fewstep", "mine", "allow", False, False, False),
    ]
    assert trackio.finished == 2
    lines = log(tmp_path / "mine")
    speed = "steps_per_second"
    assert [{k: v for k, v in line.items() if k != speed} for line in trackio.lines] == [
        {k: v for k, v in line.items() if k != speed} for line in lines
    ]


@pytest.mark.needs("trackio")
def test_the_real_trackio_if_it_is_here(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    from trackio.sqlite_storage import SQLiteStorage

    stopped_and_resumed(tmp_path / "mine", "trackio")
    assert [line["step"] for line in SQLiteStorage.get_logs("fewstep", "mine")] == [10, 20, 30, 40, 50, 60]


def test_what_is_missing_or_unknown_is_said_in_a_sentence(monkeypatch):
    with pytest.raises(ValueError, match=r"^trackers\.0: input should be 'tensorboard' or 'trackio', not 'wandb'\.$"):
        TrainingSettings(trackers=("wandb",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="asks for trackio, which is not installed: pip install trackio"):
        check_trackers(["trackio"])


def test_nothing_is_imported_that_nobody_asked_for(tmp_path):
    before = set(sys.modules)
    trainer("plain", tmp_path, steps=2).run()
    assert not {"tensorboard", "trackio"} & (set(sys.modules) - before)
