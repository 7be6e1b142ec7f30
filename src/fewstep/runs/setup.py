"""From a recipe to a run: load the teacher, build the method and its roles, refuse what could only fail later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fewstep.checkpoints.load import lora_start, start_weights
from fewstep.checkpoints.registry import checkpoints
from fewstep.data.files import text_hash
from fewstep.data.find import find_captions
from fewstep.methods.base import Method
from fewstep.methods.guidance import OFF
from fewstep.models.families import Teacher
from fewstep.models.hub import DTYPES
from fewstep.models.lora_files import is_lora
from fewstep.models.roles import Roles
from fewstep.recipe.schema import Recipe
from fewstep.recipe.validate import RecipeError
from fewstep.runs.folder import RunFolder
from fewstep.sampling import DDIMSampler
from fewstep.students.card import Card, load_card, sampler_of
from fewstep.students.lineage import load_start, open_teacher, origin_of, student_folder
from fewstep.training.optimizers import check_optimizer
from fewstep.training.trackers import check_trackers
from fewstep.training.trainer import build_roles, check_batch


@dataclass
class Run:
    """A run that is ready to train; its parts can be used one by one.

    Attributes:
        recipe, folder: the resolved recipe and the run directory.
        teacher, method, roles: the networks, and the method that trains them.
        earlier: cost in forward passes of each run that this one builds on, as in `Card.costs`.
        sampled: cost in forward passes of the teacher's samples.
    """

    recipe: Recipe
    folder: RunFolder
    teacher: Teacher
    method: Method
    roles: Roles
    earlier: dict[str, float] = field(default_factory=dict)
    sampled: float = 0.0

    @property
    def fingerprint(self) -> str:
        """Hash of the recipe and of the runs that it builds on."""
        return text_hash("\n".join([self.recipe.as_yaml(), *sorted(self.earlier)]))

    @property
    def role(self) -> str:
        """The role that is sampled and exported: the moving average of the student where there is one."""
        return "ema" if "ema" in self.roles else "student"

    def card(self, steps: int, cost: float = 0.0) -> Card:
        """How to sample from the student after ``steps`` training steps, which have cost ``cost`` forward passes."""
        recipe, student = self.recipe, self.recipe.student
        spec = next(s for s in self.method.roles() if s.name == "student")
        method, settings = self.method, self.method.settings
        guidance = method.teacher_guidance(settings) or OFF
        wanted, few = method.sampling(settings), recipe.sample.num_inference_steps
        costs = {**self.earlier, self.fingerprint: self.sampled + cost}
        fits = recipe.sample.sampler is None or len(wanted.timesteps) == few  # as many timesteps as steps
        return Card(
            method=self.method.name,
            sampler=recipe.sample.sampler or self.method.sampler,
            num_inference_steps=few,
            eta=recipe.sample.eta,
            guidance_scale=wanted.guidance_scale,
            timesteps=wanted.timesteps if fits else (),
            prediction_type=self.roles.student.prediction_type,
            original_inference_steps=method.original_inference_steps(settings) or Card.original_inference_steps,
            weights=student.weights,
            rank=student.rank if student.weights == "lora" else 0,
            teacher=self.teacher.name,
            extra_inputs=spec.extra_inputs,
            guidance_embed=guidance.mean if "guidance_embed" in spec.extra_inputs else self.teacher.guidance_embed,
            image_size=self.teacher.size,
            steps=steps,
            forward_equivalents=sum(costs.values()),
            costs=costs,
        )


def setup(recipe: Recipe, folder: Path, earlier: Mapping[str, Path] | None = None) -> Run:
    """Load the teacher and build the roles of a recipe; ``earlier`` as in `distill`. Writes nothing.

    Raises:
        ValueError: one sentence, for what would otherwise fail after hours: a device that does not exist, a sampler
            that does not fit the schedule, a teacher of another family.
    """
    settings = recipe.training
    check_device(settings.device)
    check_batch(settings)
    check_optimizer(settings)
    check_trackers(settings.trackers)
    if recipe.data.place is not None:
        find_captions(recipe.data.place, 1)
    # Earlier stages are called by name: from here on both are places.
    source = str((earlier or {}).get(recipe.teacher.path, recipe.teacher.path))
    init = None if recipe.init is None else str((earlier or {}).get(recipe.init, recipe.init))

    teacher = _teacher(recipe, source)
    begun = None if init is None else _first_weights(recipe, init, teacher, source)
    method = recipe.method_class()(teacher.denoiser.schedule, recipe.method_settings())
    _check_buckets(recipe, method)
    _check_sampler(recipe, method, source)

    origin = origin_of(source) if any(spec.features_only for spec in method.roles()) else None
    helpers = teacher.helpers(method.encoder, settings.gradient_checkpointing, method.rewards, method.measures)
    student = recipe.student.build()
    roles = build_roles(teacher.denoiser, method, settings, student, recipe.seed, begun, origin, helpers)
    _check_kind(recipe, roles, method.converts, init)

    run = Run(recipe, RunFolder(folder), teacher, method, roles, _costs({source} if init is None else {source, init}))
    own, few, many = sampler_of(run.card(0)), recipe.sample.num_inference_steps, recipe.sample.teacher_steps
    for sampler in (own, DDIMSampler(num_inference_steps=few), DDIMSampler(num_inference_steps=many)):
        try:
            sampler.times(teacher.denoiser.schedule)
        except ValueError as error:
            raise RecipeError(f"The samplers of this recipe do not fit its method and teacher: {error}") from None
    return run


def _teacher(recipe: Recipe, source: str) -> Teacher:
    """The recipe's teacher, which is at ``source``."""
    config = recipe.teacher
    teacher = open_teacher(
        source, config.loras, recipe.training.device, dtype=DTYPES[config.dtype], size=config.size,
        guidance_embed=config.guidance_embed, vae_tiling=config.vae_tiling, config=config.config,
        quantization=config.quantize,
    )  # fmt: skip
    if source == config.path:
        return teacher
    # A card names an earlier stage as seen from the student's folder, so that the whole run may move.
    return replace(teacher, name=str(Path("..", "..", *Path(source).parts[-2:])))


