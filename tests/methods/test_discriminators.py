"""Discriminator parts against closed forms: two Gaussians, a linear head, autograd."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import ndtri
from torch import nn

from fewstep.diffusion.schedule import Schedule
from fewstep.methods.parts.discriminators import (
    Discriminator,
    discriminator_loss,
    generator_loss,
    r1,
)
from fewstep.methods.parts.heads import ConvHead, Heads, ResidualHead
from fewstep.methods.parts.projection import ProjectionHead
from fewstep.models.denoiser import Denoiser
from fewstep.models.mlp import MLP
from fewstep.models.roles import Roles
from tests.sampling.conftest import toy

VP = Schedule.scaled_linear()
REAL, FAKE = (1.0, 0.6), (-0.2, 0.9)  # mean and standard deviation, noised or not
AXIS = torch.linspace(-9, 9, 200_001, dtype=torch.float64)


def log_density(x, of):
    return -0.5 * ((x - of[0]) / of[1]) ** 2 - math.log(of[1]) - 0.5 * math.log(2 * math.pi)


def ratio(x):
    return log_density(x, REAL) - log_density(x, FAKE)


def quantiles(of, n=20_000):
    return torch.from_numpy(of[0] + of[1] * ndtri((np.arange(n) + 0.5) / n))


def integral(values):
    return torch.trapezoid(values, AXIS).item()


def divergences():
    """Total variation and Jensen-Shannon divergence of the two, by quadrature."""
    p, q = log_density(AXIS, REAL).exp(), log_density(AXIS, FAKE).exp()
    middle = (0.5 * (p + q)).log()
    js = 0.5 * integral(p * (p.log() - middle) + q * (q.log() - middle))
    return 0.5 * integral((p - q).abs()), js


@pytest.mark.parametrize("kind", ["logistic", "hinge"])
def test_a_logit_above_zero_means_real(kind):
    for real, fake, low in (([3.0], [-3.0], True), ([-3.0], [3.0], False)):
        loss = discriminator_loss([torch.tensor([real])], [torch.tensor([fake])], kind).item()
        assert (loss < 0.5) == low
    pleased, displeased = (generator_loss([torch.tensor([[x]])], kind) for x in (3.0, -3.0))
    assert pleased < displeased


def test_losses_at_a_few_logits():
    real, fake = [torch.tensor([[0.5, 2.0]])], [torch.tensor([[-0.5, 1.0]])]
    assert discriminator_loss(real, fake).item() == pytest.approx((0.5 + 0) / 2 + (0.5 + 2) / 2)
    assert generator_loss(fake).item() == pytest.approx(-0.25)
    log = math.log
    logistic = (log(1 + math.exp(-0.5)) + log(1 + math.exp(-2)) + log(1 + math.exp(-0.5)) + log(1 + math.e)) / 2
    assert discriminator_loss(real, fake, "logistic").item() == pytest.approx(logistic)
    saturating_not = (log(1 + math.exp(0.5)) + log(1 + math.exp(-1))) / 2
    assert generator_loss(fake, "logistic").item() == pytest.approx(saturating_not)


@pytest.mark.parametrize("kind", ["logistic", "hinge"])
def test_every_head_counts_alike_however_large_its_map(kind):
    real, fake = ([torch.randn(3, 64), torch.randn(3, 1)] for _ in range(2))
    each = [discriminator_loss([r], [f], kind) for r, f in zip(real, fake, strict=True)]
    torch.testing.assert_close(discriminator_loss(real, fake, kind), sum(each) / 2)
    torch.testing.assert_close(generator_loss(fake, kind), sum(generator_loss([f], kind) for f in fake) / 2)


def test_the_best_logistic_discriminator_is_the_log_ratio():
    """Fitted on exact quadratic features, where it is convex; loss 2 log 2 - 2 JS."""
    real, fake = quantiles(REAL), quantiles(FAKE)
    weights = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def logit(x):
        return torch.stack([torch.ones_like(x), x, x * x], dim=1) @ weights

    optimizer = torch.optim.LBFGS([weights], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = discriminator_loss([logit(real)[:, None]], [logit(fake)[:, None]], "logistic")
        loss.backward()
        return loss

    optimizer.step(closure)
    x = torch.linspace(-2, 2.5, 19, dtype=torch.float64)
    torch.testing.assert_close(logit(x), ratio(x), rtol=0, atol=5e-3)
    assert closure().item() == pytest.approx(2 * math.log(2) - 2 * divergences()[1], abs=1e-4)


def test_the_best_hinge_discriminator_is_the_sign():
    real, fake = quantiles(REAL), quantiles(FAKE)

    def loss(logit):
        return discriminator_loss([logit(real)[:, None]], [logit(fake)[:, None]]).item()

    assert loss(lambda x: ratio(x).sign()) == pytest.approx(2 * (1 - divergences()[0]), abs=1e-4)
    for scale in (0.5, 2.0, 10.0):
        assert loss(lambda x, scale=scale: scale * ratio(x)) > loss(lambda x: ratio(x).sign())
    assert loss(lambda x: 0.7 * torch.ones_like(x)) == pytest.approx(2)  # nothing told apart


def test_generators_slopes_at_the_best_discriminator():
    """-D: the difference of scores, reverse KL; softplus(-D): that times q / (p + q)."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    scores = (x - REAL[0]) / REAL[1] ** 2 - (x - FAKE[0]) / FAKE[1] ** 2  # s_q - s_p
    share = 1 / (1 + ratio(x).exp())
    for kind, wanted in (("hinge", scores), ("logistic", scores * share)):
        (slope,) = torch.autograd.grad(generator_loss([ratio(x)[:, None]], kind) * len(x), x)
        torch.testing.assert_close(slope, wanted.detach(), rtol=1e-10, atol=1e-12)


