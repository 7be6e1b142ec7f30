"""Files that appear whole or not at all, and are on disk when the call returns."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LOCK = ".lock"


def at_home(path: str) -> str:
    """A path with the home folder for ~ at its beginning, and at that of each part of file@folder and model+lora."""
    return re.sub(r"(?<![^@+])~[^@+]*", lambda part: os.path.expanduser(part[0]), path)


@contextmanager
def held(path: Path, wait: bool = False) -> Iterator[bool]:
    """Lock a file within this block; yields whether this process has got the lock.

    The system releases the lock of a process that dies.

    Args:
        wait: until another process releases it.
    """
    with open(path, "a", encoding="utf-8") as file:
        try:
            _lock(file, wait)
            ours = True
        except OSError:
            ours = False
        yield ours


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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write in this block; then it takes the place of ``path``.

    Readers see the old file or the new one, never half of it. If the block fails, the old one stays, and nothing else.
    """
    part = path.with_name(f".{path.name}.part")
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
