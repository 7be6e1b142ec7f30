"""`fewstep benchmark`: recipes at one cost and several seeds, every student measured on the same prompts and noise.

<out>/RUN.json       what a run gave: figures, and how much of its teacher's loss it avoids
      table.md .csv .json  grid.png  report.html      all that has been measured so far
<runs>/RUN/          the run itself (`fewstep distill`), with measured/, a file for each number of steps
       teacher/      the teacher by several samplers

RUN is a job's name and a seed. Work is done in slices: what is finished stays, the same command goes on. Started
twice at once, on two cores or GPUs, each takes the runs that the other has not.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import Field, PositiveInt, field_validator
from pydantic.dataclasses import dataclass as checked

from fewstep.data.files import held, replace_text, text_hash
from fewstep.evaluation.compare import Candidate, compare
from fewstep.methods.registry import METHODS
from fewstep.models.families import Teacher, load_teacher
from fewstep.models.hub import DTYPES
from fewstep.recipe.chain import Chain, load
from fewstep.recipe.load import shipped_recipes
from fewstep.recipe.schema import Recipe
from fewstep.recipe.validate import RecipeError, validated
from fewstep.reports.results import DISTANCES, Entry, Standings, in_order
from fewstep.runs.chain import run as distil
from fewstep.runs.dataset import versions
from fewstep.runs.plan import cost_of_pairs, cost_of_step, memory_of_step
from fewstep.sampling import make_sampler
from fewstep.scenes64.prompts import unseen_prompts
from fewstep.students.card import load_card, sampler_of
from fewstep.students.lineage import model_behind, student_folder, teacher_of
from fewstep.students.student import load_student
from fewstep.training import distributed
from fewstep.training.trainer import TrainingStopped

NOISE = 0
"""Seed of prompts' noise: one for all runs, so that every two of them can be compared pair by pair."""
CURVES = ("ddim", "dpm++2m", "euler")
"""The teacher's samplers; the first is what students are held against."""


@checked(frozen=True)
class BenchmarkEntry:
    """A recipe to be run once for each seed.

    Attributes:
        name: of its runs. recipe: a name or file that `fewstep distill` takes; set: what is changed in it.
        seeds: of the runs. budget: forward equivalents of each, pairs and earlier stages included; None: as the recipe
            says. steps: of the student, each measured. count: prompts. without: stages of a chain that are left out.
    """

    name: str
    recipe: str
    set: dict[str, Any] = Field(default_factory=dict)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    budget: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    steps: tuple[PositiveInt, ...] = Field(default=(1, 2, 4, 8), min_length=1)
    count: int = Field(default=5000, ge=8)
    without: tuple[str, ...] = ()

    @field_validator("name")
    @classmethod
    def _a_word(cls, name: str) -> str:
        """It becomes a folder's name."""
        if not name or name.startswith(".") or Path(name).name != name:
            raise ValueError(f"name: '{name}' is to be the name of a folder: take letters, digits, '-' and '_'.")
        return name

    @classmethod
    def of(cls, source: str, **given: Any) -> BenchmarkEntry:
        """From a job's file (YAML with a key ``recipe``), or from a recipe's name or file; ``given`` goes first.

        Raises:
            RecipeError: an unknown key, a value that makes no sense, or a file that cannot be read.
        """
        path, data = Path(source), None
        if path.suffix in (".yaml", ".yml"):
            try:
                data = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError, yaml.YAMLError):
                raise RecipeError(f"{path} cannot be read: give a job's file, or a recipe's name or file.") from None
        if not isinstance(data, dict) or "recipe" not in data:
            data = {"recipe": source}
        known = {f.name for f in fields(cls)}
        for key in data.keys() - known:
            raise RecipeError(f"{path}: a job has no key '{key}': it has {', '.join(sorted(known - {'name'}))}.")
        data = {"name": path.stem} | data | {key: value for key, value in given.items() if value is not None}
        try:
            job = validated(cls, data)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None
        return job

    def runs(self, overrides: Sequence[str] = ()) -> Iterator[Run]:
        """One for each seed; ``overrides`` of all recipes."""
        changes = [*(f"{key}={value}" for key, value in self.set.items()), *overrides]
        steps: dict[str, int] = {}
        for seed in self.seeds:
            recipe = _without(load(self.recipe, [*changes, f"seed={seed}"]), self.without)
            if self.budget is not None:
                steps = steps or steps_within(recipe, self.budget)  # a rehearsal of every stage, alike for all seeds
                recipe = _as_long(recipe, steps)
            yield Run(self, seed, recipe, tuple(changes))


