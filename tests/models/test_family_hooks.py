"""What a family may say of its own: each default is what the first families need, each override reaches its use."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fewstep.data.cache import prompt_latents
from fewstep.data.rows import TOKENS
from fewstep.diffusion.schedule import Schedule
from fewstep.inference.load import _few_step
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import Teacher, as_teacher
from fewstep.models.families.folder import is_part, read_index
from fewstep.models.families.network import TransformerNetwork
from fewstep.models.families.sd3 import StableDiffusion3
from fewstep.models.families.unet import StableDiffusion
from fewstep.models.meta_pipeline import outline
from fewstep.models.quantize import quantizable
from fewstep.models.roles import RoleNetwork
from tests.models.pipelines import SIZE, build

# ---------------------------------------------------------------- the autoencoder


class Frames:
    """An autoencoder of frames, [B, 4, F, H, W] with alpha, which keeps every number."""

    device, dtype, config = torch.device("cpu"), torch.float32, SimpleNamespace()

    def encode(self, images):
        assert images.shape[1:3] == (4, 1)
        mean = images[:, :2]
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.ones_like(mean)))

    def decode(self, latents, return_dict):
        assert latents.ndim == 5
        return (torch.cat([latents, latents], dim=1),)


class OfFrames(StableDiffusion):
    down = 1

    @property
    def latent_scale(self):
        return self.per_channel([0.5, 2.0]), self.per_channel([1.0, -1.0])

    def to_encoder(self, images):
        return torch.cat([images, torch.ones_like(images[:, :1])], dim=1).unsqueeze(2)

    def from_encoder(self, encoded):
        return encoded[:, :, 0]

    def to_decoder(self, latents):
        return latents.unsqueeze(2)

    def from_decoder(self, decoded):
        return decoded[:, :3, 0]


def test_an_autoencoder_of_frames_with_alpha_and_numbers_for_every_channel():
    unet = torch.nn.Linear(1, 1)
    unet.config = SimpleNamespace(in_channels=2)
    teacher = Teacher(None, OfFrames(SimpleNamespace(vae=Frames(), unet=unet)), "frames")
    images = torch.linspace(-0.9, 0.9, 24).reshape(2, 3, 2, 2)
    mean, std = teacher.encode_images(images)
    torch.testing.assert_close(mean[:, 0], (images[:, 0] - 1) * 0.5)
    torch.testing.assert_close(mean[:, 1], (images[:, 1] + 1) * 2)
    assert std[:, 0].eq(0.5).all() and std[:, 1].eq(2).all()
    torch.testing.assert_close(teacher.decode(mean)[:, :2], images[:, :2] / 2 + 0.5)


def test_an_autoencoder_without_a_posterior_has_no_deviation():
    for name in ("latents", "latent"):  # AutoencoderTiny's word, and AutoencoderDC's
        vae = Frames()
        vae.config = SimpleNamespace(latent_channels=2, scaling_factor=0.25, block_out_channels=(1,))
        vae.encode = lambda images, name=name: SimpleNamespace(**{name: images[:, :2]})
        unet = torch.nn.Linear(1, 1)
        unet.config = SimpleNamespace(in_channels=2)
        family = StableDiffusion(SimpleNamespace(vae=vae, unet=unet))
        mean, std = family.posterior(torch.ones(1, 3, 2, 2))
        assert mean.eq(0.25).all() and std.eq(0).all()


class OfVideo(StableDiffusion):
    """Latents [B, 4, 3, h, w] of so many frames."""

    latent_shape = (4, 3, 8, 16)


def test_latents_may_have_an_axis_of_frames():
    teacher = as_teacher(build("sd15"), size=SIZE)
    video = Teacher(teacher.denoiser, OfVideo(teacher.pipeline, SIZE), "video")
    assert video.latent_shape == (4, 3, 8, 16) and video.image_size == 8 * video.family.down
    assert video.family.tokens == 8 * 16
    cond = Cond({"given": torch.ones(2)}, {"given": torch.zeros(1)})
    denoiser, x = Denoiser(Frame(), Schedule.flow(), "flow"), torch.randn(2, *video.latent_shape)
    assert denoiser(x, torch.tensor([0.5, 0.2]), cond, torch.tensor([2.0, 3.0])).x0.shape == x.shape


class Frame(nn.Module):
    def forward(self, x, t, cond):
        return x * cond["given"].reshape(-1, 1, 1, 1, 1)


# ---------------------------------------------------------------- guidance


class Clamped(nn.Module):
    """Outputs 2 where there is a condition and 1 where there is none, and never guides beyond 3."""

    def forward(self, x, t, cond):
        return x * 0 + 1 + cond["given"][:, None]

    def guide(self, with_, without, scale):
        return (without + scale * (with_ - without)).clamp(max=3.0)


@pytest.mark.parametrize("batched", [True, False])
def test_a_network_may_guide_by_a_rule_of_its_own(batched):
    cond = Cond({"given": torch.ones(2)}, {"given": torch.zeros(1)})
    for network in (Clamped(), RoleNetwork(Clamped(), (), None, None)):
        denoiser = Denoiser(network, Schedule.flow(), "flow", batched_guidance=batched)
        x = torch.zeros(2, 3)
        assert denoiser(x, 0.5, cond, 1.5).output.eq(2.5).all() and denoiser(x, 0.5, cond, 9.0).output.eq(3).all()
        guided, plain = denoiser.with_and_without_guidance(x, 0.5, cond, 9.0)
        assert guided.output.eq(3).all() and plain.output.eq(2).all()
        assert denoiser(x, 0.5, cond, torch.tensor([1.5, 9.0])).output[:, 0].tolist() == [2.5, 3.0]


# ---------------------------------------------------------------- taps


class Joint(nn.Module):
    """A transformer with two text tokens before those of the image; its forward ends in ``final``."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(4)])
        self.final = nn.ModuleDict({"1": nn.Identity()})

    def forward(self, x):
        tokens = torch.cat([torch.full((len(x), 2, 3), 9.0), x.flatten(2).transpose(1, 2)], dim=1)
        for layer in self.layers:
            tokens = layer(tokens)
        self.final["1"](tokens)
        raise AssertionError("the forward went on")


