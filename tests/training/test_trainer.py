"""The training loop: exact resume, stopping, the NaN guard, what a step costs beyond its networks, checkpoints."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import killable
import pytest
import torch
from killable import SOURCE, VP, roles_for, trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.data.sources import LatentSource
from fewstep.methods.base import Player
from fewstep.methods.cm import CM
from fewstep.methods.ctm import CTM
from fewstep.methods.flowmap import FlowMap
from fewstep.methods.ladd import LADD
from fewstep.methods.lcm import LCM
from fewstep.methods.lightning import Lightning
from fewstep.methods.pcm import PCM
from fewstep.methods.pdd import PDD
from fewstep.methods.reflow import Reflow
from fewstep.methods.scm import SCM
from fewstep.methods.tcd import TCD
from fewstep.methods.turbo import Turbo
from fewstep.models.cond import Cond
from fewstep.models.lora import live
from fewstep.training import checkpoint
from fewstep.training.players import PlayerState
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import NotFinite, TrainingStopped


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same(a, b):
    return checkpoint.same(a.tensors(), b.tensors())


@dataclass
class Tampered:
    """A source whose batches something happens to."""

    tamper: object

    def batch(self, rng):
        return self.tamper(rng.step, SOURCE.batch(rng))


# ------------------------------------------------------------------ resume


def train_and_kill(case, folder):
    """Start the run in a process of its own and kill -9 it somewhere past its 120th step."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, killable.__file__, case, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        while int(process.stdout.readline()) < 120:
            pass
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("case", killable.CASES)
def test_200_steps_are_100_steps_and_a_kill_and_the_rest_to_the_bit(case, tmp_path):
    train_and_kill(case, tmp_path / "killed")
    saved = checkpoint.latest(tmp_path / "killed" / "checkpoints")
    assert 100 <= checkpoint.load(saved)[1]["step"] < 200
    resumed, whole = trainer(case, tmp_path / "killed"), trainer(case, tmp_path / "whole")
    resumed.run(resume=True)
    whole.run()
    assert resumed.done == whole.done == 200 and same(resumed, whole)
    assert not same(whole, trainer(case))
    assert any("exp_avg_sq" in name for name in whole.tensors())
    assert [line["step"] for line in log(tmp_path / "killed")] == list(range(25, 201, 25))
    assert log(tmp_path / "killed")[-1]["forward_equivalents"] == log(tmp_path / "whole")[-1]["forward_equivalents"]
    assert len(checkpoint.complete(tmp_path / "killed" / "checkpoints")) == 2


def test_logged_losses_after_a_resume_are_those_of_a_whole_run(tmp_path):
    whole = trainer("plain", tmp_path / "whole", steps=60, checkpoint_every=20, log_every=10)
    whole.run()
    for step in ("step-0000040", "step-0000060"):  # keep two: 20 is gone by now
        assert (tmp_path / "whole" / "checkpoints" / step).is_dir()
    os.rename(tmp_path / "whole" / "checkpoints" / "step-0000060", tmp_path / "gone")
    before = log(tmp_path / "whole")
    trainer("plain", tmp_path / "whole", steps=60, checkpoint_every=20, log_every=10).run(resume=True)
    for line, again in zip(before, log(tmp_path / "whole"), strict=True):
        assert line | {"steps_per_second": 0} == again | {"steps_per_second": 0}


def test_a_half_written_checkpoint_is_passed_over_and_cleared_away(tmp_path):
    trainer("plain", tmp_path, steps=4, checkpoint_every=2).run()
    folder = tmp_path / "checkpoints"
    part = folder / ".part-0000006-1"
    part.mkdir()
    (part / "tensors.safetensors").write_bytes(b"half")
    assert checkpoint.latest(folder).name == "step-0000004"
    trainer("plain", tmp_path, steps=6, checkpoint_every=2).run(resume=True)
    assert {path.name for path in folder.iterdir()} == {"step-0000004", "step-0000006"}


