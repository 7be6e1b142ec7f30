"""A training step of a method on a tiny pipeline of a family, on the pretended device; its data are on the host."""

import copy
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

from fewstep.data.captions import as_rows, encoder
from fewstep.data.pairs import PairSource, WithPairs
from fewstep.data.rows import CAPTION, NULL, Held
from fewstep.data.sources import CaptionDropout, LatentSource, WithPrompts
from fewstep.methods.registry import METHODS
from fewstep.models.families import as_teacher
from fewstep.models.roles import Weights
from fewstep.recipe.load import parse_recipe
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, build_roles
from tests.fake_cuda.device import FakeCuda
from tests.models.pipelines import BUILD, PROMPTS, SIZE, build
from tests.rewards import taste

FEW = {"num_grid_steps": 4, "num_phases": 2, "segments": 2, "max_hops": 2, "student_every": 1, "encoder": "scenes-64"}
"""Settings that fit a few steps and have every player act in each, where a method has them."""
CASES = [(family, method, weights) for family in BUILD for method in METHODS for weights in ("lora", "full")]


@contextmanager
def settings_of(method):
    """The method's settings, checked as in a recipe; within this block the file of its reward model is there."""
    known = METHODS[method].Settings.__annotations__
    given = {key: value for key, value in FEW.items() if key in known}
    with tempfile.TemporaryDirectory() as place:
        if "rewards" in known:
            given["rewards"] = [{"model": str(taste(Path(place) / "taste.safetensors", "encoder")), "threshold": 50.0}]
        recipe = parse_recipe({"method": {"name": method, **given}, "teacher": {"path": "scenes-64"}})
        yield recipe.method_settings()


def sources_of(method, teacher, live):
    """Four rows on the host, with what the method reads beside them; their captions encoded, or as text."""
    captions = PROMPTS * 2
    on_device = teacher.encode_prompts(captions).to(torch.float16).given()
    zeros = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in on_device.items()}
    null = {name: t[:1] for name, t in zeros.items() if name.startswith(NULL)}
    cond = {name: t for name, t in zeros.items() if not name.startswith(NULL)}
    texts = {CAPTION: as_rows(captions)} if live else cond
    latents = {name: torch.zeros(4, *teacher.latent_shape, dtype=torch.float16) for name in ("mean", "std")}
    encode = encoder(teacher) if live else None
    source = LatentSource.of(Held({**latents, **texts, **null}), encode)
    source = CaptionDropout(WithPrompts(source, captions) if "prompts" in method.streams else source, 0.1)
    if "pairs" not in method.streams:
        return source
    return WithPairs(source, PairSource.of_pairs(Held({"x0": latents["mean"], **texts, **null}), 0, 0.0, encode))


def measure(family, method, weights="lora", text="cached"):
    """What the second step of a run asks of the device: copies, and what the host waits for; the first copies the null.

    In bf16, with activation checkpointing, a moving average and captions dropped.
    """
    pipeline = copy.deepcopy(build(family))
    training = TrainingSettings(
        steps=4,
        batch_size=2,
        device="cuda",
        precision="bf16",
        gradient_checkpointing=True,
        ema_decay=0.9,
    )
    with settings_of(method) as settings, FakeCuda() as device:
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(device="cuda", dtype=torch.bfloat16)
        teacher = as_teacher(pipeline, size=SIZE)
        base, built = teacher.denoiser, METHODS[method](teacher.denoiser.schedule, settings)
        helpers = teacher.helpers(built.encoder, True, built.rewards, built.measures)
        roles = build_roles(base, built, training, Weights(weights, rank=2), origin=base, helpers=helpers)
        job = Trainer(built, roles, sources_of(built, teacher, text == "live"), training)
        job.step(0)
        device.clear()
        job.step(1)
    copies = sum(n for (what, _), n in device.seen.items() if what == "copy")
    waits = {f"{what} at {line}": n for (what, line), n in sorted(device.waits.items())}
    return {"operators": device.operators, "copies": copies, "waits": waits}
