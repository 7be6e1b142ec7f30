"""From a recipe to a run: load the teacher, build the method and its roles, refuse what could only fail later."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fewstep.checkpoints.copies import copy_of
from fewstep.checkpoints.load import lora_start, start_weights
from fewstep.checkpoints.registry import checkpoints
from fewstep.data.files import text_hash
from fewstep.methods.base import Method
from fewstep.models.families import Teacher
from fewstep.models.hub import DTYPES, Remark
from fewstep.models.lora_files import is_lora, lora_file
from fewstep.models.roles import Roles
from fewstep.recipe.schema import Recipe
from fewstep.runs.fit import card_at, check_data, check_fit, check_machine, foreseen_card
from fewstep.runs.folder import RunFolder
from fewstep.students.card import Card, load_card
from fewstep.students.lineage import (
    is_pipeline,
    load_start,
    open_teacher,
    origin_of,
    same_student,
    student_folder,
)
from fewstep.training import distributed
from fewstep.training.progress import doing
from fewstep.training.run_files import refuse_missing_run
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
        costs = {**self.earlier, self.fingerprint: self.sampled + cost}
        card = foreseen_card(self.recipe, self.method, self.teacher.denoiser.prediction_type)
        embedded = "guidance_embed" in card.extra_inputs
        return replace(
            card,
            teacher=self.teacher.name,
            guidance_embed=card.guidance_embed if embedded else self.teacher.guidance_embed,
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
    check_machine(recipe)
    check_batch(settings)
    check_data(recipe)
    # Earlier stages are called by name: from here on both are places.
    source = str((earlier or {}).get(recipe.teacher.path, recipe.teacher.path))
    init = None if recipe.init is None else str((earlier or {}).get(recipe.init, recipe.init))
    if init is not None and same_student(init, source):
        init = None  # it begins as its teacher anyway

    with doing("loading the teacher"):
        teacher = _teacher(recipe, source)
        begun = None if init is None else _first_weights(recipe, init, teacher, source)
    method = recipe.method_class()(teacher.denoiser.schedule, recipe.method_settings())
    _remark_on_guidance(source, teacher, method)
    below, start = card_at(source), None if init is None else card_at(init)
    check_fit(recipe, method, teacher.denoiser.prediction_type, below, start, begins=init is not None)

    origin = origin_of(source) if any(spec.features_only for spec in method.roles()) else None
    helpers = teacher.helpers(method.encoder, settings.gradient_checkpointing, method.rewards, method.measures)
    student = recipe.student.build()
    roles = build_roles(teacher.denoiser, method, settings, student, recipe.seed, begun, origin, helpers)
    return Run(recipe, RunFolder(folder), teacher, method, roles, _costs({source} if init is None else {source, init}))


def _remark_on_guidance(source: str, teacher: Teacher, method: Method) -> None:
    """Say so where classifier-free guidance is put on a few-step teacher, which was not made for it."""
    wanted, entry = method.teacher_guidance(method.settings), copy_of(source)
    embeds = teacher.guidance_embed is not None and teacher.family.closes_guidance
    most = 1.0 if embeds else (entry.guidance_range or (1.0, entry.guidance_scale or 1.0))[1] if entry else math.inf
    if wanted is not None and wanted.high > most:
        instead = ", and teacher.guidance_embed to the scale that it embeds" if embeds else ""
        sentence = f"The teacher {source} is a few-step model, made for guidance of {most:g} at most (1 is off): set "
        warnings.warn(Remark(f"{sentence}method.guidance_scale to that{instead}."), stacklevel=3)


def _teacher(recipe: Recipe, source: str) -> Teacher:
    """The recipe's teacher, which is at ``source``."""
    config, device = recipe.teacher, recipe.training.device
    teacher = open_teacher(
        source, config.loras, "cpu" if recipe.training.offload else device,
        dtype=DTYPES[config.dtype], size=config.size, guidance_embed=config.guidance_embed,
        vae_tiling=config.vae_tiling, config=config.config, quantization=config.quantize, later=_may_wait(recipe),
    )  # fmt: skip
    if recipe.training.offload:
        teacher.offload(device)
    if source == config.path:
        return teacher
    # A card names an earlier stage as seen from the student's folder, so that the whole run may move.
    return replace(teacher, name=str(Path("..", "..", *Path(source).parts[-2:])))


def _may_wait(recipe: Recipe) -> bool:
    """Whether the teacher's weights may stay in their files until they are spread over processes.

    They are needed before that where the teacher is sampled, where weights begin as another model's, and by LoRAs.
    """
    adapted = recipe.student.weights == "lora" or recipe.method.get("discriminator_weights") == "lora"
    spread = recipe.training.fsdp and distributed.count() > 1 and not adapted
    return spread and not recipe.needs_pairs and not recipe.evaluate.every and recipe.init is None


def _first_weights(recipe: Recipe, init: str, teacher: Teacher, source: str) -> dict[str, torch.Tensor]:
    """The student's first weights: a published checkpoint's, another program's LoRA file's, or those of a run."""
    refuse_missing_run(init)
    student = recipe.student
    if init in checkpoints() and not Path(init).exists():
        return start_weights(checkpoints()[init], teacher, student.weights, student.rank)
    path = Path(init)
    if not is_pipeline(path) and student_folder(path) is None and any(path.glob("*.safetensors")):
        path = lora_file(path)
    if path.is_file() and is_lora(path):
        return lora_start(init, path, teacher, student.weights, student.rank)
    return load_start(init, source, student.weights)


def _costs(places: Iterable[str]) -> dict[str, float]:
    """Cost of each run behind the students at ``places``, by its fingerprint: what two of them share counts once."""
    costs: dict[str, float] = {}
    for folder in filter(None, (student_folder(Path(place)) for place in sorted(places))):
        card = load_card(folder)
        costs |= card.costs or {text_hash(repr(card)): card.forward_equivalents}  # an old card has the sum alone
    return costs
