"""Training of scenes-64, the teacher that ships with fewstep: two stages, resumable, on a CPU or a GPU.

    python -m fewstep.scenes64.train_teacher --out runs/teacher --vae-minutes 20 --unet-minutes 60 --export scenes-64

Two processes halve the time of an ordinary two-core machine:
``torchrun --nproc-per-node 2 -m fewstep.scenes64.train_teacher ...``. Every stage leaves ``<out>/<stage>/checkpoints``
and ``<out>/<stage>/log.jsonl``; the same command continues an interrupted run. All random numbers are keyed by
(seed, step), so a resumed run ends in the same weights.

With ``--init FOLDER`` training goes on from that pipeline's weights, and stage one is skipped unless
``--vae-minutes`` is given; learning rates warm up and decay anew. Give another ``--seed`` then, for other pictures.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fewstep.data import files
from fewstep.data.random import stream_key
from fewstep.diffusion.schedule import Schedule
from fewstep.models.families import load_teacher
from fewstep.scenes64 import architecture as scenes64
from fewstep.scenes64.fit import Fit, plan
from fewstep.scenes64.linear_code import LinearCode, fit_linear_code
from fewstep.scenes64.scenes import WORDS, Scenes
from fewstep.scenes64.teacher_stages import (
    AutoencoderStage,
    LatentPool,
    TextToImageStage,
    as_tensor,
    encode_pool,
    latent_std,
    token_ids,
)
from fewstep.training import distributed
from fewstep.training.settings import TrainingSettings


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
            steps=40000, batch_size=48, learning_rate=2e-3, warmup_steps=200, lr_schedule="cosine",
            betas=(0.9, 0.99), weight_decay=0.01, ema_decay=0.999,
        )
    )  # fmt: skip
    pool: int = 49152
    tellings: int = 4
    save_seconds: float = 120.0


# ---------------------------------------------------------------- the two stages, one after the other


def train_vae(
    out: Path, settings: TeacherSettings, minutes: float | None = None, show: bool = False, init: Any = None
) -> Any:
    """Stage one; returns the averaged autoencoder with its scaling factor in the config.

    ``init`` is a pipeline to start from instead of random weights.
    """
    stage = AutoencoderStage(_built("vae", settings, init), _code(out, settings), settings.vae, settings.seed)
    fit = Fit(stage, out / "vae", settings.seed)
    plan(fit, minutes)
    fit.run(settings.save_seconds, show)
    fit.use_average()
    vae = _frozen(fit.stage.networks["vae"])
    known = out / "vae" / "scaling_factor.json"
    with distributed.first_goes_first():
        if not known.is_file():
            factor = 1 / latent_std(vae, settings.seed + 1, min(1024, settings.pool), settings.vae.device)
            files.replace_text(known, json.dumps({"scaling_factor": round(factor, 5)}))
    vae.register_to_config(**json.loads(known.read_text()))
    return vae


def train_unet(
    out: Path,
    settings: TeacherSettings,
    vae: Any,
    minutes: float | None = None,
    show: bool = False,
    init: Any = None,
) -> Fit:
    """Stage two on the latents of ``vae``; returns the finished fit, the averaged weights in its networks."""
    fit = unet_fit(out, settings, vae, init)
    plan(fit, minutes)
    fit.run(settings.save_seconds, show)
    fit.use_average()
    return fit


def unet_fit(out: Path, settings: TeacherSettings, vae: Any, init: Any = None) -> Fit:
    """Stage two as far as it got: newest checkpoint, encoded scenes (made and kept on the first call).

    ``init`` is a pipeline to start from instead of random weights.
    """
    tokenizer = scenes64.build_tokenizer(WORDS)
    stage = TextToImageStage(
        _built("unet", settings, init),
        _built("text_encoder", settings, init),
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


def _built(part: str, settings: TeacherSettings, init: Any = None) -> Any:
    """A network with the weights of the pipeline ``init``, else with random ones from its own stream."""
    builders: dict[str, Callable[[], Any]] = {
        "vae": scenes64.build_vae,
        "unet": scenes64.build_unet,
        "text_encoder": lambda: scenes64.build_text_encoder(scenes64.build_tokenizer(WORDS)),
    }
    if init is not None:
        network = copy.deepcopy(getattr(init, part)).requires_grad_(True)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_key(settings.seed, "weights", part))
            network = builders[part]()
    device = (settings.vae if part == "vae" else settings.unet).device
    return network.to(device, memory_format=torch.channels_last).train()


def _code(out: Path, settings: TeacherSettings) -> LinearCode:
    """The latents' code, made on the first call and kept: its rounding must not differ when a run goes on."""
    path = out / "vae" / "code.safetensors"
    with distributed.first_goes_first():
        if not path.is_file():
            images = as_tensor(Scenes(settings.seed + 3).render(range(settings.pool // 4)).images)
            path.parent.mkdir(parents=True, exist_ok=True)
            files.replace_tensors(path, fit_linear_code(images, scenes64.LATENT_SHAPE[0])._asdict())
    return LinearCode(**{name: t.to(settings.vae.device) for name, t in load_file(path).items()})


def _frozen(network: Any) -> Any:
    return network.eval().requires_grad_(False)


def _pool(out: Path, settings: TeacherSettings, vae: Any, tokenizer: Any) -> LatentPool:
    path = out / "unet" / "latents.safetensors"
    with distributed.first_goes_first():
        if not path.is_file():
            pool = encode_pool(vae, tokenizer, settings.seed + 2, settings.pool, settings.tellings, settings.vae.device)
            path.parent.mkdir(parents=True, exist_ok=True)
            files.replace_tensors(path, pool.tensors())
    return LatentPool.of(load_file(path))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fewstep.scenes64.train_teacher", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="run directory; an unfinished run in it is continued")
    parser.add_argument("--vae-minutes", type=float, help="length of stage one (default: its number of steps)")
    parser.add_argument("--unet-minutes", type=float, help="length of stage two (default: its number of steps)")
    parser.add_argument("--stage", choices=("vae", "unet"), default="unet", help="where to stop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--init", metavar="FOLDER", help="go on from these weights (scenes-64, a pipeline folder)")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the diffusers folder here at the end")
    given = parser.parse_args(arguments)
    distributed.join(given.device)
    if given.threads:
        torch.set_num_threads(given.threads)
    settings = TeacherSettings(seed=given.seed)
    settings = replace(
        settings, vae=replace(settings.vae, device=given.device), unet=replace(settings.unet, device=given.device)
    )
    init = load_teacher(given.init).pipeline if given.init else None
    if init is not None and given.vae_minutes is None:
        vae = init.vae.to(given.device)
    else:
        vae = train_vae(given.out, settings, given.vae_minutes, True, init)
    if given.stage == "vae":
        return
    fit = train_unet(given.out, settings, vae, given.unet_minutes, True, init)
    if given.export and distributed.first():
        size = export(fit, vae, given.export)
        print(f"Wrote {given.export} ({size / 1e6:.1f} MB).")


if __name__ == "__main__":
    main()
