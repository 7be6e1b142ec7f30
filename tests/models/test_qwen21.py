"""What is Qwen-Image-2.1's own: texts of one length in a call, levels of its own, images with alpha, sizes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fewstep.models.families import as_teacher, find_family
from fewstep.models.families.qwen21 import Qwen21Network
from fewstep.models.meta_pipeline import allocate
from fewstep.models.roles import enable_checkpointing
from fewstep.planning.estimate import fill
from tests.models.pipelines import SIZE, build
from tests.models.pipelines_flow import TURBO21

PROMPTS = ["a red circle", "a blue circle", "a blue square on grass"]


@pytest.fixture(scope="module")
def teacher():
    return as_teacher(build("qwen_image21"), size=SIZE)


@torch.no_grad()
def test_neighbours_with_texts_of_one_length_are_called_together_and_others_apart(teacher, monkeypatch):
    """Padded to one length, as its pipeline pads them, the shorter ones would be other images."""
    cond, calls = teacher.encode_prompts(PROMPTS), []
    x = torch.randn(3, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    base = teacher.family.base
    handle = base.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(tuple(kwargs["encoder_hidden_states"].shape[:2])), with_kwargs=True
    )
    both = teacher.denoiser(x, 0.7, cond).output
    assert cond["prompt_length"].tolist() == [11, 11, 13] and calls == [(2, 11), (1, 13)]
    calls.clear()
    monkeypatch.setattr("fewstep.models.families.qwen21.is_spread", lambda network: True)
    alone = teacher.denoiser(x, 0.7, cond).output
    handle.remove()
    assert calls == [(1, 11), (1, 11), (1, 13)]
    torch.testing.assert_close(alone, both, rtol=1e-5, atol=1e-6)
    slots = torch.zeros(3, 13 + 4, dtype=torch.bool)
    slots[:, 13:] = True
    padded = base(
        hidden_states=x.flatten(2).transpose(1, 2), timestep=torch.full((3,), 0.7), img_shapes=[[(1, 4, 4)]] * 3,
        encoder_hidden_states=cond["prompt_embeds"], img_mask=slots, return_dict=False,
        encoder_hidden_states_mask=torch.arange(13) < cond["prompt_length"][:, None],
    )[0][:, -16:].transpose(1, 2).unflatten(2, (4, 4))  # fmt: skip
    off = (padded - both).abs().amax(dim=(1, 2, 3))
    assert off[2] <= 1e-5 and min(off[:2]) > 1e-4


@torch.no_grad()
def test_extra_inputs_are_added_to_the_images_time_and_not_to_the_texts(teacher):
    """The text is modulated at t = 0, the last row that the time embedder sees."""
    cond, x, seen = teacher.encode_prompts(PROMPTS[:2]), torch.zeros(2, *teacher.latent_shape), []
    network = teacher.denoiser.network
    handle = network.time_embedder.linear_1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for extra in (None, torch.ones(2, network.extra_width)):
        network(x, torch.tensor([0.7, 0.4]), cond, extra=extra)
    handle.remove()
    torch.testing.assert_close(seen[1][:2], seen[0][:2] + 1)
    assert torch.equal(seen[1][2], seen[0][2])


def test_turbo_is_sampled_at_its_own_levels_and_its_students_at_theirs(teacher):
    assert teacher.family.own_sigmas() is None and teacher.guidance_scale == 1.0
    pipeline = type(teacher.pipeline)(**teacher.pipeline.components, sample_sigmas=list(TURBO21))
    family = find_family(pipeline, SIZE)
    assert family.own_sigmas() == TURBO21
    family.forget_sampling()
    assert pipeline.config.sample_sigmas is None and family.own_sigmas() is None


@torch.no_grad()
def test_images_are_encoded_opaque(teacher):
    images = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, _ = teacher.encode_images(images)
    vae, config = teacher.pipeline.vae, teacher.pipeline.vae.config
    own = vae.encode(torch.cat([images, torch.ones(1, 1, SIZE, SIZE)], dim=1)[:, :, None]).latent_dist.mean[:, :, 0]
    for channel, (middle, spread) in enumerate(zip(config.latents_mean, config.latents_std, strict=True)):
        torch.testing.assert_close(mean[:, channel], (own[:, channel] - middle) / spread)
    assert teacher.decode(mean).shape == (1, 3, SIZE, SIZE)


def test_sides_are_multiples_of_thirty_two_pixels(teacher):
    assert teacher.multiple == 32
    with pytest.raises(ValueError, match="must be a multiple of 32 pixels"):
        as_teacher(build("qwen_image21"), size=48)
    with pytest.raises(ValueError, match="must be multiples of 32 pixels"):
        teacher.family.at(64, 80)
    assert teacher.family.at(64, 96).latent_shape == (4, 4, 6)


def test_a_step_is_rehearsed_on_the_meta_device(teacher):
    """Forward and backward, with checkpointing, for texts of two lengths; then with memory, as a trial has it."""
    with torch.device("meta"):
        network = Qwen21Network(type(teacher.family.base).from_config(teacher.family.base.config))
    enable_checkpointing(network)
    cond, x = teacher.encode_prompts(PROMPTS), torch.ones(3, *teacher.latent_shape)
    found = network(x.to("meta"), torch.ones(3, device="meta"), cond.to("meta"))
    found.sum().backward()
    assert found.shape == x.shape and all(p.grad is not None for p in network.parameters() if p.ndim == 2)
    network.zero_grad()
    fill(allocate(network, "cpu"))
    assert network(x, torch.ones(3), cond).isfinite().all()


def test_a_network_alone_is_planned_with_its_usual_sizes(teacher):
    base = SimpleNamespace(config=SimpleNamespace(**{**teacher.family.base.config, "in_channels": 64}))
    family = type(teacher.family)(SimpleNamespace(transformer=base))
    assert (family.latent_shape, family.down, family.tokens) == ((64, 64, 64), 16, 4096)
