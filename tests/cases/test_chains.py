"""What a chain's stages may begin with, and what is refused before the first of them has run."""

from __future__ import annotations

import pytest
import torch

from fewstep.recipe.chain import parse_chain
from fewstep.recipe.load import parse_recipe
from fewstep.runs.chain import run_chain
from fewstep.runs.distill import distill
from fewstep.runs.foresee import foresee, missing_here
from fewstep.runs.plan import dry_run
from fewstep.runs.setup import setup
from fewstep.students.card import load_card
from fewstep.students.lineage import open_teacher
from tests.command_line import output, student

COMMON = {
    "data": {"size": 8},
    "training": {"steps": 2, "batch_size": 2, "log_every": 1, "checkpoint_every": 2, "learning_rate": 1e-2},
    "student": {"rank": 2},
    "sample": {"every": 4, "teacher_steps": 2, "num_inference_steps": 2, "prompts": ["a red circle"]},
}
STAGES = [
    {"name": "first", "method": {"name": "lcm", "num_grid_steps": 4}},
    {"name": "second", "method": {"name": "lcm", "num_grid_steps": 4}, "teacher": "first", "init": "first"},
    {"name": "third", "method": {"name": "lcm", "num_grid_steps": 4}, "teacher": "second"},
    {"name": "two", "merge": "third", "weights": "lora"},
    {"name": "all", "merge": "two", "weights": "lora"},
]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stacked") / "run"
    run_chain(parse_chain({**COMMON, "teacher": str(tiny), "stages": STAGES}), folder)
    return folder


@pytest.mark.slow
def test_a_stage_whose_init_is_its_teacher_begins_as_its_teacher(run, tmp_path):
    """The LoRA counts once: it is in the teacher, and the student adds nothing to it. A rank of its own will do."""
    keys = {"teacher": str(run / "01-first"), "init": str(run / "01-first"), "method": "tcd", "student": {"rank": 3}}
    job = setup(parse_recipe({**COMMON, **keys}), tmp_path)
    wanted = student(run / "01-first" / "student")
    assert torch.allclose(output(job.roles.student, job.teacher), wanted, atol=1e-5)
    assert len(job.earlier) == 1


@pytest.mark.slow
def test_stacked_loras_join_into_one_on_the_first_model(run, tiny):
    """Two joins of three LoRAs of rank 2 are one of rank 6, the same function as the last stage on its two teachers."""
    cards = [load_card(run / name / "student") for name in ("04-two", "05-all")]
    assert [(card.rank, card.teacher) for card in cards] == [(4, "../../01-first/student"), (6, str(tiny))]
    wanted = student(run / "03-third" / "student")
    assert torch.allclose(student(run / "05-all" / "student"), wanted, atol=1e-5)
    teacher = open_teacher(str(tiny))
    assert not torch.allclose(output(teacher.denoiser, teacher), wanted, atol=1e-4)


CONVERTED = {"loss": "mse", "prediction_type": "sample", "num_inference_steps": 2}
LCM = {"method": {"name": "lcm", "num_grid_steps": 4}}
LATER = [
    (
        [{"name": "a", **LCM}, {"name": "b", **LCM, "teacher": "a"}, {"name": "c", **LCM, "teacher": "b", "init": "a"}],
        "stages.c.init: the LoRA of 'a' stands on 'scenes-64', but this stage's teacher is 'b'",
    ),
    (
        [{"name": "a", **LCM}, {"name": "b", **LCM, "teacher": "a"}, {"name": "c", **LCM, "init": "b"}],
        "stages.c.init: the LoRA of 'b' stands on 'a', but this stage's teacher is 'scenes-64'",
    ),
    (
        [{"name": "a", **LCM, "student": {"targets": ["to_q"]}}, {"name": "b", **LCM, "init": "a"}],
        "stages.b.init: 'a' adapts other layers than this stage",
    ),
    (
        [
            {"name": "a", **LCM, "student": {"targets": ["to_q"]}}, {"name": "b", **LCM, "teacher": "a"},
            {"name": "c", "merge": "b", "weights": "lora"},
        ],
        "stages.c.weights: 'b' and its teacher 'a' adapt different layers",
    ),
]  # fmt: skip
KNOWN = [
    (
        [{"name": "a", "method": {"name": "tcd", "num_grid_steps": 4, "guidance_scale": [2, 8]}}],
        "",
    ),
    (
        [{"name": "a", "method": "ctm"}, {"name": "b", **LCM, "teacher": "a"}],
        "stages.b: The student of a has the extra inputs end and cannot be a teacher",
    ),
    (
        [{"name": "a", "method": "ctm"}, {"name": "b", "merge": "a"}],
        "stages.b: merge: the student of 'a' has the extra inputs end",
    ),
    (
        [
            {"name": "a", **LCM},
            {"name": "b", "method": {"name": "lightning", **CONVERTED}, "init": "a"},
        ],
        "stages.b: init: the student 'a' predicts epsilon, but this method's predicts sample",
    ),
    (
        [{"name": "a", **LCM}, {"name": "b", **LCM, "sample": {"num_inference_steps": 9}}],
        "stages.b: The samplers of this recipe do not fit its method and teacher",
    ),
    ([{"name": "a", **LCM}, {"name": "b", **LCM, "init": "runs/nowhere"}], "stages.b: init: there is no finished run"),
]  # fmt: skip


