"""Training of the detector, which measures prompt accuracy on scenes-64, and of the encoder, which serves in losses.

``fewstep teacher detector`` is the command; the same call continues an interrupted run. Half of each batch is fresh
renders, half went through the teacher's autoencoder: the detector must judge generated images, which its decoder made.
The detector measures and must never stand in a loss; the encoder serves in losses and must never measure. They share
the task, and neither scenes nor architecture.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.data import files
from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.methods.base import Loss
from fewstep.models.cond import Cond
from fewstep.models.detector import DetectorNetwork
from fewstep.models.encoders import EncoderNetwork
from fewstep.models.families import load_teacher
from fewstep.models.roles import Roles
from fewstep.scenes64.architecture import LATENT_SHAPE
from fewstep.scenes64.autoencoder import CROWDED, as_tensor
from fewstep.scenes64.detector import Accuracy, Detector, prompt_accuracy
from fewstep.scenes64.labels import Labels, detection_loss
from fewstep.scenes64.random import ScenesRng
from fewstep.scenes64.scenes import ATTRIBUTES, Scenes
from fewstep.scenes64.scenes.render import Bytes
from fewstep.scenes64.stage import Stage, kept, seeded
from fewstep.scenes64.train_teacher import TeacherSettings, train_vae
from fewstep.training.run_files import RunFiles
from fewstep.training.settings import TrainingSettings

NETWORKS: dict[str, tuple[type[DetectorNetwork | EncoderNetwork], int]] = {
    "detector": (DetectorNetwork, 7001),
    "encoder": (EncoderNetwork, 9001),
}
"""The networks that can be trained here, and the seeds of those that ship."""
UNSEEN = 990001
"""Seed of the scenes on which the detector is tested."""
_BATCH = 64


@dataclass(frozen=True)
class DetectorSettings:
    """Settings of the shipped detector's and encoder's training.

    Attributes:
        network: one of `NETWORKS`.
        seed: of weights, scenes and all random numbers; not the teacher's.
        training: optimisation.
        pool: number of scenes that go through the teacher's autoencoder before training.
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

    @classmethod
    def of(cls, network: str, seed: int | None = None, device: str = "cpu") -> DetectorSettings:
        """The settings of one of `NETWORKS`, by default with the seed of the one that ships."""
        settings = cls(network, NETWORKS[network][1] if seed is None else seed)
        return replace(settings, training=replace(settings.training, device=device))


class Detection(Stage):
    """Trains a network to detect the things in images of `DetectorImages`."""

    name = "detector"

    def student(self, roles: Roles, batch: Batch, draws: None, shared: None) -> Loss:
        terms = detection_loss(self.trained(roles)(batch.x0), Labels.from_cond(batch.cond))
        total = terms.pop("loss")
        return Loss(total, {name: term.detach() for name, term in terms.items()})


class DetectorImages:
    """Batches of images [B, 3, 64, 64] in [0, 1], turned and slightly damaged, with `Labels` as their condition.

    Args:
        seed: of the set of scenes.
        pool: uint8 images [n, 3, 64, 64] that passed an autoencoder, and their labels; None: renders alone.
    """

    def __init__(self, seed: int, pool: tuple[Tensor, Labels] | None = None) -> None:
        self.scenes, self.pool = Scenes(seed, numbers=CROWDED), pool

    def batch(self, rng: Rng) -> Batch:
        images, labels = self.undamaged(rng)
        images, labels = turned(images, labels, rng.sample.integers("turn", 0, 8))
        return Batch(spoiled(images, rng).to(rng.device), Cond(labels._asdict()).to(rng.device))

    def undamaged(self, rng: Rng) -> tuple[Tensor, Labels]:
        """Images and labels on the host: fresh renders in the first half of the batch, images of the pool behind."""
        fresh = rng.batch_size if self.pool is None else rng.batch_size - rng.batch_size // 2
        places = range(rng.batch_size)[rng.rows]
        rendered = self.scenes.render(rng.step * fresh + place for place in places if place < fresh)
        images, labels = as_unit(rendered.images), Labels.of(rendered.scenes)
        if self.pool is None:
            return images, labels
        rows = rng.sample.integers("rows", 0, len(self.pool[0]))[len(images) :]
        passed = self.pool[0][rows].to(torch.float32) / 255
        return torch.cat([images, passed]), Labels.cat([labels, self.pool[1].rows(rows)])


