"""`fewstep prepare`, and runs that sample their teacher first: the teacher's own pictures, once, whatever happens."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from fewstep.data.pairs import PairFiles, noise_of
from fewstep.models.families import load_teacher
from fewstep.recipe.load import load_recipe, parse_recipe
from fewstep.recipe.validate import RecipeError
from fewstep.runs.distill import distill, prepare_data
from fewstep.runs.plan import describe, plan
from fewstep.runs.setup import setup
from fewstep.runs.teacher_samples import TeacherSampling, fingerprint, pair_files
from fewstep.scenes64 import architecture as scenes64
from fewstep.scenes64.scenes import WORDS, Scenes
from fewstep.students.card import load_card
from fewstep.training import distributed
from fewstep.training.checkpoint import latest, load, same
from tests.command_line import SHORT, inside, sets

FEW = ["pairs.size=10", "pairs.batch_size=4", "pairs.num_inference_steps=2", "data.size=7", "pairs.seed=5"]


@pytest.fixture(scope="module")
def shaken(tmp_path_factory):
    """The architecture of scenes-64 with weights that let captions and times through, as a diffusers folder."""
    pipeline = scenes64.build_pipeline(WORDS)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in pipeline.unet.parameters():
            weight.add_(0.02 * torch.randn(weight.shape))
    folder = tmp_path_factory.mktemp("shaken") / "pipeline"
    scenes64.save_pipeline(pipeline, folder)
    return folder


@pytest.fixture(scope="module")
def options(shaken):
    return [f"teacher.path={shaken}", *SHORT, "training.steps=2", "sample.every=2", *FEW]


@pytest.fixture(scope="module")
def made(options, tmp_path_factory):
    """The teacher's samples of the recipe, made without a break."""
    folder = tmp_path_factory.mktemp("runs") / "made"
    prepare_data(load_recipe("scenes-64-dmd", options), folder, from_teacher=True)
    return folder


def tensors(folder):
    return {path.name: load_file(path) for path in sorted((folder / "data" / "pairs").glob("*.safetensors"))}


def same_files(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and len(a) == 3 and all(same(a[name], b[name]) for name in a)


@torch.no_grad()
def test_samples_are_the_guided_teachers_from_their_noise_and_captions(made, shaken):
    """Against diffusers' own DDIM, from the UNet up; captions are the data's, counted round."""
    teacher = load_teacher(str(shaken))
    scenes = Scenes(1)
    texts = [scenes.scene(i % 7).caption for i in range(10)]
    embeds, null = (teacher.encode_prompts(t)["prompt_embeds"] for t in (texts, [""] * 10))
    scheduler = DDIMScheduler.from_config({**teacher.pipeline.scheduler.config, "set_alpha_to_one": True})
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [999, 499]
    x = torch.stack([noise_of(5, i, (16, 8, 8)) for i in range(10)])
    for t in scheduler.timesteps:
        plain, empty = (teacher.pipeline.unet(x, t, encoder_hidden_states=e).sample for e in (embeds, null))
        x = scheduler.step(empty + 3.0 * (plain - empty), t, x).prev_sample
    stored = tensors(made).values()
    found = torch.cat([file["x0"] for file in stored]).float()
    torch.testing.assert_close(found, x, rtol=2e-3, atol=2e-3)
    assert torch.equal(torch.cat([file["cond.prompt_embeds"] for file in stored]), embeds.half())
    assert all(torch.equal(file["null.prompt_embeds"], null[:1].half()) for file in stored)


def test_processes_share_the_files_out(made, options, tmp_path, monkeypatch):
    """Each in its turn, here: the first of two makes every other file, the second the rest."""
    job = setup(load_recipe("scenes-64-dmd", options), tmp_path / "run")
    files = pair_files(job)
    files.claim()
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "wait", lambda: None)
    for rank, left in ((1, [0, 2]), (0, [])):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        TeacherSampling.of_run(job)._generate(files, [0, 1, 2], False)
        assert files.missing() == left
    assert same_files(tmp_path / "run", made)