@dataclass(frozen=True)
class Run:
    """One recipe with one seed."""

    job: BenchmarkEntry
    seed: int
    recipe: Recipe | Chain
    changes: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.job.name}-s{self.seed}"

    @property
    def mark(self) -> str:
        """Of the resolved recipe: figures of any other one are measured again."""
        return text_hash(self.recipe.as_yaml())

    @property
    def steps(self) -> int:
        """Of training, in all stages."""
        return sum(recipe.training.steps for recipe in _alone(self.recipe))

    @property
    def last(self) -> Recipe:
        """The recipe of what is measured: of a chain its last stage's, on the model that the chain began with."""
        return _alone(self.recipe)[-1]

    @property
    def memory(self) -> int:
        """Bytes at the peak of a training step, of the stage that needs most."""
        return max(map(memory_of_step, _alone(self.recipe)))

    @property
    def measured_at(self) -> tuple[int, ...]:
        """At which steps its student is measured: its own alone where any other number is off what was trained."""
        recipe = self.last
        wanted = recipe.method_class().sampling(recipe.method_settings())
        own = wanted.no_other_steps and recipe.sample.sampler is None
        return (recipe.sample.num_inference_steps,) if own else self.job.steps


def every_method() -> list[str]:
    """The shipped recipes for scenes-64 that are named after a method."""
    return [name for name in (f"scenes-64-{method}" for method in METHODS) if name in shipped_recipes()]


def _alone(recipe: Recipe | Chain) -> list[Recipe]:
    """The recipe, or those of a chain's trained stages on the model that the chain began with."""
    return [recipe] if isinstance(recipe, Recipe) else list(recipe.on_first_teacher().values())


# ---------------------------------------------------------------- one cost for all


def within(recipe: Recipe | Chain, budget: float) -> Recipe | Chain:
    """The recipe with as many training steps as ``budget`` forward equivalents allow; a chain's stages in proportion.

    Raises:
        RecipeError: the teacher's samples alone, or one step of every stage, cost more.
    """
    return _as_long(recipe, steps_within(recipe, budget))


def steps_within(recipe: Recipe | Chain, budget: float) -> dict[str, int]:
    """How many steps each stage has in `within`; of one recipe the name is empty. Raises as it does."""
    names = [stage.name for stage in recipe.stages if stage.recipe] if isinstance(recipe, Chain) else [""]
    alone = _alone(recipe)
    costs = [cost_of_step(one) for one in alone]
    left = budget - sum(cost_of_pairs(one) for one in alone)
    part = left / sum(cost * one.training.steps for cost, one in zip(costs, alone, strict=True))
    steps = {name: int(part * one.training.steps + 1e-9) for name, one in zip(names, alone, strict=True)}
    if min(steps.values()) < 1:
        raise RecipeError(f"A budget of {budget:,.0f} forward equivalents is too small for this recipe: give more.")
    return steps


def _without(recipe: Recipe | Chain, left_out: Sequence[str]) -> Recipe | Chain:
    """The chain without some of its stages, and what no later one needs.

    Raises:
        RecipeError: no such stage, or a later one begins with it.
    """
    if not left_out:
        return recipe
    stages = recipe.stages if isinstance(recipe, Chain) else ()
    kept = tuple(stage for stage in stages if stage.name not in left_out)
    needed = {name for stage in kept for name in stage.begins_with}
    for name in left_out:
        if name not in {stage.name for stage in stages}:
            raise RecipeError(
                f"without: {name} is no stage of this recipe: {', '.join(s.name for s in stages) or 'it has none'}."
            )
        if name in needed:
            raise RecipeError(f"without: a later stage begins with {name}: leave that one out, too.")
    return Chain(kept)


def _as_long(recipe: Recipe | Chain, steps: dict[str, int]) -> Recipe | Chain:
    """The recipe, or each stage of a chain, with its ``steps``, and warm-up in proportion."""
    if isinstance(recipe, Chain):
        return Chain(tuple(
            stage if stage.recipe is None else replace(stage, does=_so_long(stage.recipe, steps[stage.name]))
            for stage in recipe.stages
        ))  # fmt: skip
    return _so_long(recipe, steps[""])


