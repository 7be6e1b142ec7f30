"""The names of the files in a run directory; no other module writes one of them."""

from __future__ import annotations

import difflib
from fnmatch import fnmatch
from pathlib import Path

RUNS = "runs"
"""The folder of runs that are not told another."""
_STAGE = "[0-9][0-9]-*"


class RunFiles:
    """Where each part of a run directory is.

    The run directory of several stages has its own ``recipe`` and ``data``, and one run directory a stage, ``01-name``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"  # resolved, every default written out
        self.versions = path / "versions.json"  # versions of the libraries, and the fingerprint of the data
        self.data = path / "data"  # encoded images and captions, and the list of those that could not be used
        self.pairs = self.data / "pairs"  # the teacher's samples (recipe key `pairs`)
        self.log = path / "log.jsonl"  # one line for every log step
        self.checkpoints = path / "checkpoints"  # full training states, from which a run resumes
        self.samples = path / "samples"  # sample grids at fixed seeds
        self.sample_statistics = self.samples / "statistics.jsonl"  # diversity of the sample grids
        self.evaluations = path / "evaluations.jsonl"  # validation results (recipe key `evaluate`)
        self.best = path / "best"  # the best student so far
        self.student = path / "student"  # the finished student
        self.export = path / "export"  # exports for other programs, one folder a layout

    @property
    def reference(self) -> Path:
        """The images of the first teacher that students are compared with; the stages of a run share them."""
        whole = self._whole()
        return (self if whole is None else whole).data / "reference"

    def beside(self, name: str) -> Path | None:
        """The run directory of the stage ``name`` of the run that this is a stage of; None where there is none."""
        whole = self._whole()
        return next((stage for stage in ([] if whole is None else whole.stages()) if stage.name[3:] == name), None)

    def _whole(self) -> RunFiles | None:
        """The run of several stages that this is one of."""
        path = self.path.resolve()
        whole = RunFiles(path.parent)
        return whole if fnmatch(path.name, _STAGE) and whole.recipe.is_file() else None

    def grid(self, step: int) -> Path:
        """The sample grid after ``step`` steps."""
        return self.samples / f"step-{step:07d}.png"

    def stage(self, number: int, name: str) -> Path:
        """The run directory of stage ``number``, counted from 1."""
        return self.path / f"{number:02d}-{name}"

    def stages(self) -> list[Path]:
        """The run directories of the stages that exist, in their order."""
        return sorted(self.path.glob(_STAGE))

    def last(self) -> Path:
        """The directory itself, or that of the last stage that trains: it has the log and the recipe of the result."""
        trained = [stage for stage in self.stages() if RunFiles(stage).recipe.is_file()]
        return trained[-1] if trained and self.recipe.is_file() else self.path


def refuse_missing_run(name: str | Path) -> None:
    """Refuse the name of a run that is not there, before a model hub, on which names look alike, is asked for it.

    A name is a run's where its folder is `RUNS` or holds other runs; of folders above this one, `RUNS` alone.

    Raises:
        ValueError: one sentence that names the nearest run, or those that are there.
    """
    path = Path(name)
    above = path.parent
    if path.exists() or above == Path(".") or (".." in path.parts and above.name != RUNS):
        return
    there = sorted(p.parent.name for p in above.glob(f"*/{RunFiles(path).recipe.name}"))
    if not there and path.parts[0] != RUNS:
        return
    near = difflib.get_close_matches(path.name, there, n=1)
    holds = f"{above} holds {', '.join(there)}" if there else f"{above} holds none"
    raise ValueError(f"There is no run {path}: {f'did you mean {above / near[0]}?' if near else f'{holds}.'}")
