"""What a recipe will need, said before it starts: `fewstep distill --dry-run` and `fewstep doctor --plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fewstep.models.meta_pipeline import MetaPipeline, outline
from fewstep.planning.estimate import Estimate, estimate, seconds_of_step, step_cost
from fewstep.recipe.schema import DTYPES, Recipe, count_pictures
from fewstep.students.lineage import model_behind
from fewstep.training.machine import in_words, memory

_TRY_OUT = 100_000_000  # parameters; on a CPU a step of a larger network would take long


@dataclass(frozen=True)
class Plan:
    """A recipe, its teacher's outline and what the run needs.

    Attributes:
        estimate: memory and calls; None where the teacher's family cannot be distilled.
        why_not: the sentence that says so.
        seconds: of all training steps together; None where no step was tried.
    """

    recipe: Recipe
    outline: MetaPipeline
    estimate: Estimate | None
    why_not: str
    seconds: float | None


def plan(recipe: Recipe, timed: bool = True) -> Plan:
    """MetaPipeline the teacher, rehearse a step, time one on the recipe's device. No weights are read or written.

    Raises:
        ValueError: what the run itself would refuse.
    """
    sketch = _sketch(recipe)
    try:
        sketch.denoiser()
    except ValueError as error:
        return Plan(recipe, sketch, None, str(error), None)
    found = _estimate(recipe, sketch)
    return Plan(recipe, sketch, found, "", _seconds(recipe, sketch, found) if timed else None)


def _sketch(recipe: Recipe) -> MetaPipeline:
    """The teacher's outline; of a student, that of the model it came from."""
    teacher = recipe.teacher
    place = model_behind(teacher.path)
    return outline(place, teacher.size, DTYPES[teacher.dtype], teacher.config)


def cost_of_step(recipe: Recipe) -> float:
    """Forward equivalents of one training step, of all its pictures.

    Raises:
        ValueError: what the run itself would refuse.
    """
    return recipe.training.batch_size * step_cost(
        _sketch(recipe), recipe.method_class(), recipe.method_settings(), recipe.training, recipe.student.build()
    )


def memory_of_step(recipe: Recipe) -> int:
    """Bytes at the peak of a training step on the recipe's device, all that stays between steps included.

    Raises:
        ValueError: what the run itself would refuse.
    """
    return sum(_estimate(recipe, _sketch(recipe)).training.values())


def _estimate(recipe: Recipe, sketch: MetaPipeline) -> Estimate:
    return estimate(
        sketch, recipe.method_class(), recipe.method_settings(), recipe.training, recipe.student.build(),
        count_pictures(recipe), len(recipe.sample.prompts), recipe.pairs.size or 0,
        recipe.teacher.quantize,
    )  # fmt: skip


def _seconds(recipe: Recipe, sketch: MetaPipeline, found: Estimate) -> float | None:
    room = memory(recipe.training.device)
    if room is None or found.peak > room[0]:
        return None
    if torch.device(recipe.training.device).type == "cpu" and found.parameters > _TRY_OUT:
        return None
    method, settings = recipe.method_class(), recipe.training
    return settings.steps * seconds_of_step(sketch, method, recipe.method_settings(), settings, recipe.student.build())


# ---------------------------------------------------------------- what would need less


@dataclass(frozen=True)
class Change:
    """A change of a recipe that lowers the peak of a training step.

    Attributes:
        key, value: as for --set.
        saves: bytes.
        same_run: whether a run that has begun may go on with it: it changes no number beyond rounding.
    """

    key: str
    value: str
    saves: int
    same_run: bool

    def __str__(self) -> str:
        return f"{self.key}={self.value} (saves about {in_words(self.saves)})"


def cheaper(planned: Plan) -> list[Change]:
    """Changes that would lower the peak of this recipe's training step, the most effective first.

    Each is rehearsed like the recipe itself, on its own.
    """
    if planned.estimate is None:
        return []
    now = sum(planned.estimate.training.values())
    changes = []
    for key, value in _candidates(planned.recipe):
        changed = _estimate(_changed(planned.recipe, key, value), planned.outline)
        less = now - sum(changed.training.values())
        if less > 0.005 * now:
            same = key in ("training.accumulation", "training.gradient_checkpointing")
            changes.append(Change(key, str(value).lower(), less, same))
    return sorted(changes, key=lambda change: -change.saves)


