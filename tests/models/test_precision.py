"""bf16 networks with float32 masters: the numbers of peft's layers and of autocast, in fewer kernels and casts."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from benchmarks.kernel_counts import Kernels, measure
from fewstep.diffusion.schedule import Schedule
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.lora import add_adapter, checkpoint, live, lora_layers
from fewstep.models.precision import AddProduct, Shadow, autocast, drop_shadows, keep_shadows, refresh, shadows_of
from fewstep.models.roles import Roles, Weights

BF16 = torch.bfloat16


class Block(nn.Module):
    """The layers that adapters meet; it casts its inputs where ``casts_inputs`` says so."""

    casts_inputs = True

    def __init__(self, checkpointing=False):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Linear(8, 2)
        self.gradient_checkpointing = checkpointing

    def forward(self, x, t, cond=None):
        def inner(x):
            return self.out(self.norm(self.conv(x)).movedim(1, -1)).movedim(-1, 1)

        return checkpoint(inner, x) if self.gradient_checkpointing else inner(x)


def block(dtype, **options):
    torch.manual_seed(0)
    return Block(**options).to(dtype)


def made(dtype, kind="lora", autocast=BF16, network=None, alpha=None):
    roles = Roles(Denoiser(network or block(dtype), Schedule.scaled_linear()), autocast=autocast)
    roles.add("student", Weights(kind, rank=4, alpha=alpha))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in roles.parameters("student"):
            p.add_(0.1 * torch.randn_like(p))
    return roles


def x():
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(2))


def answer(roles):
    """The student's output, and the gradients of its square."""
    output = roles.student(x(), 500).output
    output.float().square().mean().backward(inputs=roles.parameters("student"))
    return [output.detach().float(), *(p.grad for p in roles.parameters("student"))]


def peft_answers(monkeypatch, roles):
    """`answer` with peft's own forward, and autocast around all of it, as before."""
    for layer in lora_layers(roles.base):
        monkeypatch.setattr(type(layer), "forward", type(layer).__mro__[2].forward)
    roles.student.network.autocast = roles.autocast
    return answer(roles)


