"""`fewstep report`: one page about one or more runs — images from the same noise, quality against steps, losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fewstep.data.files import replace_text
from fewstep.diffusion.schedule import Schedule
from fewstep.evaluation.compare import Candidate, Comparison, as_json, compare, comparison_grid
from fewstep.evaluation.figures import FIGURES
from fewstep.evaluation.grids import ON_PAGES, image_grid
from fewstep.evaluation.prompt_set import PromptSet
from fewstep.evaluation.result import gap_closed_in, in_steps
from fewstep.methods.parts.statistics import BINS
from fewstep.models.families import Teacher
from fewstep.models.hub import check_device
from fewstep.recipe.schema import Recipe
from fewstep.recipe.validate import RecipeError
from fewstep.reports.candidates import student_candidates, teacher_candidates
from fewstep.reports.diagnose import diagnose
from fewstep.reports.page import Page
from fewstep.reports.results import in_percent, quality_charts
from fewstep.runs.first_teacher import first_teacher_of, on_first_teacher
from fewstep.runs.folder import RunFolder
from fewstep.runs.measured_on import HELD_OUT, prompt_set
from fewstep.students.card import CARD_FILE, Card, load_card, sampler_of
from fewstep.students.lineage import first_teacher
from fewstep.training.logging import read_log
from fewstep.training.progress import progress_bar
from fewstep.training.run_files import RunFiles

STEPS = (1, 2, 4, 8)


@dataclass
class FinishedRun:
    """A run with a student: its label in the report, its files, its recipe on the first teacher, its log's lines."""

    label: str
    files: RunFolder
    recipe: Recipe
    log: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path, label: str) -> FinishedRun:
        """Raises RecipeError: ``folder`` is no run directory, or the run is not finished."""
        files = RunFolder(folder)
        if not files.recipe.is_file():
            raise RecipeError(f"{folder} is no run directory: recipe.yaml is missing.")
        if not (files.student / CARD_FILE).is_file():
            raise RecipeError(f"The run {folder} has no student yet: finish it with fewstep distill ... --resume.")
        return cls(label, files, on_first_teacher(files.kept_recipe(), files), list(read_log(files.log)))

    @property
    def card(self) -> Card:
        """How its student is sampled."""
        return load_card(self.files.student)

    @property
    def own(self) -> Recipe:
        """Its recipe as it was trained, on a teacher that may be a student."""
        return self.files.kept_recipe()

    def column(self, key: str) -> list[tuple[float, float]]:
        """Points (step, value) of a column of the log."""
        return [(line["step"], line[key]) for line in self.log if key in line]


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
    teacher = first_teacher_of(runs[0].recipe)
    measured_on = measured_alike(runs, teacher, features, prompts, count, show_progress)
    steps = [steps_of(run, teacher.denoiser.schedule) for run in runs]
    with progress_bar(1 + len(STEPS) + sum(map(len, steps)), 0, "sampling", show_progress) as advance:
        candidates = candidates_of(teacher, runs, steps)
        comparison = compare(teacher, candidates, measured_on, runs[0].recipe.seed, advance, per_prompt=4)
    shown = by_steps_grid(comparison)
    page = Page("Few-step report: " + ", ".join(run.label for run in runs))
    page.text(f"{comparison.count} {measured_on.about}; teacher {name}.", note=True)
    for sentence in verdict(comparison):
        page.text(sentence)
    _images(page, shown, comparison)
    _quality(page, comparison)
    for section in (_training, _by_time, _feedback, _diagnoses, _provenance):
        section(page, runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    shown.save(out.with_suffix(".png"))
    replace_text(out.with_suffix(".json"), as_json(comparison))
    replace_text(out, page.html())
    return comparison


def finished_runs(folders: Sequence[Path], device: str | None = None) -> tuple[list[FinishedRun], str]:
    """The runs in these folders, of several stages the last one that trains, and the name of their one teacher.

    Args:
        device: for all of them, instead of that on which each was trained.

    Raises:
        ValueError: a run is not finished, is there twice, or has another teacher; there is no such device.
    """
    if device is not None:
        check_device(device, "--device")
    folders = [RunFiles(folder).last() for folder in folders]
    runs = [FinishedRun.read(folder, label) for folder, label in zip(folders, labels_of(folders), strict=True)]
    runs = [replace(run, recipe=run.recipe.on_device(device)) for run in runs]
    names = {first_teacher(run.files.student) for run in runs}
    if len(names) != 1:
        raise ValueError("Students of one teacher are compared: measure those of each other teacher apart.")
    return runs, names.pop()


def check_out(out: Path, *beside: str) -> None:
    """Raises ValueError where a file to write has the name of one of those that go beside it."""
    if out.suffix in beside:
        raise ValueError(f"--out {out}: a file of that name goes beside it: give it another ending than {out.suffix}.")


def measured_alike(
    runs: Sequence[FinishedRun],
    teacher: Teacher,
    features: str = "",
    prompts: Path | None = None,
    count: int | None = None,
    show_progress: bool = False,
) -> PromptSet:
    """What the students of ``runs`` are measured on, all of them on that of the first one.

    Raises:
        ValueError: they make images of several sizes.
    """
    first, sizes = runs[0], {run.card.image_size for run in runs}
    if len(sizes) > 1:
        listed = " and ".join(sorted(map(str, sizes)))
        raise ValueError(f"Images of one size are compared, not of {listed}: measure these runs apart.")
    found = prompt_set(asked(first.recipe, features, prompts), teacher, first.files, count, show_progress)
    data = {(run.recipe.place, run.recipe.data.size) for run in runs}
    if len(data) > 1 and found.about.startswith(HELD_OUT):
        of_first = f"{HELD_OUT} of {first.label}, which others may have seen"
        found = replace(found, about=found.about.replace(HELD_OUT, of_first, 1))
    return found


def asked(recipe: Recipe, features: str = "", prompts: Path | None = None) -> Recipe:
    """The recipe with other features or prompts to measure with."""
    changes: dict[str, Any] = {} if prompts is None else {"prompts": str(prompts)}
    if features not in ("", "detector", "reader"):  # "reader" is the detector's former name
        changes |= {"features": features}
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=changes)})


