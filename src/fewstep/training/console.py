"""Shared by all commands: options, numbers in options, exit codes, the command line that continues interrupted work."""

from __future__ import annotations

import errno
import functools
import math
import os
import shlex
import shutil
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from fewstep.training import launch, progress

RANK = str(launch.place().rank)
"""The number of this process among torchrun's or srun's."""
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
_PROMPTS = ("-p", "--prompt", "--negative-prompt")
Device = Annotated[str, typer.Option(help="Device to compute on, e.g. cpu or cuda.")]


@contextmanager
def plain_remarks() -> Iterator[None]:
    """Within this block each `Remark` is printed once, on stderr, as a sentence; other warnings as Python does."""
    usual, said = warnings.showwarning, set[str]()

    def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        from fewstep.models.hub import Remark  # imports torch, for which `fewstep --help` must not wait

        if not issubclass(category, Remark):
            usual(message, category, *rest)
        elif RANK == "0" and str(message) not in said:
            said.add(str(message))
            typer.echo(f"Note: {message}", err=True)

    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = usual


def check_working_folder() -> None:
    """Raises ValueError, one sentence, where the working folder has been deleted."""
    try:
        os.getcwd()
    except OSError:
        raise ValueError("The working folder does not exist any more: change to another one, and try again.") from None


def in_words(error: Exception) -> str:
    """An error as a sentence; the system's errors with the file that they are about, and what to do of a full disk."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error) or type(error).__name__
    name = "" if error.filename is None else f"{error.filename!s:.200}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror}{name and ': '}{name}."
    where = f" ({name} could not be written)" if name else ""
    return f"The disk is full{where}: make room, then go on with the same command, a run with --resume."


def end_with(message: str, code: int) -> int:
    """Print the last sentence of a command on stderr; returns the exit code ``code``."""
    if code == 130:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cut the sentence
    typer.echo(message if RANK == "0" else f"process {RANK}: {message}", err=True)
    return code


def say(text: str = "", err: bool = False) -> None:
    """Print a result, or a remark on stderr; the line that shows what is being done makes room for it."""
    progress.give_way()
    typer.echo(text, err=err)


def listed(name: str, text: str, width: int) -> str:
    """An entry of a list, its name in ``width`` columns: whole, and on a terminal broken at spaces."""
    whole = f"{name:{width}}{text}"
    if not sys.stdout.isatty():
        return whole  # one line an entry, for grep
    columns = max(shutil.get_terminal_size().columns, 2 * width)
    return textwrap.fill(whole, columns, subsequent_indent=" " * width, break_on_hyphens=False, break_long_words=False)


def long(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a command that may take minutes show where it stands, unless it is given --quiet.

    With --dry-run its output is a recipe and with --json it is for programs, so progress goes to stderr.
    """

    @functools.wraps(function)
    def run(*args: Any, **given: Any) -> Any:
        show, is_read = RANK == "0" and not given.get("quiet"), bool(given.get("dry_run") or given.get("as_json"))
        with progress.command(f"fewstep {function.__name__.replace('_', ' ')}", show, to_stderr=is_read):
            return function(*args, **given)

    run.__dict__["is_long"] = True
    return run


def finite(parameter: typer.CallbackParam, value: float | None) -> float | None:
    """The callback of an option that takes a number.

    Raises:
        ValueError: the number is infinite, or none.
    """
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{parameter.opts[0]} must be a finite number, not {value:g}.")
    return value


@contextmanager
def resumable(*words: object) -> Iterator[None]:
    """Within this block, Ctrl-C ends the program with a sentence that names the command of ``words``, exit code 130.

    So does SIGTERM where one of several processes is started: it is what torchrun sends when another one has died. The
    loss of another process ends it with such a sentence too, exit code 1.
    """
    from fewstep.training import distributed
    from fewstep.training.trainer import TrainingStopped

    again = launch.command(words)
    try:
        with _terminated_as_interrupted():
            yield
    except TrainingStopped as error:
        raise typer.Exit(end_with(f"{error} All is saved; continue with: {again}", 130)) from None
    except KeyboardInterrupt:
        message = f"Interrupted; what was saved is kept. Continue with: {again}"
        raise typer.Exit(end_with(message, 130)) from None
    except RuntimeError as error:
        if not distributed.is_lost(error) or os.environ.get("FEWSTEP_TRACEBACK"):
            raise
        end_with(f"{distributed.loss(error)} What was saved is kept; continue with: {again}", 1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the groups' own end would wait for the process that is gone


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Within this block of one of several processes, SIGTERM is a KeyboardInterrupt."""
    if launch.place().count == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def at_home(words: Sequence[str]) -> list[str]:
    """A command line with the home folder for ~ wherever a path may begin, where a shell has not done it."""
    found = []
    for before, word in zip(["", *words], words, strict=False):
        option, equals, value = word.partition("=")
        if before in _PROMPTS or option in _PROMPTS:
            found.append(word)
        elif equals and option.startswith("--"):
            found.append(f"{option}={os.path.expanduser(value)}")
        else:
            found.append(os.path.expanduser(word))
    return found


def command(*words: object) -> str:
    """A fewstep command line, quoted so that it can be pasted."""
    return shlex.join(["fewstep", *map(str, words)])


def options(**values: object) -> list[object]:
    """Options of a command line, those that are not None: ``vae_minutes=3`` as ``--vae-minutes 3``; lists repeat."""
    found: list[object] = []
    for name, value in values.items():
        for item in value if isinstance(value, list) else [value]:
            found += [] if item is None else [f"--{name.replace('_', '-')}", item]
    return found


def whole_numbers(text: str | None, option: str) -> list[int]:
    """The whole numbers of an option like 0,1,2; none where it was not given."""
    try:
        found = [int(part) for part in (text or "").replace(",", " ").split()]
    except ValueError:
        found = []
    if text is not None and not found:
        raise ValueError(f"{option} needs whole numbers, e.g. 0,1,2, not '{text}'.")
    return found


def numbers(text: str | None, needs: str = "--timesteps needs numbers, e.g. 999,749,499,249") -> list[float] | None:
    """The numbers of an option like 1,2.5; None where it was not given."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"{needs}, not '{text}'.") from None
