"""Training of the reader, which measures whether scenes-64 pictures show what their captions say, and of the encoder.

    python -m fewstep.scenes64.train_detector --out runs/reader --teacher runs/teacher --minutes 40 \\
        --export reader.safetensors
    python -m fewstep.scenes64.train_detector --network encoder --out runs/encoder --teacher runs/teacher

The same command continues an interrupted run. Half of each batch is fresh renders, half went through the teacher's
autoencoder (`--teacher`): the reader must judge generated pictures, which have passed that decoder. The reader
measures and must never stand in a loss; the encoder serves in losses and must never measure. They share the task, and
neither scenes nor shape.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.data import files
from fewstep.data.random import Rng, stream_key
from fewstep.models.detector import DetectorNetwork
from fewstep.models.encoders import EncoderNetwork
from fewstep.models.families import load_teacher
from fewstep.scenes64.detector import Accuracy, Detector, prompt_accuracy
from fewstep.scenes64.fit import Fit, plan
from fewstep.scenes64.labels import Labels, reading_loss
from fewstep.scenes64.scenes import ATTRIBUTES, Scenes
from fewstep.scenes64.teacher_stages import CROWDED, as_tensor
from fewstep.scenes64.train_teacher import TeacherSettings, train_vae
from fewstep.training.run_files import RunFiles
from fewstep.training.settings import TrainingSettings

NETWORKS: dict[str, tuple[type[DetectorNetwork | EncoderNetwork], int]] = {
    "detector": (DetectorNetwork, 7001),
    "encoder": (EncoderNetwork, 9001),
}
"""What can be trained here, and the seeds of those that ship."""
UNSEEN = 990001
"""Seed of the scenes on which the detector is tested."""


@dataclass(frozen=True)
class DetectorSettings:
    """How the shipped reader and encoder are trained.

    Attributes:
        network: one of `NETWORKS`.
        seed: of weights, scenes and all random numbers; not the teacher's.
        training: optimisation.
        pool: how many scenes pass the teacher's autoencoder before training.
        save_seconds: at most so long between checkpoints; they have no influence on the result.
    """

    network: str = "detector"
    seed: int = NETWORKS["detector"][1]
    training: TrainingSettings = field(
        default_factory=lambda: TrainingSettings(
            steps=12000, batch_size=32, learning_rate=3e-3, warmup_steps=200, lr_schedule="cosine",
            betas=(0.9, 0.99), weight_decay=0.02, ema_decay=0.999, log_every=50,
        )
    )  # fmt: skip
    pool: int = 16384
    save_seconds: float = 120.0


class DetectorStage:
    """Trains the reader on renders and on pictures that passed an autoencoder.

    Args:
        seed: of the set of scenes.
        pool: uint8 pictures [n, 3, 64, 64] and their labels, or None for renders alone.
    """

    name = "detector"

    def __init__(
        self,
        network: DetectorNetwork | EncoderNetwork,
        settings: TrainingSettings,
        seed: int,
        pool: tuple[Tensor, Labels] | None = None,
    ) -> None:
        self.networks: dict[str, nn.Module] = {"detector": network}
        self.network, self.settings, self.pool = network, settings, pool
        self.scenes = Scenes(seed, numbers=CROWDED)

    def loss(self, rng: Rng) -> dict[str, Tensor]:
        images, labels = self._batch(rng)
        images, labels = turned(images, labels, rng.sample.integers("turn", 0, 8))
        images = spoiled(images, rng).to(rng.device)
        return reading_loss(self.network(images), Labels(*(t.to(rng.device) for t in labels)))

    def _batch(self, rng: Rng) -> tuple[Tensor, Labels]:
        """Images [B, 3, 64, 64] in [0, 1] on the host: fresh renders, then as many from the pool."""
        fresh = rng.batch_size if self.pool is None else rng.batch_size - rng.batch_size // 2
        rendered = self.scenes.render(range(rng.step * fresh, (rng.step + 1) * fresh))
        images, labels = as_unit(rendered.images), Labels.of(rendered.scenes)
        if self.pool is None:
            return images, labels
        rows = rng.sample.integers("rows", 0, len(self.pool[0]))[fresh:]
        passed = self.pool[0][rows].to(torch.float32) / 255
        return torch.cat([images, passed]), Labels.cat([labels, self.pool[1].rows(rows)])


def as_unit(images: Any) -> Tensor:
    """uint8 [n, h, w, 3] -> float32 [n, 3, h, w] in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32) / 255


