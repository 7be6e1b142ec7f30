"""Lightning from recipe to picture: who teaches, where discriminators begin, what resuming ends in, x0 students."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch

from fewstep.inference.generate import generate, load_model
from fewstep.models.families import load_teacher
from fewstep.recipe.chain import load, parse_chain
from fewstep.recipe.load import parse_recipe
from fewstep.recipe.validate import RecipeError
from fewstep.runs.chain import run_chain
from fewstep.runs.setup import setup
from fewstep.sampling import DDIMSampler
from fewstep.students.card import load_card, sampler_of
from fewstep.students.lineage import open_teacher, teacher_of
from fewstep.students.student import load_student, load_weights
from fewstep.training.checkpoint import latest, same
from fewstep.training.checkpoint import load as read
from fewstep.training.trainer import Trainer, TrainingStopped

TINY = [
    "training.batch_size=4", "training.log_every=1", "training.checkpoint_every=1", "training.warmup_steps=1",
    "data.size=16", "sample.prompts=[a red star]", "sample.every=2", "sample.teacher_steps=2", "student.rank=4",
    *(f"stages.{stage}.training.steps=2" for stage in ("eight", "four", "conditional", "unconditional")),
]  # fmt: skip
NAMES = ["01-eight", "02-four", "03-conditional", "04-unconditional"]
LATER = [
    {"name": "whole", "merge": "unconditional"},
    {"name": "full", "init": "whole", "student": {"weights": "full"},
     "method": {"name": "lightning", "loss": "unconditional", "discriminator_weights": "lora"}},
    {"name": "converted", "teacher": "full", "student": {"weights": "full"},
     "training": {"steps": 16, "log_every": 1, "checkpoint_every": 16, "learning_rate": 3e-3}, "sample": {"every": 16},
     "method": {"name": "lightning", "loss": "convert", "num_inference_steps": 1, "num_teacher_steps": 4}},
    {"name": "one", "teacher": "full", "init": "converted", "student": {"weights": "full"},
     "method": {"name": "lightning", "loss": "conditional", "num_inference_steps": 1, "num_teacher_steps": 4,
                "prediction_type": "sample"}},
]  # fmt: skip
COMMON = {
    "training": {"steps": 2, "batch_size": 4, "log_every": 2, "checkpoint_every": 2, "learning_rate": 1e-3,
                 "critic_learning_rate": 1e-3, "ema_decay": 0.5},
    "data": {"size": 16}, "student": {"rank": 4}, "sample": {"every": 2, "teacher_steps": 2, "prompts": ["a red star"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """The shipped recipe, made short."""
    folder = tmp_path_factory.mktemp("runs") / "lightning"
    chain = load("scenes-64-lightning", [f"teacher.path={tiny}", *TINY])
    run_chain(chain, folder)
    return chain, folder


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The paper's ends: full weights, and one step that predicts x0."""
    first = {"name": "unconditional", "method": {"name": "lightning", "loss": "unconditional"}}
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run_chain(parse_chain({**COMMON, "teacher": str(tiny), "stages": [first, *LATER]}), folder)
    return folder


@pytest.mark.slow
def test_every_stage_leaves_a_student_of_its_own_steps(run, tmp_path):
    folder = run[1]
    cards = [load_card(folder / name / "student") for name in NAMES]
    assert [card.num_inference_steps for card in cards] == [8, 4, 4, 4]
    assert [card.guidance_scale for card in cards] == [1.0] * 4
    assert [card.prediction_type for card in cards] == ["epsilon"] * 4
    assert sampler_of(cards[0]) == DDIMSampler(num_inference_steps=8)
    words = generate(load_model(str(folder)), ["a red star"], None, {}, None, 0, tmp_path / "a.png")
    assert words == "ddim, timesteps 999, 749, 499, 249; guidance 1; seed 0"
    assert [p.name for p in (folder / NAMES[-1] / "student").glob("*.safetensors")] == [
        "pytorch_lora_weights.safetensors"
    ]