def off(found, wanted):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("dtype, precision", [(torch.float32, None), (torch.float64, None), (BF16, None)])
def test_without_autocast_an_adapter_is_pefts_to_the_bit(monkeypatch, dtype, precision, alpha):
    found = answer(made(dtype, autocast=precision, alpha=alpha))
    wanted = peft_answers(monkeypatch, made(dtype, autocast=precision, alpha=alpha))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_in_bf16_an_adapter_is_as_near_to_the_truth_as_pefts_was(monkeypatch, dtype, alpha):
    """Both against the same weights in float64."""
    exact = made(dtype, autocast=None, alpha=alpha)
    exact.base.double()
    for p in exact.parameters("student"):
        p.data = p.data.double()
    truth = [each.float() for each in answer(exact)]
    found = off(answer(made(dtype, alpha=alpha)), truth)
    before = off(peft_answers(monkeypatch, made(dtype, alpha=alpha)), truth)
    assert 0 < found < 1.5 * before < 0.05


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_checkpointing_recomputes_the_same_in_bf16(kind):
    plain, again = (answer(made(BF16, kind, network=block(BF16, checkpointing=c))) for c in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_bf16_network_needs_no_autocast_and_one_with_other_weights_does():
    assert made(BF16).teacher.network.autocast is None
    assert made(torch.float32).teacher.network.autocast == BF16
    assert made(BF16, "full").student.network.autocast == BF16  # its masters are in float32
    mixed, silent = block(BF16), block(BF16)
    mixed.norm.float()
    silent.casts_inputs = False
    for network in (mixed, silent):
        assert Roles(Denoiser(network, Schedule.scaled_linear()), autocast=BF16).teacher.network.autocast == BF16
    assert Roles(Denoiser(block(BF16), Schedule.scaled_linear())).teacher.network.autocast is None


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_student_answers_with_its_newest_weights(kind, fused):
    """After an update, however it was made, it is what a student built of those weights is."""
    from fewstep.methods.base import Player
    from fewstep.training.players import PlayerState
    from fewstep.training.settings import TrainingSettings

    roles = made(BF16, kind)
    before = answer(roles)[0]
    if fused:
        state = PlayerState(
            Player("student", ("student",)), roles.parameters("student"), TrainingSettings(learning_rate=0.1)
        )
        state.update(0)
    else:
        with torch.no_grad():
            torch._foreach_add_(roles.parameters("student"), 0.1)
    after = roles.student(x(), 500).output.float()
    fresh = made(BF16, kind)
    fresh.load_tensors(roles.tensors())
    assert torch.equal(after, fresh.student(x(), 500).output.float())
    assert not torch.equal(after, before)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_sampling_in_inference_mode_first_leaves_a_student_that_learns(kind):
    roles = made(BF16 if kind == "lora" else torch.float32, kind)
    with torch.inference_mode():
        roles.student(x(), 500)
    fresh = made(BF16 if kind == "lora" else torch.float32, kind)
    assert all(torch.equal(a, b) for a, b in zip(answer(roles), answer(fresh), strict=True))


def test_a_copied_network_has_its_own_shadows():
    """And its version counter may reach the one at which the original's were made."""
    roles = made(BF16, "full")
    roles.student(x(), 500)
    target = roles.follow("target", "student", 0.5)
    ema = roles.follow("ema", "student", 0.5, in_steps=False)
    with torch.no_grad():
        for p in roles._tensors["target"].values():
            for _ in range(5):
                p.add_(0.1)
    plain = copy.deepcopy(target.network.network).bfloat16()
    drop_shadows(plain)
    assert off([target(x(), 500).output.float()], [plain(x().bfloat16(), None).float()]) < 0.02
    assert target.network.shadows and not ema.network.shadows
    assert torch.equal(ema(x(), 500).output, roles.student(x(), 500).output)


def test_a_shadow_is_refreshed_when_its_master_changes_and_not_else():
    master = nn.Parameter(torch.ones(3))
    shadow = Shadow(master, BF16)
    with Kernels() as kernels:
        first = shadow.get()
        shadow.get()
    assert kernels.count["_foreach_copy_"] == 1 and first.dtype == BF16
    with torch.no_grad():
        master.mul_(2)
    assert torch.equal(shadow.get().float(), master.detach())
    master.data.mul_(2)  # not counted: whoever does this says so, as the players after a fused update
    torch.autograd.graph.increment_version([master])
    assert torch.equal(shadow.get().float(), master.detach())
    master.data = torch.full((3,), 7.0)
    assert torch.equal(shadow.get().float(), master.detach())


def test_the_gradient_of_a_shadow_is_its_masters():
    layer = nn.Linear(4, 3)
    keep_shadows(layer, BF16)
    inputs = torch.randn(5, 4)
    with autocast("cpu", BF16):
        layer(inputs).float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert torch.allclose(layer.weight.grad, inputs.bfloat16().float().sum(0).expand(3, 4), atol=0.05)
    assert torch.equal(layer.bias.grad, torch.full((3,), 5.0))
    exact = layer(inputs)  # no autocast, float32: the masters
    assert torch.equal(exact, nn.functional.linear(inputs, layer.weight, layer.bias))
    assert [s.master is p for s, p in zip(shadows_of([layer]), layer.parameters(), strict=True)] == [True, True]


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_a_product_added_in_place_has_the_gradients_of_the_formula(shape):
    base, h, up = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((*shape, 4), (*shape, 2), (4, 2)))
    wanted = base + 1.5 * h @ up.T

    def function(base, h, up):
        return AddProduct.apply(base * 1, h, up, 1.5)

    assert torch.allclose(function(base, h, up), wanted)
    assert gradcheck(function, (base, h, up)) and gradgradcheck(function, (base, h, up))
    function(base, h, up).add_(1)  # whoever gets it may change it


def test_the_base_is_as_it_was_when_no_adapter_is_live():
    network = block(BF16)
    alone = network(x().bfloat16(), None)
    add_adapter(network, "one", rank=2)
    nn.init.ones_(network.out.lora_B["one"].weight)
    with live(["one"]):
        assert not torch.equal(network(x().bfloat16(), None), alone)
    assert torch.equal(network(x().bfloat16(), None), alone)