def _candidates(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    settings, student = recipe.training, recipe.student
    finer = (n for n in range(settings.accumulation + 1, settings.batch_size + 1) if settings.batch_size % n == 0)
    accumulation = next(finer, None)
    if accumulation is not None:
        yield "training.accumulation", accumulation
    if not settings.gradient_checkpointing:
        yield "training.gradient_checkpointing", True
    if student.weights == "full":
        yield "student.weights", "lora"
    elif student.rank > 8:
        yield "student.rank", student.rank // 2
    if settings.optimizer == "adamw" and settings.precision != "fp64":
        yield "training.optimizer", "adamw8bit"
    if settings.precision != "bf16":
        yield "training.precision", {"fp64": "fp32", "fp32": "bf16"}[settings.precision]


def _changed(recipe: Recipe, key: str, value: Any) -> Recipe:
    room, name = key.split(".")
    if room == "training":
        return recipe.model_copy(update={"training": dataclasses.replace(recipe.training, **{name: value})})
    return recipe.model_copy(update={room: getattr(recipe, room).model_copy(update={name: value})})


# ---------------------------------------------------------------- in words


def describe(planned: Plan) -> list[str]:
    """The plan as lines of text."""
    recipe, settings = planned.recipe, planned.recipe.training
    lines = [_parameters(planned.outline)]
    if planned.estimate is None:
        return [*lines, planned.why_not]
    found = planned.estimate
    calls = ", ".join(f"{role} {count:g}" for role, count in found.calls.items())
    lines += [
        _trained(recipe, found),
        f"network calls per step: {calls}; {found.equivalents:.3g} forward equivalents per picture",
        f"{settings.steps:,} steps of {settings.batch_size} pictures: {_time(planned)}",
        *_sampled(recipe),
        *_memory(found),
    ]
    return lines


def fits(planned: Plan) -> bool:
    """Whether the run can be done on this device as it is now; what is not known is given the benefit of the doubt."""
    found = planned.estimate
    if found is None:
        return False
    room = memory(found.device)
    return room is None or found.peak <= room[0]


def advise(planned: Plan) -> list[str]:
    """What would lower the peak of a step, as lines of text."""
    changes = cheaper(planned)
    if not changes:
        return []
    return ["each of these alone would lower the step's peak:", *(f"  --set {change}" for change in changes)]


def _parameters(sketch: MetaPipeline) -> str:
    parts = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in sketch.parts.items())
    return f"parameters of {sketch.name} ({sketch.kind}): {parts}"


def _trained(recipe: Recipe, found: Estimate) -> str:
    trained = ", ".join(f"{player} {count:,}" for player, count in found.trainable.items())
    how = f"LoRA of rank {recipe.student.rank} on {found.lora_layers} layers" if found.lora_layers else "all weights"
    return f"parameters in training: {trained} ({how})"


def _sampled(recipe: Recipe) -> list[str]:
    """What sampling the teacher costs before training, where it is due."""
    cost, pairs = cost_of_pairs(recipe), recipe.pairs
    if not cost:
        return []
    return [
        f"before that the teacher is sampled: {pairs.size:,} pictures of {pairs.num_inference_steps} steps, up to "
        f"{cost:,} forward equivalents"
    ]


def cost_of_pairs(recipe: Recipe) -> int:
    """Forward equivalents of the teacher's samples that a recipe wants before it trains; 0 where it wants none."""
    pairs = recipe.pairs
    if not recipe.needs_pairs or pairs.size is None:
        return 0
    calls = pairs.num_inference_steps * (2 if pairs.solver == "heun" else 1) * (1 if pairs.guidance_scale == 1.0 else 2)
    return pairs.size * calls


def _time(planned: Plan) -> str:
    if planned.seconds is None:
        return "no step was tried here, so the time is open"
    minutes = planned.seconds / 60
    about = f"{minutes:.0f} minutes" if minutes >= 2 else f"{planned.seconds:.0f} seconds"
    if minutes >= 120:
        about = f"{minutes / 60:.1f} hours"
    return f"about {about} on this {planned.recipe.training.device}; encoding the data and sample grids come on top"


def _memory(found: Estimate) -> list[str]:
    peak = sum(found.training.values())
    room = memory(found.device)
    there = "" if room is None else f", of {in_words(room[0])} free"
    lines = [f"memory on {found.device}, at the peak of a training step: {in_words(peak)}{there}"]
    lines += [f"  {in_words(size):>9}  {name}" for name, size in found.training.items()]
    if found.encoding:
        lines.append(f"while pictures are encoded: {in_words(found.encoding)}")
    if found.sampling:
        lines.append(f"while a sample grid is decoded: {in_words(found.sampling)}")
    if room is not None and found.peak > room[0]:
        lines.append(f"THIS DOES NOT FIT: {in_words(found.peak)} are needed and {in_words(room[0])} are free")
    return lines
