"""`fewstep benchmark`: recipes at one compute cost and several seeds, measured on the same prompts and noise.

<out>/RUN.json       results of a run: its figures, and the share of its teacher's loss that it avoids
      table.md .csv .json  grid.png  report.html      all results so far
<runs>/RUN/          the run itself (`fewstep distill`), with measured/, a file for each number of steps
       teacher/      the teacher by several samplers

RUN is a job's name and a seed. Finished work is kept, and the same command continues the rest. Two processes that are
started at the same time, on two cores or GPUs, take different runs.
"""

from __future__ import annotations

import json
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fewstep.data.files import held, replace_text, text_hash
from fewstep.evaluation.compare import Candidate, compare
from fewstep.evaluation.figures import OF_FIRST
from fewstep.evaluation.grids import ON_PAGES, image_grid
from fewstep.evaluation.result import KEPT_IMAGES, Comparison, Result, lower_by, teacher_at
from fewstep.models.families import Teacher
from fewstep.recipe.schema import Recipe
from fewstep.recipe.validate import RecipeError
from fewstep.reports.blocks import put_differences, put_results
from fewstep.reports.candidates import student_candidates, teacher_candidates
from fewstep.reports.jobs import Run, settings_of
from fewstep.reports.page import Page
from fewstep.reports.results import DISTANCES, as_csv, as_markdown, in_order
from fewstep.runs.chain import run as distil
from fewstep.runs.dataset import versions
from fewstep.runs.first_teacher import first_teacher_of
from fewstep.runs.folder import RunFolder
from fewstep.runs.measured_on import evaluation_captions, prompt_set
from fewstep.scenes64.prompts import unseen_captions
from fewstep.students.card import load_card
from fewstep.students.lineage import student_folder
from fewstep.training import distributed
from fewstep.training.progress import doing
from fewstep.training.trainer import TrainingStopped

NOISE = 0
"""Seed of the initial noise: the same for all runs, so that any two can be compared image by image."""
CURVES = ("ddim", "dpm++2m", "euler")
"""The teacher's samplers; students are compared with the first."""