@pytest.mark.parametrize("name", ["sdxl", "flux", "qwen_image", "sana", "krea2", "z_image"])
def test_every_family_computes_without_autocast(name):
    """Teacher and student of a tiny pipeline in bf16: as near to float32 as they are with autocast."""
    from fewstep.models.families import as_teacher
    from tests.models import pipelines, pipelines_flow

    torch.manual_seed(0)
    pipeline = getattr(pipelines, name, None) or getattr(pipelines_flow, name)
    teacher = as_teacher(pipeline(), size=64)
    given = teacher.encode_prompts(["a red circle"])
    noise = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(1))

    def said(low, forced=False):
        denoiser = copy.copy(teacher.denoiser)
        denoiser.network = copy.deepcopy(teacher.denoiser.network)
        if low:
            denoiser.network.to(BF16)
        roles = Roles(denoiser, autocast=BF16 if low else None)
        roles.add("student", Weights("lora", 4), extra_inputs={"guidance_embed"})
        if forced:
            for view in roles.views().values():
                view.network.autocast = BF16
        with torch.no_grad():
            t, own = 0.5 * denoiser.schedule.start, {"guidance_embed": 3.0}
            views = (roles.teacher(noise, t, given), roles.student(noise, t, given, **own))
            return torch.stack([view.output.float() for view in views]), roles

    exact, _ = said(False)
    (found, roles), (before, _) = said(True), said(True, forced=True)
    assert roles.teacher.network.autocast is None
    assert isinstance(given, Cond)
    near, was = (float((each - exact).norm() / exact.norm()) for each in (found, before))
    assert near < 2 * was + 0.005 < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("model", ["stabilityai/stable-diffusion-xl-base-1.0", "black-forest-labs/FLUX.1-dev"])
def test_a_lora_costs_few_kernels_and_no_casts(model):
    found = measure(model)
    teacher, student = found["teacher"], found["student"]
    assert student["kernels"] <= 1.9 * teacher["kernels"]
    assert student["cast_gb"] <= 1.3 * teacher["cast_gb"]


@pytest.mark.slow
def test_full_weights_are_not_cast_in_a_forward():
    """2.57 billion weights would be read in four bytes and written in two: 15.4 GB; what remains are activations."""
    found = measure("stabilityai/stable-diffusion-xl-base-1.0", "full")
    assert found["student"]["cast_gb"] < 7.5


def test_refresh_copies_all_at_once():
    roles = made(BF16, "full")
    with Kernels() as kernels:
        refresh(roles.shadows())
        refresh(roles.shadows())
    assert kernels.count["_foreach_copy_"] == 1


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_forward_derivatives_are_those_of_float32_within_bf16(kind, graph):
    """By torch.func and by dual numbers; an adapter's sum in place and copies of weights know backwards alone."""
    networks = [block(torch.float32), block(torch.float32)]
    for network in networks:
        network.norm = nn.Tanh()  # PyTorch's own derivative of group norms fails under autocast
    low, exact = (made(torch.float32, kind, low, n) for low, n in zip((BF16, None), networks, strict=True))
    v, t = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(3)), torch.full((3,), 500.0)

    def tangents(roles):
        def call(x):
            return roles.student.network(x, t, None).float()

        yield torch.func.jvp(call, (x(),), (v,))[1]
        with forward_ad.dual_level():
            yield forward_ad.unpack_dual(call(forward_ad.make_dual(x(), v))).tangent

    with torch.set_grad_enabled(graph):
        found, wanted = list(tangents(low)), list(tangents(exact))
    torch.testing.assert_close(*wanted)
    assert off([t.detach() for t in found], [t.detach() for t in wanted]) < 0.02


def test_weights_that_stand_in_for_a_layers_own_are_computed_with():
    layer = nn.Linear(4, 3, bias=False)
    keep_shadows(layer, BF16)
    inputs, other = torch.randn(5, 4).bfloat16().float(), torch.randn(3, 4).bfloat16().float()

    def call(weight):
        return torch.func.functional_call(layer, {"weight": weight}, (inputs,)).float()

    with autocast("cpu", BF16):
        layer(inputs)
        found = call(other), torch.func.jvp(call, (layer.weight.detach(),), (other,))[1]
    for product in found:
        torch.testing.assert_close(product, inputs @ other.T, rtol=0.02, atol=0.02)


def test_a_hook_on_a_base_layer_keeps_what_that_layer_gave():
    """Where nobody looks, the adapter's part is added in the memory of the base layer's result."""
    roles, kept = made(BF16), []
    base = roles.base.out.base_layer
    hook = base.register_forward_hook(lambda layer, inputs, output: kept.append((inputs[0], output)))
    hooked = roles.student(x(), 500).output.detach()
    inputs, output = kept[0]
    hook.remove()
    assert torch.equal(output, base(inputs))
    assert off([hooked.float()], [roles.student(x(), 500).output.detach().float()]) < 0.02
