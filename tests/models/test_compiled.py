"""Compiled blocks compute what the plain ones do: every role, under checkpointing, hooks and copies.

The backend is AOTAutograd's without code generation: what can go wrong here is what is traced and guarded.
"""

import copy
import shutil

import pytest
import torch
from torch import nn

from fewstep.diffusion.schedule import Schedule
from fewstep.models import compiled
from fewstep.models.compiled import check_compiler, compile_blocks
from fewstep.models.denoiser import Denoiser
from fewstep.models.lora import checkpoint
from fewstep.models.roles import Roles, Weights
from fewstep.runs.fit import check_machine
from fewstep.training.settings import TrainingSettings
from tests.models.tiny_lcm import four_steps, tiny_teacher

BACKEND = "aot_eager"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, h):
        return h + self.down(torch.sin(self.up(h)))


class Net(nn.Module):
    casts_inputs = True

    def __init__(self):
        super().__init__()
        self.blocks, self.gradient_checkpointing = nn.ModuleList(Block() for _ in range(3)), False

    def forward(self, x, t, cond=None):
        for block in self.blocks:
            x = checkpoint(block, x) if self.gradient_checkpointing and torch.is_grad_enabled() else block(x)
        return x


def answers(views, roles, x, t, cond=None):
    """Outputs of roles in turn, each again after the others', and gradients of those that learn."""
    found = []
    for name in views:
        output = getattr(roles, name)(x, t, cond).output
        found.append(output.detach().float())
        if roles.parameters(name):
            output.float().square().mean().backward(inputs=roles.parameters(name))
    found += [p.grad.float() for name in dict.fromkeys(views) for p in roles.parameters(name) if p.grad is not None]
    return found


def toy(compiling, low=False, checkpointing=False):
    torch.manual_seed(0)
    network = Net().bfloat16() if low else Net()
    roles = Roles(
        Denoiser(network, Schedule.scaled_linear()), autocast=torch.bfloat16 if low else None,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    return grown(roles, compiling)


def grown(roles, compiling, backend=BACKEND):
    for name in ("student", "critic"):
        roles.add(name, Weights("lora", 2))
        with torch.no_grad():
            for i, p in enumerate(roles.parameters(name)):
                noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i + 100 * len(name)))
                p.add_(0.1 * noise)
    roles.follow("target", "student", 0.5)
    if compiling:
        roles.compile(backend)
    return roles


VIEWS = ("teacher", "student", "critic", "student", "target")


def off(found, wanted):
    return max(float((a - b).norm() / (b.norm() + 1e-9)) for a, b in zip(found, wanted, strict=True))


@pytest.mark.slow
def test_compiled_roles_answer_each_with_its_own_adapter():
    """One graph for all blocks of a role; hooks on blocks act; a copy calls its own blocks, not the original's."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
    wanted = answers(VIEWS, toy(False), x, 500)
    roles = toy(True)
    assert off(answers(VIEWS, roles, x, 500), wanted) < 1e-6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8  # one for each block and view would be 15
    assert not torch._dynamo.utils.counters["graph_break"]
    checkpointed = toy(True, checkpointing=True)
    assert off(answers(VIEWS, checkpointed, x, 500), wanted) < 1e-6
    seen = []
    handle = roles.base.blocks[1].register_forward_hook(lambda *parts: seen.append(parts[2]))
    roles.teacher(x, 500)
    handle.remove()
    roles.teacher(x, 500)
    assert len(seen) == 1
    other = copy.deepcopy(roles.base)
    with torch.no_grad():
        other.blocks[0].up.base_layer.weight.zero_()
        assert not torch.allclose(other(x, None), roles.base(x, None))
        assert off([roles.teacher(x, 500).output], wanted[:1]) < 1e-6


@pytest.mark.slow
def test_compiled_roles_in_bf16_follow_their_weights():
    """Rounding differs: a sum and a product are one operation without the compiler."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
    plain, fast = toy(False, low=True), toy(True, low=True)
    for _ in range(2):
        assert off(answers(VIEWS, fast, x, 500), answers(VIEWS, plain, x, 500)) < 0.03
        with torch.no_grad():
            for roles in (plain, fast):
                for p in roles.parameters("student"):
                    p.grad = None
                    p.mul_(-2)


def test_what_cannot_be_compiled_is_refused_in_a_sentence(monkeypatch):
    with pytest.raises(ValueError, match="Linear has no repeated blocks to compile"):
        compile_blocks(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"training\.compile does not go with training.fsdp"):
        TrainingSettings(compile=True, fsdp=True)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler on a CPU: install g\+\+"):
        check_compiler("cpu")
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs triton on CUDA"):
        check_compiler("cuda:1")
    with pytest.raises(ValueError, match="on cpu and cuda alone, not on mps"):
        check_compiler("mps")


def test_the_setting_compiles_every_role_of_a_run(monkeypatch):
    from fewstep.methods.lcm import LCM
    from fewstep.training.trainer import build_roles

    seen = []
    monkeypatch.setattr(Roles, "compile", lambda self, *_: seen.append(sorted(self.views())))
    for compiling in (False, True):
        denoiser = Denoiser(Net(), Schedule.scaled_linear())
        settings = TrainingSettings(compile=compiling, ema_decay=0.5)
        build_roles(denoiser, LCM(denoiser.schedule), settings, Weights("lora", 2))
    assert seen == [["ema", "student", "target", "teacher"]]


def test_a_recipe_that_compiles_asks_for_the_compiler_first(monkeypatch):
    from fewstep.recipe.load import load_recipe

    monkeypatch.setattr(shutil, "which", lambda name: None)
    recipe = load_recipe("scenes-64-tcd", ["training.compile=true"])
    with pytest.raises(ValueError, match="install g"):
        check_machine(recipe)
    check_machine(load_recipe("scenes-64-tcd"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "flux", "qwen_image"])
def test_tiny_pipelines_train_alike_compiled(name):
    """Four steps of LCM through `build_roles` and `Trainer`: losses and weights."""
    teacher, source = tiny_teacher(name)
    plain = four_steps(teacher, source, checkpointing=False)
    compiled = four_steps(teacher, source, checkpointing=True, roles=lambda roles: roles.compile(BACKEND))
    assert compiled[0] == pytest.approx(plain[0], rel=1e-5)
    assert off(compiled[1], plain[1]) < 1e-4