def verdict(comparison: Comparison) -> list[str]:
    """For each student at each number of steps what it reaches, in one sentence."""
    full, *others = comparison.results
    sentences = []
    for result in others:
        if result.model == full.model:
            continue
        ours, theirs = result.figures["evaluations"], full.figures["evaluations"]
        closed = gap_closed_in(comparison.results, "FD", result)
        gap = "" if closed is None else f", closes {in_percent(closed)} of the teacher's gap at as many steps"
        sentences.append(
            f"{result.label}: FD {result.in_words('FD')}{gap}; network evaluations per image: {ours:g}, where "
            f"{full.label}, has {theirs:g}."
        )
    return sentences


def candidates_of(teacher: Teacher, runs: Sequence[FinishedRun], steps: Sequence[Sequence[int]]) -> Iterator[Candidate]:
    """The teacher at its full number of steps and at few, then the student of each run at its ``steps``.

    Each student is loaded when its turn comes, so that one of them is in memory at a time.
    """
    sampling = runs[0].recipe.sample
    yield from teacher_candidates(teacher, (sampling.teacher_steps, *STEPS), sampling.guidance_scale)
    for run, taken in zip(runs, steps, strict=True):
        yield from student_candidates(run.files.student, taken, model_of(run, runs), run.own)


def model_of(run: FinishedRun, runs: Sequence[FinishedRun]) -> str:
    """What the student of ``run`` is called in a table of ``runs``."""
    return run.label if len(runs) > 1 else "student"