@pytest.mark.slow
def test_a_step_costs_what_the_documents_say(run):
    """A picture: student 3, teacher 2 calls (guided: 4); features 1/2 each, with their gradients 1 more for each.

    The pull on the student is a second backward through the fake's features, which is not counted.
    """
    costs = []
    for name in NAMES:
        lines = [json.loads(line) for line in (run[1] / name / "log.jsonl").read_text().splitlines()]
        costs.append(lines[-1]["forward_equivalents"] / 2 / 4)
        logged = {"student/landing_error", "discriminator/d_accuracy"} if "cond" in name else {"student/mse"}
        assert lines[-1].keys() >= logged
    assert costs == [3 + 4, 3 + 2, 3 + 2 + 3 * 1.5, 3 + 2 + 2 * 1.5]


@pytest.mark.slow
def test_a_discriminator_begins_as_the_first_model_whoever_teaches(run, tiny, tmp_path):
    chain, folder = run
    recipe = chain.stages[2].recipe
    job = setup(recipe, tmp_path, {"eight": folder / NAMES[0] / "student", "four": folder / NAMES[1] / "student"})
    first = dict(load_teacher(str(tiny)).denoiser.network.named_parameters())
    found = job.roles.tensors_of("discriminator")
    assert all(torch.equal(tensor, first[name]) for name, tensor in found.items())
    taught = dict(job.roles.base.named_parameters())
    assert any(not torch.equal(t, taught.get(name, taught.get(name.replace(".weight", ".base_layer.weight"))))
               for name, t in found.items())  # fmt: skip


@pytest.mark.slow
def test_a_discriminator_has_no_decoder(run, tmp_path):
    chain, folder = run
    job = setup(chain.stages[3].recipe, tmp_path, {"eight": folder / NAMES[0] / "student",
                                                     "conditional": folder / NAMES[2] / "student"})  # fmt: skip
    names = job.roles.tensors_of("discriminator")
    assert any(name.startswith("unet.mid_block") for name in names)
    assert not any(name.startswith(("unet.up_blocks", "unet.conv_norm_out", "unet.conv_out")) for name in names)
    half = sum(t.numel() for t in names.values())
    everything = sum(p.numel() for name, p in job.roles.base.named_parameters() if ".lora_" not in name)
    assert half < 0.6 * everything
    job.roles.discriminator.features(torch.zeros(1, *job.teacher.latent_shape), 500, job.teacher.encode_prompts(["a"]),
                                     ["mid"])  # fmt: skip


@pytest.mark.slow
def test_stopped_in_every_stage_and_gone_on_with_it_ends_in_the_same_weights(run, tmp_path, monkeypatch):
    chain, folder = run
    step, place, stopped = Trainer.step, tmp_path / "run", set()

    def stopping(self, number):
        step(self, number)
        if self.run_dir.name not in stopped:
            stopped.add(self.run_dir.name)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "step", stopping)
    for _ in NAMES:
        with pytest.raises(TrainingStopped, match="after step 1"):
            run_chain(chain, place, resume=True)
    run_chain(chain, place, resume=True)
    assert stopped == set(NAMES)
    mine, theirs = (read(latest(where / NAMES[-1] / "checkpoints"))[0] for where in (place, folder))
    assert same(mine, theirs)
    assert any(name.startswith("optimizer/discriminator/") for name in mine)


def said(denoiser, teacher):
    x = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return denoiser(x, 999, teacher.encode_prompts(["a red star", "two shapes"])).x0


