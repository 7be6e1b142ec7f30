"""Validation during training: sample grids, and measurements that keep the best student and may end the run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from fewstep.evaluation.compare import Candidate, eval_inputs, sample_candidate
from fewstep.evaluation.figures import DECIDING, best_first
from fewstep.evaluation.grids import ON_PAGES, image_grid
from fewstep.evaluation.measured import Reference
from fewstep.evaluation.prompt_set import PromptSet
from fewstep.evaluation.result import in_steps
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import Teacher
from fewstep.recipe.schema import Recipe
from fewstep.runs.first_teacher import first_teacher_of, on_first_teacher
from fewstep.runs.measured_on import evaluation_captions, needs_teacher_images, prompt_set
from fewstep.runs.setup import Run
from fewstep.sampling import DDIMSampler, sample
from fewstep.scenes64.prompts import REFERENCE_FIRST
from fewstep.students.card import Card, load_card, sampler_of
from fewstep.students.lineage import copy_student
from fewstep.students.student import SAMPLES_FILE, load_weights, save_student
from fewstep.training import distributed
from fewstep.training.logging import JsonLines, read_log
from fewstep.training.progress import doing


def validation_prompts(recipe: Recipe) -> list[list[str]]:
    """The lists of prompts that are encoded during training: until then the text encoders are needed."""
    return [list(recipe.sample.prompts), *([evaluation_captions(recipe)] if recipe.evaluate.every else [])]


def run_prompt_set(run: Run, show_progress: bool = False) -> PromptSet:
    """What the students of a run are measured on: against the images of the first teacher of its lineage.

    That model is loaded for these images alone, where it is not the run's own teacher. The text encoders must be there:
    they are part of what identifies a teacher.
    """
    recipe, teacher = run.recipe, run.teacher
    if needs_teacher_images(recipe, teacher.image_size):
        first = on_first_teacher(recipe, run.folder)
        if first is not recipe:
            with doing("loading the first teacher"):
                recipe, teacher = first, first_teacher_of(first)
    return prompt_set(recipe, teacher, run.folder, show_progress=show_progress)


class SampleGrid:
    """Writes a sample grid: the teacher at many and at few steps, and the student, from the same noise.

    Beside it goes the diversity: the root mean square difference of two samples of one prompt, in latents and averaged
    over the prompts, of the student divided by that of the teacher at full length from the same noises.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._teacher_rows: list[torch.Tensor] | None = None
        self._teacher_difference = 0.0
        self._log: JsonLines | None = None

    def __call__(self, step: int) -> None:
        with doing("generating sample images"):
            self._write(step)

    def _write(self, step: int) -> None:
        run, settings = self.run, self.run.recipe.sample
        cond = run.teacher.encode_prompts(settings.prompts)
        many, few = settings.teacher_steps, settings.num_inference_steps
        if self._teacher_rows is None:
            row = partial(sample_teacher, run.teacher, run.recipe, cond)
            full, again, short = row(many), row(many, number=1), row(few)
            self._teacher_rows = [run.teacher.decode(full), run.teacher.decode(short)]
            self._teacher_difference = _difference(full, again)
        student, again = (_sample_student(run, run.roles.views()[run.role], run.card(step), cond, i) for i in range(2))
        diversity = _difference(student, again) / max(self._teacher_difference, 1e-30)
        rows = [*self._teacher_rows, run.teacher.decode(student)]
        labels = [f"teacher, {in_steps(many)}", f"teacher, {in_steps(few)}", f"student, {in_steps(few)}"]
        if not distributed.first():
            return
        run.folder.samples.mkdir(exist_ok=True)
        image_grid(rows, labels, settings.prompts, largest=2 * ON_PAGES).save(run.folder.grid(step))
        self._log = self._log or JsonLines(run.folder.sample_statistics, step - 1)
        self._log.write({"step": step, "diversity": diversity})


def sample_exported(run: Run, folder: Path) -> None:
    """Write the samples of the student in ``folder`` beside it, from its files alone: weights and card."""
    card, settings = load_card(folder), run.recipe.sample
    kind = card.prediction_type or None
    weights = run.recipe.student.build()
    view = run.roles.add("exported", weights, extra_inputs=card.extra_inputs, prediction_type=kind, bank=card.bank)
    run.roles.start("exported", load_weights(folder))
    latents = _sample_student(run, view, card, run.teacher.encode_prompts(settings.prompts))
    label = f"{card.method}, {in_steps(card.num_inference_steps)}"
    grid = image_grid([run.teacher.decode(latents)], [label], settings.prompts, largest=2 * ON_PAGES)
    grid.save(folder / SAMPLES_FILE)


