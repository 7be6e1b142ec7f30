"""What a long command is doing: a progress bar on a terminal, plain lines where there is none (``> log``, Slurm, CI).

    with command("report"):                                          # from its first second there is always a word
        with doing("loading the teacher"): ...                       # work of unknown length
        with progress_bar(4000, 0, "encoding") as advance: advance(12)
        give_way(); print("The result.")

Both come from a thread, so they come also while one call of the work lasts minutes. Nothing heavy is imported.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TextIO, TypeVar

EVERY = 20.0
"""Seconds between plain lines; with what a busy machine adds, there is one at least every 30 s."""
_FIRST = 1.5  # seconds before a command's first line: with those that the program needs to start, less than 3
_TICK = 0.5  # seconds between looks at the clock
_BEGINS = "loading libraries"  # what every command does first

Advance = Callable[..., None]
"""Called with the number of units done, and perhaps a text to show."""


@dataclass
class Task:
    """One piece of work: ``done`` of ``total`` (None: not known), since the time ``began`` with ``start`` done.

    ``whole``: it is a whole command, which a terminal shows only while none of its pieces is under way.
    """

    label: str
    total: int | None = None
    start: int = 0
    began: float = 0.0
    done: int = 0
    text: str = ""
    whole: bool = False

    def sentence(self, now: float) -> str:
        """Where it stands: ``encoding: 1,200 of 4,000, 2 min 5 s, about 5 min left``."""
        spent, fresh = now - self.began, self.done - self.start
        parts = [] if self.total is None else [f"{self.done:,} of {self.total:,}"]
        parts += [self.text] if self.text else []
        parts.append(duration(spent))
        if self.total is not None and fresh > 0 and self.total > self.done:
            parts.append(f"about {duration(spent / fresh * (self.total - self.done))} left")
        return f"{self.label}: {', '.join(parts)}"


class Display(Protocol):
    """Shows the tasks that are under way, the innermost last."""

    def open(self, task: Task) -> None: ...

    def update(self, task: Task) -> None: ...

    def close(self, task: Task) -> None: ...

    def give_way(self) -> None: ...


class Lines:
    """Plain lines about the innermost task, one every `EVERY` seconds as long as there is any, the first one sooner.

    Args:
        write: takes a line. clock: the time in seconds.
    """

    def __init__(self, write: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self.write, self.clock = write, clock
        self.tasks: list[Task] = []
        self._lock, self._over = threading.Lock(), threading.Event()
        self._written = 0.0

    def open(self, task: Task) -> None:
        with self._lock:
            task.began = self.clock()
            if not self.tasks:
                self._written, self._over = task.began + _FIRST - EVERY, threading.Event()
                threading.Thread(target=self._watch, args=(self._over,), daemon=True).start()
            self.tasks.append(task)

    def update(self, task: Task) -> None:
        """The thread writes; nothing is to be done."""

    def close(self, task: Task) -> None:
        with self._lock:
            self.tasks.remove(task)
            if not self.tasks:
                self._over.set()

    def give_way(self) -> None:
        """Lines stand in nobody's way."""

    def tick(self) -> None:
        """Write a line if it is time for one."""
        with self._lock:
            now = self.clock()
            if self.tasks and now - self._written >= EVERY:
                self._written = now
                self.write(self.tasks[-1].sentence(now))

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(_TICK):
            self.tick()


