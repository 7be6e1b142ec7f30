"""The floors of the house: imports only point down, and the heavy libraries stay behind their doors.

    diffusion -> models -> sampling -> methods -> data -> training -> evaluation, export -> checkpoints -> recipe -> top

Evaluation and export share a floor and do not know each other. `recipe` stands above everything it describes
(teachers, methods, training, published files) and below the programs that read it: verify and the training loop
take plain settings, never a recipe. Everything else at the top of the package (cli, app, main jobs) is the top.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "fewstep"
ORDER = (
    ("diffusion",), ("models",), ("sampling",), ("methods",), ("data",), ("training",), ("evaluation", "export"),
    ("checkpoints",), ("drawing",), ("recipe",),
)  # fmt: skip
FLOORS = {name: height for height, names in enumerate(ORDER) for name in names}
TOP = len(FLOORS)
HEAVY = {"diffusers", "transformers", "peft"}
HEAVY_ROOMS = {"models", "export", "checkpoints"}


def modules(package):
    return {path: path.relative_to(package).with_suffix("").parts for path in sorted(package.rglob("*.py"))}


def imports(path, parts):
    """(module, whether at the top level of the file) of every import; relative ones resolved, TYPE_CHECKING's too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["fewstep", *parts[: len(parts) - node.level]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from fewstep import models` imports a room, `from fewstep.models import x` lies inside one
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "fewstep" else [module]
        elif isinstance(node, ast.Call) and _is_import_call(node):
            names = [node.args[0].value]
        else:
            continue
        for name in names:
            yield name, id(node) not in inside


def _is_import_call(node):
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    named = node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
    return called in ("import_module", "__import__") and named


def violations(package):
    found = []
    for path, parts in modules(package).items():
        room = parts[0]
        for name, at_top in imports(path, parts):
            where = f"{'/'.join(parts)}.py imports {name}"
            root, *rest = name.split(".")
            if root == "fewstep" and rest:
                mine, theirs = FLOORS.get(room, TOP), FLOORS.get(rest[0], TOP)
                if theirs > mine or (theirs == mine != TOP and rest[0] != room):
                    found.append(f"{where}: upwards")
            if root in HEAVY and room not in HEAVY_ROOMS:
                found.append(f"{where}: only {', '.join(sorted(HEAVY_ROOMS))} may")
            elif root in HEAVY and at_top:
                found.append(f"{where}: at the top of the file, where it slows every start")
    return found


def test_imports_only_point_down():
    assert violations(PACKAGE) == []


def test_every_room_has_a_floor():
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms - FLOORS.keys() <= {"recipes", "assets"}


PLANTED = {
    "diffusion/a.py": "from fewstep.models.cond import Cond",
    "diffusion/b.py": "def f():\n    import fewstep.methods.lcm",
    "models/c.py": "from ..methods import base",
    "models/d.py": "from fewstep import training",
    "models/e.py": "import diffusers",
    "sampling/f.py": "def f():\n    from diffusers import DDIMScheduler",
    "training/g.py": "from fewstep.recipe import Recipe",
    "evaluation/h.py": "from fewstep.export.student import save",
    "methods/i.py": "import importlib\nimportlib.import_module('fewstep.data.sources')",
    "models/j.py": "class A:\n    import peft",
    "data/k.py": "if True:\n    from transformers.utils import logging",
    "recipe.py": "import fewstep.cli",
    "diffusion/l.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fewstep.models.cond import Cond",
}
ALLOWED = {
    "diffusion/a.py": "from fewstep.diffusion.schedule import Schedule\nfrom . import prediction",
    "models/b.py": "def f():\n    import peft\nfrom ..diffusion import schedule",
    "cli.py": "from fewstep.recipe import load\nfrom fewstep import app",
    "checkpoints/c.py": "from fewstep.export.student import save",
}


@pytest.mark.parametrize("planted", PLANTED)
def test_the_guard_sees_a_planted_import(tmp_path, planted):
    path = tmp_path / "fewstep" / planted
    path.parent.mkdir(parents=True)
    path.write_text(PLANTED[planted])
    assert len(violations(tmp_path / "fewstep")) == 1


def test_the_guard_lets_others_pass(tmp_path):
    for name, text in ALLOWED.items():
        path = tmp_path / "fewstep" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert violations(tmp_path / "fewstep") == []


def test_the_front_door_imports_nothing_by_itself():
    """`fewstep/__init__.py` names the public things, for people and type checkers, and loads them on first use."""
    code = "import sys, fewstep; print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    import fewstep

    assert sorted(fewstep.__all__) == sorted(fewstep._MODULE)
    for name in fewstep.__all__:
        assert getattr(fewstep, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'smaple'"):
        fewstep.smaple  # noqa: B018


def test_the_lower_floors_run_without_the_heavy_libraries():
    """What the files say is not all: nothing may pull them in by way of another package either."""
    code = (
        "import sys, fewstep, fewstep.diffusion.mixture, fewstep.models.roles, fewstep.methods.registry\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
