"""Training of scenes-64, the teacher that ships with fewstep (`fewstep teacher train`): two stages, one after another.

Every stage leaves ``<out>/<stage>/checkpoints`` and ``<out>/<stage>/log.jsonl``; the same call continues an interrupted
run to the same weights. Two processes halve the time of an ordinary two-core machine:
``torchrun --nproc-per-node 2 -m fewstep teacher train ...``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data import files
from fewstep.diffusion.schedule import Schedule
from fewstep.models.families import load_teacher
from fewstep.scenes64 import architecture as scenes64
from fewstep.scenes64.autoencoder import CROWDED, Autoencoding, RenderedScenes, as_tensor, latent_std
from fewstep.scenes64.denoise import LESSONS, CaptionedUNet, Denoise, encode_scenes, encoded_scenes, token_ids
from fewstep.scenes64.linear_code import LinearCode, fit_linear_code
from fewstep.scenes64.scenes import WORDS, Scenes
from fewstep.scenes64.stage import kept, seeded
from fewstep.training import distributed
from fewstep.training.settings import TrainingSettings


@dataclass(frozen=True)
class TeacherSettings:
    """Settings of the shipped teacher's training.

    Attributes:
        seed: of weights, scenes and all random numbers; each use has its own stream.
        vae, unet: optimisation of the two stages.
        pool, tellings: number of scenes that are encoded for stage two, and of captions of each.
        lesson: of stage two, a name in `denoise.LESSONS`; empty: the whole task.
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
            steps=40000, batch_size=48, learning_rate=2e-3, warmup_steps=200, lr_schedule="cosine",
            betas=(0.9, 0.99), weight_decay=0.01, ema_decay=0.999,
        )
    )  # fmt: skip
    pool: int = 49152
    tellings: int = 4
    lesson: str = ""


def train_teacher(
    out: Path,
    settings: TeacherSettings,
    vae_minutes: float | None = None,
    unet_minutes: float | None = None,
    init: str | None = None,
    export_to: Path | None = None,
    device: str = "cpu",
    show: bool = False,
) -> int | None:
    """Both stages in ``out``; returns the bytes of the exported folder, where one was wanted.

    Args:
        vae_minutes, unet_minutes: length of the stages; None: their number of steps.
        init: teacher to continue from instead of random weights. Stage one is skipped then unless it is given minutes,
            learning rates warm up and decay anew, and another seed gives other images.
        export_to: folder for the diffusers pipeline.
    """
    distributed.join(device, out)
    settings = replace(settings, vae=replace(settings.vae, device=device), unet=replace(settings.unet, device=device))
    start = load_teacher(init).pipeline if init else None
    if start is not None and vae_minutes is None:
        vae = start.vae.to(device)
    else:
        vae = train_vae(out, settings, vae_minutes, show, start)
    network = train_unet(out, settings, vae, unet_minutes, show, start)
    return export(network, vae, export_to) if export_to and distributed.first() else None


def train_vae(
    out: Path, settings: TeacherSettings, minutes: float | None = None, show: bool = False, init: Any = None
) -> Any:
    """Stage one; returns the averaged autoencoder, its scaling factor in its config.

    Args:
        init: pipeline to start from instead of random weights.
    """
    source = RenderedScenes(Scenes(settings.seed, numbers=CROWDED))
    stage = Autoencoding(_built("vae", settings, init), source, _code(out, settings))
    vae = stage.train(settings.vae, out / "vae", settings.seed, minutes, show)
    known = out / "vae" / "scaling_factor.json"
    with distributed.first_goes_first():
        if not known.is_file():
            factor = 1 / latent_std(vae, settings.seed + 1, min(1024, settings.pool), settings.vae.device)
            files.replace_text(known, json.dumps({"scaling_factor": round(factor, 5)}))
    vae.register_to_config(**json.loads(known.read_text(encoding="utf-8")))
    return vae


def train_unet(
    out: Path,
    settings: TeacherSettings,
    vae: Any,
    minutes: float | None = None,
    show: bool = False,
    init: Any = None,
) -> CaptionedUNet:
    """Stage two on the latents of ``vae``; returns the averaged network. Scenes are encoded once and kept in ``out``.

    Args:
        init: pipeline to start from instead of random weights.
    """
    tokenizer, lesson = scenes64.build_tokenizer(WORDS), LESSONS.get(settings.lesson)

    def encoded() -> dict[str, Tensor]:
        size, device = settings.pool, settings.vae.device
        return encode_scenes(vae, tokenizer, settings.seed + 2, size, settings.tellings, device, lesson)

    folder = out / "-".join(filter(None, ("unet", settings.lesson)))
    source = encoded_scenes(kept(folder / "latents.safetensors", encoded))
    parts = [_built(name, settings, init) for name in ("unet", "text_encoder")]
    with seeded(settings.seed, "head"):
        network = CaptionedUNet(*parts)
    schedule, empty = Schedule.from_diffusers(scenes64.build_scheduler()), token_ids(tokenizer, [""])
    stage = Denoise(network, source, schedule, empty, *([lesson.times] if lesson else []))
    trained: CaptionedUNet = stage.train(settings.unet, folder, settings.seed, minutes, show)
    return trained


def export(network: CaptionedUNet, vae: Any, folder: Path) -> int:
    """Write a diffusers folder in float16; returns its bytes."""
    pipeline = scenes64.assemble(vae, network.unet, network.text_encoder, scenes64.build_tokenizer(WORDS))
    return scenes64.save_pipeline(pipeline, folder)


def _built(part: str, settings: TeacherSettings, init: Any = None) -> Any:
    """A network with the weights of the pipeline ``init``, else with random ones from its own stream."""
    builders: dict[str, Callable[[], Any]] = {
        "vae": scenes64.build_vae,
        "unet": scenes64.build_unet,
        "text_encoder": lambda: scenes64.build_text_encoder(scenes64.build_tokenizer(WORDS)),
    }
    if init is not None:
        network = copy.deepcopy(getattr(init, part))
    else:
        with seeded(settings.seed, part):
            network = builders[part]()
    device = (settings.vae if part == "vae" else settings.unet).device
    return network.to(device, memory_format=torch.channels_last)


def _code(out: Path, settings: TeacherSettings) -> LinearCode:
    """The latents' code, fitted once: its rounding must not differ when a run is continued."""

    def fitted() -> dict[str, Tensor]:
        images = as_tensor(Scenes(settings.seed + 3).render(range(settings.pool // 4)).images)
        return fit_linear_code(images, scenes64.LATENT_SHAPE[0])._asdict()

    found = kept(out / "vae" / "code.safetensors", fitted)
    return LinearCode(**{name: t.to(settings.vae.device) for name, t in found.items()})
