"""Students that are conditioned on their target time as files: read back by diffusers, by ComfyUI's names and here."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import fewstep
from fewstep.export import publish, round_trip
from fewstep.export.publish import export
from fewstep.students.lineage import open_teacher
from tests.export.comfy import unet_names
from tests.export.test_families import STUDENTS, elsewhere  # noqa: F401
from tests.export.test_fold import TOLD
from tests.export.test_publish import drawn, finished, gap, pictures
from tests.models.pipelines import PROMPTS, build
from tests.models.single_file import unet_names as original_names

FORMS = {
    "sd15": ("kohya", 8), "sdxl": ("lora", 2), "sd3": ("lora", 4), "flux": ("lora", 3), "pixart": ("diffusers", 4),
    "sana": ("diffusers", 4), "klein_base": ("lora", 1), "flux2_dev": ("merged", 4), "chroma": ("lora", 4),
    "qwen_image": ("merged", 5), "qwen_image21": ("lora", 4), "z_image": ("lora", 8), "krea2": ("lora", 4),
}  # fmt: skip


@pytest.fixture(scope="module")
def told(tiny, tmp_path_factory):
    return finished(tmp_path_factory.mktemp("told") / "mine", tiny, TOLD)


def test_a_pipeline_is_right_for_its_own_steps_and_says_so(told, in_this_process, tmp_path):
    made = export(told, "diffusers", tmp_path / "out")
    expected, n = pictures(told), 4
    assert made.call == f"num_inference_steps={n}" and made.round_trip.gap <= 1e-5
    assert gap(drawn(tmp_path / "out"), expected) <= 1e-5 and gap(pictures(tmp_path / "out"), expected) <= 1e-5
    said = "right for that number of steps alone"
    assert any(said in line for line in made.remarks)
    assert (tmp_path / "out" / "README.md").read_text().count(said) >= 2
    with safe_open(next((tmp_path / "out" / "unet").glob("*.safetensors")), "pt") as file:
        header = file.metadata()
    assert said in header["modelspec.description"] and said in header["modelspec.usage_hint"]
    card = json.loads((tmp_path / "out" / "few_step.json").read_text())
    assert card["target_times"] == [[999, 749], [749, 499], [499, 249], [249, 0]]
    model = fewstep.load(tmp_path / "out")
    for options in ({"num_inference_steps": 8}, {"eta": 0.5}, {"timesteps": [999, 500, 200, 100]}):
        with pytest.raises(ValueError, match="are right for these alone"):
            model.sample("a red star", **options)
    with pytest.raises(ValueError, match="cannot be a teacher"):
        open_teacher(str(tmp_path / "out"))


def test_a_fold_that_is_off_is_no_export(told, in_this_process, tmp_path, monkeypatch):
    """Weights without the target times sample something else, and nothing is left behind."""
    monkeypatch.setattr(publish, "is_folded", lambda card: False)
    monkeypatch.setattr(publish, "check_form", lambda *_: None)
    for to in ("diffusers", "merged"):
        with pytest.raises(ValueError, match="are not fewstep's"):
            export(told, to, tmp_path / "out")
        assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_scale_of_guidance_is_in_the_lora_too(tiny, in_this_process, tmp_path):
    """With target times it has a LoRA, which holds both; the whole pipeline holds the scale once."""
    card = replace(TOLD, extra_inputs=("end", "guidance_embed"), guidance_embed=3.0, num_inference_steps=2)
    run = finished(tmp_path / "run", tiny, card)
    for to in ("lora", "diffusers"):
        assert export(run, to, tmp_path / to).round_trip.gap <= 1e-5
    assert gap(pictures(tmp_path / "lora"), pictures(run)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_every_family_is_read_back_elsewhere(name, elsewhere, tmp_path, monkeypatch):  # noqa: F811
    """In another process, within 1e-5 of `fewstep sample`; a LoRA has n more ranks on one layer at most."""
    to, n = FORMS[name]
    monkeypatch.setattr(round_trip.subprocess, "run", elsewhere)
    with torch.random.fork_rng():
        build(name).save_pretrained(tmp_path / name)
        like = STUDENTS.get(name, TOLD)
        size = 64 if name == "pixart" else like.image_size
        card = replace(TOLD, num_inference_steps=n, image_size=size, guidance_embed=like.guidance_embed)
        run = finished(tmp_path / "run", tmp_path / name, card)
    made = export(run, to, tmp_path / "out")
    assert made.round_trip.gap <= 1e-5
    expected = fewstep.load(run).sample(PROMPTS, output_type="latent", seed=2)
    read = fewstep.load(tmp_path / "out")
    assert gap(read.sample(PROMPTS, output_type="latent", seed=2), expected) <= 1e-5
    if to in ("lora", "kohya"):
        end = "lora_A.weight" if to == "lora" else "lora_down.weight"
        ranks = sorted(
            len(t) for key, t in load_file(next((tmp_path / "out").glob("*.safetensors"))).items() if end in key
        )
        assert ranks[0] == 4 or n < 4
        assert sum(rank != 4 for rank in ranks) <= 1 and max(ranks) <= 4 + n
    hint = json.loads((tmp_path / "out" / "few_step.json").read_text())["call"]
    assert "eta" not in hint
    comfy = (tmp_path / "out" / "README.md").read_text()
    assert ("ComfyUI cannot run this student" in comfy) == (name in ("klein_base", "flux2_dev", "chroma"))


@pytest.mark.slow
def test_comfyui_samples_the_same_from_kohyas_form(in_this_process, tmp_path):
    """Every key by ComfyUI's names onto the original's weights, W + alpha / rank up down, then by diffusers' names."""
    import diffusers
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    build("sd15").save_pretrained(tmp_path / "sd15")
    run = finished(tmp_path / "run", tmp_path / "sd15", TOLD)
    export(run, "kohya", tmp_path / "out")
    file = load_file(next((tmp_path / "out").glob("*.safetensors")))
    known, weights = unet_names(depth=(0, 1), mid=1, res_blocks=1), original_names(build("sd15").unet)
    weights = {name: t.double() for name, t in weights.items()}
    for layer in {key.removesuffix(".alpha").split(".lora_")[0] for key in file}:
        up, down = (file[f"{layer}.lora_{part}.weight"].double() for part in ("up", "down"))
        place = f"{known[layer]}.weight"
        change = float(file[f"{layer}.alpha"]) / len(down) * (up.flatten(1) @ down.flatten(1))
        weights[place] = weights[place] + change.view_as(weights[place])
    assert "lora_unet_time_embedding_linear_1.alpha" in file
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "sd15", safety_checker=None)
    named = {f"model.diffusion_model.{name}": t.float() for name, t in weights.items()}
    converted = convert_ldm_unet_checkpoint(named, dict(pipe.unet.config))
    pipe.unet.load_state_dict(converted)
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    pipe.scheduler = getattr(__import__("diffusers"), scheduler).from_pretrained(
        tmp_path / "out", subfolder="scheduler"
    )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    found = pipe(PROMPTS, generator=generator, output_type="latent", num_inference_steps=4, guidance_scale=1.0).images
    assert gap(found, pictures(run, prompts=PROMPTS)) <= 1e-5
