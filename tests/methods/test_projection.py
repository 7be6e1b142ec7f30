"""Heads that know the prompt: their norms, their rows, what they are condition, and R1 at their inputs."""

import pytest
import torch
from projection_reference import slopes_at_heads

from fewstep.methods.parts.discriminators import r1
from fewstep.methods.parts.projection import (
    LocalBatchNorm,
    ProjectionHead,
    SpectralConv,
    circular,
    projection_condition,
    projection_heads,
    projection_loss,
)
from fewstep.models.cond import Cond
from fewstep.models.helpers import Helpers


@pytest.mark.parametrize(("shape", "dims"), [((24, 24, 1), 1), ((64, 48, 9), 1), ((32, 32, 3), 2), ((1, 40, 1), 1)])
def test_kernels_are_divided_by_their_largest_singular_value(shape, dims):
    conv = SpectralConv(shape[1], shape[0], shape[2], dims)
    exact = torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2)
    assert 0.9 <= float(conv.largest().detach() / exact) <= 1 + 1e-6
    torch.nn.init.orthogonal_(conv.weight)
    assert float(conv.largest().detach()) == pytest.approx(1, rel=1e-5)
    with torch.no_grad():
        conv.weight.mul_(7)
    x = torch.randn(2, shape[1], *[5] * dims)
    before = conv(x)
    with torch.no_grad():
        conv.weight.mul_(0.01)
    torch.testing.assert_close(conv(x), before, rtol=1e-4, atol=1e-5)  # whatever the kernel's scale


def test_the_norm_is_the_same_at_every_call_and_its_slope_is_of_one_singular_pair():
    conv = SpectralConv(6, 5).double()
    assert torch.equal(conv.largest(), conv.largest())
    (slope,) = torch.autograd.grad(conv.largest(), conv.weight)
    values = torch.linalg.svdvals(slope[..., 0])
    assert values[0].item() == pytest.approx(1) and values[1] < 1e-12
    assert not [name for name, _ in conv.state_dict().items() if name != "weight"]


@pytest.mark.parametrize("length", [1, 2, 3, 9, 20])
def test_rows_are_closed_however_short(length):
    x = torch.arange(float(length)).reshape(1, 1, length)
    assert circular(x, 4)[0, 0].tolist() == [float(i % length) for i in range(-4, length + 4)]


@pytest.mark.parametrize(("rows", "group"), [(16, 8), (12, 4), (6, 2), (9, 3), (5, 5)])
def test_groups_have_mean_zero_and_variance_one(rows, group):
    x = 3 + 2 * torch.randn(rows, 4, 7, dtype=torch.float64)
    y = LocalBatchNorm(4).double()(x)
    for first in range(0, rows, group):
        part = y[first : first + group]
        assert part.mean(dim=(0, 2)).abs().max() < 1e-12
        assert (part.var(dim=(0, 2), correction=0) - 1).abs().max() < 1e-4
    if rows % 8 == 0:  # micro-batches of a group give what the batch gives
        halves = torch.cat([LocalBatchNorm(4).double()(half) for half in x.split(8)])
        torch.testing.assert_close(halves, y, rtol=1e-12, atol=1e-12)


def test_one_number_alone_cannot_be_normed():
    assert LocalBatchNorm(4)(torch.randn(1, 4, 9)).std() > 0.5
    with pytest.raises(ValueError, match=r"give training\.batch_size an even number"):
        LocalBatchNorm(4)(torch.randn(11, 4, 1))


@pytest.mark.parametrize("dims", [1, 2])
def test_a_map_head_looks_at_every_picture_by_itself_and_a_token_head_at_groups(dims):
    torch.manual_seed(0)
    head, x, condition = (
        ProjectionHead(6, 3, dims).double(),
        torch.randn(8, 6, 4, 4).double(),
        torch.randn(8, 3).double(),
    )
    changed = torch.cat([x[:1], torch.randn(7, 6, 4, 4).double()])
    same = torch.allclose(head(x, condition)[0], head(changed, condition)[0], rtol=1e-9)
    assert same == (dims == 2) and head(x, condition).shape == (8, 16)
    tokens = x.flatten(2)  # a square row of tokens is a map, and a map in rows is a row
    torch.testing.assert_close(head(tokens, condition), head(x, condition), rtol=1e-12, atol=1e-12)
    assert head(x[:, :, 0, 0], condition).shape == (8, 1)


def test_logits_are_linear_in_the_condition_and_need_none():
    head, x = ProjectionHead(6, 3).double(), torch.randn(4, 6, 9).double()
    a, b = torch.randn(2, 4, 3).double()
    zero = head(x, torch.zeros(4, 3).double())
    torch.testing.assert_close(head(x, a + b) - zero, head(x, a) + head(x, b) - 2 * zero)
    assert (head(x, a) - head(x, b)).abs().min() > 1e-4
    assert ProjectionHead(6, 0).double()(x).shape == (4, 9)


def test_what_heads_are_told_has_one_scale_and_zeros_stay():
    helpers = Helpers(pool=lambda cond: cond["text"], pooled_width=2)
    cond, other = Cond({"text": torch.tensor([[300.0, 400.0], [3e-3, 4e-3]])}), torch.tensor([[2.0], [0.0]]).double()
    condition = projection_condition(helpers, cond, other)
    root = 2**0.5
    wanted = torch.tensor([[0.6 * root, 0.8 * root, 1.0], [0.6 * root, 0.8 * root, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(condition, wanted, rtol=1e-6, atol=0)
    assert projection_condition(Helpers(), None) is None


@pytest.mark.parametrize("dims", [1, 2])
def test_r1_is_the_slope_at_the_heads_inputs_and_goes_no_further(dims):
    torch.manual_seed(0)
    heads = projection_heads({"a": 5, "b": 4}, 3, dims).double()
    with torch.no_grad():
        for p in heads.parameters():
            p.add_(0.1 * torch.randn_like(p))
    pictures, condition = torch.randn(6, 5, 4, 4).double().requires_grad_(), torch.randn(6, 3).double()
    features = [pictures.sin(), pictures[:, :4].cos()]
    shaped = {"a": features[0], "b": features[1]} if dims == 2 else {
        "a": features[0].flatten(2), "b": features[1].flatten(2)}  # fmt: skip
    wanted = slopes_at_heads(dict(heads.named_parameters()), shaped, condition)
    found = r1(lambda f: heads(f, condition), features)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
    assert torch.autograd.grad(found, pictures, allow_unused=True, retain_graph=True)[0] is None
    kernel = heads.heads["a"].middle[0].weight
    assert torch.autograd.grad(found, kernel)[0].abs().max() > 0
    loss = projection_loss(lambda f: heads(f, condition), features, features, "hinge", 0.5)
    assert loss.total.item() == pytest.approx((loss.parts["hinge"] + 0.5 * loss.parts["r1"]).item())
    assert loss.stats["d_accuracy"].item() == pytest.approx(0.5)
