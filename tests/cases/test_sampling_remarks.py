"""Prompts that the text encoders do not read to their end, and samplers that a file was not made for: one remark."""

from __future__ import annotations

import copy
import warnings

import pytest

from fewstep.inference.model import Model
from fewstep.models.families import as_teacher
from fewstep.models.hub import Remark
from fewstep.students.card import Card
from tests.models.pipelines import SIZE, build


def teacher(family):
    return as_teacher(copy.copy(build(family)), family, size=SIZE)


LONG = {"sd15": (77, 75), "sdxl": (77, 75), "sd3": (256, 255), "flux": (512, 511), "pixart": (120, 119)}
"""Tokens that each family's longest encoder reads, and how many of them are words: the others are special."""


@pytest.mark.parametrize("family", LONG)
def test_a_prompt_beyond_the_encoder_is_remarked_on_once(family):
    most, words = LONG[family]
    made = teacher(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Remark)
        made.encode_prompts([" ".join(["red"] * words), "a blue square"])
    with pytest.warns(Remark, match=rf"1 of 2 prompts are longer than the {most} tokens .*: 'red red") as said:
        made.encode_prompts([" ".join(["red"] * (words + 1)), "a blue square"])
        made.encode_prompts(["red " * 1000])
    assert len([entry for entry in said if issubclass(entry.category, Remark)]) == 1


def test_sd3_without_its_long_encoder_reads_less():
    pipeline = copy.copy(build("sd3"))
    pipeline.tokenizer_3 = None
    assert "longer than the 77 tokens" in as_teacher(pipeline, "sd3", size=SIZE).family.cut_off(["red " * 100])


def test_another_sampler_than_the_cards_is_remarked_on():
    made = teacher("sd15")
    student = Model(made, made.denoiser, Card("lcm", "lcm", 4, "full", "sd15"), 1.0)
    (line,) = student.warnings(sampler="euler")
    assert "was trained for the sampler lcm, not euler" in line
    assert student.warnings(sampler="lcm") == student.warnings() == []
    model = Model(made, made.denoiser, Card("", "ddim", 50, "full", ""), 3.0)
    assert model.warnings(sampler="euler") == []
    with pytest.warns(UserWarning, match="not euler") as said:
        student.sample(["a red circle"], 1, sampler="euler", output_type="latent")
    assert len(said) == 1
