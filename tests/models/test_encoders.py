"""Encoders: taps and sizes of our own, and models of transformers against their own arithmetic."""

from __future__ import annotations

import json

import pytest
import torch

from fewstep.models.encoders import (
    EncoderNetwork,
    PretrainedEncoder,
    load_encoder,
    load_pretrained_encoder,
    open_encoder,
)
from fewstep.scenes64.labels import CELL_CHANNELS
from fewstep.scenes64.scenes import ATTRIBUTES
from fewstep.scenes64.train_detector import build_network, export

torch.set_num_threads(1)
HEADS = {name: len(values) for name, values in ATTRIBUTES.items()}


def test_taps_halve_and_answers_stand_at_8x8():
    network = EncoderNetwork(HEADS)
    images = torch.rand(2, 3, 64, 64)
    assert [t.shape for t in network.taps(images)] == [
        (2, c, 32 >> i, 32 >> i) for i, c in enumerate(network.channels)
    ]  # fmt: skip
    assert {name: t.shape[3:].numel() for name, t in network(images).items()} == CELL_CHANNELS
    assert all(t.shape[:3] == (2, 8, 8) for t in network(images).values())
    assert network.embed(images).shape == (2, 2 * network.channels[-1])


def test_pixels_reach_every_tap_and_gradients_come_back():
    network, images = EncoderNetwork(HEADS), torch.rand(1, 3, 64, 64, requires_grad=True)
    for tap in network.taps(images):
        (gradient,) = torch.autograd.grad(tap.square().sum(), images, retain_graph=True)
        assert gradient.abs().sum() > 0


def test_weights_come_back_and_foreign_files_are_one_sentence(tmp_path):
    network = build_network("encoder", 3)
    export(network, tmp_path / "encoder.safetensors")
    again, images = load_encoder(tmp_path / "encoder.safetensors"), torch.rand(2, 3, 64, 64)
    assert torch.allclose(again.embed(images), network.embed(images), atol=1e-2)
    assert not any(p.requires_grad for p in again.parameters())
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    export(build_network("detector", 0), tmp_path / "detector.safetensors")
    for name in ("missing", "bad", "detector"):
        with pytest.raises(ValueError, match="does not hold an encoder's weights"):
            load_encoder(tmp_path / f"{name}.safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny DINOv2 and CLIP models with random weights, and a text model."""
    from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    wide = {**small, "intermediate_size": 16}
    models = {
        "dino": Dinov2Model(Dinov2Config(**small, image_size=28, patch_size=14)),
        "clip": CLIPModel(CLIPConfig(text_config={**wide, "vocab_size": 9},
                                     vision_config={**wide, "image_size": 32, "patch_size": 16}, projection_dim=8)),
        "bert": BertModel(BertConfig(**wide, vocab_size=9)),
    }  # fmt: skip
    root = tmp_path_factory.mktemp("encoders")
    for name, model in models.items():
        model.save_pretrained(root / name)
    return root


def test_dino_and_clip_see_resized_and_normalised_pictures(folders):
    from transformers import CLIPModel, Dinov2Model

    pictures = torch.rand(3, 3, 64, 64)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    (folders / "dino" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": mean.tolist(), "image_std": std.tolist()})
    )
    resized = torch.nn.functional.interpolate(pictures, (28, 28), mode="bicubic", antialias=True)
    pixels = (resized - mean[:, None, None]) / std[:, None, None]
    dino = Dinov2Model.from_pretrained(folders / "dino").eval()
    encoder = load_pretrained_encoder(str(folders / "dino"))
    with torch.no_grad():
        assert torch.allclose(encoder(pictures, batch_size=2), dino(pixel_values=pixels).pooler_output, atol=1e-5)
    features = load_pretrained_encoder(str(folders / "clip"))(pictures)
    assert features.shape == (3, 8)
    resized = torch.nn.functional.interpolate(pictures, (32, 32), mode="bicubic", antialias=True)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    clip = CLIPModel.from_pretrained(folders / "clip").eval()
    with torch.no_grad():
        wanted = clip.visual_projection(clip.vision_model(pixel_values=(resized - mean) / std).pooler_output)
    assert torch.allclose(features, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["dino", "clip"])
def test_losses_see_tokens_after_each_quarter_and_gradients_come_back(folders, name):
    """The patch embedding and the blocks, the class token added to every patch; pictures from -1 to 1."""
    encoder = open_encoder(str(folders / name))
    pictures = (2 * torch.rand(2, 3, 64, 64) - 1).requires_grad_()
    assert encoder.tap_channels == {"patches": 16, "block0": 16}  # a single block here
    found = encoder.features(pictures, ["block0", "patches"])
    seen = torch.nn.functional.interpolate(pictures / 2 + 0.5, (encoder.size, encoder.size), mode="area")
    pixels = (seen - encoder.mean) / encoder.std
    vision = encoder.model.vision_model if name == "clip" else encoder.model
    hidden = vision(pixel_values=pixels, output_hidden_states=True).hidden_states
    for value, wanted in zip(found, (hidden[1], hidden[0]), strict=True):
        assert value.shape == (2, 16, 4)
        assert torch.allclose(value, (wanted[:, 1:] + wanted[:, :1]).transpose(1, 2), atol=1e-6)
        (slope,) = torch.autograd.grad(value.square().sum(), pictures, retain_graph=True)
        assert slope.abs().sum() > 0
    summary = encoder.summary(pictures)
    assert summary.shape == (2, encoder.summary_width) == (2, 8 if name == "clip" else 16)
    assert not any(p.requires_grad for p in encoder.network.parameters())
    on_meta = open_encoder(str(folders / name), "meta")
    assert on_meta.features(torch.empty(2, 3, 64, 64, device="meta"), ["patches"])[0].shape == (2, 16, 4)
    with pytest.raises(ValueError, match="has no tap 'block7': it has patches, block0"):
        encoder.features(pictures, ["block7"])


def test_a_deep_model_is_seen_after_blocks_2_5_8_and_11():
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=8, num_hidden_layers=12, num_attention_heads=1, image_size=28, patch_size=14)
    encoder = PretrainedEncoder(Dinov2Model(config), 28, torch.zeros(3), torch.ones(3))
    assert list(encoder.tap_channels) == ["patches", "block2", "block5", "block8", "block11"]
    found = encoder.features(torch.zeros(1, 3, 14, 14), encoder.tap_channels)
    assert len({f.sum().item() for f in found}) == 5


def test_the_shipped_encoder_sees_what_its_taps_see():
    encoder, pictures = open_encoder("scenes-64"), 2 * torch.rand(2, 3, 64, 64) - 1
    found = encoder.features(pictures, ["level3", "level0"])
    taps = encoder.network.taps(pictures / 2 + 0.5)
    assert torch.equal(found[0], taps[3]) and torch.equal(found[1], taps[0])
    assert [encoder.tap_channels[f"level{i}"] for i in range(4)] == [t.shape[1] for t in taps]
    assert encoder.summary(pictures).shape == (2, encoder.summary_width)


def test_what_is_no_vision_model_is_one_sentence(folders, tmp_path):
    with pytest.raises(ValueError, match="is no vision model"):
        load_pretrained_encoder(str(folders / "bert"))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_pretrained_encoder(str(tmp_path))