class Benchmark:
    """All runs of some jobs: trained, measured, and written into one table.

    Args:
        runs: of `BenchmarkEntry.runs`. out: folder of the table; place: folder of the runs.
        minutes: after which it stops; None: never.
        curves: samplers of the teacher.

    Raises:
        RecipeError: the runs have several teachers, guidance scales of the teacher, or numbers of prompts, or two of
            them have one name.
    """

    def __init__(
        self, runs: Sequence[Run], out: Path, place: Path, minutes: float | None = None,
        curves: Sequence[str] = CURVES, show_progress: bool = False,
    ) -> None:  # fmt: skip
        self.runs, self.out, self.place, self.curves, self.show_progress = list(runs), out, place, curves, show_progress
        self.until = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        self.count = self.runs[0].job.count
        self.recipe = self.runs[0].last
        for what, values in (
            ("teachers", {run.last.teacher.path for run in self.runs}),
            ("guidance scales of the teacher", {run.last.sample.guidance_scale for run in self.runs}),
            ("numbers of prompts", {run.job.count for run in self.runs}),
            ("full lengths of the teacher", {run.last.sample.teacher_steps for run in self.runs}),
            ("prompts or references", {_measured_on(run.last) for run in self.runs}),
        ):
            if len(values) > 1:
                listed = ", ".join(sorted(map(str, values)))
                raise RecipeError(f"One table cannot hold several {what} ({listed}): benchmark these runs apart.")
        if len({run.name for run in self.runs}) < len(self.runs):
            raise RecipeError("Two jobs have one name: rename one of their files.")

    def work(self, say: Callable[[str], None] = print) -> bool:
        """Train and measure the runs that are unfinished and locked by no other process, until the time is up.

        Returns:
            Whether everything is done.

        Raises:
            ValueError: one sentence, before any training: there is nothing to measure the students on.
        """
        distributed.join(self.recipe.training.device, self.place, self.recipe.training.timeout_minutes)
        for run in self.runs:
            if self.is_measured(run):
                continue
            if self._is_over():
                return False
            with self._mine(run.name) as mine:
                if not mine:
                    say(f"{run.name}: another process is working on it")
                    continue
                if self.is_measured(run):
                    continue  # another process has just measured it
                if self.recipe.place is not None:  # hours of training before a refusal would be lost
                    evaluation_captions(self.recipe, self.count)
                say(f"{run.name}: training and measuring")
                if not self._train(run) or not self._measure(run):
                    return False
        with self._mine("teacher") as mine:
            return mine and self._measure_teacher() and all(map(self.is_measured, self.runs))

    def results(self) -> Comparison | None:
        """All that has been measured; None as long as the teacher at its full number of steps has not been."""
        fingerprints = {self._teacher_fingerprint, *(run.fingerprint for run in self.runs)}
        files = [
            f
            for name in ("teacher", *(r.name for r in self.runs))
            for f in self.place.glob(f"{name}/measured/*.safetensors")
        ]
        found = [r for r in map(Result.load, files) if r.facts["prompts"] == self.count]
        found = [r for r in found if r.facts["mark"] in fingerprints]
        teacher, full_steps = _teacher_by(self.curves[0]), self.recipe.sample.teacher_steps
        full = next((r for r in found if r.model == teacher and r.steps == full_steps), None)
        if full is None:
            return None
        rest = in_order((r for r in found if r is not full), list(dict.fromkeys(run.job.name for run in self.runs)))
        facts = {"captions": unseen_captions(KEPT_IMAGES), "about": "unseen prompts", **full.facts}  # of older files
        return Comparison([full, *rest], facts["captions"], NOISE, facts["floors"], facts["about"],
                          facts.get("images", self.count))  # fmt: skip

    def write(self) -> Comparison | None:
        """Write the table of `results`, the page, and a file for each measured run."""
        table = self.results()
        if table is None:
            return None
        self.out.mkdir(parents=True, exist_ok=True)
        full, *entries = (result.as_plain() for result in table.results)
        plain = {"prompts": table.count, "real": table.floors, "full": full, "entries": entries}
        replace_text(self.out / "table.md", as_markdown(table))
        replace_text(self.out / "table.csv", as_csv(table))
        replace_text(self.out / "table.json", json.dumps(plain, indent=1) + "\n")
        replace_text(self.out / "report.html", self._page(table).html())
        _grid(table).save(self.out / "grid.png")
        for run in self.runs:
            mine = [r for r in table.results if r.model == run.job.name and r.seed == run.seed]
            if mine:
                replace_text(self.out / f"{run.name}.json", json.dumps(_run_as_plain(table, mine), indent=1) + "\n")
        return table

    def _page(self, table: Comparison) -> Page:
        """All results, and in which settings the jobs differ."""
        page, jobs = Page("Few-step benchmark"), list(dict.fromkeys(run.job.name for run in self.runs))
        page.text(f"{table.count} {table.about}; teacher {self.recipe.teacher.path}.", note=True)
        put_results(page, table)
        put_differences(page, {job: settings_of([r for r in self.runs if r.job.name == job]) for job in jobs})
        return page

    def is_measured(self, run: Run) -> bool:
        """Whether all figures of a run are there."""
        return all(self._holds(self._file(run.name, steps), run.fingerprint) for steps in run.measured_at)

    # ------------------------------------------------------------ one run

    def _is_over(self) -> bool:
        return time.monotonic() >= self.until

    def _file(self, name: str, what: int | str) -> Path:
        """The file of one result of a run, or of the teacher."""
        return self.place / name / "measured" / f"{what}.safetensors"

    def _mine(self, name: str) -> AbstractContextManager[bool]:
        """Whether no other benchmark works on this run; the processes of one torchrun are one benchmark."""
        self.place.mkdir(parents=True, exist_ok=True)
        return nullcontext(True) if distributed.count() > 1 else held(self.place / f"{name}.lock")

    def _train(self, run: Run) -> bool:
        folder = self.place / run.name
        begun = time.monotonic()
        try:
            with _stopped_at(self.until):
                distil(run.recipe, folder, resume=True, show_progress=self.show_progress)
        except TrainingStopped:
            if time.monotonic() < self.until - 1:
                raise  # not by this time limit: a user has stopped it
            return False
        finally:
            if folder.is_dir():
                spent = _minutes(folder) + (time.monotonic() - begun) / 60
                replace_text(folder / _MINUTES, json.dumps(spent))
        return True

    def _measure(self, run: Run) -> bool:
        folder, device = self.place / run.name, run.last.training.device
        student = student_folder(folder)
        assert student is not None
        card, teacher = load_card(student), first_teacher_of(run.last)
        facts = {
            "recipe": run.job.recipe, "set": list(run.changes), "method": card.method, "training_steps": card.steps,
            "forward_equivalents": card.forward_equivalents, "minutes": _minutes(folder), "memory": run.memory,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device}",
            "versions": versions(), "prompts": self.count, "mark": run.fingerprint,
        }  # fmt: skip
        candidates = student_candidates(student, run.measured_at, run.job.name, run.last)
        return all(
            self._measure_one(teacher, candidate, self._file(run.name, steps), run.seed, facts)
            for candidate, steps in zip(candidates, run.measured_at, strict=True)
        )

    def _measure_teacher(self) -> bool:
        """Every sampler of the teacher at few steps and at full length."""
        sampling, fingerprint = self.recipe.sample, self._teacher_fingerprint
        steps = [sampling.teacher_steps, *sorted({n for run in self.runs for n in run.measured_at})]
        wanted = {
            self._file("teacher", f"{name.replace('+', 'p')}-{n}"): (name, n) for name in self.curves for n in steps
        }
        wanted = {path: what for path, what in wanted.items() if not self._holds(path, fingerprint)}
        if not wanted:
            return True
        teacher = first_teacher_of(self.recipe)
        facts = {
            "guidance_scale": sampling.guidance_scale, "prompts": self.count, "versions": versions(),
            "mark": fingerprint,
        }  # fmt: skip
        for path, (name, n) in wanted.items():
            (candidate,) = teacher_candidates(teacher, [n], sampling.guidance_scale, _teacher_by(name), name)
            if not self._measure_one(teacher, candidate, path, None, facts):
                return False
        return True

    def _measure_one(
        self, teacher: Teacher, candidate: Candidate, path: Path, seed: int | None, facts: dict[str, Any]
    ) -> bool:
        """Measure one candidate, unless it has been or the time is up; True if its file is there."""
        if self._holds(path, facts["mark"]):
            return True
        if self._is_over():
            return False
        with doing(f"measuring {candidate.model}"):
            prompts = prompt_set(self.recipe, teacher, RunFolder(self.place / "teacher"), self.count)
            found = compare(teacher, [candidate], prompts, NOISE, per_prompt=4, floors=seed is None)
        (result,) = found.results
        for values in (result.figures, result.intervals, result.resampled):
            for name in OF_FIRST:  # the first candidate is itself
                values.pop(name, None)  # type: ignore[attr-defined]
        path.parent.mkdir(parents=True, exist_ok=True)
        shown = {
            "floors": found.floors,
            "images": found.count,
            "captions": list(prompts.captions[:KEPT_IMAGES]),
            "about": prompts.about,
        }
        replace(result, seed=seed, facts=facts | shown).save(path)
        return True

    def _holds(self, path: Path, fingerprint: str) -> bool:
        """Whether the file holds the result of just this model, on as many prompts."""
        if not path.is_file():
            return False
        facts = Result.load(path).facts
        return (facts["prompts"], facts["mark"]) == (self.count, fingerprint)

    @property
    def _teacher_fingerprint(self) -> str:
        known = f"{self.recipe.teacher.model_dump_json()} {self.recipe.sample.guidance_scale}"
        own = _measured_on(self.recipe)
        return text_hash(known if own == _SCENES else f"{known} {own}")


