"""Training of the parts of scenes-64 by the `Trainer` that distils: a stage is a network, a source and a loss.

Roles hold the network as the student, and its average as ``ema``. Started by torchrun, several processes train as one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.data import files
from fewstep.data.batch import Batch
from fewstep.data.random import Rng, stream_key
from fewstep.data.sources import Source
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Method, Progress
from fewstep.models.denoiser import Denoiser
from fewstep.models.roles import Roles, Weights
from fewstep.scenes64.random import ScenesRng
from fewstep.training import distributed
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, build_roles, seconds_per_step

_PLAN = "plan.json"


class Stage(Method):
    """A method that trains a network of its own, which need not be a denoiser: its loss may call `trained` itself.

    Args:
        network: trained in a copy; it is left as it is.
        source: of the batches.
        schedule: of the noise, where the loss needs one.
    """

    def __init__(self, network: nn.Module, source: Source, schedule: Schedule | None = None) -> None:
        super().__init__(schedule or Schedule.scaled_linear())
        self.start, self.source = network, source

    def draw(self, batch: Batch, rng: Rng, progress: Progress) -> Any:
        """No random numbers beside those of the batch."""
        return None

    @staticmethod
    def trained(roles: Roles) -> Any:
        """The network that is trained."""
        return roles.student.network.network  # type: ignore[attr-defined]

    def trainer(self, settings: TrainingSettings, seed: int, folder: Path | None = None, show: bool = False) -> Trainer:
        """The trainer of this stage."""
        # An average over more steps than the run has would still hold the random weights that training starts from.
        decay = min(settings.ema_decay, (1 + settings.steps) / (10 + settings.steps))
        settings = replace(settings, ema_decay=decay)
        roles = build_roles(Denoiser(self.start, self.schedule), self, settings, Weights("full"))
        key = stream_key(seed, "teacher", self.name)
        return Trainer(
            self, roles, self.source, settings, seed=key, run_dir=folder, show_progress=show, rng=ScenesRng
        )  # fmt: skip

    def train(
        self, settings: TrainingSettings, folder: Path, seed: int, minutes: float | None = None, show: bool = False
    ) -> Any:
        """Train in ``folder``, or continue training; returns the averaged network, frozen.

        Random numbers are keyed by (seed, step): an interrupted run that is continued ends in the same weights.

        Args:
            minutes: length of the training, converted to a number of steps when it begins; None: ``settings.steps``.
            show: show a progress bar.

        Raises:
            TrainingStopped: on Ctrl-C; everything is saved.
            ValueError: the checkpoint in ``folder`` is damaged, or was made with another seed or network.
        """
        if minutes is not None and not distributed.from_first((folder / _PLAN).is_file()):
            _plan(self.trainer(settings, seed), folder, minutes)
        if (folder / _PLAN).is_file():
            settings = replace(settings, steps=json.loads((folder / _PLAN).read_text(encoding="utf-8"))["steps"])
        trainer = self.trainer(settings, seed, folder, show)
        trainer.run(resume=True)
        return averaged(trainer)


def averaged(trainer: Trainer) -> Any:
    """The average of the trained network where there is one, else the network itself; frozen."""
    views = trainer.roles.views()
    network: Any = views.get("ema", views["student"]).network
    return network.network.eval().requires_grad_(False)


def _plan(trainer: Trainer, folder: Path, minutes: float) -> None:
    """Convert minutes into steps, once: a run that is continued must follow the same learning rates.

    Every process takes part in the measurement, because each step waits for all of them; the first one's time counts.
    """
    seconds = distributed.from_first(seconds_per_step(trainer, steps=6, warm_up=2))
    if distributed.first():
        folder.mkdir(parents=True, exist_ok=True)
        plan = {"steps": max(1, int(minutes * 60 / seconds)), "seconds_per_step": round(seconds, 4)}
        files.replace_text(folder / _PLAN, json.dumps(plan))
    distributed.wait()


# ---------------------------------------------------------------- beside the loop


@contextmanager
def seeded(seed: int, part: str) -> Iterator[None]:
    """Within this block torch's generator is in the stream of ``part``'s random weights; it is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_key(seed, "weights", part))
        yield


def kept(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in ``path``, which the first process makes if there is no such file."""
    with distributed.first_goes_first():
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            files.replace_tensors(path, make())
    return load_file(path)