class Bars:
    """rich's progress bars on a terminal; work of unknown length has a spinner, which goes when it ends."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[Task, Any]] = {}
        self._progress: Any = None

    def open(self, task: Task) -> None:
        if self._progress is None:
            self._progress = _rich_progress()
            self.rows = {key: (outer, self._row(outer)) for key, (outer, _) in self.rows.items()}
            self._progress.start()
        self._show_whole(not self.rows)
        self.rows[id(task)] = task, self._row(task)

    def _row(self, task: Task) -> Any:
        visible = not (task.whole and self.rows)
        return self._progress.add_task(
            task.label, total=task.total, completed=task.start, text=task.text, visible=visible
        )

    def update(self, task: Task) -> None:
        if self._progress is not None:
            self._progress.update(self.rows[id(task)][1], completed=task.done, text=task.text)

    def close(self, task: Task) -> None:
        _, number = self.rows.pop(id(task))
        if self._progress is not None and task.total is None:
            self._progress.remove_task(number)
        self._show_whole(len(self.rows) == 1)
        if not self.rows:
            self._stop()

    def give_way(self) -> None:
        """Take the row of a whole command away, so that its result is printed as it is, whatever the width."""
        if all(task.whole for task, _ in self.rows.values()):
            self._show_whole(False)
            self._stop()

    def _show_whole(self, visible: bool) -> None:
        for task, number in self.rows.values():
            if task.whole and self._progress is not None:
                self._progress.update(number, visible=visible)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = None


_displays: list[Display] = []
"""The display of the command that runs, or of the outermost bar; empty where nothing is shown."""
_open: list[Task] = []
"""The tasks that are under way, the innermost last."""


@contextmanager
def command(label: str, show: bool = True, to_stderr: bool = False) -> Iterator[None]:
    """Within this block, which is a whole command, there is a plain line every `EVERY` seconds, or bars on a terminal.

    Args:
        to_stderr: for commands whose output is read by programs.
    """
    with _shown(show, to_stderr) as display:
        if display is None:
            yield
            return
        with _under_way(display, Task(label, text=_BEGINS, whole=True)):
            yield


def give_way() -> None:
    """Before a command prints its result: a spinner that stands in the way goes, until the next work begins."""
    if _displays:
        _displays[-1].give_way()


Item = TypeVar("Item")


def each(items: Iterable[Item], label: str) -> Iterator[Item]:
    """The items, `doing` ``label`` while each is made, and nothing while it is used."""
    iterator = iter(items)
    while True:
        try:
            with doing(label):
                item = next(iterator)
        except StopIteration:
            return
        yield item


@contextmanager
def doing(label: str, total: int | None = None) -> Iterator[Advance]:
    """Within this block a `command` does this work; yields ``advance(done, text)``. Shows nothing outside of one."""
    if not _displays:
        yield lambda done, text="": None
        return
    with _under_way(_displays[-1], Task(label, total)) as advance:
        yield advance


@contextmanager
def progress_bar(total: int, start: int, label: str, show: bool = True) -> Iterator[Advance]:
    """As `doing` from ``start`` on, also outside of a `command`; shows nothing when ``show`` is False."""
    with _shown(show) as display:
        if display is None:
            yield lambda done, text="": None
            return
        with _under_way(display, Task(label, total, start, done=start)) as advance:
            yield advance


@contextmanager
def _shown(show: bool, to_stderr: bool = False) -> Iterator[Display | None]:
    """The display of an outer block, or one for this block alone."""
    if _displays or not show:
        yield _displays[-1] if show else None
        return
    _displays.append(_display(sys.stderr if to_stderr else sys.stdout))
    try:
        yield _displays[-1]
    finally:
        _displays.pop()


@contextmanager
def _under_way(display: Display, task: Task) -> Iterator[Advance]:
    def advance(done: int, text: str = "") -> None:
        task.done, task.text = done, text or task.text
        display.update(task)

    for outer in _open:
        if outer.text == _BEGINS:  # no longer
            outer.text = ""
            display.update(outer)
    _open.append(task)
    display.open(task)
    try:
        yield advance
    finally:
        _open.pop()
        display.close(task)


def _display(stream: TextIO) -> Display:
    """Bars where ``stream`` is a terminal or a notebook, lines elsewhere: CI is none, even if it asks for colours."""
    from rich.console import Console

    console = Console(file=stream)
    if (stream.isatty() and console.is_interactive) or console.is_jupyter:
        return Bars()

    def write(line: str) -> None:
        with suppress(OSError, ValueError):  # a closed pipe or a full disk must not end the work
            print(line, file=stream, flush=True)

    return Lines(write)


def _rich_progress() -> Any:
    from rich import progress as rich
    from rich.text import Text

    class IfKnown(rich.ProgressColumn):
        """A column for work of known length; empty for other work."""

        def __init__(self, column: rich.ProgressColumn) -> None:
            super().__init__()
            self.column = column

        def render(self, task: rich.Task) -> Any:
            return Text("") if task.total is None else self.column.render(task)

    return rich.Progress(
        rich.SpinnerColumn(finished_text=" "),
        rich.TextColumn("{task.description}", style="bold", markup=False),
        IfKnown(rich.BarColumn(bar_width=24)),
        IfKnown(rich.MofNCompleteColumn()),
        rich.TextColumn("{task.fields[text]}", markup=False),
        rich.TimeElapsedColumn(),
        IfKnown(rich.TextColumn("left")),
        IfKnown(rich.TimeRemainingColumn()),
        refresh_per_second=4,
    )


def duration(seconds: float) -> str:
    """``45 s``, ``2 min 5 s``, ``3 h 20 min``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
