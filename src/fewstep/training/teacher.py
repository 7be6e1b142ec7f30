"""Training of scenes-64, the teacher that ships with fewstep: two stages, resumable, on a CPU or a GPU.

    python -m fewstep.training.teacher --out runs/teacher --vae-minutes 20 --unet-minutes 60 --export scenes-64

Every stage leaves ``<out>/<stage>/checkpoints`` and ``<out>/<stage>/log.jsonl``; the same command continues an
interrupted run. All random numbers are keyed by (seed, step), so a resumed run ends in the same weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.data import files
from fewstep.data.scenes import WORDS
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Player
from fewstep.methods.random import Rng, stream_key
from fewstep.models import scenes64
from fewstep.training import checkpoint
from fewstep.training.logging import JsonLines, Meter, Speed, progress_bar
from fewstep.training.players import PlayerState
from fewstep.training.settings import TrainingSettings
from fewstep.training.teacher_stages import (
    AutoencoderStage,
    LatentPool,
    TextToImageStage,
    encode_pool,
    latent_std,
    token_ids,
)


@dataclass(frozen=True)
class TeacherSettings:
    """How the shipped teacher is trained.

    Attributes:
        seed: of weights, scenes and all random numbers; each use has its own stream.
        vae, unet: optimisation of the two stages.
        pool, tellings: how many scenes are encoded for stage two, and captions kept of each.
        save_seconds: at most so long between checkpoints; they have no influence on the result.
    """

    seed: int = 0
    vae: TrainingSettings = field(
        default_factory=lambda: TrainingSettings(
            steps=4200, batch_size=8, learning_rate=1.5e-3, warmup_steps=100, lr_schedule="cosine",
            betas=(0.9, 0.99), ema_decay=0.995,
        )
    )  # fmt: skip
    unet: TrainingSettings = field(
        default_factory=lambda: TrainingSettings(
            steps=40000, batch_size=32, learning_rate=1.2e-3, warmup_steps=200, lr_schedule="cosine",
            betas=(0.9, 0.99), weight_decay=0.01, ema_decay=0.999,
        )
    )  # fmt: skip
    pool: int = 32768
    tellings: int = 4
    save_seconds: float = 120.0


class Stage(Protocol):
    """What `fit` trains."""

    name: str
    networks: dict[str, nn.Module]
    settings: TrainingSettings

    def loss(self, rng: Rng) -> dict[str, Tensor]:
        """``loss`` and its parts for the step ``rng.step``."""


class Fit:
    """One stage being trained: weights, their EMA, the optimiser, and where all that is kept."""

    def __init__(self, stage: Stage, folder: Path, seed: int) -> None:
        self.stage, self.folder = stage, folder
        self.seed = stream_key(seed, "teacher", stage.name)
        parameters = {f"{n}/{k}": p for n, net in stage.networks.items() for k, p in net.named_parameters()}
        self.weights: dict[str, Tensor] = dict(parameters)
        self.ema = {name: p.detach().clone() for name, p in self.weights.items()}
        self.player = PlayerState(Player(stage.name), list(parameters.values()), stage.settings)
        self.done = 0
        newest = checkpoint.latest(folder / "checkpoints")
        if newest is not None:
            self._restore(newest)

    def run(self, save_seconds: float = 120.0, show_progress: bool = False) -> None:
        """Train to the last step."""
        settings, meter = self.stage.settings, Meter()
        log, speed, saved = JsonLines(self.folder / "log.jsonl", self.done), Speed(self.done), time.monotonic()
        with progress_bar(settings.steps, self.done, self.stage.name, show_progress) as advance:
            while self.done < settings.steps:
                parts = self.step()
                for name, value in parts.items():
                    meter.add(name, value)
                last = self.done == settings.steps
                if self.done % settings.log_every == 0 or last:
                    record = {"step": self.done, **meter.read(), "steps_per_second": speed.read(self.done)}
                    self._guard()
                    log.write(record)
                    advance(self.done, f"loss {record['loss']:.4f}  {record['steps_per_second']:.1f} steps/s")
                if last or time.monotonic() - saved > save_seconds:
                    self._guard()
                    self.save()
                    saved = time.monotonic()

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
        return Rng(self.seed, step, self.stage.settings.batch_size, device=self.stage.settings.device)

    def save(self) -> None:
        tensors = {f"weights/{name}": t for name, t in self.weights.items()}
        tensors |= {f"ema/{name}": t for name, t in self.ema.items()}
        tensors |= {f"optimizer/{name}": t for name, t in self.player.tensors().items()}
        checkpoint.save(self.folder / "checkpoints", self.done, tensors, {"seed": self.seed})

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


# ---------------------------------------------------------------- the two stages, one after the other


def train_vae(out: Path, settings: TeacherSettings, minutes: float | None = None, show: bool = False) -> Any:
    """Stage one; returns the averaged autoencoder with its scaling factor in the config."""
    fit = Fit(AutoencoderStage(_built("vae", settings), settings.vae, settings.seed), out / "vae", settings.seed)
    _plan(fit, minutes)
    fit.run(settings.save_seconds, show)
    fit.use_average()
    vae = _frozen(fit.stage.networks["vae"])
    known = out / "vae" / "scaling_factor.json"
    if not known.is_file():
        factor = 1 / latent_std(vae, settings.seed + 1, min(1024, settings.pool), settings.vae.device)
        files.replace_text(known, json.dumps({"scaling_factor": round(factor, 5)}))
    vae.register_to_config(**json.loads(known.read_text()))
    return vae


def train_unet(out: Path, settings: TeacherSettings, vae: Any, minutes: float | None = None, show: bool = False) -> Fit:
    """Stage two on the latents of ``vae``; returns the finished fit, the averaged weights in its networks."""
    fit = unet_fit(out, settings, vae)
    _plan(fit, minutes)
    fit.run(settings.save_seconds, show)
    fit.use_average()
    return fit


def unet_fit(out: Path, settings: TeacherSettings, vae: Any) -> Fit:
    """Stage two as far as it got: newest checkpoint, encoded scenes (made and kept on the first call)."""
    tokenizer = scenes64.build_tokenizer(WORDS)
    stage = TextToImageStage(
        _built("unet", settings),
        _built("text_encoder", settings),
        _pool(out, settings, vae, tokenizer),
        token_ids(tokenizer, [""]),
        Schedule.from_diffusers(scenes64.build_scheduler()),
        settings.unet,
    )
    return Fit(stage, out / "unet", settings.seed)


def export(fit: Fit, vae: Any, folder: Path) -> int:
    """Write the averaged weights as a diffusers folder in float16; returns its bytes."""
    fit.use_average()
    unet, text_encoder = (_frozen(fit.stage.networks[name]) for name in ("unet", "text_encoder"))
    tokenizer = scenes64.build_tokenizer(WORDS)
    return scenes64.save_pipeline(scenes64.assemble(vae, unet, text_encoder, tokenizer), folder)


def _built(part: str, settings: TeacherSettings) -> Any:
    """A network with random weights from its own stream."""
    builders: dict[str, Callable[[], Any]] = {
        "vae": scenes64.build_vae,
        "unet": scenes64.build_unet,
        "text_encoder": lambda: scenes64.build_text_encoder(scenes64.build_tokenizer(WORDS)),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_key(settings.seed, "weights", part))
        network = builders[part]()
    device = (settings.vae if part == "vae" else settings.unet).device
    return network.to(device, memory_format=torch.channels_last).train()


def _frozen(network: Any) -> Any:
    return network.eval().requires_grad_(False)


def _pool(out: Path, settings: TeacherSettings, vae: Any, tokenizer: Any) -> LatentPool:
    path = out / "unet" / "latents.safetensors"
    if not path.is_file():
        pool = encode_pool(vae, tokenizer, settings.seed + 2, settings.pool, settings.tellings, settings.vae.device)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_tensors(path, pool.tensors())
    return LatentPool(**load_file(path))


def _plan(fit: Fit, minutes: float | None) -> None:
    """Turn minutes into steps once and for all: a resumed run must follow the same learning rates."""
    path = fit.folder / "plan.json"
    if not path.is_file() and minutes is not None:
        seconds = fit.seconds_per_step()
        path.parent.mkdir(parents=True, exist_ok=True)
        steps = max(1, int(minutes * 60 / seconds))
        files.replace_text(path, json.dumps({"steps": steps, "seconds_per_step": round(seconds, 4)}))
    if path.is_file():
        steps = json.loads(path.read_text())["steps"]
        fit.stage.settings = fit.player.settings = replace(fit.stage.settings, steps=steps)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fewstep.training.teacher", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="run directory; an unfinished run in it is continued")
    parser.add_argument("--vae-minutes", type=float, help="length of stage one (default: its number of steps)")
    parser.add_argument("--unet-minutes", type=float, help="length of stage two (default: its number of steps)")
    parser.add_argument("--stage", choices=("vae", "unet"), default="unet", help="where to stop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the diffusers folder here at the end")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    settings = TeacherSettings(seed=given.seed)
    settings = replace(
        settings, vae=replace(settings.vae, device=given.device), unet=replace(settings.unet, device=given.device)
    )
    vae = train_vae(given.out, settings, given.vae_minutes, show=True)
    if given.stage == "vae":
        return
    fit = train_unet(given.out, settings, vae, given.unet_minutes, show=True)
    if given.export:
        size = export(fit, vae, given.export)
        print(f"Wrote {given.export} ({size / 1e6:.1f} MB).")


if __name__ == "__main__":
    main()
