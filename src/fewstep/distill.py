"""The main job: a recipe becomes a run directory that holds everything it needs and everything it made.

<run>/recipe.yaml          the resolved recipe, every default written out
      versions.json        of the programs, and the data's fingerprint
      data/                encoded pictures and captions
      log.jsonl            one line for every log step
      checkpoints/         to resume from
      samples/             grids at fixed seeds, while it trains
      student/             the result
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import yaml

from fewstep.data.cache import fingerprint, scene_latents
from fewstep.data.files import replace_text
from fewstep.evaluation.grids import image_grid
from fewstep.export.student import Card, sampler_of, save_student
from fewstep.methods.base import Method
from fewstep.models.families import Teacher, load_teacher
from fewstep.models.roles import Roles
from fewstep.recipe import Recipe, RecipeError, as_yaml
from fewstep.sampling import DDIM, sample
from fewstep.training.logging import progress_bar
from fewstep.training.trackers import check_trackers
from fewstep.training.trainer import Trainer, build_roles

_MAY_CHANGE = tuple(
    f"training.{name}" for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints", "trackers")
)


@dataclass
class Job:
    """A run, made ready: its parts can be used one by one.

    Attributes:
        recipe, folder: what to do, and where.
        teacher, method, roles: what takes part.
    """

    recipe: Recipe
    folder: Path
    teacher: Teacher
    method: Method
    roles: Roles

    @property
    def role(self) -> str:
        """The role that is sampled and exported: the student's average where there is one."""
        return "ema" if "ema" in self.roles else "student"

    def card(self, steps: int) -> Card:
        """How to sample from the student after ``steps`` steps of training."""
        recipe, student = self.recipe, self.recipe.student
        spec = next(s for s in self.method.roles() if s.name == "student")
        scale = getattr(self.method.settings, "guidance_scale", 1.0)
        told = float(scale if isinstance(scale, int | float) else sum(scale) / 2)
        return Card(
            method=self.method.name,
            sampler=self.method.sampler,
            num_inference_steps=recipe.sample.num_inference_steps,
            eta=recipe.sample.eta,
            original_inference_steps=getattr(self.method.settings, "num_grid_steps", 50),
            weights=student.weights,
            rank=student.rank if student.weights == "lora" else 0,
            teacher=recipe.teacher.path,
            extra_inputs=spec.extra_inputs,
            guidance_embed=told if "guidance_embed" in spec.extra_inputs else None,
            steps=steps,
        )


def distill(recipe: Recipe, folder: Path, *, resume: bool = False, show_progress: bool = False) -> Path:
    """Run ``recipe`` in ``folder``; returns the student's folder.

    Raises:
        RecipeError: the folder holds another run, or something else.
        TrainingStopped: by Ctrl-C or SIGTERM; everything is saved, and ``resume`` goes on from there.
    """
    check_folder(recipe, folder, resume)
    job = prepare(recipe, folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "recipe.yaml", as_yaml(recipe))  # only now: a recipe that cannot run claims no folder
    with progress_bar(recipe.data.size, 0, "encoding", show_progress) as advance:
        path = folder / "data" / "latents.safetensors"
        device = recipe.training.device
        source = scene_latents(path, job.teacher, recipe.data.size, recipe.data.seed, device, advance)
    replace_text(folder / "versions.json", json.dumps({**versions(), "data": fingerprint(source)}, indent=1) + "\n")
    hooks = ((recipe.sample.every, SampleGrid(job)),)
    trainer = Trainer(
        job.method, job.roles, source, recipe.training,
        seed=recipe.seed, run_dir=folder, hooks=hooks, show_progress=show_progress,
    )  # fmt: skip
    trainer.run(resume)
    save_student(folder / "student", job.roles, job.card(trainer.done), job.role)
    return folder / "student"


def prepare(recipe: Recipe, folder: Path) -> Job:
    """Load the teacher and build the roles of a recipe.

    Raises:
        ValueError: one sentence, for what would otherwise fail after hours: a device that is not there, a sampler that
            does not fit the schedule, a teacher of another family.
    """
    settings = recipe.training
    check_device(settings.device)
    check_trackers(settings.trackers)
    teacher = load_teacher(recipe.teacher.path, device=settings.device)
    method = recipe.method_class()(teacher.denoiser.schedule, recipe.method_settings())
    roles = build_roles(teacher.denoiser, method, settings, recipe.student.build(), recipe.seed)
    job = Job(recipe, folder, teacher, method, roles)
    few = recipe.sample.num_inference_steps
    many = recipe.sample.teacher_steps
    for sampler in (sampler_of(job.card(0)), DDIM(num_inference_steps=few), DDIM(num_inference_steps=many)):
        try:
            sampler.times(teacher.denoiser.schedule)
        except ValueError as error:
            raise RecipeError(f"The samplers of this recipe do not fit its method and teacher: {error}") from None
    return job


