"""Human feedback from recipe to picture: a LoRA of its own on a frozen student, joined with it in the end."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fewstep.data.preferences import read_preferences
from fewstep.export.publish import check_form
from fewstep.models.families import load_teacher
from fewstep.models.lora import merge
from fewstep.recipe.chain import load, parse_chain
from fewstep.recipe.load import load_recipe, parse_recipe
from fewstep.recipe.validate import RecipeError
from fewstep.reports.finished import FinishedRun
from fewstep.reports.page import Page
from fewstep.reports.report import _feedback
from fewstep.runs.chain import run_chain
from fewstep.runs.plan import plan
from fewstep.runs.setup import setup
from fewstep.sampling import TCDSampler
from fewstep.students.card import load_card, sampler_of
from fewstep.students.student import load_weights
from tests.command_line import inside, output, stop_and_go_on, student
from tests.rewards import taste

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    return taste(folder / "taste.safetensors", "encoder"), taste(folder / "judge.safetensors", "detector")


COMMON = {
    "data": {"size": 8}, "student": {"rank": 4},
    "training": {"batch_size": 4, "log_every": 1, "learning_rate": 1e-2, "warmup_steps": 0},
    "sample": {"every": 4, "teacher_steps": 2, "num_inference_steps": 2, "prompts": ["a star"]},
}  # fmt: skip


def feedback(files, **more):
    goal = {"model": str(files[0]), "name": "taste", "threshold": 50.0}
    method = {"name": "feedback", "rewards": [goal], "num_inference_steps": 2, "num_grid_steps": 10}
    return {**method, "held_out": str(files[1]), **more}


@pytest.fixture(scope="module")
def data(tiny, rewards):
    first = {"name": "student", "method": {"name": "tcd", "num_grid_steps": 10}, "training": {"steps": 2}}
    second = {"name": "liked", "teacher": "student", "method": feedback(rewards, perceptual_weight=0.1),
              "student": {"rank": 2}, "training": {"steps": 4}}  # fmt: skip
    merged = [{"name": "half", "merge": "liked", "scale": 0.5, "weights": "lora"}, {"name": "full", "merge": "liked"}]
    return {**COMMON, "teacher": str(tiny), "stages": [first, second, *merged]}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("feedback") / "run"
    run_chain(parse_chain(data), folder)
    return folder


def on_base(tiny, *parts):
    """The base with LoRAs of these files at these strengths added to its weights."""
    teacher = load_teacher(str(tiny))
    weights = dict(teacher.denoiser.network.named_parameters())
    for folder, scale in parts:
        merge(weights, load_weights(folder), scale)
    return output(teacher.denoiser, teacher)


def test_feedback_is_a_lora_of_its_own_on_the_frozen_student(run, tiny):
    first, second, half, full = (run / name / "student" for name in ("01-student", "02-liked", "03-half", "04-full"))
    assert torch.allclose(student(second), on_base(tiny, (first, 1.0), (second, 1.0)), atol=1e-5)
    assert not torch.allclose(student(second), student(first), atol=1e-3)
    ranks = [load_card(folder).rank for folder in (first, second, half, full)]
    assert ranks == [4, 2, 6, 0] and load_card(second).teacher == "../../01-student/student"
    assert sampler_of(load_card(second)) == TCDSampler(num_inference_steps=2, eta=0.3, original_inference_steps=10)
    assert torch.allclose(student(full), student(second), atol=1e-5)


def test_merged_with_a_scale_as_one_lora_on_the_first_teacher(run, tiny):
    """Which others have: it may be exported as a LoRA, what the feedback alone may not."""
    first, second, half = (run / name / "student" for name in ("01-student", "02-liked", "03-half"))
    assert torch.allclose(student(half), on_base(tiny, (first, 1.0), (second, 0.5)), atol=1e-5)
    assert load_card(half).teacher == str(tiny) and load_card(half).weights == "lora"
    check_form("lora", load_card(half), half)
    with pytest.raises(ValueError, match="stands on another student"):
        check_form("lora", load_card(second), second)


def test_what_is_logged_and_drawn(run):
    lines = [json.loads(line) for line in (run / "02-liked" / "log.jsonl").read_text().splitlines()]
    wanted = {f"student/{name}" for name in (
        "taste_missing", "taste_mean", "taste_std", "taste_reached", "held_out_mean", "held_out_std", "perceptual",
        "x0_spread", "data_spread",
    )}  # fmt: skip
    assert len(lines) == 4 and lines[-1].keys() >= wanted and lines[-1]["student/taste_reached"] == 0
    assert lines[-1]["student/taste_mean"] + lines[-1]["student/taste_missing"] == pytest.approx(50, rel=1e-6)
    (drawn,) = (run / "02-liked" / "samples").glob("*.png")
    said = json.loads((run / "02-liked" / "samples" / "statistics.jsonl").read_text().splitlines()[-1])
    assert drawn.name == "step-0000004.png" and said["diversity"] > 0
    page = Page("x")
    _feedback(page, [FinishedRun.read(run / "02-liked", "liked")])
    for word in ("liked taste", "liked held_out", "reward, in its model", "share at the threshold", "diversity"):
        assert word in page.html()
    page = Page("x")
    _feedback(page, [FinishedRun.read(run / "01-student", "student")])
    assert "Feedback" not in page.html()


def test_a_run_that_was_stopped_ends_in_the_same_bits(run, rewards, monkeypatch, tmp_path):
    recipe = parse_recipe({
        **COMMON, "teacher": str(run / "01-student"), "method": feedback(rewards, held_out="", anchor_weight=0.1),
        "training": {**COMMON["training"], "steps": 3, "checkpoint_every": 1},
    })  # fmt: skip
    from fewstep.runs.distill import distill

    whole = distill(recipe, tmp_path / "whole")
    stop_and_go_on(monkeypatch, recipe, tmp_path / "part", 2)
    weights = [load_file(folder / "pytorch_lora_weights.safetensors") for folder in (whole, tmp_path / "part/student")]
    assert all(torch.equal(t, weights[1][key]) for key, t in weights[0].items())
    assert any(t.any() for key, t in weights[0].items() if "lora_B" in key)


def test_prompts_of_the_pictures_reach_the_rewards(run, rewards, tmp_path, monkeypatch):
    from fewstep.models.rewards import SmallReward
    from fewstep.runs.distill import distill
    from fewstep.scenes64.scenes import Scenes

    asked = []

    def listening(self, pictures, prompts, ask=SmallReward.__call__):
        asked.append(prompts)
        return ask(self, pictures, prompts)

    monkeypatch.setattr(SmallReward, "__call__", listening)
    recipe = parse_recipe({**COMMON, "teacher": str(run / "01-student"), "method": feedback(rewards, held_out=""),
                           "training": {**COMMON["training"], "steps": 2}})  # fmt: skip
    distill(recipe, tmp_path / "run")
    captions = [Scenes(1).scene(i).caption for i in range(8)]
    assert sorted(asked[0] + asked[1]) == sorted(captions)


def test_what_does_not_fit_is_one_sentence_before_anything_is_written(run, rewards, data, tmp_path):
    base = {**COMMON, "teacher": str(run / "01-student")}
    for changes, said in (
        ({"sampler": "lcm"}, "method.sampler is lcm, but its teacher .* is a student for the sampler tcd"),
        ({"rewards": [{"model": "no.safetensors", "threshold": 1}]}, "There is no reward model 'no.safetensors'"),
        ({"rewards": [{"model": str(rewards[1]), "threshold": 1}], "held_out": ""}, "must never serve in a loss"),
        ({"held_out": str(rewards[0])}, "which is trained on"),
        ({"rewards": [{"model": "pickscore"}]}, r"method.rewards.0.threshold is missing\."),
        (
            {"rewards": [{"model": "pickscore", "threshold": 1, "wait": 2}]},
            "Unknown key 'method.rewards.0.wait': did you mean 'weight'",
        ),
    ):
        with pytest.raises((RecipeError, ValueError), match=said):
            setup(parse_recipe({**base, "method": feedback(rewards, **changes)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_merging_is_refused_where_it_makes_no_sense(run, data):
    first, second = data["stages"][:2]
    for stages, said in (
        ([first, {"name": "m", "merge": "student", "weights": "lora"}], "is no stage with a LoRA"),
        ([first, {"name": "m", "merge": "student", "scale": "much"}], "stages.m.scale: input should be a valid"),
        (
            [first, {"name": "m", "merge": "student", "scale": float("nan")}],
            "m.scale: input should be a finite",
        ),
        (
            [first, {"name": "m", "merge": "student", "weights": "half"}],
            "m.weights: input should be 'full' or",
        ),
    ):
        with pytest.raises(RecipeError, match=said):
            parse_chain({**data, "stages": stages})
    changed = [first, second, {"name": "half", "merge": "liked", "scale": 0.7, "weights": "lora"}, data["stages"][3]]
    with pytest.raises(RecipeError, match=r"03-half was merged with other settings: delete it"):
        run_chain(parse_chain({**data, "stages": changed}), run, resume=True)
    assert run_chain(parse_chain(data), run, resume=True) == run / "04-full" / "student"


@pytest.mark.slow
def test_the_shipped_recipe_is_planned_before_its_reward_models_are_there(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    chain = load("scenes-64-feedback")
    stage = next(stage for stage in chain.stages if stage.name == "feedback")
    planned = plan(chain.on_first_teacher()[stage.name], timed=False)
    assert planned.estimate.calls == {"student": 3.5, "teacher": 1} and planned.estimate.equivalents > 0
    assert stage.recipe.sample.num_inference_steps == 4 and stage.recipe.sample.eta == 0.3
    first = next(s.recipe for s in chain.stages if s.name == "student")
    assert first.method == {**load_recipe("scenes-64-tcd").method}
    assert replace(first.training, ema_decay=0) == replace(load_recipe("scenes-64-tcd").training, ema_decay=0)


def test_choices_and_reward_by_command(monkeypatch, capsys, tmp_path):
    code, said, _ = inside(monkeypatch, capsys, tmp_path, "reward", "scenes", "c", "--count", 12, "--teacher", "", "-q")
    assert code == 0 and "12 choices of simulated raters" in said and "no judge agrees with more than" in said
    assert len(read_preferences(tmp_path / "c").choices) == 12
    code, said, _ = inside(monkeypatch, capsys, tmp_path, "reward", "train", "c", "--out", "r", "--steps", 2, "-q")
    assert code == 0 and "of 2 held-out choices" in said and (tmp_path / "r" / "reward.safetensors").is_file()
    for words, wrong in (
        (("scenes", "c"), "is not an empty folder"),
        (("train", "nowhere"), "There are no preferences in 'nowhere'"),
        (("train", "c", "--trunk", "wood"), "Unknown --trunk 'wood'"),
    ):
        code, _, errors = inside(monkeypatch, capsys, tmp_path, "reward", *words, "-q")
        assert code == 2 and wrong in errors and "Traceback" not in errors
