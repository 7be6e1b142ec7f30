"""Several processes are one: the same weights for any number of them, any accumulation, sharded or not."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from killable import SOURCE, VP, Teacher
from safetensors.torch import load_file, save_file
from several import spawn

from fewstep.data.pairs import PairSource, WithPairs
from fewstep.data.sources import LatentSource
from fewstep.methods.ctm import CTM
from fewstep.methods.dmd import DMD
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.flowmap import FlowMap
from fewstep.methods.lcm import LCM
from fewstep.methods.lightning import Lightning
from fewstep.methods.pcm import PCM
from fewstep.methods.pdd import PDD
from fewstep.methods.reflow import Reflow
from fewstep.methods.scm import SCM
from fewstep.methods.tcd import TCD
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import UNetNetwork
from fewstep.models.roles import Weights
from fewstep.scenes64 import architecture as scenes64
from fewstep.training import checkpoint, distributed
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, TrainingStopped, build_roles

TOLD = LCM(VP, guidance_embed=True, guidance_scale=(2.0, 6.0), target_decay=0.95)
SETTINGS = TrainingSettings(
    steps=8, batch_size=8, learning_rate=1e-2, ema_decay=0.9, log_every=1, checkpoint_every=8, precision="fp64"
)
CASES = {
    "lora": (TCD(VP, guidance_scale=3.0), "lora", SETTINGS),
    "told": (TOLD, "lora", SETTINGS),
    "full": (TOLD, "full", SETTINGS),
    "game": (PCM(VP, guidance_scale=3.0), "lora", replace(SETTINGS, critic_learning_rate=1e-3)),
    "balanced": (CTM(VP, max_hops=2, adversarial_weight=0.5, target_decay=0.9), "full", SETTINGS),
    "slopes": (FlowMap(VP, guidance_scale=3.0), "lora", SETTINGS),
    "lines": (Reflow(VP, windows=3, guidance_scale=3.0), "lora", SETTINGS),
    "tangent and scores": (SCM(VP, guidance_scale=3.0, matching_weight=0.5, student_every=1), "full", SETTINGS),
    "blocks": (PDD(VP, num_grid_steps=8, num_inference_steps=(2, 4), guidance_scale=3.0), "lora", SETTINGS),
    "pairs": (DMD(VP), "lora", replace(SETTINGS, critic_learning_rate=1e-3)),
    "encoder": (Lightning(VP, num_inference_steps=2, num_teacher_steps=4), "full", SETTINGS),
    "term by term": (DMD2(VP, student_every=1, adversarial_weight=0.5, head="residual"), "full", SETTINGS),
    "single precision": (TCD(VP, guidance_scale=3.0), "lora", replace(SETTINGS, precision="fp32")),
    "full in single precision": (TOLD, "full", replace(SETTINGS, precision="fp32", weight_decay=0.01)),
}


LABELS = Cond({"label": torch.arange(10) % 3}, null={"label": torch.tensor([-1])})
PAIRS = PairSource(torch.randn(10, 2, generator=torch.Generator().manual_seed(0)), LABELS, seed=0)


def toy(case, folder, source=WithPairs(SOURCE, PAIRS), **changes):
    method, kind, settings = CASES[case]
    settings = replace(settings, **changes)
    torch.manual_seed(0)
    teacher = Teacher(VP, 2, width=15, depth=2, num_classes=3).to(settings.dtype)  # 15: rows that do not split evenly
    roles = build_roles(Denoiser(teacher, VP, "epsilon"), method, settings, Weights(kind, rank=3))
    return Trainer(method, roles, source, settings, run_dir=folder)


def unet(case, folder, method=None, **changes):
    """The shipped architecture, whose blocks are gathered one by one."""
    settings = replace(SETTINGS, steps=2, batch_size=4, precision="fp32", learning_rate=1e-4, ema_decay=0.0, **changes)
    torch.manual_seed(0)
    network = UNetNetwork(scenes64.build_unet())
    with torch.no_grad():  # residual branches start at zero: let something through
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(6, *scenes64.LATENT_SHAPE, generator=generator)
    embeds = torch.randn(6, 24, network.unet.config.cross_attention_dim, generator=generator)
    source = LatentSource(mean, torch.zeros_like(mean), Cond({"prompt_embeds": embeds}, {"prompt_embeds": embeds[:1]}))
    method = method or TCD(VP, guidance_scale=3.0)
    roles = build_roles(Denoiser(network, VP, "epsilon"), method, settings, Weights(case, rank=4))
    return Trainer(method, roles, source, settings, run_dir=folder)


JOBS = [
    *((toy, case, {}) for case in CASES),
    *((toy, case, {"fsdp": True}) for case in CASES),
    (toy, "told", {"accumulation": 2}),
    (toy, "full", {"accumulation": 2, "fsdp": True}),
    (unet, "lora", {"fsdp": True}),
    (unet, "full", {"fsdp": True}),
    (unet, "full", {"fsdp": True, "method": PCM(VP, guidance_scale=3.0)}),
    (unet, "lora", {"fsdp": True, "method": Lightning(VP, num_inference_steps=2, num_teacher_steps=4)}),
]


TERM_BY_TERM = ("blocks", "term by term", "tangent and scores")
"""Cases whose losses are propagated one after the other: accumulation sums their gradients in another order."""
HELD = "held.safetensors"  # what the first process has in memory at the end
QUICK = ("toy-balanced", "toy-full-fsdp", "toy-told-accumulation")
"""The jobs of `make test`; the others are slow."""


def name_of(make, case, changes):
    return "-".join([make.__name__, case, *changes])


def _together(folder, names):
    for make, case, changes in JOBS:
        if name_of(make, case, changes) in names:
            place = Path(folder) / name_of(make, case, changes)
            run = make(case, place, **changes)
            run.run()
            held = run.tensors()  # by all processes: each gives its rows
            if distributed.first():
                save_file({name: tensor.contiguous() for name, tensor in held.items()}, place / HELD)


@pytest.fixture(scope="module")
def together(request, tmp_path_factory):
    """The jobs of the tests that were collected, run by two processes that are started once."""
    folder = tmp_path_factory.mktemp("two")
    tests = " ".join(item.name for item in request.session.items)
    names = [name for name in (name_of(*job) for job in JOBS) if f"[{name}]" in tests or name == "toy-full"]
    spawn(_together, str(folder), names)
    return folder


def result(folder):
    tensors, state = checkpoint.load(checkpoint.latest(folder / "checkpoints"))
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return tensors, state, lines


@pytest.mark.parametrize(
    "job",
    [pytest.param(job, id=name_of(*job), marks=() if name_of(*job) in QUICK else pytest.mark.slow) for job in JOBS],
)
def test_two_processes_are_one(job, together, tmp_path):
    """Weights, followers and moments; losses, costs and norms as logged."""
    make, case, changes = job
    make(case, tmp_path, **{**changes, "accumulation": 1 if "accumulation" in changes else 2}).run()
    theirs, state, lines = result(together / name_of(*job))
    mine, alone, expected = result(tmp_path)
    exact = make is toy and CASES[case][2].precision == "fp64"
    assert theirs.keys() == mine.keys() and len(mine) > 10
    assert checkpoint.same(load_file(together / name_of(*job) / HELD), dict(theirs))  # all rows, in every process
    if make is toy and not changes and case not in TERM_BY_TERM:  # one sum of the same two gradients, halved
        assert checkpoint.same(dict(theirs), dict(mine))
    for key, tensor in mine.items():
        if exact:
            torch.testing.assert_close(theirs[key], tensor, rtol=1e-10, atol=1e-13)
    assert state["forward_equivalents"] == alone["forward_equivalents"] > 0
    assert len(lines) == len(expected)
    for line, other in zip(lines, expected, strict=True):
        for key in ("student/loss", "student/grad_norm", "forward_equivalents"):
            assert line[key] == pytest.approx(other[key], rel=1e-10 if exact else 1e-5), (key, line["step"])
    start = make(case, None, **changes)
    assert any(not torch.allclose(start.tensors()[key].to(t), t) for key, t in mine.items() if "optimizer" not in key)


def _resume(folder):
    toy("full", Path(folder), fsdp=True).run(resume=True)


@pytest.mark.slow
def test_the_number_of_processes_may_change_at_a_resume(together, tmp_path):
    """One process does half, two that share the weights go on, one finds what they left."""
    toy("full", tmp_path, steps=4).run()
    spawn(_resume, str(tmp_path))
    whole, theirs = result(together / "toy-full")[0], result(tmp_path)[0]
    for key, tensor in whole.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-10, atol=1e-13)
    last = toy("full", tmp_path)
    last.resume()
    assert last.done == 8


NOISY = LatentSource(torch.zeros(10, 2), torch.ones(10, 2), LABELS)  # batches that are random numbers themselves


def _quarter(folder):
    toy("term by term", Path(folder), NOISY).run()


@pytest.mark.slow
def test_four_processes_one_and_one_with_four_micro_batches_draw_the_same_numbers(tmp_path):
    spawn(_quarter, str(tmp_path / "four"), count=4)
    toy("term by term", tmp_path / "one", NOISY).run()
    toy("term by term", tmp_path / "parts", NOISY, accumulation=4).run()
    whole = result(tmp_path / "one")[0]
    for other in ("four", "parts"):
        for key, tensor in result(tmp_path / other)[0].items():
            torch.testing.assert_close(whole[key], tensor, rtol=1e-10, atol=1e-13)


class _Stops:
    """One of the processes is asked to stop while it makes its fourth batch."""

    def batch(self, rng):
        if rng.step == 3 and distributed.rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        return SOURCE.batch(rng)


def _stop(folder):
    with pytest.raises(TrainingStopped, match="Stopped after step 4 of 8"):
        toy("lora", Path(folder), _Stops()).run()


@pytest.mark.slow
def test_processes_stop_after_the_same_step(tmp_path):
    """Only one of them hears the request; all stop, and what was done is saved."""
    spawn(_stop, str(tmp_path))
    assert result(tmp_path)[1]["step"] == 4


def _uneven():
    for changes in ({"batch_size": 7}, {"batch_size": 6, "accumulation": 2}):
        with pytest.raises(ValueError, match=r"training.batch_size \(.\) must be a multiple of .* processes"):
            toy("lora", None, **changes)


@pytest.mark.slow
def test_a_batch_that_cannot_be_split_is_refused():
    spawn(_uneven)


def _leave():
    """What an optimiser imports must not keep the group, whose threads could abort the process while Python ends."""
    toy("lora", None, steps=2).run()
    distributed.leave()
    names = [Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task")]
    assert not [name for name in names if "gloo" in name], names


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed on Linux only")
def test_no_thread_of_the_group_outlives_it():
    spawn(_leave)
