"""Latents of a teacher: the autoencoder's numbers, shifted and scaled as its network was trained."""

from types import SimpleNamespace

import diffusers
import pytest
import torch

from fewstep.models.cond import Cond
from fewstep.models.families import Teacher, as_teacher


class Autoencoder:
    """Four times down by means; the posterior's deviation is a third."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(scaling_factor=0.25, shift_factor=0.5, block_out_channels=(1, 1, 1))

    def encode(self, images):
        mean = torch.nn.functional.avg_pool2d(images, 4)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.full_like(mean, 1 / 3)))

    def decode(self, latents, return_dict):
        return (torch.nn.functional.interpolate(latents, scale_factor=4),)


def test_latents_are_shifted_and_scaled_and_back():
    teacher = Teacher(None, SimpleNamespace(vae=Autoencoder()), "small")
    small = torch.linspace(-1, 1, 24).reshape(2, 3, 2, 2)
    images = torch.nn.functional.interpolate(small, scale_factor=4)
    mean, std = teacher.encode_images(images)
    torch.testing.assert_close(mean, (small - 0.5) * 0.25)
    torch.testing.assert_close(std, torch.full_like(mean, 0.25 / 3))
    torch.testing.assert_close(teacher.decode(mean, batch_size=1), images / 2 + 0.5)
    assert teacher.decode(mean * 100).max() == 1 and teacher.decode(mean * 100).min() == 0


class Unet(torch.nn.Module):
    """Remembers at which times it was asked."""

    config = SimpleNamespace(in_channels=4)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t, encoder_hidden_states, timestep_cond, return_dict):
        self.asked = t
        return (x * self.weight,)


def pipeline(scheduler):
    return SimpleNamespace(unet=Unet(), vae=None, text_encoder=torch.nn.Identity(), scheduler=scheduler)


def test_a_flow_unet_is_asked_at_times_of_its_own_scale():
    made = pipeline(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    denoiser = as_teacher(made).denoiser
    assert (denoiser.prediction_type, denoiser.schedule.shift) == ("flow", 3.0)
    denoiser(torch.zeros(2, 4, 8, 8), 0.25, Cond({"prompt_embeds": torch.zeros(2, 3, 5)}))
    assert made.unet.asked.tolist() == [250.0, 250.0]


def test_an_edm_pipeline_is_refused():
    with pytest.raises(ValueError, match="EDM scheduler"):
        as_teacher(pipeline(diffusers.EDMEulerScheduler()))