def test_resuming_nothing_starts_anew(tmp_path):
    fresh = trainer("plain", tmp_path, steps=2)
    fresh.run(resume=True)
    assert fresh.done == 2


# ------------------------------------------------------------------ stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["step", "hook"])
def test_a_stop_request_saves_what_it_reports_and_resumes_to_the_bit(moment, number, tmp_path):
    def tamper(step, batch):
        if step == 7 and moment == "step":
            os.kill(os.getpid(), number)
        return batch

    hooks = ((8, lambda done: os.kill(os.getpid(), number)),) if moment == "hook" else ()
    stopped = trainer("plain", tmp_path, hooks, Tampered(tamper), steps=20)
    handler = signal.getsignal(number)
    with pytest.raises(TrainingStopped, match=r"Stopped after step \d+ of 20") as caught:
        stopped.run()
    assert signal.getsignal(number) is handler
    assert caught.value.step == stopped.done == {"step": 8, "hook": 9}[moment]
    assert checkpoint.load(checkpoint.latest(tmp_path / "checkpoints"))[1]["step"] == stopped.done
    resumed, whole = trainer("plain", tmp_path, steps=20), trainer("plain", steps=20)
    resumed.run(resume=True)
    whole.run()
    assert same(resumed, whole)


@pytest.mark.parametrize("steps", [4, 6])
def test_what_died_between_a_checkpoint_and_its_hooks_is_looked_at_again(steps, tmp_path):
    """Else a measurement, the last one even, would be missing, and another student be called the best."""
    seen = []

    def die(done):
        if done == 4:
            raise KeyboardInterrupt
        seen.append(done)

    options = dict(steps=steps, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        trainer("plain", tmp_path, hooks=((2, die),), **options).run()
    trainer("plain", tmp_path, hooks=((2, seen.append),), **options).run(resume=True)
    assert seen == list(range(2, steps + 1, 2))


def test_a_stop_request_at_the_last_step_ends_as_usual():
    def tamper(step, batch):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return batch

    last = trainer("plain", source=Tampered(tamper), steps=4)
    last.run()
    assert last.done == 4


def test_a_second_ctrl_c_interrupts_at_once():
    def tamper(step, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return batch

    with pytest.raises(KeyboardInterrupt):
        trainer("plain", source=Tampered(tamper), steps=4).run()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ------------------------------------------------------------------ numbers that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_the_guard_names_step_player_and_checkpoint_and_keeps_the_good_weights(max_grad_norm, value, tmp_path):
    """One bad batch at step 7, good ones after it; the host looks at step 10."""

    def tamper(step, batch):
        return Batch(torch.full_like(batch.x0, value), batch.cond) if step == 7 else batch

    options = dict(max_grad_norm=max_grad_norm, log_every=5, checkpoint_every=5)
    broken = trainer("plain", tmp_path, source=Tampered(tamper), steps=20, **options)
    with pytest.raises(NotFinite) as caught:
        broken.run()
    said = str(caught.value)
    assert said.startswith("Step 7: the gradient of 'student' is not finite") and "\n" not in said
    assert str(tmp_path / "checkpoints" / "step-0000005") in said
    good = trainer("plain", steps=20, **options)
    for step in range(7):
        good.step(step)
    assert same(broken, good)
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-0000005"


def test_without_a_checkpoint_the_guard_says_so():
    def tamper(step, batch):
        return Batch(batch.x0 * math.nan, batch.cond)

    with pytest.raises(NotFinite, match=r"Step 0: .* no checkpoint was written yet"):
        trainer("plain", source=Tampered(tamper), steps=2).run()


# ------------------------------------------------------------------ what a step costs


GUIDED = [
    pytest.param(LCM(VP, guidance_scale=4.0, target_decay=0.9), id="lcm"),
    pytest.param(TCD(VP, guidance_scale=4.0, target_decay=0.9), id="tcd"),
    pytest.param(CM(VP, guidance_scale=4.0, target_decay=0.9, solver="heun", weighting="inverse"), id="cm"),
]
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "item"}


class Operators(TorchDispatchMode):
    """Counts operator calls by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def waits(self):
        return sum(self.counts[name] for name in WAITS)


class OnDevice(Tensor):
    """Stands for a tensor on an accelerator, and so does all that is computed from it: notes who reads one."""

    reads: ClassVar[Counter] = Counter()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in {
            "cpu",
            "numpy",
            "item",
            "tolist",
            "__bool__",
            "__float__",
            "__int__",
            "__index__",
            "__array__",
        }:
            cls.reads[func.__name__] += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def latents_on_device(size=50):
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.rand(size, 2, generator=generator).as_subclass(OnDevice) for _ in range(2))
    label = (torch.arange(size) % 3).as_subclass(OnDevice)
    return LatentSource(mean, std, Cond({"label": label}, null={"label": torch.tensor([-1])}))


GAMES = [
    pytest.param(PCM(VP), id="pcm"),
    pytest.param(CTM(VP, adversarial_weight=0.5), id="ctm"),
    pytest.param(FlowMap(VP), id="flowmap"),
    pytest.param(Reflow(VP, windows=2), id="reflow"),
    pytest.param(SCM(VP), id="scm"),
    pytest.param(PDD(VP), id="pdd"),
    pytest.param(Turbo(VP), id="turbo"),
    pytest.param(LADD(VP, warmup_steps=5), id="ladd"),
    pytest.param(Lightning(VP, num_inference_steps=1, num_teacher_steps=2), id="lightning"),
]


@pytest.mark.parametrize("method", [*GUIDED, *GAMES])
def test_nothing_waits_for_the_device_between_log_steps(method):
    """Clipping, the NaN guard, both EMAs, accumulation and statistics included."""
    waits, reads = [0], [0]
    OnDevice.reads.clear()
    with Operators() as operators:

        def note(done):
            waits.append(operators.waits)
            reads.append(sum(OnDevice.reads.values()))

        options = dict(steps=10, log_every=5, ema_decay=0.9, accumulation=2)
        trainer(method, hooks=((1, note),), source=latents_on_device(), **options).run()
    waited = {step for step in range(1, 11) if waits[step] > waits[step - 1]}
    read = {step for step in range(1, 11) if reads[step] > reads[step - 1]}
    assert waited == {5, 10}  # and there it does wait: the counter counts
    assert read == {5, 10}


def test_the_stand_in_for_a_device_sees_reads():
    """The test above can fail: what is computed from a tensor on the device and then read is noticed."""
    OnDevice.reads.clear()
    x = (torch.ones(3) + torch.ones(3).as_subclass(OnDevice)).sum()
    bool(x > 1), float(x), x.item(), x.cpu(), x.detach().numpy(), x.tolist()
    assert OnDevice.reads.keys() >= {"__bool__", "__float__", "item", "cpu", "numpy", "tolist"}


def bare_step(run, x, t, cond):
    """The same network calls, backward, clipping, fused AdamW and EMAs, with nothing around them."""
    roles, parameters = run.roles, run.roles.parameters("student")
    network, optimizer = roles.base, torch.optim.AdamW(parameters, fused=True)
    followers = [list(roles.tensors_of(name).values()) for name in ("target", "ema")]
    twice, times, both = torch.cat([x, x]), torch.cat([t, t]), Cond.cat([cond.null(), cond])

    def step():
        with torch.no_grad():
            network(twice, times, both)
            with live(("target",)):
                network(x, t, cond)
        with live(("student",)):
            loss = network(x, t, cond).square().mean()
        loss.backward(inputs=parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for follower in followers:
            torch._foreach_lerp_(follower, parameters, 0.1)

    return step


def operators_of(step):
    step()  # the optimiser's state exists afterwards
    with Operators() as operators:
        step()
    return sum(operators.counts.values())


@pytest.mark.parametrize("method", GUIDED)
def test_a_step_makes_at_most_350_operator_calls_beyond_the_bare_one_and_its_noise(method):
    run = trainer(method, ema_decay=0.9)
    batch = SOURCE.batch(Rng(0, 0, 8))
    bare = operators_of(bare_step(run, batch.x0, torch.arange(8) * 100, batch.cond))
    whole = operators_of(lambda: run.step(1))
    noise = operators_of(lambda: Rng(0, 1, 8).sample.normal("noise", (2,)))
    assert 0 < whole - bare - noise <= 350 and noise <= 130


# ------------------------------------------------------------------ checkpoints that are not this run's


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer("plain", folder, steps=2).run()
    return folder


def damage(folder, file, content):
    path = folder / "checkpoints" / "step-0000002" / file
    if content is None:
        path.unlink()
    elif isinstance(content, int):
        path.write_bytes(path.read_bytes()[:content])
    else:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tensors.safetensors", None),
        ("tensors.safetensors", 0),
        ("tensors.safetensors", 1000),
        ("tensors.safetensors", b"\xff" * 100),
        ("state.json", 0),
        ("state.json", 20),
        ("state.json", b"[]"),
        ("state.json", b'{"format": 99, "step": 2}'),
        ("state.json", b'{"format": 1}'),
        ("state.json", b"\xff\xfe"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_sentence(file, content, finished, tmp_path):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", finished, copy], check=True)
    damage(copy, file, content)
    with pytest.raises(
        ValueError, match=r"step-0000002 cannot be read \(.*\): delete it to use an older one"
    ) as caught:
        trainer("plain", copy, steps=4).run(resume=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(seed=1), "made with another method or seed"),
        (dict(case=LCM(VP)), "made with another method or seed"),
        (dict(rank=5), "belongs to another student: its tensors differ in name or shape"),
        (dict(kind="full"), "belongs to another student: its tensors differ in name or shape"),
        (dict(case=TCD(VP, tell_end=True)), "belongs to another student: its tensors differ in name or shape"),
        (dict(ema_decay=0.9), "belongs to another student: its tensors differ in name or shape"),
    ],
)
def test_a_foreign_checkpoint_is_one_clear_sentence(changes, sentence, finished):
    other = trainer(**{"case": "plain", "folder": finished, "steps": 4} | changes)
    before = {name: tensor.detach().clone() for name, tensor in other.tensors().items()}
    with pytest.raises(ValueError, match=sentence) as caught:
        other.run(resume=True)
    assert "\n" not in str(caught.value)
    assert checkpoint.same(before, other.tensors())  # nothing half loaded


@pytest.mark.parametrize("recorded", [{}, {"random": 1}, {"random": 3}])
def test_a_run_that_began_with_other_random_numbers_is_one_clear_sentence(recorded, finished, tmp_path):
    """Version 1 was not recorded."""
    shutil.copytree(finished, tmp_path / "run")
    state = tmp_path / "run" / "checkpoints" / "step-0000002" / "state.json"
    kept = json.loads(state.read_text())
    assert kept.pop("random") == Rng.version == 2
    state.write_text(json.dumps(kept | recorded))
    other = trainer("plain", tmp_path / "run", steps=4)
    before = {name: tensor.detach().clone() for name, tensor in other.tensors().items()}
    with pytest.raises(ValueError) as caught:
        other.run(resume=True)
    began = recorded.get("random", 1)
    assert str(caught.value) == (
        f"{tmp_path / 'run'} was begun with random numbers of version {began} and this fewstep draws those of version "
        "2, so it cannot be continued exactly: finish it with the fewstep that began it, or start it anew in another "
        "--out."
    )
    assert checkpoint.same(before, other.tensors())  # nothing half loaded


def test_moments_of_other_shapes_are_refused(finished, tmp_path):
    other = trainer("plain", steps=4)
    tensors, _ = checkpoint.load(checkpoint.latest(finished / "checkpoints"))
    moments = checkpoint.split(tensors, "optimizer/student")
    with pytest.raises(ValueError, match="'student' differs in shape"):
        other.players[0].load_tensors(moments | {"0/exp_avg": torch.zeros(3)})
    with pytest.raises(ValueError, match="'student' belongs to another recipe"):
        other.players[0].load_tensors(moments | {"999/exp_avg": torch.zeros(3)})


# ------------------------------------------------------------------ clipping and learning rate


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_clipping_sees_every_trainable_tensor(kind):
    """The norm is over all of them, extra inputs included, and every one is scaled by the same factor."""
    limit, method = 1e-3, TCD(VP, tell_end=True)
    run = trainer(method, kind=kind, max_grad_norm=limit)
    tensors = run.roles.tensors_of("student")
    with torch.no_grad():
        for p in tensors.values():
            p.add_(0.1 * torch.randn_like(p))
    player, rng = run.players[0], Rng(0, 0, 8)
    assert {id(p) for p in player.parameters} == {id(p) for p in tensors.values()}
    assert any(name.startswith("extras.") for name in tensors)
    batch = SOURCE.batch(rng)
    draws = method.draw(batch, rng, None)
    shared = method.prepare(run.roles, batch, draws, {"student"})
    player.backward(method.student(run.roles, batch, draws, shared).total, 1)
    gradients = [p.grad.clone() for p in player.parameters]
    assert all(g.any() for g in gradients)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert norm > 2 * limit
    player.update(0)
    assert float(player.grad_norm) == pytest.approx(norm, rel=1e-5)
    for p, g in zip(player.parameters, gradients, strict=True):
        first = player.optimizer.state[p]["exp_avg"] / 0.1  # AdamW's first moment: 0.1 of the gradient it was given
        torch.testing.assert_close(first, g * (limit / norm), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(("schedule", "last"), [("constant", [2.0] * 4), ("cosine", [2.0, 1.7071068, 1.0, 0.2928932])])
def test_learning_rate_warms_up_then_stays_or_falls_to_zero(schedule, last):
    settings = TrainingSettings(
        steps=8, learning_rate=2.0, critic_learning_rate=1.0, warmup_steps=4, lr_schedule=schedule
    )
    wanted = [0.5, 1.0, 1.5, 2.0, *last]
    assert [settings.rate(step) for step in range(8)] == pytest.approx(wanted)
    assert [settings.rate(step, "critic") for step in range(8)] == pytest.approx([r / 2 for r in wanted])
    assert settings.rate(8) == pytest.approx(2.0 if schedule == "constant" else 0.0)


def test_the_optimiser_uses_the_rate_of_its_step():
    run = trainer("plain", steps=8, warmup_steps=4, lr_schedule="cosine", weight_decay=0.0)
    for step in range(8):
        run.step(step)
        assert run.players[0].optimizer.param_groups[0]["lr"] == run.settings.rate(step)


def test_a_player_without_parameters_is_refused():
    settings = TrainingSettings(batch_size=8)
    method = TCD(VP)
    roles = roles_for(method, settings)
    for p in roles.parameters("student"):
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="'student' has no trainable parameters"):
        killable.Trainer(method, roles, SOURCE, settings)


def test_a_run_without_a_folder_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = trainer("plain", steps=2)
    run.run()
    assert run.save() is None and not list(Path(tmp_path).iterdir())
    assert run.last_record["step"] == 2 and run.last_record["student/loss"] > 0


def test_critics_may_have_betas_of_their_own():
    settings = TrainingSettings(betas=(0.9, 0.99), critic_betas=(0.0, 0.999))
    weight = torch.nn.Parameter(torch.zeros(1))
    found = [
        PlayerState(Player(name), [weight], settings).optimizer.defaults["betas"] for name in ("student", "critic")
    ]
    assert found == [(0.9, 0.99), (0.0, 0.999)]
    same = PlayerState(Player("critic"), [weight], TrainingSettings(betas=(0.9, 0.99)))
    assert same.optimizer.defaults["betas"] == (0.9, 0.99)
    with pytest.raises(ValueError, match=r"critic_betas\.1: input should be less than 1, not 1\.0"):
        TrainingSettings(critic_betas=(0.0, 1.0))
