"""Latents of a teacher: the autoencoder's numbers, shifted and scaled as its network was trained."""

from types import SimpleNamespace

import torch

from fewstep.models.families import Teacher


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
