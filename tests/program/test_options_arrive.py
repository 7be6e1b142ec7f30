"""Every option of every command reaches the work: changed alone, the functions that do it are called otherwise.

Each command runs with stand-ins for the functions that it imports, which write down how they are called. An option that
is parsed, perhaps repeated in the sentence that says how to continue, and then replaced by its default would be silent.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
import types
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import typer

from fewstep.cli import app


class StandIn:
    """Writes every call of it, or of what it gives, into ``log``; it can be printed, counted, entered and compared."""

    def __init__(self, log, name):
        self._log, self._name = log, name

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(self._log, f"{self._name}.{name}")

    def __call__(self, *args, **named):
        self._log.append((self._name, repr(args), repr(sorted(named.items()))))
        return StandIn(self._log, f"{self._name}()")

    def keys(self):
        return []

    def __repr__(self):
        return self._name

    def __format__(self, how):
        return self._name

    def __iter__(self):
        return iter([StandIn(self._log, f"{self._name}[]")])

    def __getitem__(self, key):
        return StandIn(self._log, f"{self._name}[{key!r}]")

    def __len__(self):
        return 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def _same(self, *_):
        return self

    __add__ = __radd__ = __truediv__ = __and__ = __rand__ = __sub__ = __mul__ = __rmul__ = _same


def commands(group, prefix=""):
    """Name -> the function of each command, as it was written."""
    found = {}
    for info in group.registered_commands:
        function = inspect.unwrap(info.callback)
        found[(prefix + (info.name or function.__name__)).replace("_", "-")] = function
    for sub in group.registered_groups:
        found |= commands(sub.typer_instance, f"{prefix}{sub.name} ")
    return found


COMMANDS = commands(app)
# What a command is given before one option changes: what it requires, and what makes other options go.
GIVEN = {
    "distill": {"recipe": "a.yaml"},
    "prepare": {"recipe": "a.yaml"},
    "sample": {"model": "mine", "image": Path("in.png"), "mask": Path("mask.png"), "strength": 0.5},
    "export": {"run": Path("mine")},
    "doctor": {"plan": "a.yaml"},
    "recipes show": {"name": "sd15-lcm"},
    "recipes copy": {"name": "sd15-lcm"},
    "benchmark": {"jobs": ["a"]},
    "report": {"runs": [Path("mine")]},
    "evaluate": {"runs": [Path("mine")]},
    "diagnose": {"run": Path("mine")},
    "scenes": {"out": Path("nowhere")},
    "checkpoints": {"name": "tcd-sd15"},
    "reward scenes": {"out": Path("nowhere")},
    "reward train": {"folder": Path("nowhere")},
}
# Values of options that are no free text, and what stands beside them.
CHANGED = {
    "distill.seeds": "3,4",
    "sample.timesteps": "999,499",
    "sample.checkpoint": ("tcd-sd15", {"model": None, "checkpoint": "tcd-sdxl"}),
    "sample.file": (Path("here"), {"model": None, "checkpoint": "tcd-sd15"}),
    "benchmark.seeds": "3,4",
    "benchmark.steps": "2,3",
    "evaluate.steps": "2,3",
    "evaluate.guidance": "1,2",
    "evaluate.eta": "0,0.3",
    "evaluate.lora_scale": "0.5,1",
    "scenes.layout": "webdataset",
    "teacher measure.guidance": "1.5,2.5",
    "teacher measure.stated": 0.5,
    "teacher detector.network": "encoder",
}
# Options that choose between two texts to print.
SAID = {"diagnose.as_json", "checkpoints.code"}
OPTIONS = [
    (name, option)
    for name, function in COMMANDS.items()
    for option, parameter in inspect.signature(function).parameters.items()
    if "Context" not in str(parameter.annotation)
]


def another(kind, value):
    """Another value of an option's kind."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    kinds = [k for k in get_args(kind) if k is not type(None)] if get_origin(kind) in (types.UnionType,) else [kind]
    kind = kinds[0]
    if get_origin(kind) is list:
        return [another(get_args(kind)[0], None), another(get_args(kind)[0], None)]
    if kind is bool:
        return not value
    if kind in (int, float):
        return kind((value or 0) + 17)
    return kind("another")


def called(function, given, monkeypatch):
    """How the functions that a command imports are called, and what it prints, up to its end or an error."""
    log = []
    with monkeypatch.context() as patch:
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fewstep")):
                continue
            module = importlib.import_module(node.module)
            for alias in node.names:
                if callable(getattr(module, alias.name)) and alias.name != "Chain":  # of which an instance is asked
                    patch.setattr(module, alias.name, StandIn(log, alias.name))
        patch.setattr(typer, "echo", lambda text="", **_: log.append(("echo", str(text), "")))
        try:
            function(**given)
        except (typer.Exit, Exception) as end:
            log.append((type(end).__name__, "", ""))
    return log


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=[f"{name}.{option}" for name, option in OPTIONS])
def test_an_option_reaches_the_work(name, option, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    function, beside = COMMANDS[name], {}
    parameters = inspect.signature(function).parameters
    value = CHANGED.get(f"{name}.{option}")
    if isinstance(value, tuple):
        value, beside = value
    given = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
    given |= GIVEN.get(name, {}) | beside
    if value is None:
        value = another(get_type_hints(function, include_extras=True)[option], given[option])
    before, after = called(function, given, monkeypatch), called(function, {**given, option: value}, monkeypatch)
    work = [[call for call in log if call[0] != "echo"] for log in (before, after)]
    assert any(arguments for _, arguments, _ in work[0])  # something was called
    assert work[0] != work[1] or f"{name}.{option}" in SAID
    assert before != after


def test_every_command_is_here():
    assert COMMANDS.keys() >= {"distill", "prepare", "sample", "app", "export", "verify", "benchmark", "teacher train"}
    assert COMMANDS.keys() >= GIVEN.keys() and {f"{n}.{o}" for n, o in OPTIONS} >= CHANGED.keys() | SAID
