"""Comparisons on a prompt set of one's own: any teacher, any image size, any judge; and scenes-64's set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewstep import DDIMSampler, load_teacher
from fewstep.evaluation.compare import Candidate, compare, comparison_grid
from fewstep.evaluation.measured import Judgement, Reference
from fewstep.evaluation.prompt_set import PromptSet
from fewstep.evaluation.tables import as_text
from fewstep.scenes64.prompts import real_images, reference_of, unseen_captions, unseen_prompts

torch.set_num_threads(1)
CAPTIONS = [f"image {i}" for i in range(8)]


def colours(images):
    """Features [N, 3]: mean colours."""
    return images.mean(dim=(2, 3))


def images(numbers, size=128):
    return torch.rand(len(numbers), 3, size, size, generator=torch.Generator().manual_seed(numbers.start))


@pytest.fixture(scope="module")
def teacher(tiny):
    return load_teacher(str(tiny), size=128)


@pytest.fixture(scope="module")
def candidates(teacher):
    return [Candidate("teacher", teacher.denoiser, DDIMSampler(num_inference_steps=n)) for n in (2, 1)]


def test_any_prompts_any_size_and_any_judge(teacher, candidates):
    """The judge sees the images in the order of the captions; the reference is the given one."""
    seen = []

    def judge(images):
        seen.append(images)
        return [Judgement({"number": (i % 2, 1)}, i % 2 == 1, True) for i in range(len(images))]

    reference = Reference.of(images(range(50)), colours)
    found = compare(teacher, candidates, PromptSet(CAPTIONS, colours, reference, judge), seed=3)
    assert (
        [r.label for r in found.results] == ["teacher, 2 steps", "teacher, 1 step"]
        and found.count == 8
        and found.floors == {}
    )
    for result, judged in zip(found.results, seen, strict=True):
        assert result.images.shape == (8, 3, 128, 128) and torch.equal(result.images, judged)
        assert result.figures["accuracy"] == result.figures["accuracy of number"] == 0.5
        without = {"evaluations", "ms", "accuracy of number"}  # all others have an interval that holds them
        assert result.figures.keys() - without == result.intervals.keys() == result.resampled.keys()
        assert all(low <= result.figures[name] <= high for name, (low, high) in result.intervals.items())
    first, second = found.results
    assert first.figures["to first"] == 0 and first.figures["unlike first"] == pytest.approx(0, abs=1e-12)
    a, b = (result.images.double().numpy() for result in found.results)
    assert second.figures["to first"] == pytest.approx(((a - b) ** 2).mean() ** 0.5, rel=1e-6)
    a, b = a.mean((2, 3)), b.mean((2, 3))
    cosines = (a * b).sum(1) / ((a**2).sum(1) * (b**2).sum(1)) ** 0.5
    assert second.figures["unlike first"] == pytest.approx(1 - cosines.mean(), abs=1e-6)
    assert "real images" not in as_text(found) and '"pictures": 8' in found.as_json()
    assert "Over 8 unseen prompts" in as_text(found)
    assert comparison_grid(found, 2).height > 2 * 128


def test_without_a_judge_there_is_no_accuracy_and_without_real_images_no_distance(teacher, candidates):
    prompts = PromptSet(CAPTIONS, colours, real=images)
    found = compare(teacher, candidates[:1], prompts)
    assert "accuracy" not in found.results[0].figures and found.floors.keys() == {"FD", "detail FD"}
    given = replace(prompts, reference=Reference.of(images(range(8, 16)), colours))  # those behind the captions' own
    assert compare(teacher, candidates[:1], given).results[0].figures["FD"] == found.results[0].figures["FD"]
    with pytest.raises(ValueError, match="no real images to measure distances to: give it a reference"):
        compare(teacher, candidates, PromptSet(CAPTIONS, colours))


def test_the_set_of_scenes_64():
    """Its captions are the first unseen ones, its reference the shipped one for the shipped model alone."""
    shipped = load_teacher("scenes-64")
    prompts = unseen_prompts(shipped, 4)
    assert list(prompts.captions) == unseen_captions(4)
    assert torch.equal(prompts.reference.features, reference_of(shipped).features)
    assert reference_of(replace(shipped, name="another")) is None
    real = prompts.real(range(4))
    assert torch.equal(real, real_images(shipped, range(4)))
    assert sum(j.all_right for j in prompts.judge(real)) == sum(j.stated for j in prompts.judge(real))
    with pytest.raises(ValueError, match=r"3 images .* 4 captions"):
        prompts.judge(real[:3])
