"""Processes that lose each other: what ends, when, with which sentence; and folders that are not one folder."""

import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

from fewstep.training import distributed
from fewstep.training.console import resumable

pytestmark = pytest.mark.slow
PATIENCE = 4.0  # seconds of a step, played below


def _enter(rank, port, folder):
    """What each of two processes goes through; notes go to ``<rank>.json``."""
    torch.set_num_threads(1)
    launcher = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "GROUP_WORLD_SIZE": 1}
    os.environ |= {name: str(value) for name, value in launcher.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    notes, folder = {}, Path(folder)
    sys.stderr = open(folder / f"{rank}.err", "w")  # noqa: SIM115
    distributed._SEEN_WITHIN = 1.0
    distributed.join("cpu", folder / "not there" / "run", minutes=PATIENCE / 60)
    notes["left by a shared folder"] = sorted(p.name for p in folder.iterdir() if p.is_dir())
    for name, place in {"own folders": "run", "own names": folder / f"of-{rank}"}.items():
        os.chdir(folder / "ab"[rank])
        try:
            distributed.check_shared(Path(place))
        except ValueError as error:
            notes[name] = str(error)
    notes["left by folders of their own"] = sorted(str(p) for p in folder.glob("[ab]/*"))
    if rank == 1:
        time.sleep(PATIENCE + 1)
    distributed.wait()  # longer than a step may last
    with resumable("distill", "my.yaml", "--resume"):
        try:
            if rank == 1:
                time.sleep(PATIENCE + 2)
            began = time.monotonic()
            distributed.agree(False)
        except RuntimeError as error:
            notes["late"] = [distributed.is_lost(error), time.monotonic() - began]
        (folder / f"{rank}.json").write_text(json.dumps(notes))
        if rank == 1:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.wait()


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """(notes of both processes, exit code and last words of the one that is left) after the other's death."""
    folder = tmp_path_factory.mktemp("lost")
    for name in "ab":
        (folder / name).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = multiprocessing.get_context("spawn").Process
    both = [start(target=_enter, args=(rank, port, str(folder))) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    notes = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return notes, both[0].exitcode, (folder / "0.err").read_text()


def test_a_dead_process_ends_the_other_with_a_sentence(lost):
    _, code, said = lost
    assert code == 1 and re.fullmatch(
        r"Another process of this run has ended or hangs \(\[.*gloo.*\] .*\). What was saved is kept; continue with: "
        "torchrun --nproc-per-node 2 -m fewstep distill my.yaml --resume",
        said.strip(),
    )


def test_a_late_process_is_lost_after_the_time_of_a_step_and_not_before(lost):
    is_lost, seconds = lost[0][0]["late"]
    assert is_lost and PATIENCE - 0.5 < seconds < PATIENCE + 1.9


@pytest.mark.parametrize("case", ["own folders", "own names"])
def test_a_folder_that_is_not_the_same_for_all_is_refused(lost, case):
    host, notes = socket.gethostname(), [notes[case] for notes in lost[0]]
    wanted = (
        f" is not the same folder for process 0 on {host} and for process 1 on {host}: give a folder on a file system"
    )
    assert all(wanted in note for note in notes)
    assert [Path(note.split(" is not")[0]).name for note in notes] == (
        ["run"] * 2 if case == "own folders" else ["of-0", "of-1"]
    )


def test_looking_at_a_folder_leaves_nothing(lost):
    for notes in lost[0]:
        assert notes["left by a shared folder"] == ["a", "b"] and notes["left by folders of their own"] == []
