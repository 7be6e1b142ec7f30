"""What `tests.program.test_apple` runs in a process of its own, on the pretended Apple GPU of `tests.accelerator`."""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import fewstep
from fewstep.data.pairs import PairSource, WithPairs
from fewstep.data.sources import LatentSource, WithPrompts
from fewstep.methods.registry import METHODS
from fewstep.models.families import load_teacher
from fewstep.models.roles import Weights
from fewstep.planning.doctor import difference, lora_step
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, build_roles
from tests.accelerator import pretended
from tests.rewards import taste

torch.set_num_threads(1)


def rules():
    """How many things that such a device lacks are refused."""
    x = torch.ones(2, 3).to("apple")
    lacking = (
        lambda: torch.zeros(2, device="apple", dtype=torch.float64),
        lambda: x.double(),
        lambda: x.to(torch.float64),
        lambda: torch.from_numpy(np.ones(2)).to("apple"),
        lambda: x + torch.ones(2, 3),
        lambda: torch.cat([x, torch.ones(1, 3)]),
        lambda: x.numpy(),
    )
    refused = 0
    for make in lacking:
        try:
            make()
        except (TypeError, RuntimeError):
            refused += 1
    moved = torch.from_numpy(np.ones((2, 3))).to("apple", torch.float32)  # converted on the way
    assert torch.equal((x + moved).cpu(), torch.full((2, 3), 2.0))
    print(refused, "refused")


def sample():
    there, here = (fewstep.load("scenes-64", device=d).sample(["a red star"], 2, seed=1)[0] for d in ("apple", "cpu"))
    print("equal" if np.array_equal(np.asarray(there), np.asarray(here)) else "different")


def numbers():
    """What `fewstep doctor` compares, on this device."""
    exact, _ = lora_step("cpu", "fp64")
    print("agree" if difference(lora_step("apple", "fp32")[0], exact) < 1e-4 else "differ")


def steps(*names):
    """One whole training step of each method on scenes-64: data, losses, gradients, update, log and checkpoint."""
    settings = TrainingSettings(steps=1, batch_size=2, device="apple", ema_decay=0.9, log_every=1, checkpoint_every=1)
    with tempfile.TemporaryDirectory() as place:
        liked = {"model": str(taste(Path(place) / "taste.safetensors", "encoder")), "threshold": 0.5}
        shipped = {"feedback": {"rewards": [liked]}, "turbo": {"encoder": "scenes-64"}}  # not what the hub has
        for name in names:
            teacher = load_teacher("scenes-64", device="apple")
            method = METHODS[name](teacher.denoiser.schedule, **shipped.get(name, {}))
            helpers = teacher.helpers(method.encoder, False, method.rewards, method.measures)
            roles = build_roles(teacher.denoiser, method, settings, Weights(rank=2), helpers=helpers)
            before = {key: value.cpu() for key, value in roles.tensors_of("student").items()}
            trainer = Trainer(method, roles, data(teacher, method), settings, run_dir=Path(place) / name)
            trainer.run()
            moved = [
                key for key, value in roles.tensors_of("student").items() if not torch.equal(value.cpu(), before[key])
            ]
            said = trainer.last_record  # hyper's student is still its teacher at the first step: no gradient
            assert np.isfinite(said["student/loss"]) and bool(moved) == (said["student/grad_norm"] > 0), said
            print(name)


def data(teacher, method):
    """Four random latents with captions; the teacher's samples are random ones too."""
    captions = ["a red star", "two shapes", "a striped square", "three small circles"]
    noise = torch.randn(4, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    cond = teacher.encode_prompts(captions).to("apple")
    source = LatentSource(noise.to("apple"), torch.ones_like(noise).to("apple"), cond)
    if "prompts" in method.streams:
        source = WithPrompts(source, captions)
    return WithPairs(source, PairSource(noise.to("apple"), cond, seed=0)) if "pairs" in method.streams else source


def main(what, *arguments):
    with pretended():
        {"rules": rules, "sample": sample, "numbers": numbers, "steps": steps}[what](*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
