"""Whether the parts of a recipe fit each other, this machine, and the students that it begins with.

A student that a run begins with is known by its card: that of a finished run, or the one that an earlier stage will
write (`foreseen_card`). So a run refuses the same things in the same words as ``--dry-run`` does for all its stages.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from fewstep.data.find import find_captions
from fewstep.data.remote import open_shards
from fewstep.methods.base import Method
from fewstep.methods.guidance import OFF
from fewstep.models.compiled import check_compiler
from fewstep.models.hub import Remark
from fewstep.recipe.schema import Recipe
from fewstep.recipe.validate import RecipeError
from fewstep.sampling import DDIMSampler
from fewstep.students.card import Card, load_card, sampler_of
from fewstep.students.lineage import student_folder
from fewstep.training.optimizers import check_optimizer
from fewstep.training.trackers import check_trackers


def check_machine(recipe: Recipe) -> None:
    """Raises ValueError, one sentence, for a device or a package that the recipe needs and this machine lacks."""
    check_device(recipe.training.device)
    check_optimizer(recipe.training)
    if recipe.training.compile:
        check_compiler(recipe.training.device)
    if recipe.training.offload and torch.device(recipe.training.device).type == "cpu":
        sentence = "training.offload saves no memory on a CPU, where weights are in the host's memory anyway"
        warnings.warn(Remark(f"{sentence}: leave it out there."), stacklevel=2)
    check_trackers(recipe.training.trackers)


def check_data(recipe: Recipe) -> None:
    """Raises ValueError, one sentence, where the data that a recipe names are not there. No image is opened for it."""
    data = recipe.data
    if data.place is not None and data.stream:
        open_shards(data.place)
    elif data.place is not None:
        find_captions(data.place, data.size)


def check_device(name: str) -> None:
    """Raises RecipeError for a device that this machine or this torch does not have."""
    try:
        there = torch.empty(1, device=name).cpu().device.type == "cpu"
    except (RuntimeError, AssertionError, NotImplementedError):
        there = False
    if not there:
        raise RecipeError(f"training.device: there is no device '{name}' here: use cpu, or cuda where torch finds one.")


def card_at(place: str) -> Card | None:
    """The card of the finished run or student at ``place``; None for a model."""
    folder = student_folder(Path(place))
    return None if folder is None else load_card(folder)


def foreseen_card(recipe: Recipe, method: Method, kind: str) -> Card:
    """The card that a run of ``recipe`` will write, as far as its words tell.

    Args:
        kind: prediction type of the teacher.
    """
    spec = next(s for s in method.roles() if s.name == "student")
    guidance = method.teacher_guidance(method.settings) or OFF
    wanted, few = method.sampling(method.settings), recipe.sample.num_inference_steps
    is_lora = recipe.student.weights == "lora"
    return Card(
        method=method.name,
        sampler=recipe.sample.sampler or method.sampler,
        num_inference_steps=few,
        eta=recipe.sample.eta,
        guidance_scale=wanted.guidance_scale,
        timesteps=wanted.timesteps,
        prediction_type=spec.prediction_type or kind,
        original_inference_steps=method.original_inference_steps(method.settings) or Card.original_inference_steps,
        weights=recipe.student.weights,
        rank=recipe.student.rank if is_lora else 0,
        teacher=recipe.teacher.path,
        extra_inputs=spec.extra_inputs,
        bank=spec.bank,
        bank_steps=wanted.trained_steps if spec.bank else (),
        guidance_embed=guidance.mean if "guidance_embed" in spec.extra_inputs else recipe.teacher.guidance_embed,
        image_size=recipe.teacher.size,
    )


def check_fit(
    recipe: Recipe, method: Method, kind: str, below: Card | None, start: Card | None, *, begins: bool
) -> None:
    """Refuse what would fail after hours, or train something else without a word.

    Args:
        method: on the teacher's schedule. kind: the teacher's prediction type.
        below, start: cards of the teacher and of the first weights, where these are students.
        begins: whether there are first weights other than the teacher's.

    Raises:
        RecipeError: one sentence: an opponent that cannot judge the images' shapes, weights of another prediction
            type, a teacher of another sampler, a sampler that does not fit the schedule.
    """
    _check_buckets(recipe, method)
    _check_starts(recipe, method)
    _check_teacher(recipe, method, below)
    _check_kind(recipe, method, kind, start, begins)
    _check_bank(recipe, method, start)
    _check_extras(recipe, method, start)
    _check_times(recipe, method)
    few, many = recipe.sample.num_inference_steps, recipe.sample.teacher_steps
    own = sampler_of(foreseen_card(recipe, method, kind))
    for sampler in (own, DDIMSampler(num_inference_steps=few), DDIMSampler(num_inference_steps=many)):
        try:
            sampler.times(method.schedule)
        except ValueError as error:
            raise RecipeError(f"The samplers of this recipe do not fit its method and teacher: {error}") from None


def _check_buckets(recipe: Recipe, method: Method) -> None:
    """A head that ends in one logit of a 4x4 map cannot judge elongated ones."""
    if recipe.data.aspect_buckets and method.head_needs_squares:
        instead = "set method.head to residual, or leave" if "head" in method.setting_names() else "leave"
        raise RecipeError(f"data.aspect_buckets: the discriminator of {method.name} needs squares: {instead} them out.")


def _check_starts(recipe: Recipe, method: Method) -> None:
    """Say that a player never learns, whose first step is after the run's end; a short trial may want no more."""
    for player in method.players:
        if player.start and player.start >= recipe.training.steps:
            warnings.warn(
                f"method.{player.name}_start ({player.start:,}) is not below training.steps "
                f"({recipe.training.steps:,}): the {player.name} will not learn in this run.",
                Remark,
                stacklevel=2,
            )


