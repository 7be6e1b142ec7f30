"""Single files as teachers: the same network, text and pictures as from the pipeline's folder; no pickle is read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fewstep
from fewstep.export.lora import peft_layout
from fewstep.export.publish import export
from fewstep.methods.lcm import LCM
from fewstep.models.families import as_teacher, is_ours, load_teacher
from fewstep.models.families.single_file import config_of
from fewstep.models.meta_pipeline import outline
from fewstep.models.roles import Weights
from fewstep.students.card import Card
from fewstep.students.student import save_student
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import build_roles
from tests.models.pipelines import PROMPTS, SIZE, build
from tests.models.single_file import save_single_file


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def files(request, tmp_path_factory):
    """(pipeline, its single file, a folder with its configs and tokenizers and without weights)."""
    folder, pipeline = tmp_path_factory.mktemp(request.param), build(request.param)
    save_single_file(pipeline, folder / "model.safetensors")
    pipeline.save_pretrained(folder / "configs")
    for weights in (folder / "configs").rglob("*.safetensors"):
        weights.unlink()
    return pipeline, folder / "model.safetensors", folder / "configs"


@torch.no_grad()
def test_a_file_is_the_teacher_that_its_folder_would_be(files):
    pipeline, file, configs = files
    folder, single = as_teacher(pipeline, size=SIZE), load_teacher(str(file), config=str(configs), size=SIZE)
    x, t = torch.randn(1, *folder.latent_shape), folder.denoiser.schedule.start
    cond, mine = (teacher.encode_prompts(PROMPTS[:1]) for teacher in (folder, single))
    for name in cond:
        torch.testing.assert_close(mine[name], cond[name])
    torch.testing.assert_close(single.denoiser(x, t, mine).output, folder.denoiser(x, t, cond).output)
    torch.testing.assert_close(single.decode(x), folder.decode(x))
    assert single.name == f"{file}@{configs}" and is_ours(single.name)
    again = load_teacher(single.name, size=SIZE)  # as a student's card calls it
    assert torch.equal(again.denoiser(x, t, mine).output, single.denoiser(x, t, mine).output)


def test_a_plan_of_a_file_reads_no_weight(files):
    pipeline, file, configs = files
    sketch = outline(str(file), config=str(configs))
    assert sum(p.numel() for p in sketch.base.parameters()) == sum(p.numel() for p in pipeline.unet.parameters())
    again = outline(f"{file}@{configs}+style.safetensors")  # as a student's card calls its teacher
    assert again.base.config == sketch.base.config
    shipped = config_of(file)  # the kind is known by the names of its tensors
    assert shipped.name == ("sdxl" if hasattr(pipeline, "text_encoder_2") else "sd15")


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("sd15", {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
        (
            "sdxl",
            {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
        ),
    ],
)
def test_the_shipped_configs_are_the_published_models(kind, numbers):
    sketch = outline(str(Path(fewstep.__file__).parent / "assets" / "configs" / kind))
    assert {name: sum(p.numel() for p in part.parameters()) for name, part in sketch.parts.items()} == numbers
    assert sketch.latent_shape == ((4, 64, 64) if kind == "sd15" else (4, 128, 128))
    assert sketch.denoiser().prediction_type == "epsilon"


def test_teachers_with_loras_are_found_again_by_their_name(tmp_path):
    """What a student's card says of its teacher opens that teacher."""
    pipeline = build("sd15")
    pipeline.save_pretrained(tmp_path / "model")
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {f"unet.{name}.lora_A.weight": torch.randn(2, 32), f"unet.{name}.lora_B.weight": torch.randn(32, 2)}
    tensors, said = peft_layout(lora)
    save_file(tensors, tmp_path / "style.safetensors", metadata=said)
    styled = load_teacher(str(tmp_path / "model"), loras=[str(tmp_path / "style.safetensors")], size=SIZE)
    again, plain = load_teacher(styled.name, size=SIZE), load_teacher(str(tmp_path / "model"), size=SIZE)
    weights = [t.pipeline.unet.get_parameter(f"{name}.weight") for t in (styled, again, plain)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert is_ours(styled.name) and not is_ours(plain.name)


class _Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path, files):
    _, file, configs = files
    for suffix in (".ckpt", ".pt", ".bin"):
        (tmp_path / f"m{suffix}").write_bytes(pickle.dumps(_Trap()))
        with pytest.raises(ValueError, match="is a pickle, which may run any program"):
            load_teacher(str(tmp_path / f"m{suffix}"))
    (tmp_path / "m.safetensors").write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(ValueError, match="is damaged, or no safetensors file"):
        load_teacher(str(tmp_path / "m.safetensors"))
    (tmp_path / "m.safetensors").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged, or no safetensors file"):
        load_teacher(str(tmp_path / "m.safetensors"))
    with pytest.raises(ValueError, match=r"holds no configs \(model_index\.json is missing\)"):
        load_teacher(str(file), config=str(tmp_path))
    with pytest.raises(ValueError, match=r"teacher\.config goes with a single \.safetensors file"):
        load_teacher("scenes-64", config=str(configs))
    save_file({"lora_unet.x": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="holds no whole model"):
        load_teacher(str(tmp_path / "m.safetensors"))
    save_file({"model.diffusion_model.x": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"neither SD 1\.x nor SDXL: give the folder of its configs"):
        load_teacher(str(tmp_path / "m.safetensors"))
    with pytest.raises(ValueError, match=r"cannot be loaded"):
        load_teacher(str(tmp_path / "m.safetensors"), config=str(configs))
    assert json.loads((configs / "model_index.json").read_text())["_class_name"].startswith("StableDiffusion")


def student_of(teacher, folder):
    """A LoRA that moves it, as a run leaves one."""
    roles = build_roles(teacher.denoiser, LCM(teacher.denoiser.schedule), TrainingSettings(), Weights(rank=2))
    for parameter in roles.parameters("student"):
        torch.nn.init.normal_(parameter, std=0.1)
    card = Card("lcm", "lcm", 2, "lora", teacher.name, rank=2, image_size=SIZE)
    save_student(folder, roles, card)
    return folder


@pytest.mark.slow
def test_a_student_of_a_file_is_exported_and_proved(files, tmp_path):
    pipeline, file, configs = files
    if hasattr(pipeline, "text_encoder_2"):
        pytest.skip("one family is enough")
    teacher = load_teacher(str(file), config=str(configs), size=SIZE)
    made = export(student_of(teacher, tmp_path / "student"), "lora", tmp_path / "lora")
    assert made.round_trip.gap < 1e-5 and made.round_trip.layers > 20
    assert file.name in (tmp_path / "lora" / "README.md").read_text()
    named = json.loads((tmp_path / "student" / "few_step.json").read_text()) | {"teacher": f"{teacher.name}+style"}
    (tmp_path / "student" / "few_step.json").write_text(json.dumps(named))
    with pytest.raises(ValueError, match="stands on a model with LoRAs of its own"):
        export(tmp_path / "student", "lora", tmp_path / "other")