def _first_weights(recipe: Recipe, init: str, teacher: Teacher, source: str) -> dict[str, torch.Tensor]:
    """The student's first weights: a published checkpoint's, another program's LoRA file's, or those of a run."""
    student = recipe.student
    if init in checkpoints() and not Path(init).exists():
        return start_weights(checkpoints()[init], teacher, student.weights, student.rank)
    if Path(init).is_file() and is_lora(Path(init)):
        return lora_start(init, Path(init), teacher, student.weights, student.rank)
    return load_start(init, source, student.weights)


def _costs(places: Iterable[str]) -> dict[str, float]:
    """Cost of each run behind the students at ``places``, by its fingerprint: what two of them share counts once."""
    costs: dict[str, float] = {}
    for folder in filter(None, (student_folder(Path(place)) for place in sorted(places))):
        card = load_card(folder)
        costs |= card.costs or {text_hash(repr(card)): card.forward_equivalents}  # an old card has the sum alone
    return costs


def _check_buckets(recipe: Recipe, method: Method) -> None:
    """A head that ends in one logit of a 4x4 map cannot judge elongated ones."""
    if recipe.data.aspect_buckets and method.head_needs_squares:
        instead = "set method.head to residual, or leave" if "head" in method.setting_names() else "leave"
        raise RecipeError(f"data.aspect_buckets: the discriminator of {method.name} needs squares: {instead} them out.")


def _check_kind(recipe: Recipe, roles: Roles, converts: bool, init: str | None) -> None:
    """Weights that were trained for one prediction type must not be read as another, unless converting is the task."""
    mine, theirs = roles.student.prediction_type, roles.teacher.prediction_type
    found = None if init is None else student_folder(Path(init))
    before = "" if found is None else load_card(found).prediction_type
    if before and before != mine:
        raise RecipeError(f"init: the student '{recipe.init}' predicts {before}, but this method's predicts {mine}.")
    if recipe.init is None and mine != theirs and not converts:
        raise RecipeError(
            f"init: a student that is to predict {mine} cannot begin with weights that predict {theirs}: train one "
            "with loss convert first, and begin with that."
        )


def _check_sampler(recipe: Recipe, method: Method, source: str) -> None:
    """A method that continues a few-step student must sample it by that student's own sampler."""
    folder = student_folder(Path(source))
    if not method.continues or folder is None:
        return
    card = load_card(folder)
    if card.sampler != method.sampler:
        raise RecipeError(
            f"method.sampler is {method.sampler}, but its teacher '{recipe.teacher.path}' is a student for the sampler "
            f"{card.sampler}: set method.sampler to {card.sampler}."
        )


def check_device(name: str) -> None:
    """Raises RecipeError for a device that this machine or this torch does not have."""
    try:
        there = torch.empty(1, device=name).cpu().device.type == "cpu"
    except (RuntimeError, AssertionError, NotImplementedError):
        there = False
    if not there:
        raise RecipeError(f"training.device: there is no device '{name}' here: use cpu, or cuda where torch finds one.")
