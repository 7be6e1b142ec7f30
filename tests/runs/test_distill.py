"""The main job on the real path: pipeline folder, text, latents, LoRA, checkpoints, export, sampling."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fewstep.data.files import only_one
from fewstep.inference.generate import generate, load_model
from fewstep.models.families import load_teacher
from fewstep.recipe.load import load_recipe
from fewstep.recipe.validate import RecipeError
from fewstep.reports.diagnose import diagnose
from fewstep.runs.distill import distill, prepare_data
from fewstep.runs.setup import setup
from fewstep.sampling import TCDSampler, sample
from fewstep.scenes64.latents import scene_latents
from fewstep.students.card import load_card, sampler_of
from fewstep.students.student import load_student
from fewstep.training.checkpoint import same
from fewstep.training.trainer import Trainer
from tests.command_line import stop_and_go_on


@pytest.fixture(scope="module")
def run(short, tmp_path_factory):
    """A finished short TCD run."""
    folder = tmp_path_factory.mktemp("runs") / "tcd"
    recipe = load_recipe("scenes-64-tcd", short)
    distill(recipe, folder)
    return recipe, folder


def test_a_run_directory_holds_everything(run):
    _, folder = run
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert found == {
        ".lock", "recipe.yaml", "versions.json", "log.jsonl", "data/latents-00000.safetensors",
        "samples/step-0000004.png",
        "samples/statistics.jsonl", "student/few_step.json", "student/pytorch_lora_weights.safetensors",
        "student/samples.png",
        "checkpoints/step-0000002/state.json", "checkpoints/step-0000002/tensors.safetensors",
        "checkpoints/step-0000004/state.json", "checkpoints/step-0000004/tensors.safetensors",
    }  # fmt: skip
    assert load_recipe(folder / "recipe.yaml").as_yaml() == run[0].as_yaml()
    assert set(json.loads((folder / "versions.json").read_text())) >= {"torch", "diffusers", "peft", "data"}


def test_the_grid_says_how_diverse_samples_of_one_prompt_are(run):
    """A LoRA after four steps of training is the teacher still, sampled otherwise."""
    lines = [json.loads(line) for line in (run[1] / "samples" / "statistics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4]
    assert 0.2 < lines[0]["diversity"] < 5


def test_the_log_says_what_was_spent(run):
    lines = [json.loads(line) for line in (run[1] / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    # per picture: student 1 + 2 for its backward, teacher 2 for guidance, target 1
    assert [line["forward_equivalents"] for line in lines] == [2 * 4 * 6, 4 * 4 * 6]


def test_stopping_and_resuming_ends_in_the_same_weights(run, tmp_path, monkeypatch):
    recipe, folder = run
    other = tmp_path / "stopped"
    stop_and_go_on(monkeypatch, recipe, other, 3)
    assert same_students(folder, other)
    lines = [json.loads(line) for line in (other / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["forward_equivalents"] == 4 * 4 * 6


def same_students(a, b):
    """Tensors bit for bit, and the same card but for the recipe's mark (safetensors orders its metadata at random)."""
    a, b = a / "student", b / "student"
    mine, theirs = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (a, b))
    cards = [dataclasses.replace(card, costs=list(card.costs.values())) for card in map(load_card, (a, b))]
    return same(mine, theirs) and cards[0] == cards[1]


def test_resuming_a_finished_run_changes_nothing(run, tmp_path):
    recipe, folder = run
    shutil.copytree(folder, tmp_path / "before")
    distill(recipe, folder, resume=True)
    assert same_students(tmp_path / "before", folder)


def begun_with_old_numbers(run):
    """The run directory as an earlier fewstep left it, which drew random numbers of version 1 and did not say so."""
    for path in run.rglob("state.json"):
        state = json.loads(path.read_text())
        assert state.pop("random") == 2
        path.write_text(json.dumps(state))


