"""Blocks that come from the host compute what they do without, and what was let go is used by nobody."""

import copy
import itertools
import types
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from fewstep.diffusion.schedule import Schedule
from fewstep.models import offload as room
from fewstep.models.denoiser import Denoiser
from fewstep.models.offload import Streamer, is_offloaded, offload, restore
from fewstep.models.quantize import moved, quantize
from fewstep.models.roles import Roles, Weights
from fewstep.training.settings import TrainingSettings
from tests.models.test_compiled import VIEWS, Net, answers, grown, off
from tests.models.tiny_lcm import four_steps, tiny_teacher


@pytest.fixture
def poison(monkeypatch):
    """Copies that are let go become NaN, as their memory may be another block's then; counts blocks on the device."""
    copies, most, free, fetch = [], [0], Streamer.free, Streamer._fetch

    def poisoned(self, index):
        for module, name, on_host in self.kept[index] if index in self._here else ():
            assert module._parameters[name] is not on_host
            moved(module._parameters[name], lambda t: t.fill_(torch.nan if t.is_floating_point() else 0))
        free(self, index)

    def counted(self, index, early=False):
        if index not in self._here:
            copies.append((index, early))
        fetch(self, index, early)
        most[0] = max(most[0], len(self._here))

    monkeypatch.setattr(Streamer, "free", poisoned)
    monkeypatch.setattr(Streamer, "_fetch", counted)
    return copies, most


def toy(streaming, checkpointing=False, kind="lora"):
    torch.manual_seed(0)
    network = Net()
    if streaming:
        offload(network, "cpu")
    roles = Roles(Denoiser(network, Schedule.scaled_linear()), gradient_checkpointing=checkpointing)
    if kind == "full":
        roles.add("student", Weights("full"))
        roles.add("critic", Weights("lora", 2))
        return roles.follow("target", "student", 0.5) and roles
    return grown(roles, False)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_role_answers_as_without(poison, checkpointing):
    """Teacher, student, critic, target, one after the other, outputs and gradients to the bit; two blocks at most."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
    wanted = answers(VIEWS, toy(False), x, 500)
    roles = toy(True, checkpointing)
    for _ in range(2):
        for name in ("student", "critic"):
            for p in roles.parameters(name):
                p.grad = None
        found = answers(VIEWS, roles, x, 500)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert poison[1] == [2]


def test_two_calls_in_one_graph(poison):
    """A loss of two calls, and of two roles: the backward passes through each block's weights twice."""
    found = []
    for streaming in (False, True):
        roles = toy(streaming)
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(4)).requires_grad_()
        first = roles.student(x, 500, None).output
        loss = (roles.critic(first, 100, None).output * roles.student(x + 1, 20, None).output).sum()
        loss.backward()
        found.append([x.grad, *(p.grad for name in ("student", "critic") for p in roles.parameters(name))])
    assert off(found[1], found[0]) < 1e-6


def test_the_next_block_comes_early_in_both_directions(poison):
    """In the first step but for the ends of a pass, and everywhere once the order is known."""
    roles, seen = toy(True), poison[0]
    x, steps = torch.randn(2, 4), []
    for _ in range(3):
        seen.clear()
        roles.student(x, 500, None).output.sum().backward()
        steps.append(list(seen))
    assert steps[0][:3] == [(0, False), (1, True), (2, True)] and (0, True) in steps[0]
    assert steps[2] == [(1, True), (2, True), (1, True), (0, True)]


def test_trained_weights_stay_and_frozen_ones_go(poison):
    roles = toy(True)
    roles.teacher(torch.randn(2, 4), 500)
    tables = [m._parameters for block in roles.base.blocks for m in block.modules()]
    held = roles.base.blocks[0].streamer.kept
    assert [len(kept) for kept in held] == [4, 4, 4]  # two layers' weights and biases
    assert all(p.requires_grad is False for kept in held for _, _, p in kept)
    assert all(any(t.get("weight") is p for t in tables) for p in roles.parameters("student"))
    assert is_offloaded(roles.base) and not is_offloaded(Net())


