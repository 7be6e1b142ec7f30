"""Files that appear whole or not at all, and are on disk when the call returns."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LOCK = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What file systems without locks answer: some network and cluster ones, as they are mounted."""
_LOCKED = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}
"""What systems answer where another process has the lock; the last of them is Windows'."""


def _host() -> str:
    """This machine's name with the number of the processes' namespace, for in two containers one pid means two."""
    try:
        space = re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    except OSError:  # not Linux: there are no such namespaces
        space = ""
    return "-".join([re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:32], *filter(None, [space])])


_HOST = _host()
_ASIDE = re.compile(r"\..+\.(?P<host>[A-Za-z0-9-]*)-(?P<pid>\d+)-[0-9a-f]{8}\.part")
_QUIET, _LONG_AGO = 600.0, 86_400.0  # seconds
_cleared: set[str] = set()  # folders in which this process has looked


def at_home(path: str) -> str:
    """A path with the home folder for ~ at its beginning, and at that of each part of file@folder and model+lora."""
    return re.sub(r"(?<![^@+])~[^@+]*", lambda part: os.path.expanduser(part[0]), path)


@contextmanager
def held(path: Path, wait: bool = False) -> Iterator[bool]:
    """Lock a file within this block; yields whether this process has got the lock.

    The system releases the lock of a process that dies.

    Args:
        wait: until another process releases it.

    Warns:
        Remark: the file system has no locks; then the answer is True.
    """
    with open(path, "a", encoding="utf-8") as file:
        try:
            _lock(file, wait)
            ours = True
        except OSError as error:
            if error.errno in _NO_LOCKS:
                _remark_no_locks(path.parent)
            elif error.errno not in _LOCKED:
                error.filename = str(path)
                raise
            ours = error.errno in _NO_LOCKS
        yield ours


def _remark_no_locks(folder: Path) -> None:
    from fewstep.models.hub import Remark  # imports PyTorch

    sentence = f"The file system of {folder} has no locks, by which fewstep sees that another process is at work there"
    warnings.warn(Remark(f"{sentence}: take care that only one is."), stacklevel=4)


def _lock(file: IO[str], wait: bool) -> None:
    """Lock an open file until it is closed; OSError where another process has it, unless we wait for that."""
    if sys.platform == "win32":
        import msvcrt

        while True:
            try:  # Windows itself waits for ten seconds at most
                return msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            except OSError as error:
                if not wait or error.errno != errno.EDEADLK:
                    raise
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


@contextmanager
def only_one(folder: Path, wait: bool = False) -> Iterator[None]:
    """Within this block no other process may work in ``folder``.

    Args:
        wait: until another one has ended its work there.

    Raises:
        ValueError: another process works there now.
    """
    with held(folder / LOCK, wait) as ours:
        if not ours:
            raise ValueError(
                f"Another process is at work in {folder}: wait until it has ended, or choose another --out."
            )
        yield


def give_usual_permissions(path: Path) -> None:
    """Give a file the permissions of any new file; safetensors itself writes 0600."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions any other file would get, and flush it to disk.

    Raises:
        OSError: it cannot be written: no space, no permission.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file  # with PyTorch, which `fewstep recipes` does without

    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error})") from None
    give_usual_permissions(path)
    _order_header(path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _order_header(path: Path) -> None:
    """Sort the metadata of a safetensors file, which its library writes in another order each time."""
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" not in header:
            return
        header = {**header, "__metadata__": dict(sorted(header["__metadata__"].items()))}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # the same entries in another order; the rest is padding
            file.seek(8)
            file.write(text.ljust(size))


def aside(path: Path) -> Path:
    """A name beside ``path``, of this host and process, for what is to take its place; no other call returns it.

    What processes that were killed have left under such names in this folder is deleted, at the first call for it:
    after ten minutes in which nothing was written to it where the process was one of this host, and a day where that
    is not known.
    """
    _clear(path.parent)
    end = f".{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.part"
    name = path.name.encode(errors="surrogateescape")[: 254 - len(end)].decode(errors="ignore")  # names have 255 bytes
    return path.with_name(f".{name}{end}")


def _clear(folder: Path) -> None:
    """Delete what nobody will finish in a folder, once in a process: there may be a million files in it."""
    if (known := os.path.abspath(folder)) in _cleared:
        return
    _cleared.add(known)
    for old in folder.glob(".*.part"):
        if _is_abandoned(old):
            with suppress(OSError):  # another process may be deleting it too
                shutil.rmtree(old) if old.is_dir() else old.unlink()


def _is_abandoned(part: Path) -> bool:
    """Whether nobody will finish what has this temporary name."""
    found = _ASIDE.fullmatch(part.name)
    if found is None:
        return False
    try:
        written = [each.stat().st_mtime for each in (part, *part.rglob("*"))]  # a folder's own time is its last entry's
    except OSError:  # finished, or at work
        return False
    age = time.time() - max(written)
    if found["host"] == _HOST:
        return age > _QUIET and not _lives(int(found["pid"]))
    return age > _LONG_AGO


def _lives(pid: int) -> bool:
    """Whether a process of this number runs here; True where that cannot be asked."""
    if sys.platform != "win32":  # os.kill would end it there
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):
            pass
    return True


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write in this block; then it takes the place of ``path``.

    Readers see the old file or the new one, never half of it, and of several processes that write it at once the last
    one's stays. If the block fails, the old one stays, and nothing else.
    """
    part = aside(path)
    try:
        yield part
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if isinstance(error, OSError) and error.strerror is not None:
            error.filename, error.filename2 = str(path), None  # the file that the user knows
        raise


def replace_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file by `replacing`."""
    with replacing(path) as part:
        save_tensors(part, tensors, metadata)


def write_text(path: Path, text: str) -> None:
    """Write a text file and flush it to disk."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Write a text file by `replacing`."""
    with replacing(path) as part:
        write_text(part, text)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk; where it cannot be opened (never on Windows) the system does so later."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def text_hash(text: str) -> str:
    """A hash of a text (a recipe, prompts, names of files) in sixteen hexadecimal digits."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()