def _so_long(recipe: Recipe, steps: int) -> Recipe:
    training = recipe.training
    warmup = min(training.warmup_steps, max(1, steps // 10))
    return recipe.model_copy(update={"training": dataclasses.replace(training, steps=steps, warmup_steps=warmup)})


# ---------------------------------------------------------------- the work


class Benchmark:
    """All runs of some jobs: trained, measured and set side by side.

    Args:
        runs: of `BenchmarkEntry.runs`. out: where results go; place: where runs work.
        minutes: before it stops; None: never.
        curves: samplers of the teacher.

    Raises:
        RecipeError: runs of two teachers, of two guidance scales of the teacher's, or of one name.
    """

    def __init__(
        self, runs: Sequence[Run], out: Path, place: Path, minutes: float | None = None,
        curves: Sequence[str] = CURVES, show_progress: bool = False,
    ) -> None:  # fmt: skip
        self.runs, self.out, self.place, self.curves, self.show_progress = list(runs), out, place, curves, show_progress
        self.until = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        self.count = self.runs[0].job.count
        for what, values in (
            ("teachers", {run.last.teacher.path for run in self.runs}),
            ("guidance scales of the teacher", {run.last.sample.guidance_scale for run in self.runs}),
            ("numbers of prompts", {run.job.count for run in self.runs}),
            ("full lengths of the teacher", {run.last.sample.teacher_steps for run in self.runs}),
        ):
            if len(values) > 1:
                listed = ", ".join(sorted(map(str, values)))
                raise RecipeError(f"One table cannot hold several {what} ({listed}): benchmark these runs apart.")
        if len({run.name for run in self.runs}) < len(self.runs):
            raise RecipeError("Two jobs have one name: rename one of their files.")

    def work(self, say: Callable[[str], None] = print) -> bool:
        """Go on with what is not finished and nobody else is at, until the time is spent; True when all is done."""
        distributed.join(self.runs[0].last.training.device)
        for run in self.runs:
            if self.is_measured(run):
                continue
            if self._is_over():
                return False
            with self._mine(run.name) as mine:
                if not mine:
                    say(f"{run.name}: another process is at it")
                    continue
                if self.is_measured(run):
                    continue  # by another process, just now
                say(f"{run.name}: training and measuring")
                if not self._train(run) or not self._measure(run):
                    return False
        with self._mine("teacher") as mine:
            return mine and self._measure_teacher() and all(map(self.is_measured, self.runs))

    def standings(self) -> Standings | None:
        """What has been measured so far; None before the teacher's full length has been."""
        full_steps = self.runs[0].last.sample.teacher_steps
        files = [*self.place.glob("teacher/measured/*.safetensors")]
        for run in self.runs:
            files += (self.place / run.name / "measured").glob("*.safetensors")
        marks = {self._teacher_mark, *(run.mark for run in self.runs)}
        entries = [e for e in map(Entry.load, files) if e.facts["prompts"] == self.count and e.facts["mark"] in marks]
        full = next((e for e in entries if e.model == _named(self.curves[0]) and e.steps == full_steps), None)
        if full is None:
            return None
        rest = in_order((e for e in entries if e is not full), list(dict.fromkeys(run.job.name for run in self.runs)))
        return Standings(rest, full, self.count, full.facts["floors"])

    def write(self) -> Standings | None:
        """Write what is there to see, and a file for each measured run."""
        found = self.standings()
        if found is None:
            return None
        self.out.mkdir(parents=True, exist_ok=True)
        found.write(self.out)
        for run in self.runs:
            mine = [e for e in found.entries if e.model == run.job.name and e.seed == run.seed]
            if mine:
                replace_text(self.out / f"{run.name}.json", json.dumps(_result(found, mine), indent=1) + "\n")
        return found

    def is_measured(self, run: Run) -> bool:
        """Whether all of a run's figures are there."""
        place = self.place / run.name / "measured"
        return all(self._holds(place / f"{steps}.safetensors", run.mark) for steps in run.measured_at)

    # ------------------------------------------------------------ one run

    def _is_over(self) -> bool:
        return time.monotonic() >= self.until

    def _mine(self, name: str) -> AbstractContextManager[bool]:
        """Whether no other benchmark is at this run; those that torchrun started are one."""
        self.place.mkdir(parents=True, exist_ok=True)
        return nullcontext(True) if distributed.count() > 1 else held(self.place / f"{name}.lock")

    def _train(self, run: Run) -> bool:
        folder = self.place / run.name
        left = self.until - time.monotonic()
        timer = threading.Timer(left, os.kill, (os.getpid(), signal.SIGTERM)) if left < float("inf") else None
        if timer is not None:
            timer.daemon = True
            timer.start()
        begun = time.monotonic()
        try:
            distil(run.recipe, folder, resume=True, show_progress=self.show_progress)
        except TrainingStopped:
            if time.monotonic() < self.until - 1:
                raise  # somebody else stopped it
            return False
        finally:
            if timer is not None:
                timer.cancel()
            if folder.is_dir():
                spent = _minutes(folder) + (time.monotonic() - begun) / 60
                replace_text(folder / _MINUTES, json.dumps(spent))
        return True

    def _measure(self, run: Run) -> bool:
        folder = self.place / run.name
        student = student_folder(folder)
        assert student is not None
        card, teacher = load_card(student), self._teacher(run.last)
        model = load_student(teacher_of(student, card, run.last.training.device), student, card)
        facts = {
            "recipe": run.job.recipe, "set": list(run.changes), "method": card.method, "training_steps": card.steps,
            "forward_equivalents": card.forward_equivalents, "minutes": _minutes(folder), "memory": run.memory,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {run.last.training.device}",
            "versions": versions(), "prompts": self.count, "mark": run.mark,
        }  # fmt: skip
        for steps in run.measured_at:
            sampler = sampler_of(card, num_inference_steps=steps)
            way = Candidate(f"{run.job.name}, {steps}", model, sampler, card.guidance_scale, card.guidance_embed)
            path = folder / "measured" / f"{steps}.safetensors"
            if not self._way(teacher, way, path, run.job.name, run.seed, steps, facts):
                return False
        return True

    def _measure_teacher(self) -> bool:
        """Every sampler of the teacher at few steps and at full length."""
        recipe = self.runs[0].last
        teacher: Teacher | None = None
        for name in self.curves:
            few = sorted({steps for run in self.runs for steps in run.measured_at})
            for steps in (recipe.sample.teacher_steps, *few):
                path = self.place / "teacher" / "measured" / f"{name.replace('+', 'p')}-{steps}.safetensors"
                if self._holds(path, self._teacher_mark):
                    continue
                teacher = teacher or self._teacher(recipe)
                sampler = make_sampler(name, num_inference_steps=steps)
                way = Candidate(f"{_named(name)}, {steps}", teacher.denoiser, sampler, recipe.sample.guidance_scale)
                facts = {
                    "guidance_scale": recipe.sample.guidance_scale, "prompts": self.count, "versions": versions(),
                    "mark": self._teacher_mark,
                }  # fmt: skip
                if not self._way(teacher, way, path, _named(name), None, steps, facts):
                    return False
        return True

    def _teacher(self, recipe: Recipe) -> Teacher:
        """The model that a run came from, past all students in between, whole: students are measured on that."""
        teacher = recipe.teacher
        return load_teacher(
            model_behind(teacher.path), device=recipe.training.device, loras=teacher.loras, dtype=DTYPES[teacher.dtype],
            size=teacher.size, config=teacher.config, guidance_embed=teacher.guidance_embed,
        )  # fmt: skip

    def _way(
        self,
        teacher: Teacher,
        way: Candidate,
        path: Path,
        model: str,
        seed: int | None,
        steps: int,
        facts: dict[str, Any],
    ) -> bool:
        """Measure one way, unless it has been or the time is spent."""
        if self._holds(path, facts["mark"]):
            return True
        if self._is_over():
            return False
        prompts = unseen_prompts(teacher, self.count)
        found = compare(teacher, [way], prompts, NOISE, per_prompt=4, floors=seed is None)
        path.parent.mkdir(parents=True, exist_ok=True)
        Entry.of(found.results[0], model, seed, steps, facts | {"floors": found.floors}).save(path)
        return True

    def _holds(self, path: Path, mark: str) -> bool:
        """Whether the file is of just this, on as many prompts."""
        if not path.is_file():
            return False
        facts = Entry.load(path).facts
        return (facts["prompts"], facts["mark"]) == (self.count, mark)

    @property
    def _teacher_mark(self) -> str:
        recipe = self.runs[0].last
        return text_hash(f"{recipe.teacher.model_dump_json()} {recipe.sample.guidance_scale}")


_MINUTES = "minutes.json"


def _minutes(folder: Path) -> float:
    path = folder / _MINUTES
    return float(json.loads(path.read_text())) if path.is_file() else 0.0


def _named(sampler: str) -> str:
    return f"teacher, {sampler}"


def _result(found: Standings, entries: Sequence[Entry]) -> dict[str, Any]:
    """What a run's own file holds: figures by steps, and against the teacher at as many steps."""
    ways = {}
    for entry in entries:
        few = found.few(entry)
        against = {} if few is None else {
            name: {"closed": found.closed(entry, name), "better by": found.better_by(entry, few, name)}
            for name in DISTANCES
        }  # fmt: skip
        ways[str(entry.steps)] = {**entry.figures, "intervals": entry.intervals, "against the teacher": against}
    facts = {key: value for key, value in entries[0].facts.items() if key not in ("floors", "mark")}
    return {"model": entries[0].model, "seed": entries[0].seed, **facts, "steps": ways}
