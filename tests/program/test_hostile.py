"""Models by strangers: one sentence, nothing run, nothing loaded; and files that are right, on the wrong base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewstep
from tests.checkpoints.tiny import kohya, lora_of
from tests.export.test_publish import finished
from tests.models.pipelines import build

EVIL = """
open({mark!r}, "w").close()
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
class Evil(StableDiffusionPipeline): pass
class Net(UNet2DConditionModel): pass
"""


def change(file, **keys):
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def own_pipeline(folder, code):
    (folder / "pipeline.py").write_text(code)
    change(folder / "model_index.json", _class_name=["pipeline", "Evil"])


def own_network(folder, code):
    (folder / "unet" / "code.py").write_text(code)
    change(folder / "model_index.json", unet=["code", "Net"])


def own_text_encoder(folder, code):
    (folder / "text_encoder" / "code.py").write_text(code)
    change(folder / "text_encoder" / "config.json", auto_map={"AutoModel": "code.Net"})


def own_tokenizer(folder, code):
    (folder / "tokenizer" / "code.py").write_text(code)
    change(folder / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Net", None]})


def a_module_of_python(folder, code):
    change(folder / "model_index.json", scheduler=["subprocess", "Popen"])


def a_module_elsewhere(folder, code):
    (folder.parent / "code.py").write_text(code)
    change(folder / "model_index.json", unet=["../code", "Net"])


def pickles(folder, code):
    for file in (folder / "unet").glob("*.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()


def no_weights_at_all(folder, code):
    shutil.rmtree(folder / "unet")


def not_json(folder, code):
    (folder / "model_index.json").write_bytes(b"\xff\xfe{")


def absurd_width(folder, code):
    change(folder / "unet" / "config.json", block_out_channels=[-32, 64, 64])


def cut_weights(folder, code):
    file = next((folder / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize("spoil, loads", [
    (own_pipeline, False), (own_network, False), (a_module_of_python, False), (a_module_elsewhere, False),
    (pickles, False), (no_weights_at_all, False), (not_json, False), (absurd_width, False), (cut_weights, False),
    (own_text_encoder, True), (own_tokenizer, True),  # passed over: the libraries' own classes are taken
])  # fmt: skip
def test_a_pipeline_by_a_stranger_runs_nothing(spoil, loads, tiny, tmp_path):
    folder, mark = tmp_path / "theirs", tmp_path / "code-was-run"
    shutil.copytree(tiny, folder)
    spoil(folder, EVIL.format(mark=str(mark)))
    if loads:
        fewstep.load(folder).sample("a", 1)
    else:
        with pytest.raises(ValueError) as error:
            fewstep.load(folder)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600 and "theirs" in str(error.value)
    assert not mark.exists()


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A pipeline of another family."""
    folder = tmp_path_factory.mktemp("other") / "sdxl"
    build("sdxl").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    return finished(tmp_path_factory.mktemp("runs") / "mine", tiny)


@pytest.mark.parametrize("what", ["run", "file", "published", "style"])
def test_the_wrong_base_is_one_sentence(what, run, other, tmp_path):
    """A LoRA of one model put on another: said before anything is drawn."""
    file = run / "student" / "pytorch_lora_weights.safetensors"
    how = {
        "run": lambda: fewstep.load(run, base=str(other)),
        "file": lambda: fewstep.load(file, base=str(other)),
        "published": lambda: fewstep.load("hyper-sd15-4step", base=str(other), file=file),
        "style": lambda: fewstep.load(other, loras=[file]),
    }[what]
    with pytest.raises(ValueError) as error:
        how()
    assert "\n" not in str(error.value) and len(str(error.value)) < 600, str(error.value)[:900]


@pytest.mark.parametrize("spoil", ["nan", "names", "ranks", "bytes", "pickle"])
def test_a_style_by_a_stranger_changes_nothing(spoil, tiny, tmp_path):
    """What is refused halfway leaves no layer behind."""
    model, path = fewstep.load(str(tiny)), tmp_path / "style.safetensors"
    network = model.teacher.pipeline.unet
    before = {k: v.clone() for k, v in network.state_dict().items()}
    tensors = kohya(lora_of(network, targets=("to_q", "to_v")), alpha=2)
    last = max(tensors)
    if spoil == "nan":
        tensors[last] = torch.full_like(tensors[last], float("nan"))
    elif spoil == "names":
        tensors[last.replace("to_v", "to_w")] = tensors.pop(last)
    elif spoil == "ranks":
        tensors[last] = tensors[last][:, :1].contiguous()
    save_file(tensors, path)
    if spoil == "bytes":
        path.write_bytes(path.read_bytes()[:-9])
    elif spoil == "pickle":
        path = Path(shutil.move(path, tmp_path / "style.ckpt"))
    from fewstep.models.lora_files import add_loras

    with pytest.raises(ValueError) as error:
        add_loras(model.teacher.family.lora_parts, [(path, 1.0)])
    assert "style" in str(error.value) and "\n" not in str(error.value)
    after = network.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())


def test_a_folder_that_names_files_elsewhere_opens_none(run, tiny, tmp_path):
    """A card's words are never file names; its teacher is a model's name and nothing else."""
    secret = tmp_path / "secret.safetensors"
    shutil.copyfile(run / "student" / "pytorch_lora_weights.safetensors", secret)
    folder = tmp_path / "theirs"
    folder.mkdir()
    card = json.loads((run / "student" / "few_step.json").read_text())
    for more in ({"export": "lora", "base": str(tiny)}, {"export": "../lora", "base": str(tiny)}, {}):
        named = {"file": "../secret.safetensors", "weight_name": str(secret), **more}
        (folder / "few_step.json").write_text(json.dumps({**card, **named}))
        with pytest.raises(ValueError, match="holds no"):
            fewstep.load(folder)
    (folder / "few_step.json").write_text(json.dumps({**card, "teacher": "../../secret"}))
    with pytest.raises(ValueError, match="There is no teacher"):
        fewstep.load(folder)