class Linear(nn.Module):
    """Two linear heads: sums over channels, by position."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(5).double()), nn.Parameter(torch.randn(3).double())

    def forward(self, features):
        maps = [f.flatten(2) for f in features]
        return [torch.einsum("c,bcp->bp", w, f) for w, f in zip((self.first, self.second), maps, strict=True)]


def test_r1_of_linear_heads_is_the_square_of_their_weights():
    """|w|^2 at each position of each map, whatever the features; its slope is 2 w a position."""
    torch.manual_seed(0)
    heads, features = Linear(), [torch.randn(4, 5, 2, 3).double(), torch.randn(4, 3, 1, 1).double()]
    value = r1(heads, features)
    wanted = (6 * heads.first.square().sum() + heads.second.square().sum()) / 2
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=0)
    value.backward()
    torch.testing.assert_close(heads.first.grad, 6 * heads.first.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(heads.second.grad, heads.second.detach(), rtol=1e-12, atol=0)


def test_r1_stops_at_the_heads_inputs_and_is_their_slope():
    torch.manual_seed(0)
    heads = Heads({"a": 6}).double()
    x = torch.randn(3, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    value = r1(heads, [2 * x])
    feature, step, slope = (2 * x).detach(), 1e-6, torch.zeros(3, 24, dtype=torch.float64)
    for i in range(24):  # by central differences
        nudge = torch.zeros(24, dtype=torch.float64)
        nudge[i] = step
        up, down = (heads([feature + sign * nudge.reshape(6, 2, 2)])[0].sum(dim=1) for sign in (1, -1))
        slope[:, i] = (up - down).detach() / (2 * step)
    assert value.item() == pytest.approx(slope.square().sum(dim=1).mean().item(), rel=1e-6)
    value.backward()
    assert x.grad is None and all(p.grad is not None for p in heads.parameters() if p.ndim > 1)


@pytest.mark.parametrize("channels", [1, 3, 10, 64, 88, 320, 1280])
def test_a_head_has_one_logit_a_position_and_treats_samples_apart(channels):
    torch.manual_seed(0)
    head, features = ResidualHead(channels), torch.randn(3, channels, 2, 2)
    logits = head(features)
    assert logits.shape == (3, 4)
    torch.testing.assert_close(head(features[1:2]), logits[1:2])
    assert head(features[:, :, 0, 0]).shape == (3, 1)
    norm = head.inlet[1]
    assert norm.num_groups == (32 if channels >= 320 else norm.num_groups) and norm.num_channels >= 4 * norm.num_groups


@pytest.mark.parametrize(
    ("size", "halvings", "logits"),
    [((8, 8), 1, 1), ((32, 32), 3, 1), ((4, 4), 0, 1), ((8, 8), 0, 4), ((6, 5), 0, 4), ((2, 2), 1, 1), ((), 0, 1)],
)
def test_a_conv_head_leads_down_to_one_logit_and_treats_samples_apart(size, halvings, logits):
    """The middle of SD1.5 at 512 pixels is 8x8, SDXL's at 1024 is 32x32 (spec: DMD2's head)."""
    torch.manual_seed(0)
    head, features = ConvHead(16, halvings), torch.randn(3, 16, *size)
    said = head(features)
    assert said.shape == (3, logits)
    torch.testing.assert_close(head(features[1:2]), said[1:2])
    assert [m.kernel_size for m in head.modules() if isinstance(m, nn.Conv2d)] == [(4, 4)] * (halvings + 1) + [(1, 1)]


CONV = partial(ConvHead, halvings=3)
TOKENS, MAPS = (partial(ProjectionHead, condition_width=8, dims=dims) for dims in (1, 2))


@pytest.mark.parametrize("head", [ResidualHead, CONV, TOKENS, MAPS])
def test_a_head_on_wide_features_has_512_channels_inside(head):
    """UNets have at most 1280 channels, and their heads are as published; transformers have up to 3,072."""

    def weights(channels):
        with torch.device("meta"):
            return sum(p.numel() for p in head(channels).parameters() if p.ndim > 2)

    inlet = 0 if head is CONV else 512
    for wide in (1536, 3072):
        assert weights(wide) == weights(512) + 512 * (wide - inlet)
    assert weights(1280) > 3 * weights(1536) / 2


def test_a_conv_head_sees_every_place():
    torch.manual_seed(0)
    features = torch.randn(1, 16, 8, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(ConvHead(16, 1)(features).sum(), features)
    assert (slope.abs().amin(dim=1) > 0).all()


def duel(taps=None, loss="hinge", **head):
    torch.manual_seed(0)
    roles = Roles(Denoiser(MLP(VP, 2, width=16, depth=3).double(), VP))
    game = Discriminator(loss, taps=taps, **head)
    roles.add_heads(game.name, game.spec().build)
    return roles, game


def test_the_picture_gets_a_gradient_through_the_frozen_teacher_and_the_teacher_none():
    roles, game = duel(("block2", "block0"))
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    features = game.features(roles, x, 500, None)
    assert [f.shape for f in features] == [(4, 16), (4, 16)]
    loss = generator_loss(game.logits(roles, features))
    (slope,) = torch.autograd.grad(loss, x)
    nudge, step = torch.randn(4, 2, dtype=torch.float64), 1e-6
    with torch.no_grad():
        ends = [
            generator_loss(game.logits(roles, game.features(roles, x + s * nudge, 500, None))) for s in (step, -step)
        ]
    assert ((ends[0] - ends[1]) / (2 * step)).item() == pytest.approx((slope * nudge).sum().item(), rel=1e-6)
    assert all(p.grad is None and not p.requires_grad for p in roles.base.parameters())


def test_taps_are_all_or_those_asked_for():
    assert duel()[0].heads["discriminator"].taps == ("block0", "block1", "block2")
    assert duel(("block1",))[0].heads["discriminator"].taps == ("block1",)
    (head,) = duel(("block1",), head="conv", halvings=2)[0].heads["discriminator"].heads.values()
    assert isinstance(head, ConvHead) and len(head.halve) == 2
    with pytest.raises(ValueError, match="cannot look at 'mid': this network has block0, block1, block2"):
        duel(("mid",))


def test_heads_compute_in_their_own_precision():
    heads = Heads({"a": 8})
    (logits,) = heads([torch.randn(2, 8, dtype=torch.bfloat16)])
    assert logits.dtype == torch.float32


def test_a_network_without_features_is_refused():
    with pytest.raises(ValueError, match=r"function offers no features \(tap_channels\)"):
        Roles(Denoiser(toy, VP)).add_heads("discriminator", Heads)


def test_heads_are_built_for_the_network_of_their_own_backbone_and_for_its_last_tap_alone():
    roles = Roles(Denoiser(MLP(VP, 2, width=8, depth=2), VP))
    roles.add_network("fake", MLP(VP, 2, width=16, depth=3), "sample")
    game = Discriminator(backbone="fake", taps="last")
    spec = game.spec()
    heads = roles.add_heads(spec.name, spec.build, spec.backbone)
    assert heads.taps == ("block2",) and next(heads.parameters()).shape[1] == 16
    assert game.logits(roles, game.features(roles, torch.ones(3, 2), 500, None))[0].shape == (3, 1)
    assert roles.fake.cost.calls == 1 and roles.teacher.cost.calls == 0


def test_softplus_is_not_saturating():
    """A generator far behind still learns: slope 1 where the saturating loss has none."""
    x = torch.tensor([[-30.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(generator_loss([x], "logistic"), x)
    assert slope.item() == pytest.approx(-1) and F.softplus(x).item() < 1e-12
