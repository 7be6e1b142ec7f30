"""The linear code of latents: linear, of unit variance, and the best of its size."""

import pytest
import torch

from fewstep.scenes64.autoencoder import as_tensor
from fewstep.scenes64.linear_code import fit_linear_code
from fewstep.scenes64.scenes import Scenes


@pytest.fixture(scope="module")
def images():
    return as_tensor(Scenes(3).render(range(300)).images)


@pytest.fixture(scope="module")
def code(images):
    return fit_linear_code(images, 16)


def test_the_mean_of_pictures_has_the_mean_code(images, code):
    latents = code.encode(images)
    assert latents.shape == (300, 16, 8, 8)
    assert torch.allclose(code.encode(images[:8].mean(0, keepdim=True))[0], latents[:8].mean(0), atol=1e-5)


def test_latents_have_unit_variance_uncorrelated_channels_and_coarse_ones_first(images, code):
    rows = code.encode(images).transpose(0, 1).flatten(1).double()
    covariance = torch.cov(rows)
    assert covariance.trace() / 16 == pytest.approx(1.0, abs=1e-3)
    assert (covariance - torch.diag(covariance.diag())).abs().max() < 1e-3
    assert (covariance.diag().diff() <= 1e-6).all()
    assert rows.mean().abs() < 1e-3


def test_it_explains_more_than_other_projections(images, code):
    """Ridge regression of windowed patches on the code leaves less than on as many random projections of them."""
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4), mode="reflect")
    window = torch.sin(torch.pi * (torch.arange(16) + 0.5) / 16)
    taper = (window[:, None] * window).flatten().repeat(3)
    patches = (torch.nn.functional.unfold(padded, 16, stride=8).transpose(1, 2).reshape(-1, 768) * taper).double()
    patches -= patches.mean(0)

    def left(rows):
        rows = rows - rows.mean(0)
        return float((patches - rows @ torch.linalg.lstsq(rows, patches).solution).square().sum())

    mine = left(code.encode(images).flatten(2).transpose(1, 2).reshape(-1, 16).double())
    other = left(patches @ torch.randn(768, 16, generator=torch.Generator().manual_seed(0)).double())
    values = torch.linalg.eigvalsh(patches.T @ patches)
    assert mine == pytest.approx(float(values[:-16].sum()), rel=1e-3)
    assert mine < other
    ratio = code.encode(images).transpose(0, 1).flatten(1).double().var(1) / (values / len(patches)).flip(0)[:16].sqrt()
    assert torch.allclose(ratio, ratio.mean().expand(16), rtol=1e-2)  # variance e becomes one in proportion to e^(1/2)
