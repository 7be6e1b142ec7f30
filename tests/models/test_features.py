"""Features of networks: the right activations, no more work than needed, gradients to the picture alone."""

import pytest
import torch
from torch import nn

from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.parts.heads import Heads
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser, edm_precondition
from fewstep.models.families import UNetNetwork
from fewstep.models.mlp import MLP
from fewstep.models.roles import Roles, Weights
from fewstep.scenes64 import architecture as scenes64

VP = Schedule.scaled_linear()
TAPS = ("down0", "down1", "mid")


def unet():
    torch.manual_seed(0)
    network = scenes64.build_unet(channels=(48, 56), text_width=16).double()
    with torch.no_grad():  # it starts as the identity: wake every layer
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return UNetNetwork(network)


def inputs(n=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *scenes64.LATENT_SHAPE, generator=generator, dtype=torch.float64)
    return x, Cond({"prompt_embeds": torch.randn(n, 5, 16, generator=generator, dtype=torch.float64)})


def by_hand(network, x, t, cond):
    """The UNet's first half, block after block."""
    unet, text = network.unet, cond["prompt_embeds"]
    time = unet.time_embedding(unet.time_proj(t).to(x.dtype))
    h, found = unet.conv_in(x), []
    for block in unet.down_blocks:
        h, _ = block(h, time, encoder_hidden_states=text)
        found.append(h)
    return [*found, unet.mid_block(h, time, encoder_hidden_states=text)]


def test_a_unets_features_are_its_blocks_outputs():
    network, (x, cond) = unet(), inputs()
    features = Denoiser(network, VP).features(x, 500, cond, TAPS)
    for mine, wanted in zip(features, by_hand(network, x, torch.full((2,), 500), cond), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)
    assert [f.shape[1] for f in features] == [network.tap_channels[tap] for tap in TAPS] == [48, 56, 56]
    swapped = Denoiser(network, VP).features(x, 500, cond, ("mid", "down0"))
    assert torch.equal(swapped[0], features[2]) and torch.equal(swapped[1], features[0])


@pytest.mark.parametrize(("taps", "entered"), [(TAPS, (True, True, True)), (("down0",), (True, False, False))])
def test_nothing_after_the_last_tap_is_run(taps, entered):
    network, (x, cond) = unet(), inputs()
    blocks = [*network.unet.down_blocks, network.unet.mid_block, *network.unet.up_blocks]
    seen = []
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, i=i: seen.append(i))
    network.features(x, torch.full((2,), 500), cond, taps)
    assert seen == [i for i, there in enumerate(entered) if there]
    assert not any(block._forward_hooks for block in blocks)


def test_watching_ends_when_the_network_fails():
    network, (x, _) = unet(), inputs()
    with pytest.raises(ValueError, match="needs a text condition"):
        network.features(x, torch.full((2,), 500), None, TAPS)
    assert not any(block._forward_hooks for block in network.unet.down_blocks)


