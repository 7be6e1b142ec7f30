"""Training of one small network or a few together, resumable bit for bit: the parts of scenes-64 are made so.

All random numbers are keyed by (seed, step), and a checkpoint holds weights, their EMA and the optimiser's moments.
Started by torchrun, several processes train as one; the first of them writes.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from fewstep.data import files
from fewstep.data.random import Rng, stream_key
from fewstep.methods.base import Player
from fewstep.training import checkpoint, distributed
from fewstep.training.logging import JsonLines, Meter, Speed, progress_bar
from fewstep.training.players import PlayerState
from fewstep.training.run_files import RunFiles
from fewstep.training.settings import TrainingSettings


class Stage(Protocol):
    """What `Fit` trains."""

    name: str
    networks: dict[str, nn.Module]
    settings: TrainingSettings

    def loss(self, rng: Rng) -> dict[str, Tensor]:
        """``loss`` and its parts for the step ``rng.step``."""


class Fit:
    """One stage being trained: weights, their EMA, the optimiser, and where all that is kept.

    Networks have parameters only: buffers, such as batch statistics, would not be kept.
    """

    def __init__(self, stage: Stage, folder: Path, seed: int) -> None:
        self.stage, self.folder = stage, folder
        self.seed = stream_key(seed, "teacher", stage.name)
        parameters = {f"{n}/{k}": p for n, net in stage.networks.items() for k, p in net.named_parameters()}
        self.weights: dict[str, Tensor] = dict(parameters)
        self.ema = {name: p.detach().clone() for name, p in self.weights.items()}
        self.player = PlayerState(Player(stage.name), list(parameters.values()), stage.settings)
        self.done = 0
        newest = checkpoint.latest(RunFiles(folder).checkpoints)
        if newest is not None:
            self._restore(newest)

    def run(self, save_seconds: float = 120.0, show_progress: bool = False) -> None:
        """Train to the last step."""
        settings, meter = self.stage.settings, Meter()
        first = distributed.first()
        log = JsonLines(RunFiles(self.folder).log, self.done) if first else None
        speed, saved = Speed(self.done), time.monotonic()
        with progress_bar(settings.steps, self.done, self.stage.name, show_progress and first) as advance:
            while self.done < settings.steps:
                parts = self.step()
                for name, value in parts.items():
                    meter.add(name, value)
                last = self.done == settings.steps
                if self.done % settings.log_every == 0 or last:
                    record = {"step": self.done, **meter.read(), "steps_per_second": speed.read(self.done)}
                    self._guard()
                    if log is not None:
                        log.write(record)
                    advance(self.done, f"loss {record['loss']:.4f}  {record['steps_per_second']:.1f} steps/s")
                if first and (last or time.monotonic() - saved > save_seconds):
                    self._guard()
                    self.save()
                    saved = time.monotonic()
        distributed.wait()

    def step(self) -> dict[str, Tensor]:
        """One step: loss, backward, update, EMA."""
        parts = self.stage.loss(self._rng(self.done))
        self.player.backward(parts["loss"], 1)
        self.player.update(self.done)
        # early on the average must not remember the random start
        decay = min(self.stage.settings.ema_decay, (1 + self.done) / (10 + self.done))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), list(self.weights.values()), 1 - decay)
        self.done += 1
        return {name: value.detach() for name, value in parts.items()} | {"grad_norm": self.player.grad_norm}

    def seconds_per_step(self, steps: int = 6) -> float:
        """Measured without changing anything: gradients are computed and dropped."""
        for i in range(steps + 2):
            if i == 2:  # the first ones warm up
                start = time.perf_counter()
            self.player.backward(self.stage.loss(self._rng(i))["loss"], 1)
        self.player.optimizer.zero_grad(set_to_none=True)
        return (time.perf_counter() - start) / steps

    def _rng(self, step: int) -> Rng:
        size = self.stage.settings.batch_size
        return Rng(self.seed, step, size, distributed.rows(size), device=self.stage.settings.device)

    def save(self) -> None:
        tensors = {f"weights/{name}": t for name, t in self.weights.items()}
        tensors |= {f"ema/{name}": t for name, t in self.ema.items()}
        tensors |= {f"optimizer/{name}": t for name, t in self.player.tensors().items()}
        checkpoint.save(RunFiles(self.folder).checkpoints, self.done, tensors, {"seed": self.seed})

    def _restore(self, path: Path) -> None:
        tensors, state = checkpoint.load(path)
        if state.get("seed") != self.seed:
            raise ValueError(f"The checkpoint {path} was made with another seed: give another --out.")
        for name, target in (("weights", self.weights), ("ema", self.ema)):
            found = checkpoint.split(tensors, name)
            if {k: t.shape for k, t in found.items()} != {k: t.shape for k, t in target.items()}:
                raise ValueError(f"The checkpoint {path} is of networks of another shape: give another --out.")
            with torch.no_grad():
                for key, tensor in found.items():
                    target[key].copy_(tensor)
        self.player.load_tensors(checkpoint.split(tensors, "optimizer"))
        self.done = int(state["step"])

    def _guard(self) -> None:
        bad = self.player.first_bad_step.item()
        if bad != float("inf"):
            raise ValueError(f"Step {int(bad)} of stage {self.stage.name}: the gradient is not finite.")

    def use_average(self) -> None:
        """Put the EMA's weights into the networks."""
        with torch.no_grad():
            for name, parameter in self.weights.items():
                parameter.copy_(self.ema[name])


def plan(fit: Fit, minutes: float | None) -> None:
    """Turn minutes into steps once and for all: a resumed run must follow the same learning rates."""
    path = fit.folder / "plan.json"
    with distributed.first_goes_first():
        if not path.is_file() and minutes is not None:
            seconds = fit.seconds_per_step()
            path.parent.mkdir(parents=True, exist_ok=True)
            steps = max(1, int(minutes * 60 / seconds))
            files.replace_text(path, json.dumps({"steps": steps, "seconds_per_step": round(seconds, 4)}))
    if path.is_file():
        steps = json.loads(path.read_text())["steps"]
        fit.stage.settings = fit.player.settings = replace(fit.stage.settings, steps=steps)
