"""What a recipe needs, estimated before it starts: `fewstep distill --dry-run` and `fewstep doctor --plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fewstep.export.possible import obstacle
from fewstep.methods.base import Method
from fewstep.models.meta_pipeline import MetaPipeline
from fewstep.models.roles import Weights
from fewstep.planning.estimate import Estimate, estimate, seconds_of_step, step_cost
from fewstep.planning.hardware import UTILISATION, durations, smallest
from fewstep.recipe.chain import Chain, Stage
from fewstep.recipe.resume import may_change
from fewstep.recipe.schema import Recipe
from fewstep.runs.fit import foreseen_card
from fewstep.runs.foresee import foresee, missing_here, outline_of
from fewstep.runs.measured_on import measuring_of, needs_teacher_images
from fewstep.students.card import Card
from fewstep.students.lineage import model_behind
from fewstep.training.machine import in_words, memory
from fewstep.training.progress import doing
from fewstep.training.settings import TrainingSettings

_IMAGES = 1000
"""Assumed where the data are not here. Encoded data lie on the disk, so their number hardly matters."""
_LARGEST_TIMED = 100_000_000  # parameters; on a CPU a step of a larger network would take long


@dataclass(frozen=True)
class Plan:
    """A recipe, its teacher without weights, and what the run needs.

    Attributes:
        outline: the teacher's pipeline on the meta device.
        estimate: memory and network calls; None where the teacher's family cannot be distilled.
        why_not: the reason, a sentence, where there is no estimate.
        seconds: time of all training steps; None where no step was timed.
        reference: bytes while the model behind the teacher, a student, generates the images of reference; 0 where it
            need not.
    """

    recipe: Recipe
    outline: MetaPipeline
    estimate: Estimate | None
    why_not: str
    seconds: float | None
    reference: int = 0

    @property
    def peak(self) -> int:
        """The most bytes that the run holds at any time; 0 where that is not known."""
        return 0 if self.estimate is None else max(self.estimate.peak, self.reference)


def plan(recipe: Recipe, timed: bool = True, on_student: bool = False) -> Plan:
    """Trace the memory of a step without weights, and time one on the recipe's device. No weights are read or written.

    Args:
        on_student: its teacher will be a student, of an earlier stage that ``recipe`` does not name.

    Raises:
        ValueError: what the run itself would refuse.
    """
    teacher = outline_of(recipe)
    try:
        teacher.denoiser()
    except ValueError as error:
        return Plan(recipe, teacher, None, str(error), None)
    with doing("tracing a training step without weights"):
        found = _estimate(recipe, teacher)
    with doing("timing training steps"):
        seconds = _seconds(recipe, teacher, found) if timed else None
    return Plan(recipe, teacher, found, "", seconds, _reference(recipe, teacher, found, on_student))


def dry_run(recipe: Recipe | Chain) -> str:
    """The resolved recipe, followed in comments by what it, or each of its stages, needs.

    Raises:
        ValueError: what the run itself would refuse, in any of its stages.
    """
    foresee(recipe, elsewhere=True)
    lines = [recipe.as_yaml().rstrip()]
    if isinstance(recipe, Chain):
        for stage in (stage for stage in recipe.stages if stage.recipe is not None):
            planned = _plan_stage(stage, recipe)
            lines += [f"# stage {stage.name}", *(f"#   {line}" for line in describe(planned))]
    else:
        lines += [f"# {line}" for line in describe(plan(recipe))]
    return "\n".join([*lines, *(f"# NOT ON THIS MACHINE: {sentence}" for sentence in missing_here(recipe))])


def _plan_stage(stage: Stage, chain: Chain) -> Plan:
    """The plan of a stage that trains, on the model behind its teacher, held as the stage holds its teacher."""
    own, first = stage.recipe, chain.on_first_teacher()[stage.name]
    assert own is not None
    held = {key: getattr(own.teacher, key) for key in ("dtype", "quantize", "vae_tiling")}
    held["size"] = own.teacher.size or first.teacher.size
    on_first = first.model_copy(update={"teacher": first.teacher.model_copy(update=held)})
    return plan(on_first, on_student=own.teacher.path in {each.name for each in chain.stages})


def cost_of_step(recipe: Recipe) -> float:
    """Forward passes of one training step, of its whole batch; a backward pass counts as 2.

    Raises:
        ValueError: what the run itself would refuse.
    """
    return recipe.training.batch_size * step_cost(outline_of(recipe), *_training(recipe))


def cost_of_pairs(recipe: Recipe) -> int:
    """Forward passes of the teacher's samples that a recipe needs before it trains; 0 where it needs none, or where
    their number follows from data that are not here."""
    return recipe.pairs.cost if recipe.needs_pairs and recipe.pairs.size else 0


def memory_of_step(recipe: Recipe) -> int:
    """Bytes at the peak of a training step on the recipe's device, with everything that stays between steps.

    Raises:
        ValueError: what the run itself would refuse.
    """
    return sum(_estimate(recipe, outline_of(recipe), memory_alone=True).training.values())


def _training(recipe: Recipe) -> tuple[type[Method], Any, TrainingSettings, Weights]:
    """The sections of a recipe that determine a training step."""
    return recipe.method_class(), recipe.method_settings(), recipe.training, recipe.student.build()


def _estimate(recipe: Recipe, teacher: MetaPipeline, **known: Any) -> Estimate:
    measuring = None
    if recipe.evaluate.every:
        measuring = measuring_of(recipe, teacher.image_size or 0, _card(recipe, teacher))
    images = _IMAGES if recipe.lacks_data else recipe.captions()
    pairs = (recipe.pairs.size or images) if recipe.needs_pairs else 0
    return estimate(
        teacher, *_training(recipe),
        images, len(recipe.sample.prompts), pairs, recipe.teacher.quantize,
        measuring=measuring, live=recipe.data.live, stream=recipe.data.stream, **known,
    )  # fmt: skip


def _reference(recipe: Recipe, teacher: MetaPipeline, found: Estimate, on_student: bool) -> int:
    """Bytes while a second model, with its text encoders, generates images before there is an optimiser."""
    later = on_student or model_behind(recipe.teacher.path) != recipe.teacher.path
    if not (later and recipe.evaluate.every and needs_teacher_images(recipe, teacher.image_size or 0)):
        return 0
    passing = ("optimiser", "gradients", "activations", "fragmentation (assumed)", "text encoders")
    between = sum(size for name, size in found.training.items() if name not in passing)
    beside = [part for part in teacher.parts.values() if part is not teacher.base]
    whole = sum(t.nbytes for part in beside for t in part.parameters())
    return between + found.training["the teacher's network"] + found.host + 2 * whole


def _seconds(recipe: Recipe, teacher: MetaPipeline, found: Estimate) -> float | None:
    room = memory(recipe.training.device)
    if room is None or found.peak > room[0]:
        return None
    if torch.device(recipe.training.device).type == "cpu" and found.parameters > _LARGEST_TIMED:
        return None
    return recipe.training.steps * seconds_of_step(teacher, *_training(recipe))


# ---------------------------------------------------------------- what would need less


@dataclass(frozen=True)
class Change:
    """A change of a recipe that lowers the peak memory of a training step.

    Attributes:
        key, value: as for --set.
        saves: bytes.
    """

    key: str
    value: str
    saves: int

    @property
    def same_run(self) -> bool:
        """Whether a run that has begun may be resumed with it."""
        return may_change(self.key)

    def __str__(self) -> str:
        return f"{self.key}={self.value} (saves about {in_words(self.saves)})"


def cheaper(planned: Plan) -> list[Change]:
    """Changes that would lower the peak of this recipe's training step, the most effective first, each traced alone."""
    if planned.estimate is None:
        return []
    now = sum(planned.estimate.training.values())
    changes = []
    for key, value in candidates(planned.recipe):
        known = {"step": planned.estimate.rehearsal} if key in _SAME_STEP else {"memory_alone": True}
        with doing(f"tracing {key}={value}"):
            found = _estimate(changed(planned.recipe, key, value), planned.outline, **known)
        less = now - sum(found.training.values())
        if less > 0.005 * now:
            changes.append(Change(key, str(value).lower(), less))
    return sorted(changes, key=lambda change: -change.saves)