def test_a_run_of_older_random_numbers_is_refused_but_not_its_student(run, tmp_path, monkeypatch):
    """Before anything is loaded, encoded or written; a finished one has nothing left to draw."""
    recipe, folder = run[0], tmp_path / "run"
    shutil.copytree(run[1], folder)
    assert json.loads((folder / "versions.json").read_text())["random"] == "2"
    begun_with_old_numbers(folder)
    assert distill(recipe, folder, resume=True) == folder / "student"
    longer = recipe.model_copy(update={"training": dataclasses.replace(recipe.training, steps=8)})
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr("fewstep.runs.distill.setup", None)
    with pytest.raises(RecipeError, match=r"run was begun with random numbers of version 1 .*: finish it with the few"):
        distill(longer, folder, resume=True)
    (folder / "student" / "few_step.json").unlink()
    with pytest.raises(RecipeError, match="was begun with random numbers of version 1"):
        distill(recipe, folder, resume=True)
    with pytest.raises(RecipeError, match="was begun with random numbers of version 1"):
        prepare_data(recipe, folder)
    del before[folder / "student" / "few_step.json"]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_finished_run_is_not_made_shorter(run):
    recipe, folder = run
    shorter = recipe.model_copy(update={"training": dataclasses.replace(recipe.training, steps=2)})
    with pytest.raises(ValueError, match=r"has done 4 steps, more than training\.steps = 2"):
        distill(shorter, folder, resume=True)
    distill(recipe, folder, resume=True)


def test_a_run_made_longer_and_interrupted_is_not_finished(run, tmp_path, monkeypatch):
    """The student of fewer steps does not pass for the longer run's; a refused recipe leaves it where it is."""
    recipe, folder = run[0], tmp_path / "run"
    shutil.copytree(run[1], folder)

    def of(steps):
        return recipe.model_copy(update={"training": dataclasses.replace(recipe.training, steps=steps)})

    with pytest.raises(ValueError, match=r"more than training\.steps = 3"):
        distill(of(3), folder, resume=True)
    assert distill(recipe, folder, resume=True) and load_card(folder / "student").steps == 4
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", lambda self, step: (_ for _ in ()).throw(KeyboardInterrupt))
        distill(of(5), folder, resume=True)
    assert load_card(distill(of(5), folder, resume=True)).steps == 5


def test_a_run_directory_refuses_another_run(run, tmp_path):
    recipe, folder = run
    with pytest.raises(RecipeError, match="already holds a run: add --resume"):
        distill(recipe, folder)
    with pytest.raises(RecipeError, match=r"was started with student.rank = 4, not 8"):
        distill(load_recipe(folder / "recipe.yaml", ["student.rank=8"]), folder, resume=True)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(RecipeError, match="is not empty and holds no run"):
        distill(recipe, tmp_path)
    with pytest.raises(RecipeError, match="is a file"):
        distill(recipe, tmp_path / "mine.txt")


def test_checkpointed_activations_change_nothing(run, short, tmp_path):
    recipe = load_recipe("scenes-64-tcd", [*short, "training.gradient_checkpointing=true"])
    distill(recipe, tmp_path / "run")
    assert same_students(run[1], tmp_path / "run")


