"""The names of the files in a run directory; no other module writes one of them."""

from __future__ import annotations

from pathlib import Path


class RunFiles:
    """Where each part of a run directory is.

    recipe.yaml          the resolved recipe, every default written out
    versions.json        versions of the programs, and the fingerprint of the data
    data/                encoded images and captions, and skipped.txt, which lists those that could not be used
    data/pairs/          the teacher's samples (recipe key `pairs`)
    log.jsonl            one line for every log step
    checkpoints/         to resume from
    samples/             sample grids at fixed seeds, and statistics.jsonl, their diversity
    evaluations.jsonl    validation results during training
    best/                the best student so far (recipe key `evaluate`)
    student/             the finished student
    export/              exports for other programs, one folder a format

    The run directory of several stages has its own recipe.yaml and data/, and one run directory a stage, ``01-name``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def versions(self) -> Path:
        return self.path / "versions.json"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def pairs(self) -> Path:
        return self.data / "pairs"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def sample_statistics(self) -> Path:
        return self.samples / "statistics.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def student(self) -> Path:
        return self.path / "student"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def grid(self, step: int) -> Path:
        """The sample grid after ``step`` steps."""
        return self.samples / f"step-{step:07d}.png"

    def stage(self, number: int, name: str) -> Path:
        """The run directory of stage ``number``, counted from 1."""
        return self.path / f"{number:02d}-{name}"

    def stages(self) -> list[Path]:
        """The run directories of the stages that exist, in their order."""
        return sorted(self.path.glob("[0-9][0-9]-*"))

    def last(self) -> Path:
        """The directory itself, or that of the last stage that trains: it has the log and the recipe of the result."""
        trained = [stage for stage in self.stages() if RunFiles(stage).recipe.is_file()]
        return trained[-1] if trained and self.recipe.is_file() else self.path
