"""Latents of a teacher: the autoencoder's numbers, shifted and scaled as its network was trained."""

from types import SimpleNamespace

import diffusers
import pytest
import torch

from fewstep.models.cond import Cond
from fewstep.models.families import Teacher, as_teacher, load_teacher
from fewstep.models.families.unet import StableDiffusion


class Autoencoder:
    """Four times down by means; the posterior's deviation is a third."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(latent_channels=4, scaling_factor=0.25, shift_factor=0.5, block_out_channels=(1, 1, 1))

    def encode(self, images):
        mean = torch.nn.functional.avg_pool2d(images, 4)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.full_like(mean, 1 / 3)))

    def decode(self, latents, return_dict):
        return (torch.nn.functional.interpolate(latents, scale_factor=4),)


def small(vae):
    """A teacher with this autoencoder and a network that nobody calls."""
    unet = torch.nn.Linear(1, 1)
    unet.config = SimpleNamespace(in_channels=4)
    return Teacher(None, StableDiffusion(SimpleNamespace(vae=vae, unet=unet)), "small")


def test_latents_are_shifted_and_scaled_and_back():
    teacher = small(Autoencoder())
    values = torch.linspace(-1, 1, 24).reshape(2, 3, 2, 2)
    images = torch.nn.functional.interpolate(values, scale_factor=4)
    mean, std = teacher.encode_images(images)
    torch.testing.assert_close(mean, (values - 0.5) * 0.25)
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


def test_large_pictures_are_decoded_and_encoded_few_at_a_time():
    from fewstep.models.families.teacher import vae_batch_size

    assert [vae_batch_size(side) for side in (64, 256, 512, 1024, 4096)] == [32, 32, 8, 2, 1]
    seen = []
    vae = Autoencoder()
    vae.encode = lambda images: seen.append(len(images)) or Autoencoder.encode(vae, images)
    vae.decode = lambda latents, return_dict: seen.append(len(latents)) or Autoencoder.decode(vae, latents, return_dict)
    teacher = small(vae)
    mean, _ = teacher.encode_images(torch.zeros(5, 3, 1024, 1024))
    assert len(mean) == 5 and len(teacher.decode(mean)) == 5
    assert seen == [2, 2, 1, 2, 2, 1]


def test_dtypes_have_one_set_of_words_and_torchs_own_names_mean_the_same():
    from fewstep.models.hub import DTYPES, dtype_word

    for word, name in (("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")):
        assert dtype_word(word, "dtype") == dtype_word(name, "dtype") == word
        assert DTYPES[word] == getattr(torch, name)
    with pytest.raises(ValueError, match=r"^Unknown --dtype 'int8': use fp32, fp16, bf16\.$"):
        dtype_word("int8", "--dtype")


def test_tiling_is_the_autoencoders_own(tmp_path):
    from tests.models.pipelines import SIZE, build

    build("sd15").save_pretrained(tmp_path / "sd15")
    assert load_teacher(str(tmp_path / "sd15"), size=SIZE, vae_tiling=True).pipeline.vae.use_tiling
    teacher = load_teacher(str(tmp_path / "sd15"), dtype=torch.bfloat16)
    assert {p.dtype for p in teacher.denoiser.network.parameters()} == {torch.bfloat16}
    assert teacher.image_size == 64 and teacher.size is None and not teacher.pipeline.vae.use_tiling
