"""Hyper-SD's chain from recipe to picture: what each stage begins with and costs, where one step starts, resuming."""

import json

import pytest
import torch

from fewstep.export.comfyui import usage_hint
from fewstep.export.scheduler import plan_scheduler
from fewstep.inference.generate import generate, load_model
from fewstep.recipe.chain import Chain, load
from fewstep.recipe.load import parse_recipe
from fewstep.recipe.validate import RecipeError
from fewstep.runs.chain import run_chain
from fewstep.runs.setup import setup
from fewstep.runs.teacher_samples import pair_files
from fewstep.sampling import LCMSampler, PhasedSampler, TCDSampler
from fewstep.students.card import load_card, sampler_of
from fewstep.students.lineage import load_start, teacher_of
from fewstep.training.checkpoint import latest, same, split
from fewstep.training.checkpoint import load as read
from tests.command_line import output, stop_and_go_on, student

STAGES = ["eight", "four", "one", "one-step"]  # of those shipped: "two" is as "four", "unified" is made ready alone
NAMES = [f"{number:02d}-{name}" for number, name in enumerate(STAGES, 1)]
TINY = [
    "training.batch_size=4", "training.log_every=2", "training.checkpoint_every=2", "training.warmup_steps=1",
    "data.size=16", "sample.prompts=[a red star]", "sample.every=2", "sample.teacher_steps=2", "student.rank=4",
    "stages.one.init=four", "stages.one.training.ema_decay=0", *(f"stages.{s}.training.steps=2" for s in STAGES),
    *(f"stages.{s}.pairs.{key}" for s in ("one-step", "unified") for key in ("size=4", "num_inference_steps=2")),
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """The shipped recipe, made short."""
    folder = tmp_path_factory.mktemp("runs") / "hyper"
    shipped = {stage.name: stage for stage in load("scenes-64-hyper", [f"teacher.path={tiny}", *TINY]).stages}
    run_chain(Chain(tuple(shipped[name] for name in STAGES)), folder)
    return shipped, folder


@pytest.fixture(scope="module")
def unified(run, tmp_path_factory):
    """The last stage, made ready."""
    made = {"one": run[1] / NAMES[2] / "student"}
    return setup(run[0]["unified"].recipe, tmp_path_factory.mktemp("unified"), made)


def test_every_stage_leaves_a_student_of_its_own_steps(run, unified, tiny):
    cards = [*(load_card(run[1] / name / "student") for name in NAMES), unified.card(0)]
    assert [card.num_inference_steps for card in cards] == [8, 4, 2, 1, 1]
    assert [card.sampler for card in cards] == ["phased", "phased", "tcd", "lcm", "tcd"]
    assert [card.timesteps for card in cards] == [(), (), (), (800,), ()]
    assert [card.weights for card in cards] == ["lora"] * 3 + ["full", "lora"]
    assert sampler_of(cards[1]) == PhasedSampler(num_inference_steps=4, original_inference_steps=16)
    assert {card.guidance_scale for card in cards} == {1.0}
    assert len(list((run[1] / "data").glob("pairs-*"))) == 1
    assert {card.teacher for card in cards} == {str(tiny)}  # LoRAs on the first model, which others have


def test_a_later_stage_goes_on_from_the_one_before_and_asks_its_student(run, tmp_path):
    """Its student, its target and who hops are the earlier student; the teacher is the first model; no guidance."""
    stages, folder = run
    made = folder / NAMES[0] / "student"
    job, wanted = setup(stages["four"].recipe, tmp_path, {"eight": made}), student(made)
    for role in ("student", "target", "beginning"):
        assert torch.allclose(output(getattr(job.roles, role), job.teacher), wanted, atol=1e-5)
    assert not torch.allclose(output(job.roles.teacher, job.teacher), wanted, atol=1e-5)


def test_one_step_begins_with_the_consistency_student_and_its_fake_score_too(run, unified):
    wanted = student(run[1] / NAMES[2] / "student")
    for role in ("student", "fake"):
        assert torch.allclose(output(getattr(unified.roles, role), unified.teacher), wanted, atol=1e-5)
    assert not torch.allclose(output(unified.roles.teacher, unified.teacher), wanted, atol=1e-5)


def test_the_one_step_network_is_drawn_from_800_by_lcm_here_and_in_diffusers(run, tmp_path):
    folder = run[1] / NAMES[3]
    words = generate(load_model(str(folder)), ["a red star"], None, {}, None, 0, tmp_path / "a.png")
    assert words == "lcm, timesteps 800; guidance 1; seed 0"
    card = load_card(folder / "student")
    assert sampler_of(card) == sampler_of(card, num_inference_steps=1) == LCMSampler(timesteps=(800,))
    teacher = teacher_of(folder / "student", card)
    schedule, config = teacher.denoiser.schedule, dict(teacher.pipeline.scheduler.config)
    plan = plan_scheduler(sampler_of(card), schedule, config, "epsilon", type(teacher.family))
    assert (plan.scheduler, plan.call) == ("LCMScheduler", {"timesteps": [800]})
    line = usage_hint(card, teacher, sampler_of(card), "epsilon")
    assert line.startswith("1 step, cfg 1, sampler lcm, sigmas 5.1110277 0. ") and "initial noise by 0.9814" in line
    x = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    model, cond = load_model(str(folder)), teacher.encode_prompts(["a red star"])
    with torch.no_grad():
        answer = model.denoiser(x, 800, cond)
    wanted = (x - 0.98140 * answer.output) / 0.19198  # the model card's (z - .981 eps) / .192
    assert torch.allclose(answer.x0, wanted, atol=2e-3)


def test_the_unified_lora_takes_more_steps_by_tcds_sampler(unified, tmp_path):
    card = unified.card(0)
    assert sampler_of(card) == TCDSampler(num_inference_steps=1, eta=0.3)
    assert sampler_of(card, num_inference_steps=4) == TCDSampler(num_inference_steps=4, eta=0.3)
    assert sampler_of(card).times(unified.teacher.denoiser.schedule).tolist() == [999, 0]


def test_a_sampler_of_the_recipes_own():
    base = {"method": {"name": "dmd", "timestep": 800}}
    assert parse_recipe({**base, "sample": {"sampler": "tcd", "num_inference_steps": 4}}).sample.eta == 0.0
    with pytest.raises(RecipeError, match=r"sample\.num_inference_steps is 4, but this method's students take 1"):
        parse_recipe({**base, "sample": {"num_inference_steps": 4}})
    with pytest.raises(RecipeError, match=r"Unknown sample\.sampler 'lcmm': use lcm, "):
        parse_recipe({**base, "sample": {"sampler": "lcmm"}})


@pytest.fixture(scope="module")
def ready(tiny, tmp_path_factory):
    """Makes ready the one-step stage as it would be without an init, with other keys."""
    shipped = {stage.name: stage for stage in load("scenes-64-hyper", [f"teacher.path={tiny}", *TINY]).stages}
    recipe = shipped["one-step"].recipe.model_copy(update={"init": None})

    def make(key, **keys):
        changed = getattr(recipe, key).model_copy(update=keys)
        return setup(recipe.model_copy(update={key: changed}), tmp_path_factory.mktemp("ready"))

    return make


def test_times_of_the_method_go_with_as_many_steps_alone(ready):
    card = ready("sample").card(0)
    assert (card.sampler, card.timesteps, sampler_of(card)) == ("lcm", (800,), LCMSampler(timesteps=(800,)))
    card = ready("sample", sampler="tcd").card(0)
    assert sampler_of(card) == TCDSampler(timesteps=(800,), eta=0.0)
    with pytest.raises(RecipeError, match=r"num_inference_steps is 2, .* trained at the times 800: set it to 1"):
        ready("sample", sampler="tcd", num_inference_steps=2)


def test_stages_share_the_samples_of_the_teacher_that_both_want(ready, tmp_path):
    one, same, other = ready("sample"), ready("sample", eta=0.5), ready("pairs", num_inference_steps=3)
    places = [pair_files(job, tmp_path).place for job in (one, same, other)]
    assert places[0] == places[1] != places[2] and {place.parent for place in places} == {tmp_path}
    assert pair_files(one).place == one.folder.pairs


def test_a_step_costs_what_the_documents_say(run):
    """A picture: student 3, a guided hop 2, one without 1, target 1; two half networks with their gradients, 3."""
    costs = []
    for name in NAMES:
        lines = [json.loads(line) for line in (run[1] / name / "log.jsonl").read_text().splitlines()]
        costs.append(lines[-1]["forward_equivalents"] / 2 / 4)
        if name in NAMES[1:3]:
            assert lines[-1].keys() >= {"student/consistency", "student/adversarial", "student/consistency_pull",
                                        "student/adversarial_pull", "discriminator/d_accuracy"}  # fmt: skip
    assert costs == [6, 8, 8, 12]


def test_stopping_and_resuming_ends_in_the_same_weights_and_moments(run, tmp_path, monkeypatch):
    """Who hops is in the checkpoint too: what a resumed run would make of ``init`` by then is not asked."""
    stages, folder = run
    recipe = stages["four"].recipe.model_copy(update={"init": str(folder / NAMES[0])})
    stop_and_go_on(monkeypatch, recipe, tmp_path / "run", 1)
    mine, theirs = (read(latest(where / "checkpoints"))[0] for where in (tmp_path / "run", folder / NAMES[1]))
    assert same(mine, theirs)
    assert any(name.startswith("optimizer/discriminator/") for name in mine)
    began = load_start(str(folder / NAMES[0]), str(recipe.teacher.path), "lora")
    kept = split(mine, "roles/beginning")
    assert kept.keys() == began.keys() and all(torch.allclose(kept[key], began[key], atol=1e-6) for key in kept)


@pytest.mark.parametrize("model", ["scenes-64", "sd15", "sdxl"])
def test_shipped_chains_are_the_papers(model):
    stages = load(f"{model}-hyper").stages
    recipes = [stage.recipe for stage in stages]
    assert [r.method_settings().segments for r in recipes[:4]] == [8, 4, 2, 1]
    assert [r.init for r in recipes] == [None, "eight", "four", "two", "one", "one"]
    assert [r.method_settings().guidance_scale != 1 for r in recipes] == [True, False, False, False, True, True]
    assert [r.method_settings().hop_by for r in recipes[:4]] == ["teacher", *["beginning"] * 3]
    assert recipes[4].method_settings().timestep == 800 and recipes[5].method_settings().timestep is None
    assert all(r.method_settings().fake_init_from == "student" for r in recipes[4:])
    assert len({r.teacher.path for r in recipes}) == 1
    if model != "scenes-64":
        assert {(r.training.batch_size, r.training.learning_rate) for r in recipes} == {(512, 1e-6)}
