"""Linux, macOS and Windows: nothing that one of them lacks, and the same bytes on all.

No test here runs on another system than its own; those that pretend replace exactly the call that differs there. The
workflow in .github runs this file on Windows and macOS.
"""

import ast
import builtins
import errno
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import fewstep
from fewstep.data.files import held, only_one, sync_folder, write_text
from fewstep.models.families.single_file import _with_usual_suffix
from fewstep.reports.benchmark import _stopped_at

PACKAGE = Path(fewstep.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

POSIX_MODULES = {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"}
POSIX_NAMES = {
    "chown", "chroot", "fchmod", "fchown", "fork", "forkpty", "geteuid", "getgid", "getpgid", "getuid", "kill",
    "killpg", "mkfifo", "nice", "posix_spawn", "pread", "pwrite", "setpgid", "setsid", "setuid", "statvfs", "sync",
    "uname", "wait", "waitpid", "O_DIRECTORY", "O_NOFOLLOW",
}  # fmt: skip
"""Of `os`: absent on Windows, but for kill, which ends a process there whatever the signal is."""
POSIX_SIGNALS = {
    "SIGALRM",
    "SIGCHLD",
    "SIGHUP",
    "SIGKILL",
    "SIGPIPE",
    "SIGQUIT",
    "SIGUSR1",
    "SIGUSR2",
    "alarm",
    "setitimer",
    "pause",
}


def only_here(tree):
    """(line, what) for each use of what another system lacks, outside the branch of an `if sys.platform`."""
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "sys.platform" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name in POSIX_MODULES | {"msvcrt", "winreg"})
        if isinstance(node, ast.ImportFrom) and node.module in POSIX_MODULES:
            yield node.lineno, node.module
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = {"os": POSIX_NAMES, "signal": POSIX_SIGNALS}.get(node.value.id, set())
            if node.attr in names:
                yield node.lineno, f"{node.value.id}.{node.attr}"


def without_encoding(tree):
    """(line, call) for each text file that is opened, read or written in the system's encoding."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {word.arg: word.value for word in node.keywords}
        text = ast.unparse(node)
        if "encoding" in given:
            continue
        if name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute):
            yield node.lineno, text
        elif name == "open" and isinstance(node.func, ast.Name):
            mode = given.get("mode") or (node.args[1] if len(node.args) > 1 else ast.Constant("r"))
            if not (isinstance(mode, ast.Constant) and "b" in mode.value):
                yield node.lineno, text
        elif name in ("run", "Popen", "check_output") and ("text" in given or "universal_newlines" in given):
            yield node.lineno, text


@pytest.mark.parametrize("find", [only_here, without_encoding])
def test_no_file_of_the_package_depends_on_one_system(find):
    found = {
        f"{path.relative_to(PACKAGE)}:{line}": what
        for path in SOURCES
        for line, what in find(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_these_checks_find_what_they_look_for():
    bad = ast.parse("import fcntl, os, signal\nos.fork()\nos.kill(1, signal.SIGKILL)\nfrom resource import getrusage")
    assert [what for _, what in only_here(bad)] == ["fcntl", "resource", "os.fork", "os.kill", "signal.SIGKILL"]
    guarded = "import sys\nif sys.platform == 'win32':\n    import msvcrt\nelse:\n    import fcntl"
    assert list(only_here(ast.parse(guarded))) == []
    text = (
        "open(a)\nopen(a, 'w')\nopen(a, 'rb')\nopen(a, encoding='utf-8')\np.read_text()\nsubprocess.run([], text=True)"
    )
    assert [line for line, _ in without_encoding(ast.parse(text))] == [1, 2, 5, 6]


@pytest.fixture
def windows(monkeypatch):
    """Windows' file locks, as the C library documents them: one region, one holder, an OSError for all others.

    Those who wait get it too, after ten attempts; here the holder is gone after the second time that they wait.
    """
    locked, waited = set(), []

    def locking(descriptor, mode, size):
        key = os.fstat(descriptor).st_ino
        assert mode in (1, 2) and size == 1
        if mode == 1:
            waited.append(key)
        if key in locked and len(waited) < 3:
            raise OSError(errno.EDEADLK, "Resource deadlock avoided")
        locked.add(key)

    real = builtins.__import__

    def without_posix(name, *rest, **more):
        if name in POSIX_MODULES:
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_posix)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_LOCK=1, LK_NBLCK=2))
    monkeypatch.setattr(sys, "platform", "win32")
    return locked


def test_a_folder_has_one_process_on_windows_too(windows, tmp_path):
    with held(tmp_path / ".lock") as first, held(tmp_path / ".lock") as second:
        assert first and not second
    with pytest.raises(ValueError, match=r"Another process is at work in .*: wait"), only_one(tmp_path):
        pass
    with only_one(tmp_path, wait=True):
        pass
    windows.clear()  # Windows does so when the file is closed
    with only_one(tmp_path):
        assert windows


def test_a_folder_that_cannot_be_opened_is_not_flushed(monkeypatch, tmp_path):
    """Windows opens no folder: PermissionError. Without this every checkpoint would fail there."""

    def closed(path, flags):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", closed)
    sync_folder(tmp_path)


def test_texts_are_the_same_bytes_on_every_system(monkeypatch, tmp_path):
    """Python writes line feeds as os.linesep unless it is told not to."""
    opened = []
    real = builtins.open
    monkeypatch.setattr(builtins, "open", lambda *a, **k: opened.append(k) or real(*a, **k))
    write_text(tmp_path / "a.txt", "a\nü\n")
    assert (tmp_path / "a.txt").read_bytes() == "a\nü\n".encode()
    assert opened[0]["newline"] == "\n"


def test_a_file_of_another_suffix_is_copied_where_links_are_not_allowed(monkeypatch, tmp_path):
    given = tmp_path / "MODEL.SAFETENSORS"
    given.write_bytes(b"weights")
    for allowed in (True, False):
        if not allowed:
            monkeypatch.setattr(os, "symlink", lambda *a, **k: (_ for _ in ()).throw(OSError(1314, "no privilege")))
        with _with_usual_suffix(given) as path:
            assert path.suffix == ".safetensors" and path.read_bytes() == b"weights"
            assert path.is_symlink() == allowed


def test_a_training_that_has_used_up_its_time_is_asked_to_save(monkeypatch):
    """Through the handler of SIGTERM, which every system has; os.kill would end the process on Windows at once."""
    monkeypatch.setattr(os, "kill", None)
    asked, before = threading.Event(), signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        with _stopped_at(time.monotonic() + 0.01):
            for _ in range(500):
                if asked.is_set():
                    break
                time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert asked.is_set()
