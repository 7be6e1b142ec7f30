"""Banks of last layers on every family: each mixture is the network with that mixture of layers as its last one."""

import copy

import numpy as np
import pytest
import torch

from fewstep.diffusion.schedule import Schedule
from fewstep.models.bank import LayerBank, fused, interval_lengths
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser, edm_precondition
from fewstep.models.families import as_teacher
from fewstep.models.mlp import MLP
from fewstep.models.roles import Roles, Weights
from tests.models.pipelines import PROMPTS, build

QUICK = ("sd15", "sana")
SLOW = ("sdxl", "sd3", "flux", "pixart", "sana_sprint", "qwen_image", "klein_base", "flux2_dev", "krea2", "chroma")
SLOW = (*SLOW, "z_image", "qwen_image21")
FAMILIES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
ROWS = np.stack([np.eye(6)[2], np.full(6, 1 / 6), fused(np.arange(1.0, 7.0), 2, 5)])
FLOW = Schedule.flow(3.0)
TIMES = [*FLOW.timesteps(6).tolist(), 0.0]


def asked(name):
    """A teacher of its own, for roles change it; a batch whose texts differ in length, and times for a bank."""
    teacher = as_teacher(copy.deepcopy(build(name)))
    torch.manual_seed(0)
    x, cond = torch.randn(2, *teacher.latent_shape), teacher.encode_prompts(PROMPTS, guided=False)
    schedule = teacher.denoiser.schedule
    return teacher.denoiser, x, cond, [*schedule.timesteps(6).tolist(), schedule.clean]


def shaken(roles):
    with torch.no_grad():
        for tensor in roles.tensors().values():
            tensor.add_(0.05 * torch.randn_like(tensor))


