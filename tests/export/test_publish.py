"""Whole exports of a tiny run, read back by diffusers: against weights made by hand and samples of fewstep."""

from __future__ import annotations

import json
import stat
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fewstep.export import files, publish, round_trip
from fewstep.export.publish import export
from fewstep.inference.generate import load_model
from fewstep.models.families import load_teacher
from fewstep.models.lora_files import read_lora
from fewstep.models.roles import Roles, Weights
from fewstep.sampling import sample
from fewstep.students.card import Card, load_card, sampler_of
from fewstep.students.student import load_student, save_student
from tests.command_line import inside

LCM = Card("lcm", "lcm", 4, "lora", "", rank=4, steps=7)


def finished(folder, base, card=LCM, size=0.1):
    """A run whose student is far from its teacher."""
    roles = Roles(load_teacher(str(base)).denoiser)
    roles.add("student", Weights(card.weights, rank=4, alpha=2.0), extra_inputs=card.extra_inputs)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in roles.parameters("student"):
            p.add_(size * torch.randn_like(p))
    save_student(folder / "student", roles, replace(card, teacher=str(base)))
    (folder / "student" / "samples.png").write_bytes(b"a picture")
    return folder


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    return finished(tmp_path_factory.mktemp("runs") / "mine", tiny)


def pictures(run, seed=3, prompts=("a red star", "two shapes")):
    """Latents that fewstep draws from a run's student."""
    model = load_model(str(run))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(prompts), *model.teacher.latent_shape, generator=generator)
    card, cond = model.card, model.teacher.encode_prompts(list(prompts))
    return sample(
        model.denoiser, sampler_of(card), x, cond, model.guidance_scale, guidance_embed=card.guidance_embed,
        generator=generator,
    ).x0  # fmt: skip