@pytest.mark.slow
def test_a_student_may_predict_another_kind_than_its_teacher(whole, tmp_path):
    """Its card says so, and whoever opens it reads it so: to draw, to compare, to teach."""
    folder = whole / "05-one" / "student"
    card = load_card(folder)
    assert (card.prediction_type, card.num_inference_steps, card.weights) == ("sample", 1, "full")
    assert load_card(whole / "03-full" / "student").prediction_type == "epsilon"
    teacher = teacher_of(folder, card)
    student = load_student(teacher, folder, card)
    assert student.prediction_type == "sample"
    again = open_teacher(str(whole))
    assert again.denoiser.prediction_type == "sample"
    assert torch.allclose(said(student, teacher), said(again.denoiser, teacher), atol=1e-6)
    x = torch.randn(1, *teacher.latent_shape)
    with torch.no_grad():
        told = student(x, 999, teacher.encode_prompts(["a red star"]))
    assert torch.equal(told.x0, told.output)
    words = generate(load_model(str(whole)), ["a red star"], None, {}, None, 0, tmp_path / "a.png")
    assert words == "ddim, timesteps 999; guidance 1; seed 0"


@pytest.mark.slow
def test_a_conversion_brings_x0_towards_the_teachers(whole):
    lines = [json.loads(line) for line in (whole / "04-converted" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["student/convert"] < 0.7 * lines[0]["student/convert"]


@pytest.mark.slow
def test_weights_of_one_kind_are_not_read_as_another(whole, tmp_path):
    method = {"name": "lightning", "loss": "conditional", "num_inference_steps": 1, "num_teacher_steps": 4}
    recipe = {**COMMON, "teacher": str(whole / "03-full"), "student": {"weights": "full"}}
    with pytest.raises(RecipeError, match=r"predicts sample, but this method's predicts epsilon"):
        setup(parse_recipe({**recipe, "method": method, "init": str(whole / "04-converted")}), tmp_path)
    with pytest.raises(RecipeError, match=r"predict sample cannot begin .* convert"):
        setup(parse_recipe({**recipe, "method": {**method, "prediction_type": "sample"}}), tmp_path)


def test_other_steps_than_its_own_are_refused():
    with pytest.raises(RecipeError, match="num_inference_steps is 6, but this method's students take 4: leave it out"):
        parse_recipe({"method": "lightning", "sample": {"num_inference_steps": 6}})
    assert parse_recipe({"method": {"name": "lightning", "num_inference_steps": 2}}).sample.num_inference_steps == 2


def test_a_teacher_is_asked_on_the_grid_it_learnt():
    first = {"name": "eight", "method": {"name": "lightning", "num_inference_steps": 8, "num_teacher_steps": 16}}
    second = {"name": "four", "teacher": "eight", "method": {"name": "lightning", "num_teacher_steps": 16}}
    with pytest.raises(RecipeError, match=r"four.method.num_teacher_steps is 16, but 'eight' makes .* 8 steps"):
        parse_chain({"stages": [first, second]})
    second["method"]["num_teacher_steps"] = 8
    parse_chain({"stages": [first, second]})


@pytest.mark.slow
def test_merged_it_is_the_same_student(whole):
    one, other = (whole / name / "student" for name in ("01-unconditional", "02-whole"))
    teacher = teacher_of(one, load_card(one))
    answers = [said(load_student(teacher_of(f, load_card(f)), f), teacher) for f in (one, other)]
    assert torch.allclose(*answers, atol=1e-4) and load_weights(other).keys() != load_weights(one).keys()


@pytest.mark.parametrize(("weights", "discriminator", "waits"), [
    ("full", "full", True), ("lora", "full", False), ("full", "lora", False),
])  # fmt: skip
def test_a_teacher_that_adapters_stand_on_is_read_at_once(monkeypatch, weights, discriminator, waits):
    """An adapter on weights that are still in their files would stay on the meta device."""
    from fewstep.runs import setup

    monkeypatch.setattr(setup.distributed, "count", lambda: 2)
    method = {"name": "lightning", "loss": "adversarial", "discriminator_weights": discriminator}
    recipe = SimpleNamespace(
        training=SimpleNamespace(fsdp=True), student=SimpleNamespace(weights=weights), method=method, init=None,
        needs_pairs=False, evaluate=SimpleNamespace(every=0),
    )  # fmt: skip
    assert setup._may_wait(recipe) == waits
