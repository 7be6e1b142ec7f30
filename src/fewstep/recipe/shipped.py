"""The recipes that come with the package, and any recipe's file. Nothing heavy is imported: lists must be quick."""

from __future__ import annotations

import difflib
import itertools
import re
from pathlib import Path

from fewstep.data.files import at_home


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    return {p.stem: p for p in sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))}


def find_recipe(source: str | Path) -> Path:
    """The file of a recipe given by path or by the name of a shipped one.

    Raises:
        RecipeError: there is none; the sentence names the nearest shipped one.
    """
    path = Path(at_home(str(source)))
    if path.is_file():
        return path
    named = shipped_recipes()
    if str(source) in named:
        return named[str(source)]
    from fewstep.recipe.validate import RecipeError  # with pydantic and PyTorch, which lists do without

    near = difflib.get_close_matches(str(source), named, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else " `fewstep recipes` lists the shipped ones."
    raise RecipeError(f"There is no recipe '{source}'.{hint}")


def purpose(path: Path) -> str:
    """The first sentence of the comment above a recipe, over as many lines as it has."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    text = " ".join(line.removeprefix("#").strip() for line in lines)
    sentence = re.match(r".*?\.(?=\s|$)", text)
    return sentence[0] if sentence else text
