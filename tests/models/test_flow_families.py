"""What every family of `tests.models.pipelines_flow` must do: features, checkpointing, extra inputs, batches, files."""

from __future__ import annotations

import copy

import pytest
import torch

from fewstep.models.cond import Cond
from fewstep.models.families import as_teacher
from fewstep.models.roles import Roles, Weights, enable_checkpointing
from tests.models.pipelines import PROMPTS, SIZE, build

NAMES = (
    "sana", "sana_sprint",
    "qwen_image",
    "z_image",
    "klein_base",
    "krea2",
    "chroma",
    "qwen_image21",
)  # fmt: skip


def asked(name):
    """(teacher, states, times, condition) of two prompts."""
    teacher = as_teacher(build(name), size=SIZE)
    x = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(1))
    return teacher, x, torch.tensor([0.8, 0.3]), teacher.encode_prompts(PROMPTS)


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_the_whole_forward(name):
    teacher, x, t, cond = asked(name)
    network, seen = teacher.denoiser.network, {}
    blocks = network._blocks()
    watch = lambda i: lambda module, args, output: seen.setdefault(i, []).append(output)  # noqa: E731
    handles = [block.register_forward_hook(watch(i)) for i, block in enumerate(blocks)]
    with torch.no_grad():
        network(x, t, cond)
        whole = dict(seen)
        seen.clear()
        features = network.features(x, t, cond, network.tap_channels)
    for handle in handles:
        handle.remove()
    numbers = [int(tap.removeprefix("block")) for tap in network.tap_channels]
    assert max(seen) == max(numbers) < len(blocks) - 1 and len(network._blocks()) == len(blocks)
    rows, columns = (side // network.patch_size for side in x.shape[-2:])
    for number, tap, channels in zip(numbers, features, network.tap_channels.values(), strict=True):
        assert tap.shape == (2, channels, rows, columns) and tap.std() > 0
        calls = [output[network.place] if isinstance(output, tuple) else output for output in whole[number]]
        tokens = torch.cat([network.image_tokens(output, rows * columns) for output in calls])
        maps = tokens.transpose(1, 2).unflatten(2, (rows, columns))
        assert torch.equal(tap, maps)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_no_output_and_no_gradient(name):
    teacher, x, t, cond = asked(name)
    network, found = copy.deepcopy(teacher.denoiser.network), []
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(network)
        state = x.clone().requires_grad_()
        output = network(state, t, cond)
        features = network.features(state, t, cond, [next(iter(network.tap_channels))])[0]
        (slope,) = torch.autograd.grad(output.square().mean() + features.square().mean(), state)
        found.append((output.detach(), slope))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_those_beside_it(name):
    """The shorter prompt alone, and with a longer one; guidance in one call and in two."""
    teacher, x, t, cond = asked(name)
    network = teacher.denoiser.network
    with torch.no_grad():
        both = network(x, t, cond)
        for row in range(2):
            alone = network(x[row : row + 1], t[row : row + 1], teacher.encode_prompts([PROMPTS[row]]))
            torch.testing.assert_close(both[row : row + 1], alone, rtol=1e-4, atol=1e-5)
        twice = network(torch.cat([x, x]), torch.cat([t, t]), Cond.cat([cond.null(), cond]))
        torch.testing.assert_close(twice[2:], both, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(twice[:2], network(x, t, cond.null()), rtol=1e-4, atol=1e-5)
    assert (twice[:2] - both).abs().mean() > 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_extra_inputs_start_at_zero_and_change_the_output(name):
    teacher, x, t, cond = asked(name)
    network = teacher.denoiser.network
    with torch.no_grad():
        bare, extra = network(x, t, cond), torch.zeros(2, network.extra_width)
        assert torch.equal(network(x, t, cond, extra=extra), bare)
        assert not torch.allclose(network(x, t, cond, extra=extra + 1), bare, atol=1e-5)
        assert torch.equal(network(x, t, cond), bare)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_student_is_its_teacher_to_the_bit_in_bf16_too(name):
    teacher, x, t, cond = asked(name)
    network = copy.deepcopy(teacher.denoiser.network).to(torch.bfloat16)
    roles = Roles(copy.copy(teacher).with_denoiser(network=network).denoiser, autocast=torch.bfloat16)
    roles.add("student", Weights(rank=2))
    with torch.no_grad():
        first, told = (view(x, t, cond).output for view in (roles.teacher, roles.student))
    assert torch.equal(first, told) and first.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_images_become_latents_and_images_again(name):
    """The autoencoder's own: its latents, normalised and back, decode as it decodes them itself."""
    teacher = as_teacher(build(name), size=SIZE)
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2)) * 2 - 1
    mean, std = teacher.encode_images(images)
    assert mean.shape == std.shape == (2, *teacher.latent_shape) and (std >= 0).all()
    family, vae = teacher.family, teacher.pipeline.vae
    with torch.no_grad():
        encoded = vae.encode(family.to_encoder(images))
        own = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
        wanted = family.from_decoder(vae.decode(own, return_dict=False)[0])
    torch.testing.assert_close(family.decode(mean), wanted, rtol=1e-4, atol=1e-4)