def by_hand(roles, x, t, cond, row):
    """The student's output with one mixture put into the network as its own last layer."""
    view = roles.student.network
    layer, bank = view.network.get_submodule(view.network.last_layer), view.bank
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p += bank.rate * torch.einsum("n,n...->...", torch.from_numpy(row).float(), getattr(bank, name))
        view.bank = None
        found = roles.student(x, t, cond).output
        view.bank = bank
        for name, p in layer.named_parameters():
            p.copy_(before[name])
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_mixture_is_the_network_with_that_last_layer(name):
    denoiser, x, cond, times = asked(name)
    roles = Roles(denoiser, gradient_checkpointing=name in ("flux", "z_image"))
    roles.add("student", Weights("lora", 4), bank=times)
    with torch.no_grad():
        teacher = roles.teacher(x, times[2], cond).output
    for prediction in roles.student.mixtures(x, times[2], cond, ROWS):  # the student begins as its teacher
        torch.testing.assert_close(prediction.output, teacher, rtol=0, atol=1e-6)
    shaken(roles)
    rows = np.stack([ROWS[0], fused(interval_lengths(denoiser.schedule, times), 2, 5)])
    predictions = roles.student.mixtures(x, times[2], cond, rows)
    wanted = by_hand(roles, x, times[2], cond, rows[1])
    torch.testing.assert_close(predictions[1].output, wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # the same by the end of a step, of one image alone
        told = roles.student(x[:1], times[2], cond[:1], end=times[5]).output
    torch.testing.assert_close(told, wanted[:1], rtol=1e-4, atol=1e-4)
    predictions[0].output.square().mean().backward()
    tensors = roles.tensors_of("student")
    assert tensors["bank.weight"].grad.flatten(1).abs().amax(1).nonzero().flatten().tolist() == [2]
    assert not any(key.startswith(roles.base.last_layer) for key in tensors)  # no LoRA on the layer it stands for
    assert sum(p.grad is not None for key, p in tensors.items() if ".lora_" in key) > 4


@pytest.mark.parametrize("name", ["sd15", pytest.param("krea2", marks=pytest.mark.slow)])
def test_a_bank_stays_in_float32_where_the_network_is_not(name):
    """Under autocast, and beside weights in bfloat16: the same as the last layer in float32 on what it is given."""
    denoiser, x, cond, times = asked(name)
    denoiser.network.to(torch.bfloat16)
    roles = Roles(denoiser, autocast=torch.bfloat16)
    roles.add("student", Weights("lora", 4), bank=times)
    given, layer = [], roles.base.get_submodule(roles.base.last_layer)
    handle = layer.register_forward_hook(lambda _, args, __: given.append(args[0]))
    with torch.no_grad():
        found = roles.student.network.bank.forward
        made = roles.student.mixtures(x, times[2], cond, ROWS)
        wanted = found(given[0], torch.from_numpy(ROWS), layer).chunk(3)
    handle.remove()
    exact = copy.deepcopy(layer).float()(given[0].float())
    assert given[0].dtype == torch.bfloat16 and roles.student.network.bank.weight.dtype == torch.float32
    for mixture, prediction in zip(wanted, made, strict=True):
        torch.testing.assert_close(mixture, exact, rtol=0, atol=1e-6)
        assert (
            prediction.output.dtype == torch.float32
            and prediction.output.bfloat16().float().ne(prediction.output).any()
        )


class Reshapes(torch.nn.Module):
    """A network that counts its output by the batch of its input, as Sana's transformer does."""

    last_layer, dtype = "last", torch.float32

    def __init__(self):
        super().__init__()
        self.last = torch.nn.Linear(4, 4)

    def forward(self, x, t, cond=None):
        return self.last(x).reshape(len(x), -1, 4).mean(1)


def test_a_network_that_would_scramble_mixtures_is_refused():
    roles = Roles(Denoiser(Reshapes(), FLOW, "flow"))
    roles.add("student", Weights("full"), bank=TIMES)
    with pytest.raises(ValueError, match="scramble 3 mixtures"):
        roles.student.mixtures(torch.randn(2, 4), 0.5, None, ROWS)
    assert roles.student.mixtures(torch.randn(2, 4), 0.5, None, ROWS[:1])[0].output.shape == (2, 4)


def small(kind="lora", schedule=FLOW, times=TIMES, **more):
    torch.manual_seed(0)
    roles = Roles(Denoiser(MLP(schedule, 2, width=16, depth=1), schedule, "flow"), **more)
    roles.add("student", Weights(kind, 2), bank=times)
    shaken(roles)
    return roles


def test_an_edm_network_hands_on_its_last_layer():
    schedule = Schedule.edm()
    times = [*schedule.timesteps(6).tolist(), 0.0]
    torch.manual_seed(0)
    raw = MLP(schedule, 2, width=16, depth=1)
    roles = Roles(Denoiser(edm_precondition(raw), schedule, "sample"))
    roles.add("student", Weights("lora", 2), bank=times)
    shaken(roles)
    x = torch.randn(3, 2)
    for row, prediction in zip(ROWS, roles.student.mixtures(x, times[1], None, ROWS), strict=True):
        torch.testing.assert_close(prediction.output, by_hand(roles, x, times[1], None, row), rtol=1e-6, atol=1e-6)


def test_guidance_reaches_the_layer_of_the_step_too():
    torch.manual_seed(0)
    roles = Roles(Denoiser(MLP(FLOW, 2, width=16, depth=1, num_classes=2), FLOW, "flow"))
    roles.add("student", Weights("lora", 2), bank=TIMES)
    shaken(roles)
    x, cond = torch.randn(3, 2), Cond({"label": torch.tensor([0, 1, 0])}, null={"label": torch.tensor([-1])})
    with_, without = (roles.student(x, TIMES[1], c, end=TIMES[4]).output for c in (cond, cond.null()))
    guided = roles.student(x, TIMES[1], cond, guidance_scale=3.0, end=TIMES[4]).output
    torch.testing.assert_close(guided, without + 3 * (with_ - without))


def test_only_its_own_times_are_steps():
    roles, x = small(), torch.randn(2, 2)
    for t, end, why in [
        (TIMES[1], 0.123, "0.123 is none of them"),
        (0.123, 0.0, "0.123 is none of them"),
        (TIMES[3], TIMES[1], "lower times alone"),
        (TIMES[3], TIMES[3], "no slope at the end of a step"),
        (torch.tensor(TIMES[1:3]), 0.0, "is none of them: leave timesteps and sampler out, or choose among 1, 0.9"),
    ]:
        with pytest.raises(ValueError, match=why):
            roles.student(x, t, None, end=end)
    with pytest.raises(ValueError, match="must say where a step ends"):
        roles.student(x, TIMES[1])
    with pytest.raises(ValueError, match="no bank"):
        roles.teacher.mixtures(x, TIMES[1], None, ROWS)


def test_what_can_have_no_bank_is_refused():
    zero = Schedule.scaled_linear().zero_terminal_snr()
    with pytest.raises(ValueError, match="pure noise, where sigma/alpha is infinite"):
        interval_lengths(zero, [999.0, 499.0, -1])
    with pytest.raises(ValueError, match=r"must decrease, not 0\.5, 0\.9, 0\."):
        interval_lengths(FLOW, [0.5, 0.9, 0.0])
    with pytest.raises(ValueError, match="must decrease, not 1, nan, 0"):
        interval_lengths(FLOW, [1.0, float("nan"), 0.0])
    network = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear does not say which layer is its last"):
        Roles(Denoiser(network, FLOW, "flow")).add("student", Weights("full"), bank=TIMES)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_follower_has_a_bank_of_its_own(kind):
    roles = small(kind)
    roles.follow("ema", "student", 0.75)
    x, before = torch.randn(2, 2), roles.student(torch.ones(2, 2), TIMES[1], end=0.0).output.detach()
    assert torch.equal(roles.ema(torch.ones(2, 2), TIMES[1], end=0.0).output, before)
    old = roles.ema.network.bank.weight.detach().clone()
    with torch.no_grad():
        roles.tensors_of("student")["bank.weight"].add_(1.0)
    roles.update_followers("student")
    torch.testing.assert_close(roles.ema.network.bank.weight, old + 0.25)
    assert not torch.equal(roles.ema(x, TIMES[1], end=0.0).output, roles.student(x, TIMES[1], end=0.0).output)


def test_layers_move_at_a_tenth_of_the_rate_beside_a_lora():
    """After one step of Adam, whose size is the rate for every parameter; or at the share of it that is given."""
    moved = {}
    for kind, share in (("lora", None), ("full", None), ("lora", 0.3), ("full", 0.3)):
        torch.manual_seed(0)
        roles = Roles(Denoiser(MLP(FLOW, 2, width=16, depth=1), FLOW, "flow"))
        roles.add("student", Weights(kind, 2), bank=TIMES, bank_rate=share)
        bank = roles.student.network.bank
        optimizer = torch.optim.Adam(roles.parameters("student"), lr=1e-3)
        roles.student.mixtures(torch.randn(8, 2), TIMES[0], None, ROWS)[0].output.square().mean().backward()
        optimizer.step()
        moved[kind, share] = float((bank.rate * bank.weight.detach()).abs().max())
    wanted = {("lora", None): 1e-4, ("full", None): 1e-3, ("lora", 0.3): 3e-4, ("full", 0.3): 3e-4}
    assert moved == pytest.approx(wanted, rel=1e-3)


def test_other_students_start_one_and_what_they_lack_stays_at_zero():
    first, then = small("full"), small("full")
    saved = {k: v.detach().clone() for k, v in first.tensors_of("student").items()}
    then.start("student", saved)
    x = torch.randn(2, 2)
    same = [roles.student(x, TIMES[1], end=0.0).output for roles in (first, then)]
    assert torch.equal(*same)
    plain = Roles(Denoiser(MLP(FLOW, 2, width=16, depth=1), FLOW, "flow"))
    plain.add("student", Weights("full"))
    whole = {k: v.detach().clone() for k, v in plain.tensors_of("student").items()}
    banked = Roles(Denoiser(MLP(FLOW, 2, width=16, depth=1), FLOW, "flow"))
    banked.add("student", Weights("full"), bank=TIMES)
    banked.start("student", whole)  # its last layer becomes that which the bank differs from
    output = banked.student(x, TIMES[1], end=0.0).output
    torch.testing.assert_close(output, plain.student(x, TIMES[1]).output)


def test_a_saved_bank_starts_another_beside_a_lora():
    """What a file holds is the differences themselves, whatever the rate."""
    first, then = small(), small()
    saved = {k: v.detach() * (0.1 if k.startswith("bank.") else 1.0) for k, v in first.tensors_of("student").items()}
    with torch.no_grad():
        then.tensors_of("student")["bank.weight"].zero_()
    then.start("student", saved)
    torch.testing.assert_close(then.tensors_of("student")["bank.weight"], first.tensors_of("student")["bank.weight"])


def test_differences_are_counted_from_the_layer_that_is_there():
    layer = torch.nn.Linear(3, 2)
    bank = LayerBank(layer, FLOW, TIMES, rate=0.1)
    with torch.no_grad():
        bank.weight[4] += 1.0
    h = torch.randn(5, 3)
    made = bank(h, torch.from_numpy(np.eye(6)[[4, 0]]), layer)
    torch.testing.assert_close(made[:5], layer(h) + 0.1 * h.sum(1, keepdim=True))
    torch.testing.assert_close(made[5:], layer(h))