def test_ctrl_c_says_how_to_go_on_and_it_ends_in_the_same_bits(made, options, tmp_path, monkeypatch, capsys):
    write = PairFiles.write

    def interrupted(self, number, *rest):
        write(self, number, *rest)
        if number == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(PairFiles, "write", interrupted)
    words = ["scenes-64-dmd", "--from-teacher", "--out", "run", *sets(options)]
    code, _, errors = inside(monkeypatch, capsys, tmp_path, "prepare", *words, "-q")
    assert code == 130 and "Interrupted; what was saved is kept. Continue with: fewstep prepare scenes-64-dmd" in errors
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "data" / "pairs").glob("*.safetensors")}
    assert len(before) == 2
    monkeypatch.setattr(PairFiles, "write", write)
    code, output, _ = inside(monkeypatch, capsys, tmp_path, "prepare", *words, "-q")
    assert code == 0 and "10 samples of the teacher are in run/data/pairs (40 forward passes)." in output
    assert "Continue with: fewstep distill scenes-64-dmd --out run --set" in output and output.strip().endswith(
        "--resume"
    )
    assert same_files(tmp_path / "run", made) and all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.fixture(scope="module")
def run(options, made, tmp_path_factory):
    """A finished DMD run that made its pairs by itself."""
    folder = tmp_path_factory.mktemp("runs") / "dmd"
    recipe = load_recipe("scenes-64-dmd", options)
    distill(recipe, folder)
    return recipe, folder


def test_a_run_that_needs_pairs_makes_them_first_and_counts_them(run, made, options):
    folder = run[1]
    assert same_files(folder, made)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    # a picture: student 3 for each of its two answers, teacher 2 for guidance, fake score 1 and 3
    assert [line["forward_equivalents"] for line in lines] == [2 * 4 * 12]
    card = load_card(folder / "student")
    assert card.forward_equivalents == 2 * 4 * 12 + 10 * 2 * 2
    assert (card.method, card.num_inference_steps, card.guidance_scale) == ("dmd", 1, 1.0)
    said = json.loads((folder / "versions.json").read_text())
    assert said["pairs"] != said["data"]
    assert {"student/matching", "student/regression", "fake/loss", "student/fake_error"} <= lines[-1].keys()


@pytest.mark.slow
def test_prepared_distilled_halfway_and_resumed_is_distilled(run, made, options, tmp_path):
    """With pairs from a folder of their own, too; they are met in the same order."""
    recipe = load_recipe("scenes-64-dmd", [*options, f"pairs.path={made / 'data' / 'pairs'}"])
    half = recipe.model_copy(update={"training": dataclasses.replace(recipe.training, steps=1)})
    before = {path: path.stat().st_mtime_ns for path in (made / "data" / "pairs").iterdir()}
    prepare_data(half, tmp_path / "run")
    distill(half, tmp_path / "run", resume=True)
    distill(recipe, tmp_path / "run", resume=True)
    mine, theirs = (load(latest(place / "checkpoints"))[0] for place in (tmp_path / "run", run[1]))
    assert same(mine, theirs) and not (tmp_path / "run" / "data" / "pairs").exists()
    assert before == {path: path.stat().st_mtime_ns for path in (made / "data" / "pairs").iterdir()}
    assert load_card(tmp_path / "run" / "student").forward_equivalents == 2 * 4 * 12 + 40


def test_any_method_trains_on_the_teachers_samples(options, tmp_path):
    recipe = load_recipe(
        "scenes-64-tcd", [*options, "training.steps=1", "data.source=teacher", "method.guidance_scale=2"]
    )
    distill(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "data" / "latents-00000.safetensors").exists()
    x0 = torch.cat([file["x0"] for file in tensors(tmp_path / "run").values()]).float()
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert abs(line["student/data_std"] / float(x0.std(correction=0)) - 1) < 0.2
    assert load_card(tmp_path / "run" / "student").forward_equivalents == 4 * 6 + 40
    assert recipe.pairs.guidance_scale == 2.0