def _check_teacher(recipe: Recipe, method: Method, card: Card | None) -> None:
    """A student that is conditioned on more than its prompt cannot teach; one that is continued keeps its sampler."""
    if card is None:
        return
    name = recipe.teacher.path
    if card.beside_weights:
        raise RecipeError(
            f"The student of {name} has {card.beside_weights} and cannot be a teacher: train it without them, or let "
            "it be the init of the next run."
        )
    if method.continues and card.sampler != method.sampler:
        raise RecipeError(
            f"method.sampler is {method.sampler}, but its teacher '{name}' is a student for the sampler "
            f"{card.sampler}: set method.sampler to {card.sampler}."
        )


def _check_kind(recipe: Recipe, method: Method, kind: str, start: Card | None, begins: bool) -> None:
    """Weights that were trained for one prediction type must not be read as another, unless converting is the task."""
    mine = next(spec.prediction_type for spec in method.roles() if spec.name == "student") or kind
    before = "" if start is None else start.prediction_type
    if before and before != mine:
        raise RecipeError(f"init: the student '{recipe.init}' predicts {before}, but this method's predicts {mine}.")
    if not begins and mine != kind and not method.converts:
        raise RecipeError(
            f"init: a student that is to predict {mine} cannot begin with weights that predict {kind}: train one "
            "with loss convert first, and begin with that."
        )


def _check_bank(recipe: Recipe, method: Method, start: Card | None) -> None:
    """Last layers that were trained for one grid must not be read as those of another."""
    mine = next(spec.bank for spec in method.roles() if spec.name == "student")
    if start is not None and start.bank and start.bank != mine:
        instead = f"this one has {len(mine) - 1} on other times" if mine else f"a student of {method.name} has one"
        raise RecipeError(
            f"init: the student '{recipe.init}' has {len(start.bank) - 1} last layers for its own times, and "
            f"{instead}: begin with a student of another method, or take the settings of that run."
        )


def _check_extras(recipe: Recipe, method: Method, start: Card | None) -> None:
    """First weights that are conditioned on more than this method's student have no place in it."""
    mine = next(spec.extra_inputs for spec in method.roles() if spec.name == "student")
    names = sorted(set(start.extra_inputs) - set(mine)) if start is not None else []
    if names:
        settings = {"end": "tell_end", "guidance_embed": "guidance_embed"}
        found = [settings[name] for name in names if settings.get(name) in method.setting_names()]
        remedy = f"set method.{found[0]} to true" if found else "begin with a student without it"
        raise RecipeError(
            f"init: the student '{recipe.init}' is conditioned on {' and '.join(names)}, and this one of "
            f"{method.name} is not: {remedy}."
        )


def _check_times(recipe: Recipe, method: Method) -> None:
    """A student of times of its own takes as many steps, by any sampler."""
    times, few = method.sampling(method.settings).timesteps, recipe.sample.num_inference_steps
    if times and len(times) != few:
        listed = ", ".join(f"{time:g}" for time in times)
        raise RecipeError(
            f"sample.num_inference_steps is {few}, but this student is trained at the times {listed}: set it to "
            f"{len(times)}."
        )
