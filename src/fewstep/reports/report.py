"""`fewstep report`: one page about one or more runs — pictures from the same noise, quality against steps, losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fewstep.data.files import replace_text
from fewstep.evaluation.compare import FIGURES, Candidate, Comparison, Result, as_json, compare, comparison_grid
from fewstep.evaluation.grids import image_grid
from fewstep.methods.parts.statistics import BINS
from fewstep.models.encoders import load_pretrained_encoder
from fewstep.models.families import Teacher, load_teacher
from fewstep.recipe.load import load_recipe
from fewstep.recipe.schema import Recipe
from fewstep.recipe.validate import RecipeError
from fewstep.reports.diagnose import diagnose
from fewstep.reports.page import Page
from fewstep.sampling import DDIMSampler
from fewstep.scenes64.prompts import unseen_prompts
from fewstep.students.card import CARD_FILE, load_card, sampler_of
from fewstep.students.lineage import first_teacher, teacher_of
from fewstep.students.student import load_student
from fewstep.training.logging import read_log
from fewstep.training.run_files import RunFiles

STEPS = (1, 2, 4, 8)


def report(
    runs: Sequence[Path],
    out: Path,
    count: int = 256,
    advance: Callable[[int], None] | None = None,
    features: str = "detector",
) -> Comparison:
    """Write ``out`` (HTML), and beside it the pictures (PNG) and the figures (JSON).

    Args:
        runs: finished run directories; all of one teacher.
        count: unseen prompts that every way is measured on.
        advance: called with the number of ways sampled, of `candidates_of`.
        features: "detector", or a DINOv2, CLIP or similar model (folder or hub name) for FD, KID and overlap.

    Raises:
        ValueError: a run that is not finished, or of another teacher.
    """
    runs = [RunFiles(run).last() for run in runs]
    labels = labels_of(runs)
    recipes = [_recipe(run) for run in runs]
    names = {first_teacher(RunFiles(run).student) for run in runs}
    if len(names) != 1:
        raise ValueError("A report compares runs of one teacher: make one report for each teacher.")
    first = recipes[0]
    (name,) = names
    teacher = load_teacher(name, loras=first.teacher.loras)
    prompts = unseen_prompts(teacher, count)
    if features not in ("detector", "reader"):  # "reader" is the detector's former name
        prompts = replace(prompts, features=load_pretrained_encoder(features), reference=None)
    comparison = compare(teacher, candidates_of(teacher, runs, recipes), prompts, first.seed, advance, per_prompt=4)
    shown = by_steps_picture(comparison)
    page = Page("Few-step report: " + ", ".join(labels))
    page.text(f"{count} unseen prompts, seed {first.seed}; teacher {name}.", note=True)
    _pictures(page, shown, comparison)
    _quality(page, comparison)
    _training(page, runs, labels)
    _by_time(page, runs, labels)
    _feedback(page, runs, labels)
    _diagnoses(page, runs, labels)
    _provenance(page, runs, labels)
    out.parent.mkdir(parents=True, exist_ok=True)
    shown.save(out.with_suffix(".png"))
    replace_text(out.with_suffix(".json"), as_json(comparison))
    replace_text(out, page.html())
    return comparison


def candidates_of(teacher: Teacher, runs: Sequence[Path], recipes: Sequence[Recipe]) -> list[Candidate]:
    """The teacher at its full and at few steps, and every student at few steps."""
    recipe = recipes[0]
    scale, many = recipe.sample.guidance_scale, recipe.sample.teacher_steps
    ways = [
        Candidate(f"teacher, {_steps(n)}", teacher.denoiser, DDIMSampler(num_inference_steps=n), scale)
        for n in (many, *STEPS)
    ]
    for run, label in zip(runs, labels_of(runs), strict=True):
        folder = RunFiles(run).student
        card = load_card(folder)
        student = load_student(teacher_of(folder, card), folder, card)
        name = label if len(runs) > 1 else "student"
        for n in STEPS:
            sampler = sampler_of(card, num_inference_steps=n)
            ways.append(Candidate(f"{name}, {_steps(n)}", student, sampler, card.guidance_scale, card.guidance_embed))
    return ways


def labels_of(runs: Sequence[Path]) -> list[str]:
    """What tells runs apart: their folders' names, with as many folders above them as that takes.

    Raises:
        ValueError: a run is there twice.
    """
    parts = [run.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise ValueError("A report compares different runs: the same one was given twice.")


def _steps(n: int) -> str:
    return "1 step" if n == 1 else f"{n} steps"


def _recipe(run: Path) -> Recipe:
    if not RunFiles(run).recipe.is_file():
        raise RecipeError(f"{run} is no run directory: recipe.yaml is missing.")
    if not (RunFiles(run).student / CARD_FILE).is_file():
        raise RecipeError(f"The run {run} has no student yet: finish it with fewstep distill ... --resume.")
    return load_recipe(RunFiles(run).recipe)


def by_steps_picture(comparison: Comparison, prompts: int = 3) -> Image.Image:
    """A few prompts, each at 1, 2, 4 and 8 steps from left to right: the teacher at full length, then every model."""
    full, *others = comparison.results
    models = list(dict.fromkeys(o.label.rpartition(", ")[0] for o in others))
    by_label = {o.label: o for o in others}
    rows = [full.images[:prompts].repeat_interleave(len(STEPS), dim=0)]
    for model in models:
        columns = [by_label[f"{model}, {_steps(n)}"].images[:prompts] for n in STEPS]
        rows.append(torch.stack(columns, dim=1).flatten(0, 1))
    above = [f"{_steps(n)}: {caption}" for caption in comparison.captions[:prompts] for n in STEPS]
    return image_grid(rows, [full.label, *models], above)


def _pictures(page: Page, shown: Image.Image, comparison: Comparison) -> None:
    page.heading("Pictures")
    page.picture(shown, "Every row starts from the same noise and the same prompts.")
    page.picture(comparison_grid(comparison), "Eight prompts, all ways.")


def _quality(page: Page, comparison: Comparison) -> None:
    outcomes = comparison.results
    page.heading("Quality")
    names = list(outcomes[0].figures)
    rows = [[o.label, *(_value(o, name) for name in names)] for o in outcomes]
    rows.append(["real images", *(f"{comparison.floors[n]:.4g}" if n in comparison.floors else "" for n in names)])
    page.table(["", *names], rows)
    page.text(f"{comparison.count} pictures of each; in brackets 95 % intervals, resampled over pictures.", note=True)
    for name in names:
        if name in FIGURES:
            page.text(f"{name}: {FIGURES[name]}.", note=True)
    for name in ("FD", "detail FD", "accuracy"):
        if name in names:
            page.chart(_by_steps(outcomes, name), "steps", name, logarithmic=name != "accuracy")
            cost = {m: [(by[s], v) for s, v in points if s in by] for m, points, by in _by_cost(outcomes, name)}
            page.chart(cost, "network evaluations per picture", name, logarithmic=name != "accuracy")


def _value(outcome: Result, name: str) -> str:
    value = f"{outcome.figures[name]:.4g}"
    if name in outcome.intervals:
        low, high = outcome.intervals[name]
        value += f" [{low:.3g}, {high:.3g}]"
    return value


def _by_cost(
    outcomes: Sequence[Result], figure: str
) -> list[tuple[str, Sequence[tuple[float, float]], dict[float, float]]]:
    """(model, its points by steps, evaluations by steps)."""
    costs: dict[str, dict[float, float]] = {}
    for outcome in outcomes[1:]:
        name, _, steps = outcome.label.rpartition(", ")
        costs.setdefault(name, {})[float(steps.split()[0])] = outcome.figures["evaluations"]
    series = _by_steps(outcomes, figure)
    return [(name, series[name], by_steps) for name, by_steps in costs.items()]


def _by_steps(outcomes: Sequence[Result], figure: str) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for outcome in outcomes[1:]:  # the first is the teacher's full length, far to the right
        name, _, steps = outcome.label.rpartition(", ")
        series.setdefault(name, []).append((float(steps.split()[0]), outcome.figures[figure]))
    full = outcomes[0]
    series[full.label] = [(float(n), full.figures[figure]) for n in (STEPS[0], STEPS[-1])]
    return series


def _training(page: Page, runs: Sequence[Path], labels: Sequence[str]) -> None:
    page.heading("Training")
    logs = {label: list(read_log(RunFiles(run).log)) for run, label in zip(runs, labels, strict=True)}
    losses = sorted({key for lines in logs.values() for line in lines for key in line if key.endswith("/loss")})
    for key in losses:
        series = {name: [(line["step"], line[key]) for line in lines if key in line] for name, lines in logs.items()}
        page.chart(series, "steps", key, logarithmic=True)
    spent = [
        [name, f"{lines[-1]['step']:g}", f"{lines[-1]['forward_equivalents']:,.0f}"]
        for name, lines in logs.items()
        if lines
    ]
    page.table(["run", "steps", "forward passes of one picture, or their equivalent"], spent)


_TIMED = {"score_gap": "matching", "d_real": "real", "d_fake": "fake"}  # and whose share of rows each is divided by


def _by_time(page: Page, runs: Sequence[Path], labels: Sequence[str]) -> None:
    """Where in time scores differ and a discriminator sees something: means of a log's last quarter."""
    series: dict[str, list[tuple[float, float]]] = {}
    for run, label in zip(runs, labels, strict=True):
        lines = list(read_log(RunFiles(run).log))
        for name, what in _TIMED.items():
            points = timed(lines[-max(1, len(lines) // 4) :], name, what)
            if points:
                series[f"{label} {name}"] = points
    if series:
        page.heading("By noise level")
        page.chart(series, "noise level, as a share of all", "mean over the last quarter")


def timed(lines: Sequence[Mapping[str, Any]], name: str, what: str) -> list[tuple[float, float]]:
    """(middle of a bin, mean of ``name`` there) over lines of a log; bins that no row fell into are left out."""
    for line in lines:
        player = next((key.split("/")[0] for key in line if key.endswith(f"/{name}_by_time/0")), None)
        if player is None:
            continue
        sums, shares = (
            [sum(line.get(f"{player}/{key}_by_time/{i}", 0.0) for line in lines) for i in range(BINS)]
            for key in (name, f"{what}_share")
        )
        return [((i + 0.5) / BINS, a / b) for i, (a, b) in enumerate(zip(sums, shares, strict=True)) if b > 0]
    return []


def _feedback(page: Page, runs: Sequence[Path], labels: Sequence[str]) -> None:
    """Where rewards take part: what they say, the one that is held out among them, and what that may cost."""
    logs = {label: list(read_log(RunFiles(run).log)) for run, label in zip(runs, labels, strict=True)}
    names = {key.removesuffix("_reached") for lines in logs.values() for line in lines for key in line
             if key.endswith("_reached")}  # fmt: skip
    if not names:
        return
    page.heading("Feedback")
    for ending, what in (("mean", "reward, in its model's own units"), ("reached", "share at the threshold")):
        series: dict[str, list[tuple[float, float]]] = {}
        for (label, lines), name in product(logs.items(), [*sorted(names), "student/held_out"]):
            key = f"{name}_{ending}"
            series[f"{label} {name.rpartition('/')[2]}"] = [(line["step"], line[key]) for line in lines if key in line]
        page.chart(series, "steps", what)
    files = {label: RunFiles(run).sample_statistics for run, label in zip(runs, labels, strict=True)}
    drawn = {label: [(line["step"], line["diversity"]) for line in read_log(file)] for label, file in files.items()}
    page.chart(drawn, "steps", "diversity within prompts, student over teacher")


def _diagnoses(page: Page, runs: Sequence[Path], labels: Sequence[str]) -> None:
    page.heading("Diagnosis")
    for run, label in zip(runs, labels, strict=True):
        first, *others = diagnose(run).sentences()
        page.text(f"{label}: {first}")
        for sentence in others:
            page.text(sentence, note=True)


def _provenance(page: Page, runs: Sequence[Path], labels: Sequence[str]) -> None:
    page.heading("Settings and versions")
    for run, label in zip(runs, labels, strict=True):
        page.text(label)
        page.code(RunFiles(run).recipe.read_text(encoding="utf-8"))
        page.code(RunFiles(run).versions.read_text(encoding="utf-8"))
    page.text(f"Made with torch {torch.__version__}.", note=True)
