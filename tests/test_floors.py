"""The floors of the house: imports only point down, nowhere in a circle, and heavy libraries stay behind their doors.

    diffusion -> models -> sampling, data -> methods -> training -> scenes64, students, recipe, ... -> runs -> cli

`ORDER` names the rooms from the ground up. Rooms of one floor do not know each other. Every import counts, also inside
functions and under TYPE_CHECKING.
"""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "fewstep"
ORDER = (
    ("diffusion",), ("models",), ("sampling", "data", "checkpoints"), ("methods",), ("training", "evaluation"),
    ("scenes64", "students", "recipe", "verification"), ("planning", "export"), ("runs", "inference"),
    ("reports",), ("cli",), ("__main__",),
)  # fmt: skip
FLOORS = {name: height for height, names in enumerate(ORDER) for name in names}
BEYOND = {("checkpoints", "sampling")}
"""Pairs of rooms of one floor of which the first may import the second."""
HEAVY = {"diffusers", "transformers", "peft"}
HEAVY_ROOMS = {"models", "export", "checkpoints", "scenes64"}
ROOT = {"__init__", "__main__"}


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
            # a name may be a module: `from fewstep.models import roles` imports fewstep/models/roles.py
            names = [f"{module}.{alias.name}" for alias in node.names] if module.startswith("fewstep") else [module]
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
        if room == "__init__":  # the root's lazy names
            continue
        for name, at_top in imports(path, parts):
            where = f"{'/'.join(parts)}.py imports {name}"
            root, *rest = name.split(".")
            if root == "fewstep" and rest and rest[0] != room:
                mine, theirs = FLOORS.get(room, len(ORDER)), FLOORS.get(rest[0], len(ORDER))
                if theirs > mine or (theirs == mine and (room, rest[0]) not in BEYOND):
                    found.append(f"{where}: upwards")
            if root in HEAVY and room not in HEAVY_ROOMS:
                found.append(f"{where}: only {', '.join(sorted(HEAVY_ROOMS))} may")
            elif root in HEAVY and at_top:
                found.append(f"{where}: at the top of the file, where it slows every start")
    return found


def graph(package):
    """module -> modules of the package that it imports; the root's `__init__` and its lazy names are left out."""
    names = {".".join(p for p in parts if p != "__init__"): path for path, parts in modules(package).items()}
    names.pop("", None)
    arrows = {}
    for name, path in names.items():
        parts = path.relative_to(package).with_suffix("").parts
        arrows[name] = {
            target
            for found, _ in imports(path, parts)
            if (target := _module(found.removeprefix("fewstep."), names)) not in (None, name)
        }
    return arrows


def _module(dotted, names):
    """The longest beginning of a dotted name that is a module."""
    while dotted and dotted not in names:
        dotted = dotted.rpartition(".")[0]
    return dotted or None


def circles(arrows):
    """Groups of nodes that reach each other."""
    reached = {}
    for start in arrows:
        waiting, seen = list(arrows[start]), set()
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += arrows.get(node, ())
        reached[start] = seen
    return {frozenset(b for b in reached[a] if a in reached[b]) for a in arrows if a in reached[a]}


def rooms_of(arrows):
    rooms = {}
    for name, targets in arrows.items():
        room = name.split(".")[0]
        rooms.setdefault(room, set()).update({t.split(".")[0] for t in targets} - {room})
    return rooms


def levels(rooms):
    """Length of the longest chain of rooms, each importing the next."""

    def height(room):
        return 1 + max((height(other) for other in rooms[room]), default=0)

    return max(map(height, rooms))


def test_imports_only_point_down():
    assert violations(PACKAGE) == []


def test_no_import_goes_round_between_rooms_or_inside_one():
    arrows = graph(PACKAGE)
    assert circles(arrows) == set()
    assert circles(rooms_of(arrows)) == set()


def test_the_house_has_at_most_eleven_levels():
    assert levels(rooms_of(graph(PACKAGE))) <= 11


def test_the_package_root_holds_the_public_names_alone():
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT


def test_every_room_has_a_floor():
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms | {"__main__"} == FLOORS.keys()


