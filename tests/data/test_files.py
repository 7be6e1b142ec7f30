"""Files that appear whole or not at all, written by many processes at once, and locks where a file system has none."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
import warnings

import pytest

from fewstep.data import files
from fewstep.data.files import aside, held, only_one, replace_text, replacing
from fewstep.models.hub import Remark

WRITER = """
import json, os, pathlib, sys
from fewstep.data.files import replace_text
folder, me, count = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
(folder / f"ready-{me}").touch()
while len(list(folder.glob("ready-*"))) < 8:
    pass
for i in range(count):
    replace_text(folder / "same.json", json.dumps({"by": me, "i": i, "rest": me * 20_000}))
    replace_text(folder / f"{me}-{i}.json", json.dumps({"by": me, "i": i}))
    found = json.loads((folder / "same.json").read_text())  # never half a file
    assert found["rest"] == found["by"] * 20_000
"""


def test_none_of_200_writes_by_eight_processes_at_once_is_lost(tmp_path):
    """Half of them are of the same file; half as many more of different ones, in the same folder."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    running = [subprocess.Popen([*command, str(me), "25"], stderr=subprocess.PIPE) for me in range(8)]
    died = [errors for process in running if (errors := process.communicate()[1]) or process.returncode]
    assert not died, died[0].decode()
    for me in range(8):
        for i in range(25):
            assert json.loads((tmp_path / f"{me}-{i}.json").read_text()) == {"by": str(me), "i": i}
    assert json.loads((tmp_path / "same.json").read_text())["i"] == 24
    assert not list(tmp_path.glob(".*.part"))


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "notes.txt"
    with replacing(path) as mine:
        with replacing(path) as theirs:
            assert mine != theirs and str(os.getpid()) in mine.name
            mine.write_text("mine"), theirs.write_text("theirs")
        assert path.read_text() == "theirs"
    assert path.read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127, "星" * 85, "x"])
def test_a_name_as_long_as_a_name_may_be(tmp_path, name):
    replace_text(tmp_path / name, "whole")
    assert (tmp_path / name).read_text() == "whole"


def test_what_killed_processes_have_left_is_cleared_away(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host, now = files._HOST, time.time()
    left = {  # name: seconds since it was written, whether it must stay
        f".a.{host}-{dead.pid}-00000000.part": (700, False),
        f".b.{host}-{dead.pid}-00000000.part": (300, True),  # not for long: a clock or a number may deceive
        f".c.{host}-{os.getpid()}-00000000.part": (700, True),  # at work
        f".day.{host}-{os.getpid()}-00000000.part": (90_000, True),  # after a suspension, or by a server's clock
        f".in.{host}1-{dead.pid}-00000000.part": (700, True),  # in another container of one hostname
        f".d.elsewhere-{dead.pid}-00000000.part": (700, True),  # nobody knows
        ".e.elsewhere-1-00000000.part": (90_000, False),
        ".download.part": (90_000, True),  # another program's
        "f.elsewhere-1-00000000.part": (90_000, True),
    }
    for name, (age, _) in left.items():
        (tmp_path / name).mkdir() if "c." in name else (tmp_path / name).touch()
        os.utime(tmp_path / name, (now - age, now - age))
    for name, age in {"export": 700, "grows": 0}.items():
        folder = tmp_path / f".{name}.{host}-{dead.pid}-00000000.part"
        (folder / "unet").mkdir(parents=True)
        (folder / "unet/model").touch()
        for part, since in {folder / "unet/model": age, folder / "unet": 700, folder: 700}.items():
            os.utime(part, (now - since, now - since))
    left[folder.name] = (0, True)  # a file in it is being written
    aside(tmp_path / "new")
    assert {p.name for p in tmp_path.iterdir()} == {name for name, (_, stays) in left.items() if stays}


def test_a_folder_is_looked_through_once(tmp_path, monkeypatch):
    """A folder of encoded data may have a million files, and each of them is written aside."""
    looked = []
    monkeypatch.setattr(files, "_is_abandoned", lambda part: looked.append(part.name))
    (tmp_path / ".a.b-1-00000000.part").touch()
    for name in "xyz":
        replace_text(tmp_path / name, "whole")
    assert looked == [".a.b-1-00000000.part"]


@pytest.mark.skipif(not os.path.exists("/proc/self/ns/pid"), reason="only Linux has namespaces of processes")
def test_a_container_has_names_of_its_own(monkeypatch):
    """Two containers may have one hostname, and the same number means two processes there."""
    here = files._host()
    assert here == files._HOST and files._ASIDE.fullmatch(aside(files.Path("x")).name)["host"] == here
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[7]")
    assert files._host() != here


def test_of_two_only_one_works_in_a_folder(tmp_path):
    with only_one(tmp_path), held(tmp_path / files.LOCK) as ours:
        assert not ours
        with (
            pytest.raises(ValueError, match=r"Another process is at work in .*: wait until it has"),
            only_one(tmp_path),
        ):
            pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_no_other_process(tmp_path, monkeypatch, code):
    def refuses(file, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuses)
    sentence = r"^The file system of .* has no locks, .*: take care that only one is\.$"
    with pytest.warns(Remark, match=sentence), only_one(tmp_path):
        pass


def test_any_other_failure_of_a_lock_is_said_as_it_is(tmp_path, monkeypatch):
    def fails(file, how):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fails)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OSError, match="Input/output error") as found, only_one(tmp_path):
            pass
    assert found.value.filename == str(tmp_path / files.LOCK)