_MINUTES = "minutes.json"


def _minutes(folder: Path) -> float:
    path = folder / _MINUTES
    return float(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else 0.0


@contextmanager
def _stopped_at(until: float) -> Iterator[None]:
    """Ends the training inside by SIGTERM, on which it saves everything, when the monotonic clock reaches ``until``."""
    if until == float("inf"):
        yield
        return
    timer = threading.Timer(until - time.monotonic(), signal.raise_signal, (signal.SIGTERM,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


_SCENES = "scenes-64's own"


def _measured_on(recipe: Recipe) -> str:
    """The keys that decide on what students are measured."""
    evaluate, place = recipe.evaluate, recipe.place
    given = {
        "data": recipe.data.path, "prompts": evaluate.prompts, "reference": evaluate.reference,
        "features": evaluate.features, "metrics": " and ".join(evaluate.metrics),
        "held out": 0 if place is None else place.held_out,
    }  # fmt: skip
    return ", ".join(f"{key} {value}" for key, value in given.items() if value) or _SCENES


def _teacher_by(sampler: str) -> str:
    return f"teacher, {sampler}"


def _grid(table: Comparison) -> Image.Image:
    """A row for each result, all from the same prompts and noise; of a model's seeds the first."""
    first = {r.model: r.seed for r in reversed(table.results)}
    shown = [r for r in table.results if r.seed == first[r.model]]
    labels = [f"{r.model}, {r.steps}" for r in shown]
    return image_grid([r.images for r in shown], labels, table.captions, largest=ON_PAGES)


def _run_as_plain(table: Comparison, results: Sequence[Result]) -> dict[str, Any]:
    """The file of a run: figures by steps, also against the teacher at as many steps."""
    by_steps = {}
    for result in results:
        few = teacher_at(result.steps, table.results)
        against = {} if few is None else {
            name: {"closed": table.gap_closed(result, name), "better by": lower_by(name, result, few)}
            for name in DISTANCES
        }  # fmt: skip
        by_steps[str(result.steps)] = {**result.figures, "intervals": result.intervals, "against the teacher": against}
    facts = {key: value for key, value in results[0].facts.items() if key not in ("floors", "mark")}
    return {"model": results[0].model, "seed": results[0].seed, **facts, "steps": by_steps}
