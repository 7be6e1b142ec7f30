"""The pages of the families against the code: one page each, with the facts that its class holds."""

import re

import pytest
import yaml

from fewstep.models.families.registry import FAMILIES
from tests.docs.test_docs import DOCS, ROOT, text_of

RECIPES = {path.stem: yaml.safe_load(text_of(path)) for path in (ROOT / "src" / "fewstep" / "recipes").glob("*.yaml")}


def page_of(family):
    return DOCS / "families" / f"{family.names[0]}.md"


def code(names):
    return ", ".join(f"`{name}`" for name in names) or "none"


def recipes_of(family):
    """Shipped recipes whose teacher is one of the family's base models."""
    return sorted(name for name, recipe in RECIPES.items() if recipe.get("teacher", {}).get("path") in family.licences)


def facts(family):
    """The rows of the table "Facts" of a family's page."""
    needed = [name for name in family.text_encoders if name not in family.optional_encoders]
    rows = [
        ("Network", f"`{family.network_class}`, the pipeline's `{family.part}`"),
        ("Text encoders", code(needed)),
        ("One `.safetensors` file with all parts", "read" if family.single_file else "not read"),
        ("LoRA exports", "`--to lora`, `--to kohya`" if family.kohya_prefix else "`--to lora`"),
        ("ComfyUI's node for the shift", f"`{family.comfyui_shift}`" if family.comfyui_shift else "–"),
        ("Licences of the bases", ", ".join(f"`{base}`: {name}" for base, name in family.licences.items()) or "–"),
        ("Shipped recipes", code(recipes_of(family))),
    ]
    if family.optional_encoders:
        rows.insert(2, ("Text encoders that may be absent", code(family.optional_encoders)))
    return "\n".join(f"| {name} | {value} |" for name, value in rows)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.names[0])
def test_a_familys_page_has_its_facts(family):
    assert "| | |\n|---|---|\n" + facts(family) + "\n\n" in text_of(page_of(family))


def test_there_is_a_page_for_each_family_and_no_other():
    pages = {page_of(family).name for family in FAMILIES}
    assert {page.name for page in (DOCS / "families").glob("*.md")} == pages | {"README.md"}
    assert [name for name in pages if f"]({name})" not in text_of(DOCS / "families" / "README.md")] == []


def test_every_recipe_of_a_real_model_belongs_to_a_family():
    listed = {name for family in FAMILIES for name in recipes_of(family)}
    stages = {name for name, recipe in RECIPES.items() if not name.startswith("scenes-64")}
    assert listed == stages


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.names[0])
def test_a_page_has_the_memory_that_the_readme_gives(family):
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+ GB) \|", text_of(ROOT / "README.md"), re.MULTILINE)
    given = [f"`{recipe}` needs {memory}" for recipe, memory in rows if recipe in recipes_of(family)]
    assert re.findall(r"`[\w-]+` needs [\d.]+ GB", text_of(page_of(family))) == given
