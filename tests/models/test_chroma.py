"""Chroma's three faults in diffusers, each of them shown there and worked around here."""

from __future__ import annotations

import copy

import pytest
import torch

from fewstep.models.families import as_teacher
from fewstep.models.families.chroma import ChromaNetwork
from fewstep.models.families.network import TransformerNetwork
from fewstep.models.families.packed import pack, places, unpack
from fewstep.models.roles import enable_checkpointing
from tests.models.pipelines import PROMPTS, SIZE, build


@pytest.fixture(scope="module")
def asked():
    """(network, states, times, condition)."""
    teacher = as_teacher(build("chroma"), size=SIZE)
    x = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(1))
    return copy.deepcopy(teacher.denoiser.network), x, torch.tensor([0.8, 0.3]), teacher.encode_prompts(PROMPTS)


def plainly(network, x, t, cond, mask):
    """diffusers' network without our work around its faults."""
    height, width = (side // 2 for side in x.shape[-2:])
    output = network.transformer(
        hidden_states=pack(x), timestep=t, encoder_hidden_states=cond["prompt_embeds"], attention_mask=mask,
        txt_ids=torch.zeros(512, 3), img_ids=places(height, width, x), return_dict=False,
    )[0]  # fmt: skip
    return unpack(output, height, width)


def test_the_mask_is_added_to_the_scores_and_padding_takes_part(asked):
    network, x, t, cond = asked
    bias, tokens = cond["prompt_bias"], x[0, 0].numel() // 4
    assert bias.sum(1).tolist() == [n + 1 for n in (4, 6)] and set(bias.unique().tolist()) == {0.0, 1.0}
    mask = torch.cat([bias, torch.ones(2, tokens)], dim=1)
    with torch.no_grad():
        output = network(x, t, cond)
        assert torch.equal(output, plainly(network, x, t, cond, mask))
        assert (output - plainly(network, x, t, cond, mask.bool())).abs().max() > 0.01  # another network
    padded = copy.copy(cond)
    padded.tensors = {**cond.tensors, "prompt_embeds": cond["prompt_embeds"] * bias[..., None]}
    with torch.no_grad():
        assert (output - network(x, t, padded)).abs().max() > 1e-4  # so caches keep the padding


def test_checkpointing_in_diffusers_drops_the_mask_and_here_it_does_not(asked):
    network, x, t, cond = asked
    network, mask = copy.deepcopy(network), torch.cat([cond["prompt_bias"], torch.ones(2, x[0, 0].numel() // 4)], dim=1)
    found = {}
    for name, ask in {"ours": network, "theirs": lambda x, t, cond: plainly(network, x, t, cond, mask)}.items():
        for checkpointing in (False, True):
            network.transformer.gradient_checkpointing = checkpointing
            if checkpointing:
                enable_checkpointing(network)
            state = x.clone().requires_grad_()
            output = ask(state, t, cond)
            (slope,) = torch.autograd.grad(output.square().mean(), state)
            found[name, checkpointing] = (output.detach(), slope)
    assert torch.equal(found["ours", True][0], found["ours", False][0])
    torch.testing.assert_close(found["ours", True][1], found["ours", False][1], rtol=1e-5, atol=1e-7)
    assert (found["theirs", True][0] - found["theirs", False][0]).abs().max() > 1e-3  # else nothing is left to do


def test_a_mask_that_diffusers_hands_over_is_left_alone(asked):
    network, *_ = asked
    network, block = copy.deepcopy(network), None
    block, calls = network.transformer.single_transformer_blocks[0], []
    network.transformer._gradient_checkpointing_func = lambda block, *args: calls.append(args)
    with network._checkpointing("mask"):
        network.transformer._gradient_checkpointing_func(block, 1, 2, 3)
        network.transformer._gradient_checkpointing_func(block, 1, 2, 3, 4)
        network.transformer._gradient_checkpointing_func(network.transformer.transformer_blocks[0], 1, 2, 3)
    assert calls == [(1, 2, 3, "mask"), (1, 2, 3, 4), (1, 2, 3)]


@torch.no_grad()
def test_features_of_any_block_are_those_of_the_whole_forward(asked, monkeypatch):
    network, x, t, cond = asked
    blocks, seen = network._blocks(), {}
    monkeypatch.setattr(ChromaNetwork, "tap_channels", {f"block{i}": 32 for i in range(4)})
    handles = [b.register_forward_hook(lambda m, a, o, i=i: seen.update({i: o})) for i, b in enumerate(blocks)]
    network(x, t, cond)
    whole = dict(seen)
    height, width = (side // 2 for side in x.shape[-2:])
    for last in range(4):
        seen.clear()
        (found,) = network.features(x, t, cond, [f"block{last}"])
        states = whole[last][1] if isinstance(whole[last], tuple) else whole[last][:, 512:]
        assert torch.equal(found, states.transpose(1, 2).unflatten(2, (height, width))) and max(seen) == last
    monkeypatch.setattr(ChromaNetwork, "_cut", TransformerNetwork._cut)  # shortened, as other networks are
    (found,) = network.features(x, t, cond, ["block0"])
    for handle in handles:
        handle.remove()
    assert (found - whole[0][1].transpose(1, 2).unflatten(2, (height, width))).abs().max() > 0.01
