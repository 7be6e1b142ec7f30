"""Students of any teacher are measured on prompts and images of one's own, or on the teacher's alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg

from fewstep.data.find import FEWEST, Place, find_captions, find_images, held_out_captions, held_out_images
from fewstep.evaluation.metrics import kid
from fewstep.models.families import load_teacher
from fewstep.models.imagenet import load_imagenet_encoder
from fewstep.recipe.load import parse_recipe
from fewstep.recipe.validate import RecipeError
from fewstep.runs.distill import distill
from fewstep.runs.first_teacher import first_teacher_of
from fewstep.runs.folder import RunFolder
from fewstep.runs.foresee import foresee
from fewstep.runs.measured_on import evaluation_captions, prompt_set
from fewstep.runs.setup import setup
from fewstep.runs.validation import Validation
from fewstep.sampling import DDIMSampler, sample
from tests.models.pipelines import WORDS, build

pytestmark = pytest.mark.usefixtures("few_resamplings")
COUNT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of 24 pictures with captions, and a tiny SD 1.5 beside it."""
    place, generator = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    (place / "images").mkdir()
    for i in range(COUNT):
        pixels = generator.integers(0, 255, (80, 72, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "images" / f"{i:02d}.png")
        (place / "images" / f"{i:02d}.txt").write_text(f"a {WORDS[1 + i % 4]} number {i}")
    build("sd15").save_pretrained(place / "model")
    return place


def recipe(folder, **evaluate):
    return parse_recipe({
        "method": {"name": "lcm", "num_grid_steps": 10}, "teacher": str(folder / "model"), "student": {"rank": 2},
        "data": {"source": "folder", "path": str(folder / "images")},
        "training": {"steps": 2, "batch_size": 2, "log_every": 1, "checkpoint_every": 2},
        "sample": {"prompts": ["a red circle"], "every": 2, "num_inference_steps": 2, "teacher_steps": 3},
        "evaluate": {"every": 1, "count": 8, **evaluate},
    })  # fmt: skip


def colours(images):
    """Features [N, 12]: colours of four parts."""
    return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def by_scipy(a, b):
    """Frechet distance with the matrix square root of another library."""
    ca, cb = (torch.cov(x.T).numpy() for x in (a, b))
    root = linalg.sqrtm(ca @ cb).real.trace()
    return float((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * root)


# ---------------------------------------------------------------- held out


def test_held_out_images_are_trained_on_by_nobody(folder):
    """Every image is on one side; which, follows from their number; at most a third is held out."""
    place = Place("folder", str(folder / "images"))
    everything = find_captions(place)
    for wanted, count in ((FEWEST, 8), (100, 8)):
        split = Place("folder", str(folder / "images"), held_out=wanted)
        kept, out = find_captions(split), held_out_captions(split)
        assert len(out) == count and sorted(kept + out) == sorted(everything)
        assert [image.caption for image in find_images(split).images] == list(kept)
        assert [image.caption for image in held_out_images(split).images] == list(out)
        assert held_out_captions(split) == out != everything[:count]
    with pytest.raises(ValueError, match="has 20 captions, too few to hold 8 of them out"):
        find_captions(split, 20)


def test_a_run_trains_on_what_it_does_not_hold_out(folder, tmp_path):
    """With prompts of its own, more than the teacher samples together, nothing is held out."""
    made = recipe(folder)
    assert made.captions() == COUNT - 8 and len(evaluation_captions(made)) == 8
    assert recipe(folder, every=0).captions() == COUNT
    student = distill(made, tmp_path / "run")
    trained = (tmp_path / "run" / "data" / "latents-00000.safetensors").stat().st_size
    (tmp_path / "prompts.txt").write_text("".join(f"a blue square {i}\n" for i in range(12)))
    distill(recipe(folder, every=2, count=12, prompts=str(tmp_path / "prompts.txt")), tmp_path / "all")
    assert "12 prompts of prompts.txt" in (tmp_path / "all" / "evaluations.jsonl").read_text()
    assert trained < (tmp_path / "all" / "data" / "latents-00000.safetensors").stat().st_size
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and student.is_dir()
    assert {"FD", "KID", "detail FD", "to teacher", "unlike teacher"} <= lines[0].keys()
    assert "accuracy" not in lines[0]  # nobody judges prompts here


# ---------------------------------------------------------------- the teacher as reference


@pytest.fixture(scope="module")
def against_teacher(folder, tmp_path_factory):
    made, place = recipe(folder), tmp_path_factory.mktemp("run")
    run = setup(made, place)
    return made, run, prompt_set(made, run.teacher, run.folder)


def test_the_reference_is_the_teachers_image_of_each_prompt_from_the_students_noise(against_teacher):
    made, run, prompts = against_teacher
    assert tuple(prompts.captions) == held_out_captions(made.place) != find_captions(made.place)[:8]
    cond = run.teacher.encode_prompts(prompts.captions)
    x0 = sample(run.teacher.denoiser, DDIMSampler(num_inference_steps=3), prompts.noise, cond, 3.0).x0
    assert torch.allclose(run.teacher.decode(x0).cpu(), prompts.teacher, atol=2e-3)  # kept in float16
    assert torch.equal(prompts.features(prompts.teacher), prompts.reference.features)


def test_the_reference_is_made_once(folder, tmp_path):
    """The teacher is called for the reference alone, however often students are measured, and by whom."""
    made = recipe(folder, path=str(tmp_path / "shared"))
    run, again = (setup(made, tmp_path / name) for name in ("run", "another"))
    validation = Validation(run, prompt_set(made, run.teacher, run.folder), lambda: 0.0)
    calls = run.teacher.denoiser.cost.evaluations
    assert calls == 8 * 3 * 2  # prompts, steps, both branches of guidance
    first, second = (validation._measure(step) for step in (1, 2))
    assert first == second and run.teacher.denoiser.cost.evaluations == calls
    for weight in run.roles.parameters(run.role):
        weight.data.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    assert validation._measure(3)["to teacher"] > first["to teacher"]  # a worse student
    shared = prompt_set(again.recipe, again.teacher, again.folder)
    assert torch.equal(shared.teacher, validation._prompts.teacher) and again.teacher.denoiser.cost.evaluations == 0


def test_the_first_teacher_is_held_as_in_training(folder):
    made = recipe(folder)
    made = made.model_copy(update={"teacher": made.teacher.model_copy(update={"dtype": "bf16", "vae_tiling": True})})
    teacher = first_teacher_of(made)
    assert teacher.pipeline.unet.dtype == torch.bfloat16 and teacher.pipeline.vae.use_tiling


def test_figures_against_an_independent_computation(against_teacher):
    _, _, prompts = against_teacher
    images = (prompts.teacher + 0.1 * torch.rand(prompts.teacher.shape)).clamp(0, 1)
    figures = prompts.measure(images).figures(prompts.reference)
    encoder = load_imagenet_encoder()
    a, b = encoder(images).double(), encoder(prompts.teacher).double()
    basis = torch.linalg.qr(torch.cat([a, b]).T).Q  # all 16 images lie in it: no distance changes
    assert figures["FD"] == pytest.approx(by_scipy(a @ basis, b @ basis), rel=1e-6)
    assert figures["KID"] == pytest.approx(kid(a, b), rel=1e-6)
    cosines = torch.stack([x @ y / (x.norm() * y.norm()) for x, y in zip(a, b, strict=True)])
    assert figures["unlike teacher"] == pytest.approx(float(1 - cosines.mean()), abs=1e-6)
    assert figures["to teacher"] == pytest.approx(float(((images - prompts.teacher).double() ** 2).mean() ** 0.5))
    perfect = prompts.measure(prompts.teacher).figures(prompts.reference)
    assert perfect["to teacher"] == 0 and abs(perfect["FD"]) < 1e-6 * figures["FD"] + 1e-6
    assert perfect["unlike teacher"] == pytest.approx(0, abs=1e-12)


def test_reference_images_may_be_shared_and_other_figures_asked_for(folder, tmp_path, monkeypatch):
    """A folder for all runs; a perceptual distance; features of another network."""
    made = recipe(folder, path=str(tmp_path / "shared"), metrics=["perceptual"], features="some/network")
    monkeypatch.setattr("fewstep.runs.measured_on.load_pretrained_encoder", lambda name, device: colours)
    run = setup(made, tmp_path / "run")
    prompts = prompt_set(made, run.teacher, run.folder)
    assert list((tmp_path / "shared").glob("teacher-*/pairs-*.safetensors")) and not (tmp_path / "run").exists()
    assert prompts.reference.features.shape == (8, 12)
    other = prompts.teacher.flip(0)
    figures = prompts.measure(other).figures(prompts.reference)
    wanted = load_imagenet_encoder().distance(other, prompts.teacher).mean()
    assert figures["perceptual"] == pytest.approx(float(wanted), rel=1e-5) and figures["perceptual"] > 0


# ---------------------------------------------------------------- images and prompts of one's own


def test_a_folder_of_images_and_a_file_of_prompts(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"a blue square {i}\n" for i in range(9)))
    made = recipe(folder, prompts=str(tmp_path / "prompts.txt"), reference=str(folder / "images"), count=9)
    assert made.captions() == COUNT  # prompts of their own: nothing is held out
    run = setup(made, tmp_path / "run")
    prompts = prompt_set(made, run.teacher, run.folder)
    assert list(prompts.captions) == [f"a blue square {i}" for i in range(9)]
    assert prompts.teacher is None and len(prompts.reference.features) == COUNT
    assert not (tmp_path / "run").exists()


def test_held_out_images_as_reference(folder, tmp_path):
    made = recipe(folder, reference="data")
    run = setup(made, tmp_path / "run")
    prompts = prompt_set(made, run.teacher, run.folder)
    assert len(prompts.reference.features) == len(prompts.captions) == 8 and prompts.teacher is None
    files = [folder / "images" / f"{caption.split()[-1].zfill(2)}.png" for caption in prompts.captions]
    read = [
        np.asarray(Image.open(file).crop((0, 4, 72, 76)).resize((64, 64), Image.Resampling.LANCZOS)) for file in files
    ]
    shown = torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2).float() / 127.5 - 1
    seen = run.teacher.decode(run.teacher.encode_images(shown)[0])
    assert torch.allclose(prompts.features(seen), prompts.reference.features, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "evaluate, sentence",
    [
        ({"reference": "/nowhere"}, "there is no folder '/nowhere'"),
        ({"reference": "data", "metrics": ["perceptual"]}, "set reference: teacher"),
        ({"metrics": ["inception"]}, "there is no figure 'inception': use perceptual, clip, pickscore, aesthetic"),
        ({"prompts": "/nowhere.txt"}, "^evaluate.prompts: prompts are a file of .txt or .jsonl"),
        ({"prompts": "few.txt"}, "^evaluate: 3 prompts are too few to measure on: give 8 or more"),
        ({"reference": "broken", "prompts": "many.txt"}, "^evaluate.reference: 0 images are too few to measure on"),
        ({"metric": "ms"}, "'ms' cannot decide"),
        ({"metric": "accuracy"}, "accuracy"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(folder, tmp_path, monkeypatch, evaluate, sentence):
    monkeypatch.chdir(tmp_path)
    Path("few.txt").write_text("\na cat\n \na dog\n\na bird\n")
    Path("many.txt").write_text("a cat\n" * 9)
    Path("broken").mkdir()
    for i in range(9):
        Path("broken", f"{i}.png").write_bytes(b"no image")
    with pytest.raises((RecipeError, ValueError), match=f"(?i){sentence}"):
        made = recipe(folder, **evaluate)
        run = setup(made, tmp_path / "run")
        prompt_set(made, run.teacher, run.folder)


@pytest.mark.parametrize(
    "evaluate",
    [
        {"prompts": "/nowhere.txt"},
        {"reference": "/nowhere"},
        {"metrics": ["inception"]},
        {"metrics": ["perceptual"], "reference": "data"},
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_encoded(folder, tmp_path, evaluate):
    made = recipe(folder, **evaluate)
    for refused in (lambda: foresee(made), lambda: distill(made, tmp_path / "run")):
        with pytest.raises(ValueError, match=r"evaluate|[Tt]here is no folder"):
            refused()
    assert not (tmp_path / "run").exists()


def test_a_teachers_images_belong_to_their_size(folder, tmp_path):
    """One folder for runs of two sizes of one teacher."""
    for side in (64, 128):
        made = recipe(folder, path=str(tmp_path / "shared"))
        made = made.model_copy(update={"teacher": made.teacher.model_copy(update={"size": side})})
        run = setup(made, tmp_path / "run")
        assert prompt_set(made, run.teacher, run.folder).teacher.shape[-1] == side
    assert len(list((tmp_path / "shared").iterdir())) == 2


def test_images_that_were_trained_on_are_called_so(folder, tmp_path):
    """Nothing was held out, but the images of the data are asked for."""
    made = recipe(folder, every=0, reference="data")
    run = setup(made, tmp_path / "run")
    prompts = prompt_set(made, run.teacher, run.folder)
    assert len(prompts.reference.features) == 8 and prompts.about == "captions trained on, against images trained on"


def test_scenes_may_be_measured_by_another_network(tiny, tmp_path, monkeypatch):
    """Features and further figures of scenes-64's own prompt set."""
    monkeypatch.setattr("fewstep.runs.measured_on.load_pretrained_encoder", lambda name, device: colours)
    monkeypatch.setattr("fewstep.runs.measured_on.open_reward", lambda *_, **__: lambda x, captions: x.mean((1, 2, 3)))
    made = parse_recipe({"method": "tcd", "evaluate": {"features": "some/network", "metrics": ["pickscore"]}})
    tiny = load_teacher(str(tiny))
    prompts = prompt_set(made, tiny, RunFolder(tmp_path), 8)
    assert prompts.features is colours and prompts.reference is None and prompts.judge is not None
    assert prompts.scores["PickScore"](torch.ones(8, 3, 64, 64)).tolist() == [1.0] * 8
    with pytest.raises(ValueError, match="perceptual is a distance to the teacher's images"):
        prompt_set(parse_recipe({"method": "tcd", "evaluate": {"metrics": ["perceptual"]}}), tiny, RunFolder(tmp_path))
    with pytest.raises(ValueError, match=r"^evaluate: 3 prompts are too few"):
        prompt_set(made, tiny, RunFolder(tmp_path), 3)