def test_bf16_trains_close_to_fp32(run, short, tmp_path):
    """Network arithmetic alone is bf16: weights, states and losses stay float32."""
    recipe = load_recipe("scenes-64-tcd", [*short, "training.precision=bf16"])
    distill(recipe, tmp_path / "run")
    fp32, bf16 = (
        json.loads((folder / "log.jsonl").read_text().splitlines()[-1]) for folder in (run[1], tmp_path / "run")
    )
    assert bf16["student/x0_std"] != fp32["student/x0_std"]
    assert bf16["student/x0_std"] == pytest.approx(fp32["student/x0_std"], rel=1e-2)
    assert bf16["student/loss"] < fp32["student/loss"] + 2**-12  # rounding of two answers, 2^-8 each, squared
    tensors = load_file(tmp_path / "run" / "student" / "pytorch_lora_weights.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_the_exported_student_is_the_trained_one(run):
    recipe, folder = run
    teacher = load_teacher(recipe.teacher.path)
    student = load_student(teacher, folder / "student")
    job = setup(recipe, folder)
    trainer = Trainer(job.method, job.roles, None, recipe.training, seed=recipe.seed, run_dir=folder)
    trainer.resume()
    x = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    cond = teacher.encode_prompts(["a red star", "two shapes"])
    with torch.no_grad():
        ours, theirs = student(x, 500, cond).output, job.roles.ema(x, 500, cond).output
        assert torch.allclose(ours, theirs, atol=1e-6)
        assert not torch.allclose(ours, teacher.pipeline.unet(x, 500, cond["prompt_embeds"]).sample, atol=1e-6)


def test_diffusers_loads_the_lora_and_draws_the_same(run):
    """Our sampler on our student, and diffusers' TCDScheduler on its own copy of the same LoRA file."""
    from diffusers import DiffusionPipeline, TCDScheduler

    recipe, folder = run
    pipe = DiffusionPipeline.from_pretrained(recipe.teacher.path, torch_dtype=torch.float32)
    pipe.load_lora_weights(folder / "student")
    pipe.scheduler = TCDScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    teacher = load_teacher(recipe.teacher.path)
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    theirs = pipe(
        ["a red star", "two shapes"], num_inference_steps=4, guidance_scale=1.0, eta=0.0, latents=noise,
        output_type="latent",
    ).images  # fmt: skip
    student = load_student(teacher, folder / "student")
    cond = teacher.encode_prompts(["a red star", "two shapes"])
    ours = sample(student, TCDSampler(num_inference_steps=4, eta=0.0), noise, cond).x0
    assert torch.allclose(ours, theirs, atol=2e-5 * float(theirs.abs().max()))
    bare = sample(teacher.denoiser, TCDSampler(num_inference_steps=4, eta=0.0), noise, cond).x0
    assert not torch.allclose(bare, theirs, atol=2e-5 * float(theirs.abs().max()))


def test_lcm_with_all_weights_and_an_embedding(short, tmp_path):
    """Full LCM: its weights are told w, exported under a name no other program would load."""
    changes = [*short, "method.guidance_embed=true", "method.guidance_scale=[2, 4]", "student.weights=full",
               "training.ema_decay=0"]  # fmt: skip
    recipe = load_recipe("scenes-64-lcm", changes)
    folder = distill(recipe, tmp_path / "lcm")
    card = load_card(folder)
    assert (card.sampler, card.guidance_embed, card.extra_inputs) == ("lcm", 3.0, ("guidance_embed",))
    assert [p.name for p in folder.glob("*.safetensors")] == ["fewstep_student.safetensors"]
    words = generate(load_model(str(tmp_path / "lcm")), ["a red star"], None, {}, None, 0, tmp_path / "a.png")
    assert words == "lcm, timesteps 999, 749, 499, 249; guidance 1, embedded 3; seed 0"
    assert (tmp_path / "a.png").stat().st_size > 500


@pytest.mark.parametrize(("name", "hops", "spent"), [("cm", 10, 8), ("ict", 80, 4)])
def test_consistency_models_with_and_without_a_teacher(short, tmp_path, name, hops, spent):
    """Per picture: student 3, target 1; the teacher's two guided Heun calls 4, or none."""
    folder = distill(load_recipe(f"scenes-64-{name}", short), tmp_path / name)
    card = load_card(folder)
    assert (card.method, card.sampler, card.original_inference_steps) == ("cm", "lcm", hops)
    assert [p.name for p in folder.glob("*.safetensors")] == ["pytorch_lora_weights.safetensors"]
    lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["forward_equivalents"] == 4 * 4 * spent


def test_the_card_knows_the_sampler(run):
    card = load_card(run[1] / "student")
    assert sampler_of(card) == TCDSampler(num_inference_steps=4, eta=0.3, original_inference_steps=10)
    assert sampler_of(card, num_inference_steps=8, eta=None).num_inference_steps == 8
    assert sampler_of(card, "ddim", timesteps=[999.0, 499.0]).name == "ddim"


# ---------------------------------------------------------------- the latent cache


def test_latents_are_encoded_once(tiny, tmp_path, monkeypatch):
    teacher = load_teacher(str(tiny))
    path = tmp_path / "data" / "latents"
    first = scene_latents(path, teacher, 8, seed=5)
    monkeypatch.setattr(type(teacher), "encode_images", None)
    again = scene_latents(path, teacher, 8, seed=5)
    assert torch.equal(first.mean, again.mean)
    assert first.checksum() == again.checksum()
    monkeypatch.undo()
    assert scene_latents(path, teacher, 8, seed=6).checksum() != first.checksum()


def test_a_damaged_cache_is_made_anew(tiny, tmp_path):
    teacher, path = load_teacher(str(tiny)), tmp_path / "latents"
    first = scene_latents(path, teacher, 8, seed=5)
    file = tmp_path / "latents-00000.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert torch.equal(scene_latents(path, teacher, 8, seed=5).mean, first.mean)


# ---------------------------------------------------------------- foreign files


def test_foreign_students_are_refused_in_one_sentence(run, tmp_path):
    recipe, folder = run
    teacher = load_teacher(recipe.teacher.path)
    other = tmp_path / "student"
    other.mkdir()
    with pytest.raises(ValueError, match="holds no student"):
        load_student(teacher, other)
    (other / "few_step.json").write_text((folder / "student" / "few_step.json").read_text())
    with pytest.raises(ValueError, match="holds no student weights"):
        load_student(teacher, other)
    (other / "pytorch_lora_weights.safetensors").write_bytes(b"not a tensor in sight")
    with pytest.raises(ValueError, match="is no safetensors file"):
        load_student(teacher, other)
    tensors = load_file(folder / "student" / "pytorch_lora_weights.safetensors")
    save_file(dict(list(tensors.items())[:4]) | {"foreign": torch.zeros(1)}, other / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="is of another model than"):
        load_student(teacher, other)


def test_yaml_of_a_recipe_is_plain(run):
    assert yaml.safe_load((run[1] / "recipe.yaml").read_text())["method"]["name"] == "tcd"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scenes-64-lcm", "scenes-64-tcd"])
def test_the_beginning_of_a_shipped_recipe_is_healthy(name, tmp_path):
    """On the shipped teacher, from as few steps and lines as a judgement needs."""
    short = ["training.steps=28", "training.batch_size=4", "training.log_every=2", "training.warmup_steps=2",
             "data.size=16", "sample.every=28", "sample.teacher_steps=4"]  # fmt: skip
    distill(load_recipe(name, short), tmp_path / "run")
    found = diagnose(tmp_path / "run")
    assert found.healthy, str(found)
    assert {"saturation", "drift of the mean", "lost diversity", "teacher does not fit the data"} <= set(found.checked)


def test_the_students_picture_is_drawn_from_its_files(run, tmp_path):
    """The same as by `fewstep sample`; other weights in the file, another picture."""
    from PIL import Image

    from fewstep.runs.validation import sample_exported

    recipe, folder = run
    shutil.copytree(folder / "student", tmp_path / "student")
    path = tmp_path / "student" / "pytorch_lora_weights.safetensors"
    save_file({name: 3 * t for name, t in load_file(path).items()}, path)
    sample_exported(setup(recipe, tmp_path), tmp_path / "student")
    theirs, ours = (Image.open(place / "student" / "samples.png") for place in (tmp_path, folder))
    assert theirs.size == ours.size and theirs.tobytes() != ours.tobytes()
    sample_exported(setup(recipe, tmp_path), folder / "student")
    assert Image.open(folder / "student" / "samples.png").tobytes() == ours.tobytes()


def test_one_process_at_a_time_works_in_a_run(run, tmp_path):
    """A second one is told so and changes nothing; a lock of a process that died is no lock."""
    recipe, folder = run
    shutil.copytree(folder, tmp_path / "run")
    longer = recipe.model_copy(update={"training": dataclasses.replace(recipe.training, steps=6)})
    with only_one(tmp_path / "run"), pytest.raises(ValueError, match="Another process is at work in"):
        distill(longer, tmp_path / "run", resume=True)
    assert same_students(folder, tmp_path / "run")
    assert load_card(distill(longer, tmp_path / "run", resume=True)).steps == 6