def test_copies_and_full_weights_are_whole(poison):
    """A full student is on the device; a copied base fetches its own weights; undone, all are plain again."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
    found = [answers(("teacher", "student", "critic", "target"), toy(s, kind="full"), x, 500) for s in (False, True)]
    assert off(found[1], found[0]) < 1e-6
    roles = toy(True, kind="full")
    assert is_offloaded(roles.base) and not is_offloaded(roles.student.network.network)
    other = copy.deepcopy(roles.base)
    with torch.no_grad():
        before = roles.base(x, None)
        for _, _, weight in other.blocks[0].streamer.kept[0]:
            weight.zero_()
        assert not torch.equal(other(x, None), before) and torch.equal(roles.base(x, None), before)
    restore(other)
    assert type(other.blocks[0]) is type(Net().blocks[0]) and not is_offloaded(other)


def test_what_is_outside_the_blocks_moves_and_what_is_inside_does_not():
    class Whole(Net):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.blocks[0].register_buffer("table", torch.ones(2))

    from fewstep.models.sharding import device_of

    network = Whole()
    with torch.device("cpu"):
        offload(network, "meta")  # stands for a device that is another one
    assert network.first.weight.is_meta and network.blocks[0].table.is_meta and device_of(network).type == "meta"
    assert all(p.device.type == "cpu" for p in network.blocks.parameters())
    roles = Roles(Denoiser(network, Schedule.scaled_linear()))
    roles.add("student", Weights("lora", 2))
    assert all(p.is_meta for p in roles.parameters("student"))


def test_what_cannot_be_streamed_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="Linear has no repeated blocks to stream"):
        offload(nn.Linear(2, 2), "cpu")
    for other in ("compile", "fsdp"):
        with pytest.raises(ValueError, match=rf"training\.offload does not go with training\.{other}: leave one"):
            TrainingSettings(offload=True, **{other: True})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "flux", "qwen_image"])
def test_tiny_pipelines_train_alike(name, poison):
    """Four steps of LCM, its target and teacher on one base with the student: losses and weights."""
    from fewstep.planning.estimate import _blocks

    teacher, source = tiny_teacher(name)
    plain = four_steps(teacher, source, checkpointing=True)
    losses, weights, roles = four_steps(teacher, source, checkpointing=True, network=lambda n: offload(n, "cpu"))
    stream = next(block.streamer for block in roles.base.modules() if hasattr(block, "streamer"))
    sizes = [sum(p.nbytes for _, _, p in kept) for kept in stream.kept]
    total, two = _blocks(teacher.family.base, None, "cpu")
    assert total == sum(sizes) and two == max(a + b for a, b in itertools.pairwise(sizes))
    assert losses == pytest.approx(plain[0], rel=1e-5)
    assert off(weights, plain[1]) < 1e-4
    assert poison[1] == [2]


@pytest.mark.slow
def test_every_family_is_streamed(poison):
    """A teacher and two LoRAs of a tiny pipeline of each: outputs and gradients as without, to the bit."""
    from tests.models.pipelines_flow import TEACHERS
    from tests.runs.test_distill_families import PROMPTS, teacher_of

    for family in ("sd15", "sdxl", "sd3", "flux", "pixart", *TEACHERS):
        found = []
        for streaming in (False, True):
            teacher = teacher_of(family)
            if streaming:
                teacher.offload("cpu")
            denoiser = teacher.denoiser
            torch.manual_seed(1)
            x, cond = torch.randn(len(PROMPTS), *teacher.latent_shape), teacher.encode_prompts(PROMPTS)
            roles = grown(Roles(denoiser, gradient_checkpointing=True), False)
            found.append(answers(("teacher", "student", "critic"), roles, x, 0.5 * denoiser.schedule.start, cond))
        assert len(found[0]) > 3, family
        assert all(torch.equal(a, b) for a, b in zip(found[1], found[0], strict=True)), family
    assert poison[1] == [2]


@pytest.mark.slow
def test_a_run_is_the_same_with_and_without_and_resumes(tmp_path, poison):
    """scenes-64 by LCM: in one go without offload; and stopped after two steps of four, resumed with and without."""
    from fewstep.recipe.load import load_recipe
    from fewstep.runs.distill import distill
    from fewstep.students.student import load_weights

    short = ["data.size=8", "training.batch_size=2", "training.warmup_steps=0", "sample.every=9"]
    short += ["training.gradient_checkpointing=true", "training.log_every=1", "training.checkpoint_every=2"]
    found = {}
    ways = {"without": [("false", 4)], "resumed": [("true", 2), ("true", 4)], "changed": [("true", 2), ("false", 4)]}
    for name, stages in ways.items():
        for number, (on, steps) in enumerate(stages):
            changes = [f"training.offload={on}", f"training.steps={steps}", "training.lr_schedule=constant"]
            recipe = load_recipe("scenes-64-lcm", [*short, *changes])
            student = distill(recipe, tmp_path / name, resume=number > 0)
        found[name] = load_weights(student)
    for name in ("resumed", "changed"):
        assert all(torch.equal(found[name][key], t) for key, t in found["without"].items()), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_is_streamed(kind, poison):
    """Outputs and gradients as without, to the bit, and no weight of a forward is kept for its backward."""
    pytest.importorskip({"int8": "torchao", "nf4": "bitsandbytes"}[kind])

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)

        def forward(self, h):
            return h + self.down(torch.sin(self.up(h)))

    found = []
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    for streaming in (False, True):
        torch.manual_seed(0)
        network = Net()
        network.blocks = nn.ModuleList(Wide() for _ in range(3))
        quantize(network, kind)
        if streaming:
            offload(network, "cpu")
        found.append(answers(VIEWS, grown(Roles(Denoiser(network, Schedule.scaled_linear())), False), x, 500))
    assert all(torch.isfinite(t).all() for t in found[1])
    assert all(torch.equal(a, b) for a, b in zip(found[1], found[0], strict=True))
    assert poison[1] == [2]


class Recorder:
    """In the place of torch, with a device "cuda": writes down what each stream is given, and copies on the host."""

    def __init__(self):
        self.now, self.streams, self.log = "main", {}, []
        self.cuda = types.SimpleNamespace(
            Stream=lambda device: self.stream("side"),
            stream=self.within,
            current_stream=lambda d: self.stream(self.now),
        )

    def __getattr__(self, name):
        return getattr(torch, name)

    def stream(self, name):
        return types.SimpleNamespace(name=name, wait_stream=lambda other: self.log.append((name, "waits", other.name)))

    @contextmanager
    def within(self, stream):
        self.now, before = stream.name, self.now
        yield
        self.now = before

    def empty_like(self, tensor, device):
        recorder = self

        class Made(torch.Tensor):
            def copy_(self, source, non_blocking):
                recorder.log.append((recorder.now, "copies", int(source[0, 0])))
                return torch.Tensor(source.clone())

        return torch.empty_like(tensor).as_subclass(Made)


def test_streams_wait_for_each_other(monkeypatch):
    """A copy beside the computation waits for what may read its memory; a block waits for its copy."""
    recorder = Recorder()
    monkeypatch.setattr(room, "torch", recorder)
    monkeypatch.setattr(room, "_SIDE", {})
    monkeypatch.setattr(room, "_on_host", lambda t, pinned: t if pinned else 1 / 0)
    blocks = [nn.Linear(1, 1, bias=False) for _ in range(3)]
    with torch.no_grad():
        for index, block in enumerate(blocks):
            block.weight.fill_(index)
            block.streamed_as = index
    streamer = Streamer(blocks, Cuda())
    for block in blocks:
        recorder.log.append(("main", "uses", block.streamed_as))
        streamer.use(block)
    assert recorder.log == [
        ("main", "uses", 0), ("main", "copies", 0), ("side", "waits", "main"), ("side", "copies", 1),
        ("main", "uses", 1), ("main", "waits", "side"), ("side", "waits", "main"), ("side", "copies", 2),
        ("main", "uses", 2), ("main", "waits", "side"),
    ]  # fmt: skip


class Cuda:
    type = "cuda"


def test_the_setting_streams_the_teacher_of_a_run():
    """It is loaded on the host; the other parts of the pipeline go to the device."""
    from fewstep.recipe.load import load_recipe
    from fewstep.runs.setup import _teacher

    streamed = [
        is_offloaded(_teacher(load_recipe("scenes-64-tcd", [f"training.offload={on}"]), "scenes-64").denoiser.network)
        for on in ("false", "true")
    ]
    assert streamed == [False, True]


@pytest.mark.slow
def test_a_plan_counts_two_blocks():
    """On a GPU the other blocks are in the host's memory; on a CPU, all of them, and copies of two."""
    from fewstep.planning.estimate import _blocks
    from fewstep.recipe.load import load_recipe
    from fewstep.runs.plan import advise, candidates, describe, plan

    row, two = "the teacher's network", "two blocks of it at a time"
    plans = {
        (device, on): plan(
            load_recipe("scenes-64-tcd", [f"training.device={device}", f"training.offload={on}"]), timed=False
        )
        for device in ("cpu", "cuda")
        for on in ("false", "true")
    }
    parts = {key: planned.estimate.training for key, planned in plans.items()}
    blocks, most = _blocks(plans["cuda", "true"].outline.base, None, "cuda")
    assert parts["cuda", "false"][row] - parts["cuda", "true"][row] == blocks == plans["cuda", "true"].estimate.host
    assert parts["cuda", "true"][two] == most < blocks and two not in parts["cuda", "false"]
    assert parts["cpu", "true"][row] == parts["cpu", "false"][row] and plans["cpu", "true"].estimate.host == 0
    assert parts["cuda", "true"]["activations"] < parts["cuda", "false"]["activations"]  # blocks are checkpointed
    said = "in the host's memory, for blocks that are brought to the device"
    assert said in str(describe(plans["cuda", "true"])) and said not in str(describe(plans["cuda", "false"]))
    assert "training.offload=true" in str(advise(plans["cuda", "false"]))
    assert ("training.offload", True) not in candidates(plans["cpu", "false"].recipe)