# ---------------------------------------------------------------- what pictures go through


def turned(images: Tensor, labels: Labels, turns: Tensor) -> tuple[Tensor, Labels]:
    """Each picture in one of its eight orientations: every shape and fill looks the same kind of thing in a mirror.

    Args:
        images: [B, 3, S, S].
        turns: whole numbers 0 ... 7 [B]: bit 0 mirrors x, bit 1 mirrors y, bit 2 exchanges them.
    """
    x, y = labels.centres.unbind(-1)
    for bit, axis in ((1, 3), (2, 2)):
        on = (turns & bit).bool()
        images = torch.where(on[:, None, None, None], images.flip(axis), images)
        if axis == 3:
            x = torch.where(on[:, None], 1 - x, x)
        else:
            y = torch.where(on[:, None], 1 - y, y)
    on = (turns & 4).bool()
    images = torch.where(on[:, None, None, None], images.transpose(2, 3), images)
    x, y = torch.where(on[:, None], y, x), torch.where(on[:, None], x, y)
    return images, labels._replace(centres=torch.stack([x, y], dim=-1))


def spoiled(images: Tensor, rng: Rng) -> Tensor:
    """Slight blur, colour shift and noise, each on a part of the pictures, as decoders and generators do it."""

    def amounts(name: str, most: float) -> Tensor:
        """Half of the pictures get none, the others up to ``most``."""
        return (rng.sample.uniform(name, -1.0, 1.0).clamp_min(0) * most).to(images.dtype)[:, None, None, None]

    images = images + amounts("blur", 1.0) * (_blurred(images) - images)
    shift = rng.sample.normal("shift", (3, 1, 1)).cpu() * amounts("shifted", 0.03)
    gain = 1 + rng.sample.normal("gain", (1, 1, 1)).cpu() * amounts("gained", 0.06)
    noise = rng.sample.normal("noise", images.shape[1:]).cpu() * amounts("noisy", 0.05)
    return ((images - 0.5) * gain + 0.5 + shift + noise).clamp(0, 1)


def _blurred(images: Tensor) -> Tensor:
    """Binomial blur of 3x3 pixels, a standard deviation of 0.7 pixels."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    rows = 0.25 * padded[:, :, :-2] + 0.5 * padded[:, :, 1:-1] + 0.25 * padded[:, :, 2:]
    return 0.25 * rows[..., :-2] + 0.5 * rows[..., 1:-1] + 0.25 * rows[..., 2:]


@torch.no_grad()
def through_vae(vae: Any, images: Tensor, noise: Tensor, wobble: float = 0.0) -> Tensor:
    """Encode, sample, decode: images [N, 3, 64, 64] in [0, 1] -> the same.

    Args:
        noise: unit normal [N, 16, 8, 8].
        wobble: standard deviation of what is added to the posterior's own, in units of a latent's.
    """
    posterior = vae.encode(images * 2 - 1).latent_dist
    spread = (posterior.var + (wobble / vae.config.scaling_factor) ** 2).sqrt()
    decoded: Tensor = vae.decode(posterior.mean + spread * noise).sample
    return (decoded / 2 + 0.5).clamp(0, 1).contiguous()


def passed_pool(vae: Any, seed: int, size: int, device: str = "cpu") -> Tensor:
    """Scenes 0 ... size - 1 of set ``seed`` after the autoencoder, uint8 [size, 3, 64, 64].

    Three of four batches of 64 have latents a little off, as a generator's are.
    """
    scenes, images = Scenes(seed, numbers=CROWDED), []
    for first in range(0, size, 64):
        fresh = as_tensor(scenes.render(range(first, min(first + 64, size))).images) / 2 + 0.5
        rng = Rng(seed, first, len(fresh), device=device)
        noise = rng.sample.normal("posterior", (16, 8, 8))
        wobble = 0.1 * (first // 64 % 4)
        images.append((through_vae(vae, fresh.to(device), noise, wobble) * 255).round().to("cpu", torch.uint8))
    return torch.cat(images)


# ---------------------------------------------------------------- the whole


def build_network(name: str, seed: int) -> DetectorNetwork | EncoderNetwork:
    """One of `NETWORKS` with random weights of its own stream."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_key(seed, "weights", name))
        network = NETWORKS[name][0]({attribute: len(values) for attribute, values in ATTRIBUTES.items()})
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def train_detector(
    out: Path, settings: DetectorSettings, vae: Any = None, minutes: float | None = None, show: bool = False
) -> DetectorNetwork | EncoderNetwork:
    """Train, or go on training, in ``out``; returns the averaged network.

    Args:
        vae: the teacher's autoencoder, or None for renders alone.
        minutes: length of the whole training, turned into steps when it begins.
    """
    pool = None if vae is None else _pool(out, settings, vae)
    network = build_network(settings.network, settings.seed).to(settings.training.device)
    fit = Fit(DetectorStage(network, settings.training, settings.seed, pool), out, settings.seed)
    plan(fit, minutes)
    fit.run(settings.save_seconds, show)
    fit.use_average()
    return network.eval().requires_grad_(False)


