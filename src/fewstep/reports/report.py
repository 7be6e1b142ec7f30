"""`fewstep report`: one page about one or more runs — images from the same noise, quality against steps, losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fewstep.data.files import replace_text
from fewstep.evaluation.compare import Candidate, compare
from fewstep.evaluation.result import Comparison
from fewstep.methods.parts.statistics import BINS
from fewstep.models.families import Teacher
from fewstep.reports.blocks import by_steps_grid, put_differences, put_results
from fewstep.reports.candidates import student_candidates, teacher_candidates
from fewstep.reports.diagnose import diagnose
from fewstep.reports.finished import STEPS, FinishedRun, check_out, finished_runs, measured_alike, model_of, steps_of
from fewstep.reports.page import Page
from fewstep.runs.first_teacher import first_teacher_of
from fewstep.training.logging import read_log
from fewstep.training.progress import doing, progress_bar


def report(
    folders: Sequence[Path],
    out: Path,
    count: int = 256,
    show_progress: bool = False,
    features: str = "",
    prompts: Path | None = None,
    device: str | None = None,
) -> Comparison:
    """Write ``out`` (HTML), and beside it the images (PNG) and the figures (JSON).

    Args:
        folders: finished run directories of one teacher.
        count: number of prompts to measure on; there may be fewer.
        features: network of FD, KID and overlap: "imagenet", or a DINOv2, CLIP or similar model (folder or hub name);
            the runs' own by default.
        prompts: text file of prompts to measure on instead of the runs' own.
        device: to measure on instead of the runs' own.

    Raises:
        ValueError: a run is not finished, or has another teacher.
    """
    check_out(out, ".png", ".json")
    runs, name = finished_runs(folders, device)
    with doing("loading the teacher"):
        teacher = first_teacher_of(runs[0].recipe)
    measured_on = measured_alike(runs, teacher, features, prompts, count, show_progress)
    steps = [steps_of(run, teacher.denoiser.schedule) for run in runs]
    with progress_bar(1 + len(STEPS) + sum(map(len, steps)), 0, "sampling", show_progress) as advance:
        candidates = candidates_of(teacher, runs, steps)
        comparison = compare(teacher, candidates, measured_on, runs[0].recipe.seed, advance, per_prompt=4)
    facts = {model_of(run, runs): run.facts for run in runs}
    for result in comparison.results:
        result.facts |= facts.get(result.model, {})
    page = Page("Few-step report: " + ", ".join(run.label for run in runs))
    page.text(f"{comparison.count} {comparison.about}; teacher {name}.", note=True)
    put_results(page, comparison)
    put_differences(page, {run.label: run.settings for run in runs})
    for section in (_training, _by_time, _feedback, _diagnoses, _settings):
        section(page, runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    by_steps_grid(comparison).save(out.with_suffix(".png"))
    replace_text(out.with_suffix(".json"), comparison.as_json())
    replace_text(out, page.html())
    return comparison


def candidates_of(teacher: Teacher, runs: Sequence[FinishedRun], steps: Sequence[Sequence[int]]) -> Iterator[Candidate]:
    """The teacher at its full number of steps and at few, then the student of each run at its ``steps``.

    Each student is loaded when its turn comes, so that one of them is in memory at a time.
    """
    sampling = runs[0].recipe.sample
    yield from teacher_candidates(teacher, (sampling.teacher_steps, *STEPS), sampling.guidance_scale)
    for run, taken in zip(runs, steps, strict=True):
        yield from student_candidates(run.files.student, taken, model_of(run, runs), run.own)


# ---------------------------------------------------------------- sections of the page


def _training(page: Page, runs: Sequence[FinishedRun]) -> None:
    page.heading("Training")
    for key in sorted({key for run in runs for line in run.log for key in line if key.endswith("/loss")}):
        page.chart({run.label: run.column(key) for run in runs}, "steps", key, logarithmic=True)


_TIMED = {"score_gap": "matching", "d_real": "real", "d_fake": "fake"}
"""Statistics by noise level, and the share of rows by which each is divided."""


def _by_time(page: Page, runs: Sequence[FinishedRun]) -> None:
    """At which noise levels scores differ and a discriminator is right: means over the last quarter of the log."""
    series: dict[str, list[tuple[float, float]]] = {}
    for run, (name, share) in product(runs, _TIMED.items()):
        points = timed(run.log[-max(1, len(run.log) // 4) :], name, share)
        if points:
            series[f"{run.label} {name}"] = points
    if series:
        page.heading("By noise level")
        page.chart(series, "noise level, as a share of all", "mean over the last quarter")


def timed(lines: Sequence[Mapping[str, Any]], name: str, share: str) -> list[tuple[float, float]]:
    """(middle of a bin, mean of ``name`` in it) over lines of a log, for bins that have rows."""
    keys = (key for line in lines for key in line if key.endswith(f"/{name}_by_time/0"))
    player = next(keys, "").partition("/")[0]
    if not player:
        return []
    sums, shares = (
        [sum(line.get(f"{player}/{key}/{i}", 0.0) for line in lines) for i in range(BINS)]
        for key in (f"{name}_by_time", f"{share}_share_by_time")
    )
    return [((i + 0.5) / BINS, a / b) for i, (a, b) in enumerate(zip(sums, shares, strict=True)) if b > 0]


def _feedback(page: Page, runs: Sequence[FinishedRun]) -> None:
    """For runs with rewards: the rewards, the held-out one among them, and the diversity that they may cost."""
    keys = {key for run in runs for line in run.log for key in line if key.endswith("_reached")}
    if not keys:
        return
    names = [*sorted(key.removesuffix("_reached") for key in keys), "student/held_out"]
    page.heading("Feedback")
    for ending, what in (("mean", "reward, in its model's own units"), ("reached", "share at the threshold")):
        series = {f"{r.label} {n.rpartition('/')[2]}": r.column(f"{n}_{ending}") for r, n in product(runs, names)}
        page.chart(series, "steps", what)
    logs = {run.label: read_log(run.files.sample_statistics) for run in runs}
    diversity = {label: [(line["step"], line["diversity"]) for line in log] for label, log in logs.items()}
    page.chart(diversity, "steps", "diversity within prompts, student over teacher")


def _diagnoses(page: Page, runs: Sequence[FinishedRun]) -> None:
    page.heading("Diagnosis")
    for run in runs:
        first, *others = diagnose(run.files.path).sentences()
        page.text(f"{run.label}: {first}")
        checked = Page("Details")
        for sentence in others:
            checked.text(sentence, note=True)
        page.folded(checked)


def _settings(page: Page, runs: Sequence[FinishedRun]) -> None:
    page.heading("Settings and versions")
    for run in runs:
        files = Page(run.label)
        for file in (run.files.recipe, run.files.versions):
            files.code(file.read_text(encoding="utf-8"))
        page.folded(files)
    page.text(f"Made with torch {torch.__version__}.", note=True)
