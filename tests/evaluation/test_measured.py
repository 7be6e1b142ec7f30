"""Figures and intervals of sets of pictures: moments of groups, and resampling in pairs."""

from __future__ import annotations

import pytest
import torch

from fewstep.evaluation.measured import RESAMPLINGS, Measured, Reference, gap_closed
from fewstep.evaluation.metrics import (
    GroupedMoments,
    Moments,
    centred_interval,
    detail_features,
    frechet_distance,
    spread,
)
from fewstep.scenes64.detector import judge_of, load_detector
from fewstep.scenes64.scenes import Scenes

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def detector():
    return load_detector()


def renders(seed, count):
    rendered = Scenes(seed).render(range(count))
    return torch.from_numpy(rendered.images).permute(0, 3, 1, 2).float() / 255, rendered.scenes


@pytest.fixture(scope="module")
def real(detector):
    return Reference.of(renders(11, 512)[0], detector.features)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_groups_have_the_moments_of_their_samples():
    """Counted n times, a group weighs as its samples repeated n times."""
    x = normal(20, 3)
    grouped = GroupedMoments.of(x, 5)
    whole, repeated = grouped.moments(), grouped.moments(torch.tensor([2.0, 0, 1, 1, 3]).double())
    rows = torch.cat([x[0:4], x[0:4], x[8:16], x[16:20], x[16:20], x[16:20]])
    for found, wanted in ((whole, Moments.of(x)), (repeated, Moments.of(rows))):
        assert torch.allclose(found.mean, wanted.mean) and torch.allclose(found.covariance, wanted.covariance)
        assert found.count == wanted.count


def test_spread_against_loops():
    x = normal(12, 4)
    pairs = [(x[4 * p + i] - x[4 * p + j]).norm() for p in range(3) for i in range(4) for j in range(4) if i != j]
    assert spread(x, 4) == pytest.approx(float(sum(pairs) / len(pairs)))
    assert spread(x[:1].repeat(4, 1), 2) == 0
    with pytest.raises(ValueError, match="two or more"):
        spread(x, 5)


def test_real_scenes_are_right_and_near_to_real_scenes(detector, real):
    pictures, scenes = renders(12, 256)
    figures = Measured.of(pictures, detector.features, judge_of(detector, scenes)).figures(real)
    assert figures["accuracy"] > 0.97
    assert all(figures[f"accuracy of {name}"] > 0.98 for name in ("number", "shape", "colour", "size", "place"))
    assert abs(figures["KID"]) < 0.02 and figures["coverage"] > 0.9
    wrong = Measured.of(pictures, detector.features, judge_of(detector, scenes[1:] + scenes[:1])).figures(real)
    assert wrong["accuracy"] < 0.3 and wrong["FD"] == pytest.approx(figures["FD"])


def blurred(x, sigma):
    """Gaussian blur of ``sigma`` pixels."""
    i = torch.arange(-4, 5, dtype=x.dtype)
    kernel = (-0.5 * (i / sigma).square()).exp()
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 9)
    x = torch.nn.functional.conv2d(torch.nn.functional.pad(x, (4, 4, 4, 4), mode="replicate"), kernel, groups=3)
    return torch.nn.functional.conv2d(x, kernel.transpose(2, 3), groups=3)


def test_intervals_hold_the_value_and_pairs_are_narrower(detector, real):
    """The difference of two versions of the same pictures is known far better than either's distance."""
    pictures, scenes = renders(14, 128)
    a, b = (Measured.of(x, detector.features, judge_of(detector, scenes)) for x in (pictures, blurred(pictures, 1.0)))
    plain, again = (m.figures(real) for m in (a, b))
    first, second = (m.resampled(real) for m in (a, b))
    for name in ("FD", "detail FD", "accuracy"):
        assert first[name].shape == (RESAMPLINGS,)
        low, high = centred_interval(first[name], plain[name])
        assert low <= plain[name] <= high
    alone = centred_interval(second["detail FD"], again["detail FD"])
    low, high = centred_interval(second["detail FD"] - first["detail FD"], again["detail FD"] - plain["detail FD"])
    assert low > 0 and high - low < alone[1] - alone[0]


def test_the_gap_is_closed_by_the_teacher_itself_and_not_by_a_copy():
    few, many = torch.tensor(8.0), torch.tensor(2.0)
    assert gap_closed(few, many, many) == 1 and gap_closed(few, many, few) == 0
    assert gap_closed(few, many, torch.tensor(5.0)) == 0.5


def test_statistics_come_back_from_their_file(detector, real, tmp_path):
    real.save(tmp_path / "real.safetensors", {"scenes": "512"})
    again = Reference.load(tmp_path / "real.safetensors")
    assert torch.allclose(again.features, real.features, atol=2e-3) and again.detail.count == real.detail.count
    pictures, _ = renders(12, 64)
    one = Measured.of(pictures, detector.features)
    before, after = one.figures(real), one.figures(again)
    assert after["detail FD"] == pytest.approx(before["detail FD"], rel=1e-3)
    mine, theirs = (Moments.of(detail_features(images)) for images in (pictures, renders(11, 512)[0]))
    assert after["detail FD"] == pytest.approx(frechet_distance(mine, theirs), rel=1e-3)
    (tmp_path / "other.safetensors").write_bytes(b"no")
    for name in ("other", "missing"):
        with pytest.raises(ValueError, match="holds no reference statistics"):
            Reference.load(tmp_path / f"{name}.safetensors")
