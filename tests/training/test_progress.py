"""Progress: plain lines at least every 30 s without a terminal, bars on one, nothing where it is not wanted."""

from __future__ import annotations

import io
import itertools
import random
import sys
import time

import pytest
import typer.main

from fewstep import cli
from fewstep.training import progress
from fewstep.training.console import long, say
from tests.command_line import inside, sets


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture()
def clock(monkeypatch):
    """Lines with a clock of the test's own, which nobody else moves, and what they have written at which second."""
    monkeypatch.setattr(progress.threading.Thread, "start", lambda self: None)
    lines = progress.Lines(lambda line: lines.found.append((lines.now, line)), lambda: lines.now)
    lines.now, lines.found = 0.0, []
    monkeypatch.setattr(progress, "_display", lambda stream: lines)

    def wait(seconds):
        for _ in range(round(seconds / progress._TICK)):
            lines.now += progress._TICK
            lines.tick()

    lines.wait = wait
    return lines


def gaps(lines, until):
    times = [0.0, *(at for at, _ in lines.found), until]
    return [b - a for a, b in itertools.pairwise(times)]


def test_there_is_a_line_every_thirty_seconds_whatever_the_work_does(clock):
    """An hour of steps, of one call that lasts ten minutes, and of work without a length."""
    rng = random.Random(0)
    with progress.command("fewstep distill"):
        clock.wait(100)
        with progress.doing("loading the teacher"):
            clock.wait(95)
        with progress.progress_bar(1000, 0, "training") as advance:
            for step in range(1000):
                clock.wait(rng.choice([0.5, 1, 2, 7]))
                advance(step + 1, "loss 0.5")
                if step == 500:
                    clock.wait(600)
        with progress.progress_bar(100, 0, "silent", show=False) as advance:
            clock.wait(200)
            advance(100)
    assert clock.now > 3000 and max(gaps(clock, clock.now)) <= 25
    labels = {line.partition(":")[0] for _, line in clock.found}
    assert labels == {"fewstep distill", "loading the teacher", "training"}
    assert len(clock.found) == 1 + int((clock.now - progress._FIRST) / progress.EVERY)


def test_a_line_says_where_the_work_stands(clock):
    with progress.progress_bar(4000, 1000, "encoding") as advance:
        clock.wait(20)
        advance(1300, "3 images/s")
        clock.wait(30)
    (_, first), _, (at, line) = clock.found  # 300 in 41.5 s: the other 2,700 take 373 s
    assert (at, first) == (41.5, "encoding: 1,000 of 4,000, 1 s")
    assert line == "encoding: 1,300 of 4,000, 3 images/s, 41 s, about 6 min 13 s left"
    assert [progress.duration(s) for s in (59.9, 60, 3600, 3599, 12000)] == [
        "59 s", "1 min 0 s", "1 h 0 min", "59 min 59 s", "3 h 20 min",
    ]  # fmt: skip


def test_the_first_word_comes_within_three_seconds_of_the_start(clock):
    """The program has needed some tenths of a second by then; an error of the first second stays alone."""
    with progress.command("fewstep sample"):
        clock.wait(2)
        with progress.doing("loading the model"):
            clock.wait(18)
        clock.wait(3)
    (first, begins), (_, then) = clock.found
    assert first <= 2 and begins == "fewstep sample: loading libraries, 1 s" and then == "fewstep sample: 21 s"


def test_short_work_is_silent_and_so_is_what_is_not_shown(clock):
    with progress.command("fewstep sample"):
        clock.wait(1)
    with progress.command("fewstep sample", show=False), progress.doing("sampling", 4) as advance:
        advance(1)
        clock.wait(500)
    with progress.doing("loading"), progress.progress_bar(3, 0, "x", show=False) as advance:
        advance(1)
        clock.wait(500)
    with progress.progress_bar(3, 0, "x"):
        clock.wait(1)
    assert clock.found == []


def test_the_thread_writes_while_the_work_is_busy(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.02)
    monkeypatch.setattr(progress, "_FIRST", 0.02)
    monkeypatch.setattr(progress, "_TICK", 0.005)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with progress.command("fewstep report"):
        time.sleep(0.3)  # one long call
    written = sys.stdout.getvalue().splitlines()
    assert len(written) >= 3 and set(written) == {"fewstep report: loading libraries, 0 s"}
    time.sleep(0.05)
    assert sys.stdout.getvalue().splitlines() == written


