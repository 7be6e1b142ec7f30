"""What losses look through, of the shipped teacher: pictures with a graph, pooled prompts, encoders."""

import pytest
import torch

from fewstep.methods.turbo import Turbo
from fewstep.models.cond import Cond
from fewstep.models.encoders import load_encoder
from fewstep.models.families import load_teacher
from fewstep.models.helpers import Helpers, PointEncoder, one_hot_labels, pooled_prompt
from fewstep.models.meta_pipeline import outline
from fewstep.planning.estimate import estimate
from fewstep.recipe.load import load_recipe

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("scenes-64")


def test_pictures_are_what_the_autoencoder_makes_of_unscaled_latents(teacher):
    latents = 2 * torch.randn(2, *teacher.latent_shape)
    pictures = teacher.helpers().decode(latents)
    factor, shift = teacher.family.latent_scale
    wanted = teacher.pipeline.vae.decode(latents / factor + shift).sample
    torch.testing.assert_close(pictures, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((pictures / 2 + 0.5).clamp(0, 1), teacher.decode(latents), rtol=1e-5, atol=1e-5)
    assert pictures.abs().max() > 1  # not clamped
    assert teacher.helpers().decode(latents.double()).dtype == torch.float64


def test_gradients_reach_the_latents_and_not_the_decoder_checkpointed_or_not(teacher):
    latents, slopes = torch.randn(2, *teacher.latent_shape), []
    for checkpointing in (False, True):
        leaf = latents.clone().requires_grad_()
        pictures = teacher.helpers("scenes-64", checkpointing).decode(leaf)
        slopes.append(torch.autograd.grad(pictures.square().mean(), leaf)[0])
        assert not teacher.helpers("", checkpointing).decode(latents).requires_grad
    assert slopes[0].abs().min() > 0
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-3, atol=1e-7)
    assert all(p.grad is None and not p.requires_grad for p in teacher.pipeline.vae.parameters())


def test_the_pooled_prompt_tells_prompts_apart(teacher):
    helpers = teacher.helpers()
    pooled = helpers.pool(teacher.encode_prompts(["a red circle", "a blue circle", "two shapes"]))
    assert pooled.shape == (3, helpers.pooled_width)
    apart = torch.pdist(pooled) / pooled.norm(dim=1).mean()
    assert apart.min() > 0.05


def test_prompts_are_pooled_as_their_family_encodes_them():
    embeds, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.equal(pooled_prompt(Cond({"prompt_embeds": embeds})), embeds[:, 2])
    mean = torch.stack([embeds[0, :2].mean(0), embeds[1, 0]])
    assert torch.allclose(pooled_prompt(Cond({"prompt_embeds": embeds, "prompt_mask": mask})), mean)
    pooled = torch.randn(2, 5)
    assert torch.equal(pooled_prompt(Cond({"prompt_embeds": embeds, "pooled_embeds": pooled})), pooled)


def test_labels_and_points_stand_for_prompts_and_pictures():
    helpers = Helpers(encoder=PointEncoder(2), **one_hot_labels(3))
    told = helpers.pooled(Cond({"label": torch.tensor([2, -1, 0])}))
    assert told[0].tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]] and helpers.pooled(None) == []
    assert one_hot_labels(0) == {}
    x = torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    (products, waves) = helpers.encoder.features(x, ["products", "short"])
    assert products.tolist() == [[2, 3, 4, 6, 6, 9]] and waves.shape == (1, 64)
    assert waves.square().sum().item() == pytest.approx(32)
    assert helpers.decode(x) is x


@pytest.mark.slow
def test_a_plan_counts_decoder_and_encoder_without_their_weights():
    recipe = load_recipe("scenes-64-turbo", ["method.distillation_weight=0"])
    sketch = outline("scenes-64")
    found = estimate(sketch, Turbo, recipe.method_settings(), recipe.training, recipe.student.build(), 100)
    assert found.trainable.keys() == {"student", "discriminator"}
    assert found.calls == {"student": 1, "teacher": 0} and found.equivalents == 3
    helpers = sum(p.numel() for p in sketch.parts["vae"].parameters())  # text encoders are gone by then
    encoder = sum(p.numel() for p in load_encoder().parameters())
    assert abs(found.training["autoencoder"] / 4 - helpers - encoder) < 1000  # buffers