_SAME_STEP = ("teacher.quantize", "training.optimizer", "data.text")  # they change what is held between steps alone


def candidates(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """(key, value) of the next change in each direction that may lower the peak of this recipe."""
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
    coarser = {None: "int8", "int8": "nf4"}.get(recipe.teacher.quantize)
    if student.weights == "lora" and coarser is not None and not settings.fsdp:
        yield "teacher.quantize", coarser
    beside = settings.offload or settings.compile or settings.fsdp
    if not beside and torch.device(settings.device).type != "cpu":
        yield "training.offload", True
    if recipe.data.live and not recipe.data.stream:
        yield "data.text", "cached"
    if settings.optimizer == "adamw" and settings.precision != "fp64" and not settings.fsdp:
        yield "training.optimizer", "adamw8bit"
    if settings.precision != "bf16":
        yield "training.precision", {"fp64": "fp32", "fp32": "bf16"}[settings.precision]


def changed(recipe: Recipe, key: str, value: Any) -> Recipe:
    """The same recipe with another value of ``key``, a section and a name in it."""
    section, name = key.split(".")
    if section == "training":
        return recipe.model_copy(update={"training": dataclasses.replace(recipe.training, **{name: value})})
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update={name: value})})


# ---------------------------------------------------------------- in words


def describe(planned: Plan) -> list[str]:
    """The plan as lines of text."""
    recipe, found, teacher = planned.recipe, planned.estimate, planned.outline
    parts = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in teacher.parts.items())
    lines = [f"parameters of {teacher.name} ({teacher.kind}): {parts}"]
    if found is None:
        return [*lines, planned.why_not]
    trained = ", ".join(f"{player} {count:,}" for player, count in found.trainable.items())
    how = f"LoRA of rank {recipe.student.rank} on {found.lora_layers} layers" if found.lora_layers else "all weights"
    calls = ", ".join(f"{role} {count:g}" for role, count in found.calls.items())
    lines += [
        f"parameters in training: {trained} ({how})",
        f"network calls per step: {calls}; cost per image: {found.equivalents:.3g} forward passes (a backward pass "
        "counts as 2)",
        f"{recipe.training.steps:,} steps of {recipe.training.batch_size} images: {_time(planned)}",
    ]
    if cost := cost_of_pairs(recipe):
        lines.append(
            f"before training, the teacher generates {recipe.pairs.size:,} samples in "
            f"{recipe.pairs.num_inference_steps} steps each: up to {cost:,} forward passes"
        )
    lines += [f"no export: {why}"] if (why := _no_export(planned)) else []
    return lines + _memory(planned, found) + _on_gpus(planned, found)


