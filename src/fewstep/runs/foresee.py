"""What can be known before a run starts, of a recipe or of every stage of a chain: no weights are read for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from fewstep.checkpoints.registry import checkpoints
from fewstep.models.denoiser import Denoiser
from fewstep.models.families.single_file import is_single_file
from fewstep.models.hub import DTYPES
from fewstep.models.meta_pipeline import MetaPipeline, outline
from fewstep.recipe.chain import Chain, Merge
from fewstep.recipe.schema import Recipe, TeacherConfig
from fewstep.recipe.validate import RecipeError
from fewstep.runs.fit import card_at, check_data, check_fit, check_machine, foreseen_card
from fewstep.runs.measured_on import check_measured, check_networks
from fewstep.students.card import Card
from fewstep.students.lineage import model_behind
from fewstep.training.trainer import check_batch


def outline_of(recipe: Recipe) -> MetaPipeline:
    """The teacher without weights; of a student, the model that it came from."""
    return _outline(recipe.teacher)


def _outline(teacher: TeacherConfig) -> MetaPipeline:
    return outline(model_behind(teacher.path), teacher.size, DTYPES[teacher.dtype], teacher.config)


def foresee(recipe: Recipe | Chain, elsewhere: bool = False) -> None:
    """Refuse a recipe of which a stage would be refused when its turn comes.

    A teacher whose configs cannot be read here is left to the run, which loads it.

    Args:
        elsewhere: it is planned here to be run elsewhere; see `missing_here`.

    Raises:
        RecipeError: one sentence that names the stage.
    """
    teacher_of = cache(_teacher)  # most stages have the same
    if isinstance(recipe, Recipe):
        _card(recipe, recipe, {}, elsewhere, teacher_of)
        return
    bases, cards = recipe.on_first_teacher(), dict[str, Card | None]()
    for stage in recipe.stages:
        try:
            does = stage.does
            cards[stage.name] = (
                _card(does, bases[stage.name], cards, elsewhere, teacher_of)
                if isinstance(does, Recipe)
                else _merged(does, cards)
            )
        except ValueError as error:
            raise RecipeError(f"stages.{stage.name}: {error}") from None


def missing_here(recipe: Recipe | Chain) -> list[str]:
    """What this machine lacks for the run, each a sentence: it may be planned here to be run elsewhere."""
    recipes = [recipe] if isinstance(recipe, Recipe) else [s.recipe for s in recipe.stages if s.recipe is not None]
    found = []
    for each in recipes:
        for check in (check_machine, _check_networks, check_data):
            try:
                check(each)
            except ValueError as error:
                found.append(str(error))
    return list(dict.fromkeys(found))


def _check_networks(recipe: Recipe) -> None:
    check_networks([recipe], "meta")


def _teacher(config: TeacherConfig) -> Denoiser | None:
    """A teacher without weights; None where its configs cannot be read here."""
    try:
        return _outline(config).family().denoiser()
    except ValueError:
        return None


def _merged(does: Merge, cards: Mapping[str, Card | None]) -> Card | None:
    """The card that a merged student will have; None where that of its own student is not known."""
    card = cards[does.merge]
    if card is None:
        return None
    if card.beside_weights:
        raise RecipeError(
            f"merge: the student of '{does.merge}' has {card.beside_weights}, which are no weights of its teacher: "
            "it cannot be merged."
        )
    return replace(card, weights=does.weights)


def _card(
    recipe: Recipe, base: Recipe, cards: Mapping[str, Card | None], elsewhere: bool,
    teacher_of: Callable[[TeacherConfig], Denoiser | None],
) -> Card | None:  # fmt: skip
    """The card that a run of ``recipe`` will write, or None, with all checks made that need no weights.

    Args:
        base: the same on the model that the chain starts from. cards: of the earlier stages. elsewhere: as in
            `foresee`. teacher_of: `_teacher`.
    """
    check_batch(recipe.training)
    if not (elsewhere and recipe.lacks_data):
        check_data(recipe)
        check_measured(recipe)
    below = cards[recipe.teacher.path] if recipe.teacher.path in cards else card_at(recipe.teacher.path)
    start = None
    if recipe.init is not None and recipe.init != recipe.teacher.path:
        start = cards[recipe.init] if recipe.init in cards else _outside(recipe, recipe.init)
    teacher = teacher_of(base.teacher)
    if teacher is None:
        return None
    kind = (below and below.prediction_type) or teacher.prediction_type
    method = recipe.method_class()(teacher.schedule.for_network(kind), recipe.method_settings())
    if is_single_file(base.teacher.path):  # its own keys tell what it predicts, and they are not read here
        start = None
    begins = recipe.init not in (None, recipe.teacher.path)
    check_fit(recipe, method, kind, below, start, begins=begins)
    return foreseen_card(recipe, method, kind)


def _outside(recipe: Recipe, init: str) -> Card | None:
    """The card of first weights that are no earlier stage's: of a finished run or a student's folder, if they are."""
    path, student = Path(init), recipe.student
    if path.is_file() or (init in checkpoints() and not path.exists()):
        return None
    card = card_at(init)
    if card is None:
        raise RecipeError(f"init: there is no finished run, student's folder or LoRA file '{init}'.")
    if student.weights == "lora" and card.weights == "full":
        raise RecipeError(f"init: a LoRA of rank {student.rank} cannot start from '{init}', which has full weights.")
    if student.weights == "lora" and card.rank != student.rank:
        raise RecipeError(
            f"init: a LoRA of rank {student.rank} cannot start from '{init}', which has rank {card.rank}."
        )
    return card