def check_device(name: str) -> None:
    """Raises RecipeError for a device that this machine or this torch does not have."""
    try:
        there = torch.empty(1, device=name).cpu().device.type == "cpu"
    except (RuntimeError, AssertionError, NotImplementedError):
        there = False
    if not there:
        raise RecipeError(f"training.device: there is no device '{name}' here: use cpu, or cuda where torch finds one.")


def check_folder(recipe: Recipe, folder: Path, resume: bool) -> None:
    """Refuse in one sentence a ``folder`` that holds something else than this recipe's run."""
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder} is a file: choose another --out.")
    stored = folder / "recipe.yaml"
    if stored.is_file():
        if not resume:
            raise RecipeError(f"{folder} already holds a run: add --resume to go on with it, or choose another --out.")
        try:
            before = yaml.safe_load(stored.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError):
            before = None
        if not isinstance(before, dict):
            raise RecipeError(f"{stored} is damaged: restore it, or choose another --out.")
        _same_recipe(before, yaml.safe_load(as_yaml(recipe)), folder)
    elif folder.is_dir() and any(folder.iterdir()):
        raise RecipeError(f"{folder} is not empty and holds no run: choose another --out.")


def _same_recipe(before: dict[str, object], now: dict[str, object], folder: Path) -> None:
    """A run may be made longer; anything else would no longer be the same run."""
    old, new = _flat(before), _flat(now)
    for key in sorted(old.keys() | new.keys()):
        if key in _MAY_CHANGE or key.startswith("sample."):
            continue
        if old.get(key) != new.get(key):
            raise RecipeError(
                f"{folder} was started with {key} = {old.get(key)}, not {new.get(key)}: "
                "resume with the recipe it was started with, or choose another --out."
            )


def _flat(data: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(data, dict):
        return {prefix: data}
    found: dict[str, object] = {}
    for key, value in data.items():
        found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def versions() -> dict[str, str]:
    """Of everything that can change a result."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("fewstep", "torch", "diffusers", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


class SampleGrid:
    """Writes ``samples/step-<n>.png``: the teacher at many and at few steps, and the student, from the same noise.

    And into samples/statistics.jsonl the diversity: how much two samples of one prompt differ, of the student over
    the teacher's at full length from the same noises, root mean square in latents, averaged over the prompts.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._teacher_rows: list[torch.Tensor] | None = None
        self._teacher_difference = 0.0

    def __call__(self, step: int) -> None:
        job, settings = self.job, self.job.recipe.sample
        cond = job.teacher.encode_prompts(settings.prompts)
        noise, other = (self._noise(len(settings.prompts), job.recipe.seed + i) for i in range(2))
        few = settings.num_inference_steps
        if self._teacher_rows is None:
            full, again, short = (
                sample(job.teacher.denoiser, DDIM(num_inference_steps=n), start, cond, settings.guidance_scale).x0
                for n, start in ((settings.teacher_steps, noise), (settings.teacher_steps, other), (few, noise))
            )
            self._teacher_rows = [job.teacher.decode(full), job.teacher.decode(short)]
            self._teacher_difference = _difference(full, again)
        card = job.card(step)
        student, again = (
            sample(
                job.roles.views()[job.role].uncounted(), sampler_of(card), start, cond,
                guidance_embed=card.guidance_embed, generator=torch.Generator().manual_seed(job.recipe.seed + i),
            ).x0
            for i, start in enumerate((noise, other))
        )  # fmt: skip
        diversity = _difference(student, again) / max(self._teacher_difference, 1e-30)
        rows = [*self._teacher_rows, job.teacher.decode(student)]
        labels = [f"teacher, {settings.teacher_steps} steps", f"teacher, {few} steps", f"student, {few} steps"]
        path = job.folder / "samples" / f"step-{step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        image_grid(rows, labels, settings.prompts).save(path)
        with open(path.parent / "statistics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "diversity": diversity}) + "\n")

    def _noise(self, count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(count, *self.job.teacher.latent_shape, generator=generator)
        return noise.to(self.job.recipe.training.device)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square over places of a - b, [B, ...] each, averaged over the rows."""
    return float((a - b).flatten(1).square().mean(1).sqrt().mean())