def test_stale_samples_are_refused_and_the_folder_is_left_alone(made, options, tmp_path, monkeypatch, capsys):
    changes = [*options, f"pairs.path={made / 'data' / 'pairs'}", "pairs.guidance_scale=4"]
    words = ["distill", "scenes-64-dmd", "--out", "run", *sets(changes), "-q"]
    code, _, errors = inside(monkeypatch, capsys, tmp_path, *words)
    assert code == 2 and "samples of pairs.guidance_scale = 3.0, not 4.0: delete the folder" in errors
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_a_teachers_fingerprint_is_its_weights_kind_and_schedule(options, tmp_path):
    recipe = load_recipe("scenes-64-dmd", options)
    lora, full = (
        setup(recipe.model_copy(update={"student": recipe.student.model_copy(update={"weights": kind})}), tmp_path)
        for kind in ("lora", "full")
    )
    name = fingerprint(lora.teacher)
    assert name == fingerprint(full.teacher)  # adapters of a student are none of the teacher's weights
    kind, lora.teacher.denoiser.prediction_type = lora.teacher.denoiser.prediction_type, "sample"
    assert fingerprint(lora.teacher) != name
    lora.teacher.denoiser.prediction_type = kind
    for part in (lora.roles.base, lora.teacher.pipeline.text_encoder):
        weight = next(p for key, p in part.named_parameters() if key.endswith("conv_in.weight") or "embedding" in key)
        with torch.no_grad():
            weight.mul_(1.001)
        assert fingerprint(lora.teacher) != name
        name = fingerprint(lora.teacher)


def test_a_teacher_that_gives_nan_is_one_sentence(options, tmp_path):
    recipe = load_recipe("scenes-64-dmd", [*options, "pairs.guidance_scale=1e30"])
    with pytest.raises(ValueError, match=r"samples 0 to 3 are not finite: lower pairs.guidance_scale"):
        distill(recipe, tmp_path / "run")


def test_running_out_of_memory_says_what_to_lower(options, tmp_path, monkeypatch):
    def too_large(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("fewstep.runs.teacher_samples.sample", too_large)
    with pytest.raises(ValueError, match=r"while the teacher was sampled, 4 images at once: lower pairs.batch_size"):
        prepare_data(load_recipe("scenes-64-dmd", options), tmp_path / "run", from_teacher=True)


def test_what_a_recipe_leaves_out():
    def pairs(**recipe):
        return parse_recipe(recipe).pairs

    assert (pairs(method="dmd").size, pairs(method="dmd").guidance_scale) == (4000, 3.0)
    of_method = pairs(method={"name": "dmd", "guidance_scale": 2}, data={"size": 9})
    assert (of_method.size, of_method.guidance_scale) == (9, 2.0)
    drawn = pairs(
        method={"name": "tcd", "guidance_scale": [2, 8]}, data={"source": "teacher"}, sample={"guidance_scale": 5}
    )
    assert drawn.guidance_scale == 5.0
    assert pairs(method="dmd", pairs={"guidance_scale": 1}).guidance_scale == 1.0
    unused = pairs(method="tcd")
    assert (unused.size, unused.guidance_scale) == (None, None)
    with pytest.raises(RecipeError, match=r"Unknown key 'pairs.steps': did you mean|known keys are"):
        pairs(method="dmd", pairs={"steps": 5})


def test_prepare_says_what_it_cannot_do(tmp_path, monkeypatch, capsys):
    code, _, errors = inside(monkeypatch, capsys, tmp_path, "prepare", "scenes-64-tcd", "--from-teacher")
    assert code == 2 and "This recipe needs no samples of its teacher: set data.source to teacher" in errors
    (tmp_path / "two.yaml").write_text("stages: [{name: a, method: dmd}]")
    code, _, errors = inside(monkeypatch, capsys, tmp_path, "prepare", "two.yaml")
    assert code == 2 and "has stages" in errors


@pytest.mark.slow
def test_a_plan_counts_the_pairs(options):
    said = "\n".join(describe(plan(load_recipe("scenes-64-dmd", options), timed=False)))
    assert "before training, the teacher generates 10 samples in 2 steps each: up to 40 forward passes" in said
    assert "network calls per step: student 1, teacher 1, fake 2; cost per image: 12 forward passes" in said