def as_unit(images: Bytes) -> Tensor:
    """uint8 [n, h, w, 3] -> float32 [n, 3, h, w] in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32) / 255


# ---------------------------------------------------------------- augmentation


def turned(images: Tensor, labels: Labels, turns: Tensor) -> tuple[Tensor, Labels]:
    """Each image in one of its eight orientations: mirrored or turned, shapes and fills keep their names.

    Args:
        images: [B, 3, S, S].
        turns: int64 [B], 0 ... 7: bit 0 mirrors x, bit 1 mirrors y, bit 2 exchanges them.
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
    """Slight blur, colour shift and noise, each on a part of the images, like the errors of decoders and generators."""

    def amounts(name: str, most: float) -> Tensor:
        """Half of the images get none, the others up to ``most``."""
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
def through_vae(vae: Any, images: Tensor, noise: Tensor, extra: float = 0.0) -> Tensor:
    """Encode, sample, decode: images [N, 3, 64, 64] in [0, 1] -> the same.

    Args:
        noise: unit normal [N, 16, 8, 8].
        extra: standard deviation of noise beside the posterior's own, in units of a latent's.
    """
    posterior = vae.encode(images * 2 - 1).latent_dist
    spread = (posterior.var + (extra / vae.config.scaling_factor) ** 2).sqrt()
    decoded: Tensor = vae.decode(posterior.mean + spread * noise).sample
    return (decoded / 2 + 0.5).clamp(0, 1).contiguous()


def passed_pool(vae: Any, seed: int, size: int, device: str = "cpu") -> Tensor:
    """Scenes 0 ... size - 1 of set ``seed`` after the autoencoder, uint8 [size, 3, 64, 64].

    Three of four batches of 64 have noisy latents, like a generator's.
    """
    scenes, images = Scenes(seed, numbers=CROWDED), []
    for first in range(0, size, _BATCH):
        fresh = as_tensor(scenes.render(range(first, min(first + _BATCH, size))).images) / 2 + 0.5
        noise = ScenesRng(seed, first, len(fresh), device=device).sample.normal("posterior", LATENT_SHAPE)
        passed = through_vae(vae, fresh.to(device), noise, 0.1 * (first // _BATCH % 4))
        images.append((passed * 255).round().to("cpu", torch.uint8))
    return torch.cat(images)


# ---------------------------------------------------------------- from an autoencoder to a file


def build_network(name: str, seed: int) -> DetectorNetwork | EncoderNetwork:
    """One of `NETWORKS` with random weights of its own stream."""
    with seeded(seed, name):
        network = NETWORKS[name][0]({attribute: len(values) for attribute, values in ATTRIBUTES.items()})
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def train_detector(
    out: Path, settings: DetectorSettings, vae: Any = None, minutes: float | None = None, show: bool = False
) -> DetectorNetwork | EncoderNetwork:
    """Train in ``out``, or continue training; returns the averaged network.

    Args:
        vae: the teacher's autoencoder, or None for renders alone.
        minutes: length of the training, converted to steps when it begins.
    """
    device, seed, pool = settings.training.device, settings.seed + 1, None
    if vae is not None:
        made = kept(out / "passed.safetensors", lambda: {"images": passed_pool(vae, seed, settings.pool, device)})
        scenes = Scenes(seed, numbers=CROWDED)
        pool = made["images"], Labels.of([scenes.scene(i) for i in range(len(made["images"]))])
    network = build_network(settings.network, settings.seed).to(device)
    stage = Detection(network, DetectorImages(settings.seed, pool))
    trained: DetectorNetwork | EncoderNetwork = stage.train(settings.training, out, settings.seed, minutes, show)
    return trained


def autoencoder(teacher: str) -> Any:
    """The teacher's autoencoder.

    Args:
        teacher: ``scenes-64``, a diffusers folder, or a run directory of `fewstep.scenes64.train_teacher`, whose first
            stage is finished if it is not.

    Raises:
        ValueError: there is no such teacher.
    """
    if RunFiles(Path(teacher) / "vae").checkpoints.is_dir():
        return train_vae(Path(teacher), TeacherSettings(), show=True)
    return load_teacher(teacher).pipeline.vae


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
        noise = ScenesRng(UNSEEN, 0, number).sample.normal("posterior", LATENT_SHAPE)
        pairs = zip(images.split(_BATCH), noise.split(_BATCH), strict=True)
        passed = torch.cat([through_vae(vae, *pair) for pair in pairs])
        found["after the VAE"] = prompt_accuracy(detector, passed, rendered.scenes)
    return found


def export(network: DetectorNetwork | EncoderNetwork, path: Path) -> int:
    """Write the weights in float16, with the attributes that the network predicts; returns the file's bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: t.to("cpu", torch.float16).contiguous() for name, t in network.state_dict().items()}
    files.replace_tensors(path, weights, {"heads": json.dumps(network.heads)})
    return path.stat().st_size