def autoencoder(teacher: str) -> Any:
    """The teacher's autoencoder.

    Args:
        teacher: ``scenes-64``, a diffusers folder, or a run directory of `fewstep.scenes64.train_teacher`, whose first
            stage is finished if it is not.

    Raises:
        ValueError: when there is no such teacher.
    """
    if RunFiles(Path(teacher) / "vae").checkpoints.is_dir():
        return train_vae(Path(teacher), TeacherSettings(), show=True)
    return load_teacher(teacher).pipeline.vae


def _pool(out: Path, settings: DetectorSettings, vae: Any) -> tuple[Tensor, Labels]:
    path, seed = out / "passed.safetensors", settings.seed + 1
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_tensors(path, {"images": passed_pool(vae, seed, settings.pool, settings.training.device)})
    images = load_file(path)["images"]
    scenes = Scenes(seed, numbers=CROWDED)
    return images, Labels.of([scenes.scene(i) for i in range(len(images))])


def ceilings(detector: Detector, vae: Any = None, number: int = 2000) -> dict[str, Accuracy]:
    """Prompt accuracy of images that are right by construction: the most that generated ones can reach.

    Args:
        vae: the teacher's autoencoder; with it, accuracy is measured ``after the VAE`` too, beside the ``renders``.
        number: of scenes; nothing is trained on them.
    """
    rendered = Scenes(UNSEEN).render(range(number))
    images = as_unit(rendered.images)
    found = {"renders": prompt_accuracy(detector, images, rendered.scenes)}
    if vae is not None:
        noise = Rng(UNSEEN, 0, number).sample.normal("posterior", (16, 8, 8))
        pairs = zip(images.split(64), noise.split(64), strict=True)
        passed = torch.cat([through_vae(vae, *pair) for pair in pairs])
        found["after the VAE"] = prompt_accuracy(detector, passed, rendered.scenes)
    return found


def export(network: DetectorNetwork | EncoderNetwork, path: Path) -> int:
    """Write the weights in float16, and what the network tells of; returns the file's bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: t.to("cpu", torch.float16).contiguous() for name, t in network.state_dict().items()}
    files.replace_tensors(path, weights, {"heads": json.dumps(network.heads)})
    return path.stat().st_size


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fewstep.scenes64.train_detector", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="run directory; an unfinished run in it is continued")
    parser.add_argument("--teacher", help="scenes-64, a diffusers folder, or a run directory of the teacher's training")
    parser.add_argument("--minutes", type=float, help="length of the training (default: its number of steps)")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="detector")
    parser.add_argument("--seed", type=int, help="default: that of the shipped one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the weights here at the end")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    seed = NETWORKS[given.network][1] if given.seed is None else given.seed
    settings = DetectorSettings(given.network, seed)
    settings = replace(settings, training=replace(settings.training, device=given.device))
    vae = autoencoder(given.teacher) if given.teacher else None
    network = train_detector(given.out, settings, vae, given.minutes, show=True)
    if given.export:
        print(f"Wrote {given.export} ({export(network, given.export) / 1e6:.2f} MB).")


if __name__ == "__main__":
    main()