def test_what_cannot_be_written_does_not_end_the_work(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    display = progress._display(Closed())
    display.clock = itertools.count(100, 100).__next__
    display.tasks.append(progress.Task("training"))
    display.tick()


def test_colours_alone_make_no_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("TERM", raising=False)
    assert isinstance(progress._display(io.StringIO()), progress.Lines)
    assert isinstance(progress._display(Terminal()), progress.Bars)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress._display(Terminal()), progress.Lines)


def test_a_terminal_has_bars(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    with progress.command("fewstep distill"):
        with progress.doing("loading the teacher"):
            pass
        with progress.progress_bar(7, 0, "training") as advance:
            advance(3, "loss 0.25")
            with progress.doing("writing a checkpoint"):
                pass
            advance(7)
    shown = sys.stdout.getvalue()
    assert "training" in shown and "7/7" in shown and "loss 0.25" in shown
    assert not progress._displays and not progress._open


def test_a_terminal_always_has_a_word_and_a_result_has_the_terminal_for_itself(monkeypatch):
    """While no part of the work is under way the command itself is shown; what it prints is not broken into lines."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stdout", Terminal())
    result = "Wrote runs/mine/export/lora; diffusers samples from it what fewstep does."
    with progress.command("fewstep export"):
        time.sleep(0.3)
        begins = sys.stdout.getvalue()
        with progress.doing("loading the teacher"):
            time.sleep(0.3)
        between = len(sys.stdout.getvalue())
        time.sleep(0.6)
        between = sys.stdout.getvalue()[between:]
        say(result)
        say("In diffusers: pipe(prompt)")
        with progress.doing("more"):
            pass
    shown = sys.stdout.getvalue()
    assert "fewstep export" in begins and "loading libraries" in begins
    assert "fewstep export" in between and "libraries" not in between
    assert f"{result}\nIn diffusers: pipe(prompt)\n" in shown and "more" in shown.partition(result)[2]
    assert "fewstep export" not in shown.partition(result)[2].partition("In diffusers")[0]


def commands(app, prefix=""):
    for command in app.registered_commands:
        yield prefix + (command.name or command.callback.__name__.replace("_", "-")), command.callback
    for group in app.registered_groups:
        yield from commands(group.typer_instance, f"{prefix}{group.name} ")


def test_every_long_command_says_where_it_stands():
    quick = {"app", "recipes list", "recipes show", "recipes copy"}
    known = dict(commands(cli.app))
    assert {"distill", "sample", "report", "benchmark", "verify", "demo", "export", "doctor", "prepare"} < known.keys()
    assert {name for name, function in known.items() if not getattr(function, "is_long", False)} == quick
    assert typer.main.get_command(cli.app).commands["distill"].params  # the signature is still the command's own


def test_quiet_and_other_processes_say_nothing_and_a_plan_is_a_recipe(monkeypatch):
    seen = []
    monkeypatch.setattr(progress, "_display", lambda stream: seen.append(stream) or progress.Lines(lambda line: None))

    @long
    def distill(dry_run=False, quiet=False, as_json=False):
        return 7

    assert distill() == 7 and distill(dry_run=True) == 7 and distill(quiet=True) == 7 and distill(as_json=True) == 7
    assert seen == [sys.stdout, sys.stderr, sys.stderr]
    monkeypatch.setattr("fewstep.training.console.RANK", "1")
    assert distill() == 7 and len(seen) == 3


@pytest.mark.slow
def test_a_piped_run_shows_each_of_its_parts(monkeypatch, capsys, tmp_path, short):
    """Every look at the clock writes a line: all parts of a run have a name."""
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(progress, "_FIRST", 0.0)
    monkeypatch.setattr(progress, "_TICK", 0.001)
    arguments = ("distill", "scenes-64-tcd", "--out", "run", *sets(short))
    code, output, _ = inside(monkeypatch, capsys, tmp_path, *arguments)
    labels = {line.partition(":")[0] for line in output.splitlines()}
    assert code == 0
    assert labels >= {"loading the teacher", "encoding", "training tcd", "generating sample images"}
    assert "writing a checkpoint" in labels
    code, output, _ = inside(
        monkeypatch, capsys, tmp_path, "distill", "scenes-64-tcd", "--out", "b", "-q", *sets(short)
    )
    assert code == 0 and len(output.splitlines()) == 4  # the result and what comes next