def sample_teacher(teacher: Teacher, recipe: Recipe, cond: Cond, steps: int, number: int = 0) -> torch.Tensor:
    """Latents of the sample grid's prompts by the teacher, in DDIM steps from the noise of ``number``.

    Args:
        cond: of the prompts in ``recipe.sample``.
    """
    noise, _ = _noise(teacher, recipe, number)
    return sample(
        teacher.denoiser, DDIMSampler(num_inference_steps=steps), noise, cond, recipe.sample.guidance_scale
    ).x0


def _noise(teacher: Teacher, recipe: Recipe, number: int) -> tuple[torch.Tensor, torch.Generator]:
    """Initial noise [prompts, ...] of the sample grid, by the run's seed plus ``number``, and the sampler's generator.

    The generator has drawn the noise and goes on from there: started anew, its first draw would be that very noise.
    """
    generator = torch.Generator().manual_seed(recipe.seed + number)
    noise = torch.randn(len(recipe.sample.prompts), *teacher.latent_shape, generator=generator)
    return noise.to(recipe.training.device), generator


def _sample_student(run: Run, view: Denoiser, card: Card, cond: Cond, number: int = 0) -> torch.Tensor:
    """Latents of the sample grid's prompts by a student, with the sampler of its card, from the noise of ``number``."""
    noise, generator = _noise(run.teacher, run.recipe, number)
    return sample(
        view.uncounted(), sampler_of(card), noise, cond, card.guidance_scale,
        guidance_embed=card.guidance_embed, generator=generator,
    ).x0  # fmt: skip


class Validation:
    """Measures the student on unseen prompts, keeps the best one, and ends the run when it no longer improves.

    Its whole state is the file of evaluations, so an interrupted run decides like an uninterrupted one.

    Args:
        measured_on: the prompts, and what their images are compared with.
        cost: returns the cost of the run so far, in forward passes.
    """

    def __init__(self, run: Run, measured_on: PromptSet, cost: Callable[[], float]) -> None:
        self.run, self.cost, self.settings = run, cost, run.recipe.evaluate
        self.path = run.folder.evaluations
        self._log: JsonLines | None = None
        self._prompts = measured_on
        self._reference: Reference | None = None

    def __call__(self, step: int) -> bool:
        """Measure after ``step`` steps; True when the run should end."""
        with doing(f"validation after step {step:,}"):
            record = {"step": step, **distributed.from_first(self._measure(step))}
        if distributed.first():
            self._log = self._log or JsonLines(self.path, step - 1)  # later lines are from before an interruption
            prompts = self._prompts
            self._log.write(record | {"on": f"{len(prompts.captions)} {prompts.about}"})
        distributed.wait()
        if self.settings.keep_best and self._best(step) == step:
            save_student(self.run.folder.best, self.run.roles, self.run.card(step, self.cost()), self.run.role)
        return self.enough(step)

    def enough(self, step: int) -> bool:
        """Whether the last ``patience`` measurements up to ``step`` brought no improvement."""
        best = self._best(step)
        waited = sum(line["step"] > best for line in self._lines(step)) if best is not None else 0
        return 0 < self.settings.patience <= waited

    def keep(self) -> bool:
        """Make the best student the result of the run; False when none was kept."""
        best = self.run.folder.best
        if not (self.settings.keep_best and best.is_dir()):
            return False
        if distributed.first():
            copy_student(best, self.run.folder.student)
        return True

    def _best(self, step: int) -> int | None:
        """The step of the best measurement, the first of equals."""
        metric = self.settings.metric
        lines = [(best_first(metric, line[metric]), line["step"]) for line in self._lines(step)]
        return int(min(lines)[1]) if lines else None

    def _lines(self, step: int) -> list[dict[str, float]]:
        return [line for line in read_log(self.path) if line["step"] <= step and self.settings.metric in line]

    def _measure(self, step: int) -> dict[str, float]:
        run = self.run
        card = run.card(step)
        student, scale = run.roles.views()[run.role].uncounted(), card.guidance_scale
        candidate = Candidate("student", student, sampler_of(card), scale, card.guidance_embed)
        prompts, seed = self._prompts, run.recipe.seed
        self._reference = self._reference or prompts.reference_from(REFERENCE_FIRST)
        cond, noise = eval_inputs(run.teacher, prompts, seed)
        images = run.teacher.decode(sample_candidate(candidate, noise, cond, seed)).cpu()
        # `compare` would compute intervals and floors too, which nobody reads here
        figures = prompts.measure(images).figures(self._reference)
        return {name: figures[name] for name in DECIDING if name in figures}


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of a - b over all but the first axis, averaged over that one; both [B, ...]."""
    return float((a - b).flatten(1).square().mean(1).sqrt().mean())