class JointNetwork(TransformerNetwork):
    stacks, end, patch_size, width = ("layers",), "final.1", 1, 3

    def image_tokens(self, tokens, count):
        return tokens[:, -count:]

    def forward(self, x, t, cond):
        return self.transformer(x)


def test_features_are_the_images_tokens_of_one_sequence_and_the_forward_ends_where_the_family_says():
    network, x = JointNetwork(Joint()), torch.randn(1, 3, 2, 2)
    assert network.tap_channels == {"block0": 3, "block1": 3}
    (found,) = network.features(x, torch.ones(1), None, ["block0"])
    wanted = network.transformer.layers[0](x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(1, 3, 2, 2)
    torch.testing.assert_close(found, wanted)


def test_what_is_quantised_are_the_linear_layers_in_lists_of_modules():
    network = Joint()
    network.head = nn.Linear(3, 3)
    assert [name for _, name, _ in quantizable(network)] == ["0", "1", "2", "3"]
    for name in ("sd15", "sdxl", "sd3", "flux", "pixart"):  # there it is what stands in a "block", as it was
        base = as_teacher(build(name), size=SIZE).family.base
        blocks = {id(m) for path, m in base.named_modules() if isinstance(m, nn.Linear) and "block" in path}
        assert blocks == {id(layer) for _, _, layer in quantizable(base)}


# ---------------------------------------------------------------- settings of the pipeline


INDEX = {
    "_class_name": "StableDiffusion3Pipeline", "is_distilled": True, "select": [2, 5], "sigmas": [1.0, 0.5],
    "transformer": ["diffusers", "SD3Transformer2DModel"], "text_encoder_3": [None, None],
}  # fmt: skip


def test_lists_of_numbers_in_an_index_are_settings_and_no_parts(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
    assert set(read_index(tmp_path)) == {"transformer", "text_encoder_3"}
    assert not is_part([2, 5]) and not is_part(["a"]) and is_part(["diffusers", "UNet2DConditionModel"])
    build("sd3").transformer.save_config(tmp_path / "transformer")
    family = outline(str(tmp_path)).family()
    assert family.settings == {"is_distilled": True, "select": [2, 5], "sigmas": [1.0, 0.5]}


class Shifting(StableDiffusion3):
    passes_sigmas = True

    @classmethod
    def shift(cls, config, tokens, settings):
        return lambda n: tokens / n

    def own_sigmas(self):
        return (1.0, 0.3)

    @property
    def text_parts(self):
        return (*self.text_encoders, "tokenizer")


def shifting(**scheduler):
    told = SimpleNamespace(config={"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler})
    return Shifting(SimpleNamespace(**{**build("sd3").components, "scheduler": told}), SIZE)


def test_a_family_sets_the_shift_where_the_scheduler_leaves_it_open():
    schedule = shifting(use_dynamic_shifting=True, shift_terminal=0.1).schedule()
    assert schedule.shift_at(4) == 64 / 4 and schedule.terminal == 0.1
    assert shifting(use_dynamic_shifting=False, shift=2.0).schedule().shift_at(4) == 2.0
    assert StableDiffusion3(shifting(shift_terminal=0.1).pipeline, SIZE).schedule().terminal == 0


def test_levels_of_its_own_are_the_models_default():
    family = shifting(shift=2.0)
    card = _few_step(Teacher(SimpleNamespace(accepts=frozenset(), network=None), family, "turbo"))
    assert (card.num_inference_steps, card.timesteps) == (2, (1.0, 0.3))


def test_parts_for_prompts_alone_are_let_go():
    family = shifting(shift=2.0)
    teacher = Teacher(None, family, "shifting")
    teacher.make_room(autoencoder=True)
    assert [getattr(family.pipeline, part) for part in family.text_parts] == [None] * 4
    assert build("sd3").tokenizer is not None


def test_texts_are_kept_in_the_familys_dtype(tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "text_dtype", torch.bfloat16)
    source = prompt_latents(tmp_path / "data", as_teacher(build("sd15"), size=SIZE), ["a red circle"])
    assert source.rows.take(np.array([0]))[TOKENS].dtype == torch.bfloat16