def test_features_are_those_of_the_role_that_is_asked():
    x, cond = inputs()
    network = unet()
    bare = [f.detach() for f in network.features(x, torch.full((2,), 500), cond, TAPS)]
    roles = Roles(Denoiser(network, VP))
    roles.add("student", Weights(rank=2))
    with torch.no_grad():
        for p in roles.parameters("student"):
            p.add_(0.1 * torch.randn_like(p))
    student = roles.student.features(x, 500, cond, TAPS)
    for mine, wanted, others in zip(roles.teacher.features(x, 500, cond, TAPS), bare, student, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(others, wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_reaches_the_student_through_the_frozen_teacher(checkpointing):
    """One base carries both: the student's LoRA live in one call, no adapter in the next, recomputed or not."""
    (x, cond), network = inputs(), unet()
    roles = Roles(Denoiser(network, VP, "sample"), gradient_checkpointing=checkpointing)
    roles.add("student", Weights(rank=2))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in roles.parameters("student"):
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    parameters = roles.parameters("student")

    def loss():
        answer = roles.student(x, 900, cond).x0
        return sum(f.square().mean() for f in roles.teacher.features(answer, 300, cond, TAPS))

    gradients = torch.autograd.grad(loss(), parameters)
    nudges = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    ends, step = [], 1e-6
    for sign in (1, -1):
        with torch.no_grad():
            for p, n in zip(parameters, nudges, strict=True):
                p.add_(sign * step * n)
            ends.append(loss().item())
            for p, n in zip(parameters, nudges, strict=True):
                p.sub_(sign * step * n)
    slope = sum((g * n).sum().item() for g, n in zip(gradients, nudges, strict=True))
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)
    assert all(p.grad is None for p in network.parameters())


def test_features_count_half_and_their_graph_as_any():
    denoiser, (x, cond) = Denoiser(unet().requires_grad_(False), VP), inputs()
    denoiser.features(x, 500, cond, TAPS)
    assert (denoiser.cost.calls, denoiser.cost.evaluations, denoiser.cost.graph_evaluations) == (1, 1.0, 0)
    denoiser.features(x[:1].requires_grad_(), 500, cond[:1], TAPS)
    assert (denoiser.cost.calls, denoiser.cost.evaluations, denoiser.cost.graph_evaluations) == (2, 1.5, 0.5)
    assert denoiser.cost.forward_equivalents == 2.5


def test_an_mlps_features_are_its_blocks_outputs():
    torch.manual_seed(0)
    network = MLP(VP, 2, width=16, depth=3).double()
    outputs = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    x = torch.randn(4, 2, dtype=torch.float64)
    Denoiser(network, VP)(x, 300)
    features = Denoiser(network, VP).features(x, 300, None, ("block2", "block0"))
    assert torch.equal(features[0], outputs[2]) and torch.equal(features[1], outputs[0])
    assert network.tap_channels == {"block0": 16, "block1": 16, "block2": 16}


def test_a_mixtures_features_are_what_it_knows():
    ring = GaussianMixture.ring(5, 1.0, 0.3, num_classes=2)
    denoiser = Denoiser(ring.network(VP, "v_prediction"), VP, "v_prediction")
    x, cond = torch.randn(6, 2, dtype=torch.float64, requires_grad=True), Cond({"label": torch.arange(6) % 2})
    (features,) = denoiser.features(x, 400, cond, ("posterior",))
    said = denoiser(x, 400, cond)
    torch.testing.assert_close(features[:, :2], said.x0)
    torch.testing.assert_close(features[:, 2:4], said.epsilon)
    torch.testing.assert_close(features[:, 4:].sum(dim=1), torch.ones(6, dtype=torch.float64))
    assert features.shape[1] == denoiser.network.tap_channels["posterior"] and features.requires_grad


def test_a_preconditioned_networks_features_are_the_raw_ones_at_its_own_inputs():
    torch.manual_seed(0)
    edm, raw = Schedule.edm(), Raw().double()
    x = torch.randn(3, 4, dtype=torch.float64)
    network = edm_precondition(raw, sigma_data=0.5)
    assert network.tap_channels == {"only": 4}
    (features,) = Denoiser(network, edm, "sample").features(x, 3.0, None, ("only",))
    torch.testing.assert_close(features, x / (9 + 0.25) ** 0.5 + torch.tensor(3.0).double().log() / 4)


class Raw(nn.Module):
    tap_channels = {"only": 4}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def features(self, x, t, cond, taps):
        return [self.weight * x + t[:, None]]


@pytest.mark.parametrize("network", [unet(), MLP(VP, 2, width=16).double()])
def test_unknown_taps_are_one_sentence(network):
    x, cond = inputs()
    with pytest.raises(ValueError, match="This network has no tap 'up0': it has"):
        network.features(x, torch.full((2,), 500), cond, ("up0",))


# ------------------------------------------------------------------ heads among the roles


def heads_on(roles, name="discriminator"):
    return roles.add_heads(name, Heads)


def test_heads_are_trained_saved_and_restored_like_a_role():
    def build(seed):
        torch.manual_seed(0)
        roles = Roles(Denoiser(MLP(VP, 2, width=16), VP), seed=seed)
        heads_on(roles)
        return roles

    first, same, other = build(3), build(3), build(4)
    names = {f"discriminator/{k}" for k in dict(first.heads["discriminator"].named_parameters())}
    assert first.tensors().keys() == names and len(first.parameters("discriminator")) == len(names)
    assert all(torch.equal(a, b) for a, b in zip(first.tensors().values(), same.tensors().values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.tensors().values(), other.tensors().values(), strict=True))
    other.load_tensors({k: t.detach().clone() for k, t in first.tensors().items()})
    x = [torch.randn(3, 16)] * 3
    for a, b in zip(first.heads["discriminator"](x), other.heads["discriminator"](x), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="already is a role 'discriminator'"):
        heads_on(first)


def test_heads_stay_in_float32_over_a_half_precision_base():
    roles = Roles(Denoiser(MLP(VP, 2, width=16).to(torch.bfloat16), VP))
    assert {p.dtype for p in heads_on(roles).parameters()} == {torch.float32}
