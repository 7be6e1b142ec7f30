"""Settings of methods: what pydantic refuses, in one sentence; renamed ones; what other rooms ask of them."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Method
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.guidance import Guidance
from fewstep.methods.hyper import Hyper
from fewstep.methods.ladd import LADD
from fewstep.methods.lcm import LCM
from fewstep.methods.lightning import Lightning
from fewstep.methods.registry import METHODS
from fewstep.methods.tcd import TCD
from fewstep.recipe.load import parse_recipe
from fewstep.recipe.validate import RecipeError

SOURCE = Path(__file__).parent.parent.parent / "src" / "fewstep"
VP = Schedule.scaled_linear()
RENAMED = [(cls, old, new) for cls in METHODS.values() for old, new in cls.renamed.items()]


@pytest.mark.parametrize("name", METHODS)
def test_a_value_of_another_kind_is_one_sentence_wherever_it_is_given(name):
    cls = METHODS[name]
    key, wrong = ("rewards", "pickscore") if name == "feedback" else ("guidance_scale", "high")
    key, wrong = ("num_levels", "four") if name == "ladd" else (key, wrong)
    for make in (lambda: cls(VP, **{key: wrong}), lambda: cls.Settings(**{key: wrong})):
        with pytest.raises(ValueError, match=rf"^{key}.*{wrong}'\.$") as found:
            make()
        assert "\n" not in str(found.value)
    with pytest.raises(RecipeError, match=rf"{key}.*{wrong}'\.$"):
        parse_recipe({"method": {"name": name, key: wrong}})


def test_positional_settings_are_named_in_the_sentence():
    with pytest.raises(ValueError, match=r"^guidance_scale must be one number"):
        LCM.Settings(50, "high")


@pytest.mark.parametrize(("cls", "old", "new"), RENAMED, ids=lambda value: getattr(value, "name", value))
def test_a_renamed_setting_is_refused_by_a_sentence_that_names_the_new_word(cls, old, new):
    assert new in cls.setting_names() and old not in cls.setting_names()
    with pytest.raises(RecipeError, match=rf"^method\.{old} is called method\.{new} now\.$"):
        parse_recipe({"method": {"name": cls.name, old: 1.0}})
    with pytest.raises(ValueError, match=rf"^The setting '{old}' of {cls.name} is called '{new}' now\.$"):
        cls(VP, **{old: 1.0})


def test_known_renames():
    assert {(cls.name, old) for cls, old, _ in RENAMED} == {
        ("cm", "log_mean"), ("cm", "log_std"), ("dmd", "fake_begins"), ("dmd2", "fake_begins")
    }  # fmt: skip


def test_no_room_fishes_for_settings_of_a_method():
    """`getattr(settings, "name")` stands nowhere but in the base of methods, where the convention is."""
    pattern = re.compile(r"""(getattr|hasattr)\([^()]*settings[^()]*(\(\))?, f?["'](?!__)""")
    found = {
        f"{path.relative_to(SOURCE)}: {line.strip()}"
        for path in SOURCE.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if pattern.search(line)
    }
    assert found == set()
    assert pattern.search('x = getattr(recipe.method_settings(), "guidance_scale", None)')


def test_what_others_ask_a_method():
    assert LCM.teacher_guidance(LCM.Settings(guidance_scale=(2, 6))) == Guidance(2.0, 6.0)
    assert LADD.teacher_guidance(LADD.Settings()) is None
    assert TCD.original_inference_steps(TCD.Settings(num_grid_steps=20)) == 20
    assert DMD2.original_inference_steps(DMD2.Settings()) is None
    assert Lightning.num_teacher_steps(Lightning.Settings()) == 8 and LCM.num_teacher_steps(LCM.Settings()) is None
    assert DMD2(VP).head_needs_squares and not DMD2(VP, head="residual").head_needs_squares
    assert Hyper(VP, segments=1).head_needs_squares and not Hyper(VP).head_needs_squares  # 8 segments have no GAN
    assert Lightning(VP, loss="convert").converts and not Lightning(VP).converts


class Plain(Method):
    """A method of a user's, with a plain dataclass."""

    name = "plain"

    @dataclasses.dataclass(frozen=True)
    class Settings:
        """Settings of Plain."""

        guidance_scale: float = 2.0
        num_grid_steps: int = 7


def test_a_plain_dataclass_keeps_working_and_its_names_mean_the_same():
    method = Plain(VP, num_grid_steps=9)
    assert method.teacher_guidance(method.settings) == Guidance(2.0, 2.0)
    assert method.original_inference_steps(method.settings) == 9


class More(LCM):
    """A method of a user's, with more settings than its parent."""

    @dataclasses.dataclass(frozen=True)
    class Settings(LCM.Settings):
        """Settings of More."""

        extra: int = 3


def test_a_plain_dataclass_may_extend_a_methods_settings():
    assert More(VP, extra=4, num_grid_steps=9).settings == More.Settings(num_grid_steps=9, extra=4)


@pytest.mark.parametrize("name", METHODS)
def test_every_default_is_what_its_annotation_makes_of_it(name):
    """Numbers keep their kind: a recipe with every default written out has the text, and the hash, that it had."""
    settings = METHODS[name].Settings()
    given = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    again = type(settings)(**given)
    assert again == settings
    assert all(type(getattr(again, key)) is type(value) for key, value in given.items())


def test_methods_need_torch_and_pydantic_alone():
    """`fewstep.methods` imports neither diffusers nor transformers nor peft."""
    code = (
        "import sys, fewstep.methods.registry\n"
        "assert not {'diffusers', 'transformers', 'peft', 'typer', 'omegaconf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    for path in (SOURCE / "methods").rglob("*.py"):
        roots = {
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert roots <= {"fewstep", "torch", "numpy", "pydantic", *sys.stdlib_module_names}, path.name