def _no_export(planned: Plan) -> str:
    """Why the finished student will have no export; empty where it will."""
    recipe, teacher = planned.recipe, planned.outline
    family = teacher.family()
    return obstacle(_card(recipe, teacher), family.schedule(), teacher.scheduler, type(family))


def _card(recipe: Recipe, teacher: MetaPipeline) -> Card:
    """The card of the student that a run would leave."""
    family = teacher.family()
    schedule = family.schedule()
    kind = family.prediction_type(schedule)
    method = recipe.method_class()(schedule.for_network(kind), recipe.method_settings())
    return foreseen_card(recipe, method, kind)


def fits(planned: Plan) -> bool:
    """Whether the run fits into the memory that is free on this device; True where that is not known."""
    found = planned.estimate
    if found is None:
        return False
    room = memory(found.device)
    return room is None or planned.peak <= room[0]


def advise(planned: Plan) -> list[str]:
    """Changes that would lower the peak of a step, as lines of text."""
    changes = cheaper(planned)
    if not changes:
        return []
    return ["each of these alone would lower the step's peak:", *(f"  --set {change}" for change in changes)]


def _time(planned: Plan) -> str:
    if planned.seconds is None:
        return "no step was timed here, so the duration is not known"
    about = _duration(planned.seconds)
    encoding = f"encoding {'the captions of each step, ' if planned.recipe.data.live else ''}the data"
    return f"about {about} on this {planned.recipe.training.device}, without {encoding} and sample grids"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes >= 120:
        return f"{minutes / 60:,.1f} hours"
    return f"{minutes:.0f} minutes" if minutes >= 2 else f"{seconds:.0f} seconds"


def _on_gpus(planned: Plan, found: Estimate) -> list[str]:
    """What holds the run and how long its steps would take there, by peak rates; nothing of runs on a CPU."""
    settings = planned.recipe.training
    if torch.device(settings.device).type != "cuda":
        return []
    size = smallest(planned.peak)
    flops = found.rehearsal.flops
    lines = ["no common GPU has enough memory" if size is None else f"fits into a GPU of {size} GB"]
    expected = durations(settings.steps * flops, planned.peak, settings.precision == "bf16")
    rows = [f"  {gpu.name + f' ({gpu.gigabytes} GB)':>20}  {_duration(seconds)}" for gpu, seconds in expected]
    if rows:
        teraflop = f"{flops / 1e12:,.{1 if flops < 1e14 else 0}f} TFLOP"
        lines.append(f"a step computes {teraflop}; all steps at {UTILISATION:.0%} of a GPU's peak rate (assumed):")
    return lines + rows


def _memory(planned: Plan, found: Estimate) -> list[str]:
    peak = sum(found.training.values())
    room = memory(found.device)
    there = "" if room is None else f", of {in_words(room[0])} free"
    lines = [f"memory on {found.device}, at the peak of a training step: {in_words(peak)}{there}"]
    lines += [f"  {in_words(size):>9}  {name}" for name, size in found.training.items()]
    if found.host:
        lines.append(f"in the host's memory, for blocks that are brought to the device: {in_words(found.host)}")
    if found.checkpoint:
        copy = in_words(found.checkpoint)
        lines.append(f"in the hosts' memory, for the copy from which a checkpoint is written: {copy} in all processes")
    if found.encoding:
        lines.append(f"while images are encoded: {in_words(found.encoding)}")
    if found.encoding_batch:
        lines.append(f"while a batch is encoded, before a step: {in_words(found.encoding_batch)}")
    if found.sampling:
        lines.append(f"while a sample grid is generated: {in_words(found.sampling)}")
    if found.validating:
        lines.append(f"while the student is measured: {in_words(found.validating)}")
    if planned.reference:
        lines.append(
            f"while the model behind the teacher generates the images of reference: {in_words(planned.reference)}"
        )
    if room is not None and planned.peak > room[0]:
        lines.append(f"THIS DOES NOT FIT: {in_words(planned.peak)} are needed and {in_words(room[0])} are free")
    return lines