PLANTED = {
    "diffusion/a.py": "from fewstep.models.cond import Cond",
    "diffusion/b.py": "def f():\n    import fewstep.methods.lcm",
    "models/c.py": "from ..methods import base",
    "models/d.py": "from fewstep import training",
    "models/e.py": "import diffusers",
    "sampling/f.py": "def f():\n    from diffusers import DDIMScheduler",
    "training/g.py": "from fewstep.recipe.schema import Recipe",
    "evaluation/h.py": "from fewstep.export.publish import export",
    "data/i.py": "import importlib\nimportlib.import_module('fewstep.methods.base')",
    "models/j.py": "class A:\n    import peft",
    "data/k.py": "if True:\n    from transformers.utils import logging",
    "reports/m.py": "import fewstep.cli",
    "recipe/n.py": "from fewstep.runs.distill import distill",
    "diffusion/l.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fewstep.models.cond import Cond",
}
ALLOWED = {
    "diffusion/a.py": "from fewstep.diffusion.schedule import Schedule\nfrom . import prediction",
    "models/b.py": "def f():\n    import peft\nfrom ..diffusion import schedule",
    "cli/a.py": "from fewstep.recipe.load import load_recipe\nfrom fewstep import reports",
    "checkpoints/c.py": "from fewstep.models.lora_files import read_lora\nfrom fewstep.sampling import DDIM",
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


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("from fewstep.models import b", "def f():\n    from fewstep.models.a import x"),
        ("from fewstep.models.b import x", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import a"),
        ("import fewstep.models.b", "import importlib\nimportlib.import_module('fewstep.models.a')"),
    ],
)
def test_the_guard_sees_a_planted_circle(tmp_path, first, second):
    room = tmp_path / "fewstep" / "models"
    room.mkdir(parents=True)
    for name, text in (("__init__", "from fewstep.models.a import x"), ("a", first), ("b", second)):
        (room / f"{name}.py").write_text(text)
    assert circles(graph(tmp_path / "fewstep")) == {frozenset({"models.a", "models.b"})}


def test_levels_are_counted_along_the_longest_chain():
    assert levels({"a": {"b", "d"}, "b": {"c"}, "c": {"d"}, "d": set()}) == 4


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


def test_what_benchmarks_import_is_there():
    """No test runs a benchmark, so a name that has gone would be missed for months."""
    for script in sorted((PACKAGE.parents[1] / "benchmarks").glob("*.py")):
        for node in ast.parse(script.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("fewstep"):
                module = importlib.import_module(node.module)
                gone = [name.name for name in node.names if not hasattr(module, name.name)]
                assert not gone, (script.name, node.module, gone)


def test_former_names_of_samplers_lead_to_the_present_ones():
    import fewstep

    for name in fewstep._FORMER:
        with pytest.raises(AttributeError, match=rf"^The sampler fewstep\.{name} is called fewstep\.{name}Sampler now"):
            getattr(fewstep, name)
        assert f"{name}Sampler" in fewstep.__all__


def test_the_version_is_that_of_the_package():
    import fewstep

    assert re.fullmatch(r"\d+\.\d+\.\d+.*", fewstep.__version__)


RECIPE_ROOMS = {"recipe", "runs", "reports", "cli"}


def whole_recipes(package):
    """Functions outside the rooms of recipes and runs that take a whole recipe instead of the sections they need."""
    found = []
    for path, parts in modules(package).items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if parts[0] not in RECIPE_ROOMS and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if any("Recipe" in re.findall(r"\w+", ast.unparse(a.annotation)) for a in taken if a.annotation):
                    found.append(f"{'/'.join(parts)}.py: {node.name}")
    return found


def test_whole_recipes_stay_where_runs_are_made():
    assert whole_recipes(PACKAGE) == []


def run_names():
    """Names in a run directory: whole file names, and folder names as a path's last part."""
    from fewstep.training.run_files import RunFiles

    parts = [path.name for path in vars(RunFiles(Path())).values() if path.name]
    return {name for name in parts if "." in name}, {name for name in parts if "." not in name}


def strings(package):
    """(module, string, whether it is joined to a path) of every string in the code but docstrings."""
    for path, parts in modules(package).items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        joined = {id(n.right) for n in ast.walk(tree) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Div)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield "/".join(parts), node.value, id(node) in joined


def test_every_name_in_a_run_directory_stands_in_one_module():
    files, folders = run_names()
    assert {"recipe.yaml", "log.jsonl", "versions.json"} <= files and {"student", "checkpoints", "data"} <= folders
    of_student = {"few_step.json", "samples.png", "pytorch_lora_weights.safetensors", "fewstep_student.safetensors"}
    homes = {}
    for module, text, joined in strings(PACKAGE):
        if text in files | of_student or (text in folders and joined):
            homes.setdefault(text, set()).add(module)
    assert {name: homes[name] for name in files | folders} == {key: {"training/run_files"} for key in files | folders}
    assert all(len(homes[name]) == 1 and homes[name] < {"students/card", "students/student"} for name in of_student)
