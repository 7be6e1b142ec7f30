"""One run directory: who may start, resume or finish a run in it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from pydantic import TypeAdapter

from fewstep.data.files import LOCK, only_one, replace_text
from fewstep.data.random import Rng
from fewstep.methods.base import Method
from fewstep.methods.registry import find_method
from fewstep.models.hub import Remark
from fewstep.recipe.load import parse_recipe
from fewstep.recipe.resume import consequences, refused
from fewstep.recipe.schema import Recipe
from fewstep.recipe.validate import RecipeError
from fewstep.students.card import CARD_FILE
from fewstep.training import checkpoint, distributed
from fewstep.training.run_files import RunFiles


class RunFolder(RunFiles):
    """A run directory with the rules for what may run in it; `RunFiles` names its files."""

    def check(self, recipe: Recipe, resume: bool) -> None:
        """Refuse in one sentence a directory that holds something else than a run of ``recipe``."""
        if self.holds_run(resume):
            self.may_resume(recipe)

    def holds_run(self, resume: bool) -> bool:
        """Whether a run is there to resume, of one recipe or of several stages.

        Raises:
            RecipeError: a run is there without ``resume``, or the path is a file or holds something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RecipeError(f"{self.path} is a file: choose another --out.")
        if self.recipe.is_file():
            if not resume:
                raise RecipeError(
                    f"{self.path} already holds a run: add --resume to continue it, or choose another --out."
                )
            return True
        if self.path.is_dir() and any(path.name != LOCK for path in self.path.iterdir()):
            raise RecipeError(f"{self.path} is not empty and holds no run: choose another --out.")
        return False

    def may_resume(self, recipe: Recipe) -> None:
        """Compare ``recipe`` with the stored one: a run may be made longer, but not become another run.

        Warns:
            Remark: what a changed number of steps means for a run that has begun.

        Raises:
            RecipeError: names the first key that must not change, or the stored recipe is damaged.
        """
        stored = self._stored_for(recipe)
        if "stages" in stored:
            raise RecipeError(f"{self.path} holds a run of several stages, not of one recipe: choose another --out.")
        found = refused(stored, recipe.as_data())
        if found is not None:
            key, before, now = found
            raise RecipeError(
                f"{self.path} was started with {key} = {before}, not {now}: "
                "resume with the recipe it was started with, or choose another --out."
            )
        for sentence in consequences(stored, recipe) if checkpoint.latest(self.checkpoints) else []:
            warnings.warn(Remark(sentence), stacklevel=2)

    def stored(self) -> dict[str, Any]:
        """The plain data of the recipe that the directory keeps.

        Raises:
            RecipeError: the file is damaged.
        """
        try:
            data = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError):
            data = None
        if not isinstance(data, dict):
            raise RecipeError(f"{self.recipe} is damaged: restore it, or choose another --out.")
        return data

    def kept_recipe(self) -> Recipe:
        """The recipe that the directory keeps, ready to use.

        Raises:
            RecipeError: the file is damaged, or its recipe cannot be used any more.
        """
        stored = self.stored()
        method = stored.get("method")
        name = method.get("name") if isinstance(method, dict) else None
        return parse_recipe(_in_present_words(stored, find_method(name)) if isinstance(name, str) else stored)

    def _stored_for(self, recipe: Recipe) -> dict[str, Any]:
        """`stored`, for a comparison with ``recipe``: keys that were not there yet have their defaults."""
        stored = _in_present_words(self.stored(), recipe.method_class())
        for name, section in Recipe.model_fields.items():
            if name != "method" and isinstance(stored.get(name), dict) and section.default is not None:
                defaults = TypeAdapter(type(section.default)).dump_python(section.default, mode="json")
                stored[name] = defaults | stored[name]
        return stored

    def is_finished(self, recipe: Recipe) -> bool:
        """Whether exactly this recipe has run to its end here."""
        done = (self.student / CARD_FILE).is_file() and self.recipe.is_file()
        return done and self._stored_for(recipe) == recipe.as_data()

    def check_random(self) -> None:
        """Refuse to go on with a run that has begun with random numbers of another version.

        Raises:
            RecipeError: one sentence that says what to do.
        """
        newest = checkpoint.latest(self.checkpoints)
        try:
            if newest is not None:
                checkpoint.check_random(newest, Rng.version)
        except ValueError as error:
            raise RecipeError(str(error)) from None

    def claim(self, text: str) -> None:
        """Store the recipe ``text``, which makes the directory that recipe's, unless one is stored already."""
        if distributed.first() and not self.recipe.is_file():
            replace_text(self.recipe, text)

    def reopen(self, recipe: Recipe) -> None:
        """Store a changed recipe. The student of fewer steps must not pass for its result, so its card goes."""
        if distributed.first() and self.stored() != recipe.as_data():
            (self.student / CARD_FILE).unlink(missing_ok=True)
            replace_text(self.recipe, recipe.as_yaml())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within this block no other program works in the directory, which is made if it does not exist."""
        distributed.wait()  # every process must have looked before one of them creates files
        self.path.mkdir(parents=True, exist_ok=True)
        if not distributed.first():
            yield
            return
        with only_one(self.path):
            yield


def _in_present_words(stored: dict[str, Any], cls: type[Method]) -> dict[str, Any]:
    """A stored recipe, where settings of its method that had another name once have their present one."""
    if isinstance(stored.get("method"), dict):
        stored["method"] = {cls.renamed.get(key, key): value for key, value in stored["method"].items()}
    return stored