def drawn(folder, seed=3, prompts=("a red star", "two shapes"), **call):
    """The same from an exported pipeline, by diffusers, with nothing set but what ``call`` says."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, **call}
    return pipe(list(prompts), generator=torch.Generator().manual_seed(seed), output_type="latent", **call).images


def gap(a, b):
    return float((a - b).abs().max() / b.abs().max())


def test_a_pipeline_folder_samples_right_with_nothing_set(run, in_this_process, tmp_path):
    """Another seed than the export's own check, and pictures that are not the teacher's."""
    made = export(run, "diffusers", tmp_path / "out")
    assert made.call == "num_inference_steps=4" and made.round_trip.gap <= 1e-5
    expected = pictures(run)
    assert gap(drawn(tmp_path / "out"), expected) <= 1e-5
    assert gap(drawn(tmp_path / "out", guidance_scale=1.0), expected) <= 1e-5
    assert gap(pictures(load_card(run / "student").teacher), expected) > 0.1
    assert gap(pictures(tmp_path / "out"), expected) <= 1e-5  # by fewstep sample
    said = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert said["_class_name"] == "LCMScheduler" and said["original_inference_steps"] == 50
    assert "negative prompts do nothing" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_a_lora_in_a_process_of_its_own(run, tmp_path):
    """The one place where the other process really is one; the rest of this file does its work here."""
    made = export(run, "lora", tmp_path / "out", "fp16")
    assert 1e-7 < made.round_trip.gap < 1e-2 and made.round_trip.layers == 115


@pytest.mark.parametrize("to, dtype, limit", [("lora", "fp32", 1e-6), ("kohya", "float16", 1e-3)])
def test_loras_hold_the_students_weights(to, dtype, limit, run, tiny, in_this_process, tmp_path):
    made = export(run, to, tmp_path / "out", dtype)
    file = next((tmp_path / "out").glob("*.safetensors"))
    assert file.name == {"lora": "pytorch_lora_weights.safetensors", "kohya": "mine_comfy.safetensors"}[to]
    student = load_file(run / "student" / "pytorch_lora_weights.safetensors")
    found = read_lora(load_teacher(str(tiny)).family.lora_parts, file)
    assert {f"unet.{k}" for k in found} == student.keys() and made.round_trip.layers == len(found) // 2
    for key, value in found.items():
        wanted = student[f"unet.{key}"]
        assert (value - wanted).abs().max() <= limit * wanted.abs().max()


def test_a_merged_network_is_the_sum(run, tiny, in_this_process, tmp_path):
    from diffusers import UNet2DConditionModel

    export(run, "merged", tmp_path / "out")
    network = UNet2DConditionModel.from_pretrained(tmp_path / "out")
    weights = load_teacher(str(tiny)).pipeline.unet.state_dict()
    lora = load_file(run / "student" / "pytorch_lora_weights.safetensors")
    for key in lora:
        if ".lora_A" in key:
            layer = key.removesuffix(".lora_A.weight")
            change = lora[f"{layer}.lora_B.weight"].flatten(1) @ lora[key].flatten(1)
            name = f"{layer.removeprefix('unet.')}.weight"
            weights[name] = weights[name] + change.view_as(weights[name])
    assert network.state_dict().keys() == weights.keys()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-5, atol=1e-6)


def test_an_embedded_guidance_scale_is_fixed_in_the_weights(tiny, in_this_process, tmp_path):
    card = replace(LCM, extra_inputs=("guidance_embed",), guidance_embed=3.0)
    run = finished(tmp_path / "run", tiny, card)
    made = export(run, "diffusers", tmp_path / "out")
    assert any("the scale 3 is fixed in these weights" in line for line in made.remarks)
    assert gap(drawn(tmp_path / "out"), pictures(run)) <= 1e-5
    teacher = load_teacher(str(tiny))
    student, cond = load_student(teacher, run / "student"), teacher.encode_prompts([""])
    x = torch.randn(1, *teacher.latent_shape)
    with torch.no_grad():  # it does hear the scale
        assert gap(*(student(x, 500, cond, guidance_embed=w).output for w in (3.0, 6.0))) > 1e-3
    for to in ("lora", "kohya"):
        with pytest.raises(ValueError, match="has a guidance-scale embedding"):
            export(run, to, tmp_path / to)
        assert not (tmp_path / to).exists()


def test_guidance_and_eta_that_no_file_holds_are_remarked(tiny, in_this_process, tmp_path):
    run = finished(tmp_path / "run", tiny, replace(LCM, sampler="tcd", eta=0.3, guidance_scale=2.0))
    made = export(run, "diffusers", tmp_path / "out")
    assert made.call == "num_inference_steps=4, eta=0.3, guidance_scale=2.0"
    assert any("No file of a pipeline can hold eta and guidance_scale" in line for line in made.remarks)
    assert gap(drawn(tmp_path / "out", eta=0.3, guidance_scale=2.0), pictures(run)) <= 1e-5
    assert made.call in (tmp_path / "out" / "README.md").read_text()


def test_what_stands_in_the_folder(run, in_this_process, tmp_path):
    (run / "evaluations.jsonl").write_text('{"step": 7, "FD": 12.5, "accuracy": 0.75}\n')
    export(run, "lora", tmp_path / "out")
    found = {str(p.relative_to(tmp_path / "out")): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found.keys() == {
        "pytorch_lora_weights.safetensors", "few_step.json", "README.md", "LICENSE.md", "samples.png",
        "scheduler/scheduler_config.json",
    }  # fmt: skip
    (tmp_path / "any").touch()
    ordinary = stat.S_IMODE((tmp_path / "any").stat().st_mode)
    assert {stat.S_IMODE(p.stat().st_mode) for p in found.values()} == {ordinary}
    text = found["README.md"].read_text()
    for part in ("library_name:", "samples.png", "FD 12.5", "accuracy 0.75", "## Licence", "read its card", "115 LoRA"):
        assert part in text, part
    with safe_open(found["pytorch_lora_weights.safetensors"], "pt") as file:
        said = file.metadata()
    must = {"sai_model_spec", "architecture", "implementation", "title", "resolution"}
    assert {f"modelspec.{key}" for key in must} <= said.keys()
    assert said["modelspec.sai_model_spec"] == "1.0.1" and said["modelspec.architecture"].endswith("/lora")
    assert said["modelspec.resolution"] == "64x64" and said["modelspec.prediction_type"] == "epsilon"
    assert "4 steps" in said["modelspec.usage_hint"] and "cfg 1" in said["modelspec.usage_hint"]
    told = json.loads(found["few_step.json"].read_text())
    assert (told["scheduler"], told["call"], told["export"]) == ("LCMScheduler", {"guidance_scale": 1.0}, "lora")
    lines = text.split("```python\n")[1].split("```")[0]
    compile(lines, "README", "exec")
    assert 'weight_name="pytorch_lora_weights.safetensors"' in lines


@pytest.mark.parametrize("card, to, match", [
    (dict(sampler="tcd", eta=0.3, extra_inputs=("end",)), "diffusers", "without fresh noise, and this one is sampled"),
    (dict(weights="full", rank=0), "kohya", "it is no LoRA"),
    (dict(), "onnx", "Unknown --to 'onnx'"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence(card, to, match, tiny, tmp_path):
    run = finished(tmp_path / "run", tiny, replace(LCM, **card))
    with pytest.raises(ValueError, match=match):
        export(run, to, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_a_lora_on_another_student_is_refused(run, tiny, tmp_path):
    other = finished(tmp_path / "other", tiny)
    card = other / "student" / "few_step.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "teacher": str(run)}))
    with pytest.raises(ValueError, match="stands on another student"):
        export(other, "lora", tmp_path / "out")


def test_an_export_whose_samples_differ_is_no_export(run, in_this_process, tmp_path, monkeypatch):
    """A LoRA at half its scale, one with a layer too few, and a pipeline with another grid: nothing is left behind."""
    real = files.peft_layout

    def half(lora):
        tensors, header = real(lora)
        return {k: t * (0.5 if "lora_B" in k else 1) for k, t in tensors.items()}, header

    def fewer(lora):
        gone = sorted(lora)[0].rsplit(".lora_", 1)[0]
        return real({k: t for k, t in lora.items() if not k.startswith(gone)})

    for layout, match in ((half, "are not fewstep's"), (fewer, "found 114 of the export's 115")):
        monkeypatch.setattr(files, "peft_layout", layout)
        with pytest.raises(ValueError, match=match):
            export(run, "lora", tmp_path / "out")
        assert not list(tmp_path.iterdir())
    plan = publish.plan_scheduler

    def other(*arguments):
        made = plan(*arguments)
        return replace(made, config={**made.config, "original_inference_steps": 20})

    monkeypatch.setattr(publish, "plan_scheduler", other)
    with pytest.raises(ValueError, match="are not fewstep's"):
        export(run, "diffusers", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_error_of_diffusers_is_shown(monkeypatch):
    class Failed:
        returncode, stderr = 1, "Traceback\n  ...\nOSError: no such model\n"

    monkeypatch.setattr(round_trip.subprocess, "run", lambda *_, **__: Failed())
    with pytest.raises(ValueError, match="does not work in diffusers: OSError: no such model"):
        round_trip.check_round_trip(round_trip.Request("nowhere", "unet", 1, ("a",)), torch.zeros(1), 0)


def test_the_command_line(run, in_this_process, tmp_path, monkeypatch, capsys):
    code, out, err = inside(monkeypatch, capsys, tmp_path, "export", run, "--to", "kohya", "--out", "there")
    assert code == 0, err
    assert "diffusers samples from it what fewstep does" in out and "All 115 LoRA layers" in out
    code, out, err = inside(monkeypatch, capsys, tmp_path, "export", run, "--to", "kohya", "--out", "there")
    assert code == 2 and "is there already" in err
    code, out, err = inside(monkeypatch, capsys, tmp_path, "export", tmp_path / "no-run")
    assert code == 2 and "no finished student" in err
