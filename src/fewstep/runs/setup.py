"""A recipe made ready to run: its teacher, its method, its roles."""

from __future__ import annotations

from collections.abc import Mapping
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
from fewstep.models.lora_files import is_lora
from fewstep.models.roles import Roles
from fewstep.recipe.schema import DTYPES, Recipe, RecipeError, as_yaml
from fewstep.sampling import DDIMSampler
from fewstep.students.lineage import load_start, open_teacher, origin_of, student_folder
from fewstep.students.student import Card, load_card, sampler_of
from fewstep.training.optimizers import check_optimizer
from fewstep.training.trackers import check_trackers
from fewstep.training.trainer import build_roles, check_batch


@dataclass
class Run:
    """A run, made ready: its parts can be used one by one.

    Attributes:
        recipe, folder: what to do, and where.
        teacher, method, roles: what takes part.
        earlier: what each run that it builds on has cost, in forward equivalents, as in `Card.costs`.
        sampled: what the samples of its teacher have cost.
    """

    recipe: Recipe
    folder: Path
    teacher: Teacher
    method: Method
    roles: Roles
    earlier: dict[str, float] = field(default_factory=dict)
    sampled: float = 0.0

    @property
    def mark(self) -> str:
        """Of the recipe and of what it builds on."""
        return text_hash("\n".join([as_yaml(self.recipe), *sorted(self.earlier)]))

    @property
    def role(self) -> str:
        """The role that is sampled and exported: the student's average where there is one."""
        return "ema" if "ema" in self.roles else "student"

    def card(self, steps: int, cost: float = 0.0) -> Card:
        """How to sample from the student after ``steps`` steps of training, which have cost ``cost``."""
        recipe, student = self.recipe, self.recipe.student
        spec = next(s for s in self.method.roles() if s.name == "student")
        method, settings = self.method, self.method.settings
        guidance = method.teacher_guidance(settings) or OFF
        wanted, few = method.sampling(settings), recipe.sample.num_inference_steps
        costs = {**self.earlier, self.mark: self.sampled + cost}
        told_when = wanted.timesteps if recipe.sample.sampler is None or len(wanted.timesteps) == few else ()
        return Card(
            method=self.method.name,
            sampler=recipe.sample.sampler or self.method.sampler,
            num_inference_steps=few,
            eta=recipe.sample.eta,
            guidance_scale=wanted.guidance_scale,
            timesteps=told_when,
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


def prepare(recipe: Recipe, folder: Path, earlier: Mapping[str, Path] | None = None) -> Run:
    """Load the teacher and build the roles of a recipe; ``earlier`` as in `distill`.

    Raises:
        ValueError: one sentence, for what would otherwise fail after hours: a device that is not there, a sampler that
            does not fit the schedule, a teacher of another family.
    """
    settings = recipe.training
    check_device(settings.device)
    check_batch(settings)
    check_optimizer(settings)
    check_trackers(settings.trackers)
    if recipe.data.place is not None:
        find_captions(recipe.data.place, 1)
    teacher, init, costs = _beginning(recipe, folder, earlier or {})
    method = recipe.method_class()(teacher.denoiser.schedule, recipe.method_settings())
    _check_buckets(recipe, method)
    _check_sampler(recipe, method, earlier or {})
    checkpointing = settings.gradient_checkpointing
    origin, helpers = None, teacher.helpers(method.encoder, checkpointing, method.rewards, method.measures)
    if any(spec.features_only for spec in method.roles()):
        origin = origin_of(str((earlier or {}).get(recipe.teacher.path, recipe.teacher.path)))
    student = recipe.student.build()
    roles = build_roles(teacher.denoiser, method, settings, student, recipe.seed, init, origin, helpers)
    _check_kind(recipe, roles, method.converts, earlier or {})
    job = Run(recipe, folder, teacher, method, roles, costs)
    few = recipe.sample.num_inference_steps
    many = recipe.sample.teacher_steps
    for sampler in (
        sampler_of(job.card(0)),
        DDIMSampler(num_inference_steps=few),
        DDIMSampler(num_inference_steps=many),
    ):
        try:
            sampler.times(teacher.denoiser.schedule)
        except ValueError as error:
            raise RecipeError(f"The samplers of this recipe do not fit its method and teacher: {error}") from None
    return job


def _beginning(
    recipe: Recipe, folder: Path, earlier: Mapping[str, Path]
) -> tuple[Teacher, dict[str, torch.Tensor] | None, dict[str, float]]:
    """(teacher, the student's first weights or None, what each of the runs behind them has cost)."""
    config, device = recipe.teacher, recipe.training.device
    at = earlier.get(config.path)
    teacher = open_teacher(
        str(at or config.path), config.loras, device, dtype=DTYPES[config.dtype], size=config.size,
        guidance_embed=config.guidance_embed, vae_tiling=config.vae_tiling, config=config.config,
        quantization=config.quantize,
    )  # fmt: skip
    if at is not None:  # as the student's card says it: the run may move
        teacher = replace(teacher, name=f"../../{at.parent.name}/student")
    if recipe.init is None:
        begun = None
    else:
        begun = _start(recipe, str(earlier.get(recipe.init, recipe.init)), teacher, str(at or config.path))
    places = {p for p in (at or config.path, earlier.get(recipe.init or "", recipe.init)) if p is not None}
    found = [folder for folder in (student_folder(Path(p)) for p in sorted(map(str, places))) if folder is not None]
    costs: dict[str, float] = {}
    for card in map(load_card, found):
        costs |= card.costs or {text_hash(repr(card)): card.forward_equivalents}  # a card that does not keep them apart
    return teacher, begun, costs


def _check_buckets(recipe: Recipe, method: Method) -> None:
    """A head that ends in one logit of a 4x4 map has no use for elongated ones."""
    if recipe.data.aspect_buckets and method.head_needs_squares:
        instead = "set method.head to residual, or leave" if "head" in method.setting_names() else "leave"
        raise RecipeError(f"data.aspect_buckets: the discriminator of {method.name} sees squares: {instead} them out.")


def _check_kind(recipe: Recipe, roles: Roles, converts: bool, earlier: Mapping[str, Path]) -> None:
    """Weights that were trained to predict one thing must not be read as another, unless that is what is trained."""
    mine, theirs = roles.student.prediction_type, roles.teacher.prediction_type
    found = None if recipe.init is None else student_folder(Path(earlier.get(recipe.init, recipe.init)))
    before = "" if found is None else load_card(found).prediction_type
    if before and before != mine:
        raise RecipeError(f"init: the student '{recipe.init}' predicts {before}, but this method's predicts {mine}.")
    if recipe.init is None and mine != theirs and not converts:
        raise RecipeError(
            f"init: a student that is to predict {mine} cannot begin with weights that predict {theirs}: train one "
            "with loss convert first, and begin with that."
        )


def _check_sampler(recipe: Recipe, method: Method, earlier: Mapping[str, Path]) -> None:
    """What goes on with a few-step student draws from it as that student wants."""
    folder = student_folder(Path(earlier.get(recipe.teacher.path, recipe.teacher.path)))
    if not method.continues or folder is None:
        return
    card = load_card(folder)
    if card.sampler != method.sampler:
        raise RecipeError(
            f"method.sampler is {method.sampler}, but its teacher '{recipe.teacher.path}' is a student that is drawn "
            f"from by {card.sampler}: set method.sampler to {card.sampler}."
        )


def _start(recipe: Recipe, init: str, teacher: Teacher, path: str) -> dict[str, torch.Tensor]:
    """The student's first weights: a published checkpoint's, another program's LoRA file's, or those of a run."""
    student = recipe.student
    if init in checkpoints() and not Path(init).exists():
        return start_weights(checkpoints()[init], teacher, student.weights, student.rank)
    if Path(init).is_file() and is_lora(Path(init)):
        return lora_start(init, Path(init), teacher, student.weights, student.rank)
    return load_start(init, path, student.weights)


def check_device(name: str) -> None:
    """Raises RecipeError for a device that this machine or this torch does not have."""
    try:
        there = torch.empty(1, device=name).cpu().device.type == "cpu"
    except (RuntimeError, AssertionError, NotImplementedError):
        there = False
    if not there:
        raise RecipeError(f"training.device: there is no device '{name}' here: use cpu, or cuda where torch finds one.")
