"""The statistics that methods log: against numpy on made-up answers, and what theory says of an exact teacher."""

import numpy as np
import pytest
import torch

from fewstep.data.random import Rng
from fewstep.data.sources import MixtureSource
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.parts.score_pair import noise_levels
from fewstep.methods.parts.statistics import (
    by_time,
    discriminator_statistics,
    fake_score_statistics,
    mean_shift,
    student_statistics,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(found):
    assert all(value.shape == () and not value.requires_grad for value in found.values())
    return {name: float(value) for name, value in found.items()}


def test_answers_against_numpy():
    x0, data, teacher = 3 * normal(6, 3, 4, 5) + 0.4, normal(6, 3, 4, 5, seed=1) - 0.2, 2 * normal(6, 3, 4, 5, seed=2)
    found = numbers(student_statistics(x0.requires_grad_(), data, teacher))
    x, d, t = (value.detach().numpy() for value in (x0, data, teacher))
    away = [np.abs(v - v.mean(axis=(0, 2, 3), keepdims=True)) for v in (x, d, t)]
    limit = 1.5 * np.sort(away[1].ravel())[-2]  # 0.5 % of 360 elements are 2
    gap = (x - d).mean(axis=(2, 3))
    expected = {
        "x0_mean": x.mean(),
        "x0_std": x.std(),
        "data_mean": d.mean(),
        "data_std": d.std(),
        "x0_spread": np.sqrt(x.var(axis=0, ddof=1).mean()),
        "data_spread": np.sqrt(d.var(axis=0, ddof=1).mean()),
        "mean_shift": (gap[0::2].mean(axis=0) * gap[1::2].mean(axis=0)).mean() / d.var(),
        "saturation": (away[0] > limit).mean(),
        "teacher_error": ((t - d) ** 2).mean() / d.var(),
        "teacher_variance": t.var() / d.var(),
        "teacher_saturation": (away[2] > limit).mean(),
    }
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-12)
    assert 0 < found["saturation"] < 0.5


def test_one_row_has_no_spread():
    found = student_statistics(normal(1, 3, 4), normal(1, 3, 4))
    assert {"x0_spread", "data_spread", "mean_shift"}.isdisjoint(found) and "saturation" in found
    assert all(value.isfinite() for value in found.values())


def test_one_picture_for_all_has_contrast_but_no_spread():
    found = numbers(student_statistics(normal(1, 3, 8, 8).expand(4, -1, -1, -1), normal(4, 3, 8, 8, seed=1)))
    assert found["x0_spread"] == pytest.approx(0, abs=1e-12) and found["x0_std"] > 0.8
    assert found["data_spread"] == pytest.approx(1, abs=0.1)


def test_a_shift_of_all_channels_does_not_saturate_and_a_scale_does():
    data = normal(64, 2, seed=3)
    moved = data + torch.tensor([3.0, -3.0])
    assert numbers(student_statistics(moved, data))["saturation"] == 0
    assert numbers(student_statistics(3 * data, data))["saturation"] > 0.05


def test_the_shift_of_means_is_without_bias():
    """Answers of the right mean have a shift of 0 on average, where the square of a mean would have its variance."""
    x0, data = normal(4000, 8, 3, 2), normal(4000, 8, 3, 2, seed=1)
    shifts = torch.stack([mean_shift(x, d) for x, d in zip(x0, data, strict=True)])
    assert abs(float(shifts.mean())) < 4 * float(shifts.std()) / 4000**0.5 < 0.01
    assert float((x0 - data).mean((1, 3)).square().mean()) > 0.1  # what a plain square would say
    moved = torch.stack([mean_shift(x, d + 0.5) for x, d in zip(x0, data, strict=True)])
    assert float(moved.mean()) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("t", [99, 499, 899])
def test_an_exact_teacher_explains_all_variance(t):
    """The law of total variance: its error and the variance of its answers add up to the data's."""
    ring, schedule = GaussianMixture.ring(6, 1.0, 0.3, num_classes=3), Schedule.scaled_linear()
    batch = MixtureSource(ring).batch(Rng(0, 0, 40_000, dtype=torch.float64))
    x_t = schedule.add_noise(batch.x0, normal(40_000, 2), t)
    found = numbers(student_statistics(x_t, batch.x0, ring.x0(x_t, *schedule.alpha_sigma(t))))
    assert found["teacher_error"] + found["teacher_variance"] == pytest.approx(1, abs=0.02)
    assert found["teacher_error"] < 1


def test_discriminators():
    real, fake = torch.tensor([[2.0, -1.0], [0.5, 3.0]]), torch.tensor([-2.0, 0.0, 1.0, -3.0])
    found = numbers(discriminator_statistics(real, fake))
    both = np.concatenate([real.numpy().ravel(), fake.numpy()])
    assert found == pytest.approx({
        "d_real": (1 / (1 + np.exp(-real.numpy()))).mean(),
        "d_fake": (1 / (1 + np.exp(-fake.numpy()))).mean(),
        "d_accuracy": (3 / 4 + 2.5 / 4) / 2,
        "d_logit_std": both.std(),
    }, rel=1e-6)  # fmt: skip


def test_accuracy_weighs_real_and_fake_alike():
    found = discriminator_statistics(torch.ones(10), torch.ones(1000))
    assert float(found["d_accuracy"]) == 0.5


def test_fake_scores():
    answers, fake, teacher = normal(4, 3), normal(4, 3, seed=1), normal(4, 3, seed=2)
    found = numbers(fake_score_statistics(fake, teacher, answers))
    assert found["fake_error"] == pytest.approx(float(((fake - answers) ** 2).mean()))
    assert found["teacher_fake_error"] == pytest.approx(float(((teacher - answers) ** 2).mean()))


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_statistics_by_time(name):
    """Bins are tenths of the noise levels, not of time: the first and the last level are in the outermost."""
    schedule = {"vp": Schedule.scaled_linear(), "edm": Schedule.edm(), "flow": Schedule.flow(shift=3.0)}[name]
    levels = torch.from_numpy(noise_levels(schedule))
    index = torch.tensor([0, 99, 100, 550, 599, 999])
    values = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0, 11.0], dtype=torch.float64)
    found = by_time({"gap": values}, levels[index], levels, "matching")
    assert set(found) == {"gap_by_time", "matching_share_by_time"}
    share = found["matching_share_by_time"]
    assert (6 * share).round().tolist() == [2, 1, 0, 0, 0, 2, 0, 0, 0, 1]
    means = (found["gap_by_time"] / share)[share > 0]
    assert means.tolist() == pytest.approx([2.0, 5.0, 8.0, 11.0])