def test_a_plan_of_a_quantised_base_counts_packed_blocks():
    """In 8 bits, of float32: a byte for a weight and one scale for a row."""
    from fewstep.planning.estimate import _blocks

    total, two = _blocks(Net(), "int8", "cpu")
    block = 2 * 32 + 4 * (8 + 4) + 4 * (8 + 4)  # weights, scales, biases
    assert (total, two) == (3 * block, 2 * block)


class Shares(nn.Module):
    """Blocks of which two have one layer in common, and one stands twice in the list."""

    def __init__(self):
        super().__init__()
        self.blocks = Net().blocks
        self.blocks[2].down = self.blocks[1].down
        self.blocks.append(self.blocks[0])

    def forward(self, x, t, cond=None):
        for block in self.blocks:
            x = block(x)
        return x


def test_a_layer_that_two_blocks_share_stays_on_the_device(poison):
    torch.manual_seed(0)
    network, x = Shares(), torch.randn(5, 4)
    wanted = network(x, None)
    offload(network, "cpu")
    streamer, shared = network.blocks[0].streamer, network.blocks[1].down
    on_host = {id(weight) for kept in streamer.kept for _, _, weight in kept}
    used = []
    for module in network.modules():
        module.register_forward_pre_hook(lambda m, _: used.extend(map(id, m._parameters.values())))
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(network(x, None), wanted)
    assert len(streamer.kept) == 3 and on_host.isdisjoint(used) and id(shared.weight) in used
    restore(network)
    assert torch.equal(network(x, None), wanted)


def test_offload_on_a_cpu_is_remarked_once():
    from fewstep.models.hub import Remark
    from fewstep.recipe.load import load_recipe
    from fewstep.runs.fit import check_machine

    with pytest.warns(Remark, match="training.offload saves no memory on a CPU") as remarks:
        check_machine(load_recipe("scenes-64-tcd", ["training.offload=true"]))
    assert len(remarks) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_machine(load_recipe("scenes-64-tcd"))