@pytest.mark.parametrize(("stages", "sentence"), LATER)
def test_what_the_words_of_a_chain_tell_is_refused_when_it_is_read(stages, sentence):
    with pytest.raises(ValueError, match=r".") as caught:
        parse_chain({**COMMON, "stages": stages})
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_joined_lora_has_both_ranks_and_stands_where_the_lower_one_stood():
    joined = [
        {"name": "a", **LCM}, {"name": "b", **LCM, "teacher": "a"}, {"name": "c", "merge": "b", "weights": "lora"},
        {"name": "d", **LCM, "init": "c", "student": {"rank": 4}},
    ]  # fmt: skip
    assert len(parse_chain({**COMMON, "stages": joined}).stages) == 4
    with pytest.raises(ValueError, match="a LoRA of rank 2 cannot start from 'c', which has rank 4"):
        parse_chain({**COMMON, "stages": [*joined[:3], {"name": "d", **LCM, "init": "c"}]})
    with pytest.raises(ValueError, match="is no stage with a LoRA that it could be joined with"):
        parse_chain({**COMMON, "stages": [*joined[:3], {"name": "d", "merge": "c", "weights": "lora"}]})


@pytest.mark.parametrize(("stages", "sentence"), KNOWN)
def test_what_a_later_stage_would_be_refused_for_is_said_before_the_first(stages, sentence, tmp_path):
    chain = parse_chain({**COMMON, "stages": stages})
    if not sentence:
        foresee(chain)
        return
    for begin in (dry_run, lambda chain: run_chain(chain, tmp_path / "run")):
        with pytest.raises(ValueError, match=r".") as caught:
            begin(chain)
        assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


ELSEWHERE = {**COMMON, **LCM, "training": {**COMMON["training"], "device": "cuda:77"}}


def test_what_this_machine_lacks_is_known():
    assert missing_here(parse_recipe({**COMMON, **LCM})) == []
    chain = parse_chain({**ELSEWHERE, "stages": [{"name": "a"}, {"name": "b", "init": "a"}]})
    (sentence,) = missing_here(chain)
    assert "training.device: there is no device 'cuda:77' here" in sentence


@pytest.mark.slow
def test_a_plan_says_what_this_machine_lacks_and_stays_a_plan():
    assert "\n# NOT ON THIS MACHINE: training.device: there is no device" in dry_run(parse_recipe(ELSEWHERE))


def test_a_plan_does_without_the_data_and_a_run_does_not(tmp_path):
    place = str(tmp_path / "photos")
    sample = {**COMMON["sample"], "num_inference_steps": 1}
    words = {**COMMON, "method": {"name": "dmd"}, "data": {"source": "folder", "path": place}, "sample": sample}
    recipe = parse_recipe(words)
    foresee(recipe, elsewhere=True)
    assert missing_here(recipe) == [f"data.path: there is no folder '{place}'."]
    with pytest.raises(ValueError, match=r"^data\.path: there is no folder"):
        distill(recipe, tmp_path / "run")
    with pytest.raises(ValueError, match=r"^stages\.b: data\.path: there is no folder"):
        run_chain(parse_chain({**COMMON, "stages": [{"name": "a", **LCM}, {"name": "b", **words}]}), tmp_path / "chain")
    assert not (tmp_path / "chain").exists()
    planned = dry_run(recipe)
    assert f"\n# NOT ON THIS MACHINE: data.path: there is no folder '{place}'." in planned
    assert "\n# memory on cpu" in planned and "size: null" in planned
