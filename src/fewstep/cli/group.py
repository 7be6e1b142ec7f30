"""How commands appear: arguments in capitals, flags without a value, one sentence on Ctrl-C."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from fewstep.training.console import end_with

HELP = {"help_option_names": ["-h", "--help"]}


class Command(TyperCommand):
    """A command whose help shows arguments in capitals, and flags without a value."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _shown(super().get_params(ctx))


class Commands(TyperGroup):
    """A group of commands, shown likewise; ends with a sentence on Ctrl-C, where typer alone prints none."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _shown(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(end_with("Interrupted.", 130)) from None


def _shown(parameters: list[Any]) -> list[Any]:
    """Parameters with the words that stand for their values in the help."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""  # typer's <bool> looks like a value that must be given
        elif parameter.param_type_name == "argument" and parameter.metavar is None:
            parameter.metavar = parameter.name.upper()
    return parameters