def steps_of(run: FinishedRun, schedule: Schedule) -> tuple[int, ...]:
    """Those of `STEPS` that a run's student can take, by its method and on its sampler's grid; else its own number."""
    card, recipe = load_card(run.files.student), run.recipe
    wanted = recipe.method_class().sampling(recipe.method_settings())
    own = (card.num_inference_steps,)
    if wanted.no_other_steps and recipe.sample.sampler is None:
        return own
    return tuple(n for n in STEPS if _has_times(card, n, schedule)) or own


def _has_times(card: Card, steps: int, schedule: Schedule) -> bool:
    try:
        sampler_of(card, num_inference_steps=steps).times(schedule)
    except ValueError:
        return False
    return True


def labels_of(folders: Sequence[Path]) -> list[str]:
    """Labels that distinguish runs: their folders' names, with as many folders above them as that takes.

    Raises:
        ValueError: a run is there twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len({*labels, "teacher"}) > len(labels):  # the teacher has a row of its own
            return labels
    raise ValueError("A report compares different runs: the same one was given twice.")


def by_steps_grid(comparison: Comparison, prompts: int = 3) -> Image.Image:
    """A few prompts, each at 1, 2, 4 and 8 steps from left to right: the teacher at full steps, then every model.

    Where a model does not take so many steps its place is white.
    """
    full, *others = comparison.results
    found = {(r.model, r.steps): r.images[:prompts] for r in others}
    models, columns = list(dict.fromkeys(r.model for r in others)), sorted({r.steps for r in others})
    white = torch.ones_like(full.images[:prompts])
    rows = [full.images[:prompts].repeat_interleave(len(columns), dim=0)]
    rows += [torch.stack([found.get((model, n), white) for n in columns], dim=1).flatten(0, 1) for model in models]
    above = [f"{in_steps(n)}: {caption}" for caption in comparison.captions[:prompts] for n in columns]
    return image_grid(rows, [full.label, *models], above, largest=ON_PAGES)


# ---------------------------------------------------------------- sections of the page


def _images(page: Page, shown: Image.Image, comparison: Comparison) -> None:
    page.heading("Images")
    page.image(shown, "Every row starts from the same noise and the same prompts.")
    page.image(comparison_grid(comparison), "Eight prompts, all models and numbers of steps.")


def _quality(page: Page, comparison: Comparison) -> None:
    full, *others = comparison.results
    names, floors = list(full.figures), comparison.floors
    page.heading("Quality")
    rows = [[r.label, *(r.in_words(name, digits=4) for name in names)] for r in comparison.results]
    if floors:
        rows.append(["real images", *(f"{floors[name]:.4g}" if name in floors else "" for name in names)])
    page.table(["", *names], rows)
    page.text(f"{comparison.count} images of each; in brackets 95 % intervals, resampled over images.", note=True)
    for name in names:
        if name in FIGURES:
            page.text(f"{name}: {FIGURES[name]}.", note=True)
    quality_charts(page, others, full)


def _training(page: Page, runs: Sequence[FinishedRun]) -> None:
    page.heading("Training")
    for key in sorted({key for run in runs for line in run.log for key in line if key.endswith("/loss")}):
        page.chart({run.label: run.column(key) for run in runs}, "steps", key, logarithmic=True)
    last = [(run.label, run.log[-1]) for run in runs if run.log]
    cost = [[label, f"{line['step']:g}", f"{line['forward_equivalents']:,.0f}"] for label, line in last]
    page.table(["run", "steps", "compute cost: forward passes of one image (forward 1, backward 2)"], cost)


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
        for sentence in others:
            page.text(sentence, note=True)


def _provenance(page: Page, runs: Sequence[FinishedRun]) -> None:
    page.heading("Settings and versions")
    for run in runs:
        page.text(run.label)
        for file in (run.files.recipe, run.files.versions):
            page.code(file.read_text(encoding="utf-8"))
    page.text(f"Made with torch {torch.__version__}.", note=True)
