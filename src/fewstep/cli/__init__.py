"""The command line: `COMMANDS` is the table of all commands, `main` runs one of them.

Commands import what they do when they run, so that ``fewstep --help`` need not wait for PyTorch.
"""

from __future__ import annotations

import gc
import io
import os
import sys
from typing import Annotated, Any

import typer

from fewstep.cli import catalogue, make, measure, use
from fewstep.cli.group import HELP, Command, Commands
from fewstep.data.listing import listed_once
from fewstep.scenes64.commands import reward_app, scenes, teacher_app
from fewstep.training.console import at_home, check_working_folder, end_with, in_words, plain_remarks

COMMANDS: dict[str, tuple[Any, ...]] = {
    "Start here": (make.demo, catalogue.doctor, catalogue.recipes_app),
    "Make a student": (make.distill, make.prepare, catalogue.methods),
    "Use a model": (use.sample, use.export, use.page, catalogue.checkpoints),
    "Measure": (measure.diagnose, measure.evaluate, measure.report, measure.benchmark, measure.verify),
    "The shipped model": (scenes, teacher_app, reward_app),
}
"""Commands and groups of commands by the heading under which ``fewstep --help`` shows them."""
_NAMES = {use.page: "app", catalogue.recipes_app: "recipes", teacher_app: "teacher", reward_app: "reward"}
"""Names of those that are not called after their function."""
_COLLECTIONS = 10_000, 20, 20
"""Thresholds of the garbage collector: at Python's own, it takes a fifth of the time in which libraries load."""

app = typer.Typer(
    name="fewstep",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings=HELP,
    help="""Turn any diffusion model into one that needs 1-8 steps.

Try `fewstep demo` first: it distils a small model on this machine in minutes and shows images.
Then `fewstep distill RECIPE` with a recipe of your own (`fewstep recipes` lists the shipped ones).""",
)
for heading, entries in COMMANDS.items():
    for entry in entries:
        if isinstance(entry, typer.Typer):
            for one in entry.registered_commands:
                one.cls = Command
            app.add_typer(entry, name=_NAMES[entry], cls=Commands, rich_help_panel=heading)
        else:
            app.command(_NAMES.get(entry), cls=Command, rich_help_panel=heading)(entry)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fewstep {version('fewstep')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: every user error is one sentence on stderr and exit code 2; Ctrl-C is 130."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell has closed it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, it stays open
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may hold bytes that no encoding has
        sys.stdout.reconfigure(errors="backslashreplace")
    gc.set_threshold(*_COLLECTIONS)
    try:
        check_working_folder()
        with plain_remarks(), listed_once():
            app(args=at_home(sys.argv[1:]), prog_name="fewstep")
    except KeyboardInterrupt:
        sys.exit(end_with("Interrupted.", 130))
    except (ValueError, OSError, ArithmeticError) as error:
        if os.environ.get("FEWSTEP_TRACEBACK"):  # shows where a defect is
            raise
        sys.exit(end_with(f"Error: {' '.join(in_words(error).split())}", 2))
    except RecursionError:
        if os.environ.get("FEWSTEP_TRACEBACK"):
            raise
        sys.exit(end_with("Error: A value is nested too deeply: no recipe or option needs hundreds of levels.", 2))
    except (MemoryError, RuntimeError) as error:
        from fewstep.training.machine import is_out_of_memory

        if is_out_of_memory(error) and not os.environ.get("FEWSTEP_TRACEBACK"):
            sys.exit(end_with("Error: Out of memory: ask for fewer images at once (--prompt, --count).", 2))
        raise
