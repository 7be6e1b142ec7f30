"""A published file on its base: the weights by hand, the settings by name, warnings in words, hostile files refused."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from fewstep.checkpoints import load
from fewstep.checkpoints.load import load_checkpoint, start_weights
from fewstep.checkpoints.registry import checkpoints, find_checkpoint
from fewstep.inference.load import load_published
from fewstep.inference.model import Model
from fewstep.models.families import as_teacher, find_family, load_teacher
from fewstep.models.lora_files import read_lora
from fewstep.models.roles import Roles, Weights
from fewstep.recipe.load import parse_recipe
from fewstep.runs.setup import setup
from fewstep.sampling import TCDSampler, sample
from fewstep.scenes64.architecture import build_unet
from fewstep.students.card import Card
from tests.checkpoints.tiny import added, kohya, lora_of, peft
from tests.command_line import inside
from tests.models.pipelines import SIZE, build

HYPER = replace(find_checkpoint("hyper-sd15-unified"), lora_scale=0.125)


@pytest.fixture(scope="module")
def teacher(tiny):
    return load_teacher(str(tiny))


@pytest.fixture(scope="module")
def lora(teacher):
    return lora_of(teacher.pipeline.unet)


@pytest.fixture(scope="module")
def file(lora, tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "lora.safetensors"
    save_file(kohya(lora, alpha=2), path)
    return path


def weights_are(network, expected, tolerance=1e-5):
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("layout", ["kohya", "peft", "peft with alpha in its header", "peft's folder"])
def test_a_lora_of_any_layout_is_read_as_ours(layout, teacher, lora, tmp_path):
    path, expected = tmp_path / "x.safetensors", peft(lora)
    if layout == "kohya":
        save_file(kohya(lora, alpha=2), path)
    elif layout == "peft":
        save_file(expected, path)
    elif layout == "peft's folder":
        twice = {k: 2 * t if "lora_B" in k else t for k, t in expected.items()}
        save_file({k.replace("unet.", "base_model.model.", 1): t for k, t in twice.items()}, path)
        with pytest.raises(ValueError, match=r"adapter_config\.json"):
            read_lora(teacher.family.lora_parts, path)
        (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 2}')
    else:  # alpha 2 of rank 4 halves what is there
        said = {"unet.r": 4, "unet.lora_alpha": 2, "unet.target_modules": sorted(lora)}
        twice = {k: 2 * t if "lora_B" in k else t for k, t in expected.items()}
        save_file(twice, path, metadata={"lora_adapter_metadata": json.dumps(said)})
    before = {k: v.clone() for k, v in teacher.pipeline.unet.state_dict().items()}
    found = read_lora(teacher.family.lora_parts, path)
    assert {f"unet.{k}" for k in found} == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[f"unet.{key}"], rtol=1e-5, atol=1e-6)
    weights_are(teacher.pipeline.unet, before, 0)


def test_a_lora_is_added_at_the_entrys_scale(tiny, teacher, lora, file):
    made = load_checkpoint(HYPER, str(tiny), file)
    weights_are(made.pipeline.unet, added(teacher.pipeline.unet, lora, 0.125))


def test_a_whole_network_replaces_the_bases(tiny, teacher, tmp_path):
    torch.manual_seed(3)
    other = build_unet()
    save_file(other.state_dict(), tmp_path / "unet.safetensors")
    entry = find_checkpoint("sdxl-lightning-1step")
    made = load_checkpoint(entry, str(tiny), tmp_path / "unet.safetensors")
    weights_are(made.pipeline.unet, other.state_dict(), 0)
    assert made.denoiser.prediction_type == "sample"
    begun = start_weights(replace(entry, scheduler_overrides={}), teacher, "full", 4, tmp_path / "unet.safetensors")
    assert begun.keys() == {f"unet.{k}" for k, _ in other.named_parameters()}
    with pytest.raises(ValueError, match=r"set student\.weights=full"):
        start_weights(entry, teacher, "lora", 4, tmp_path / "unet.safetensors")


def test_a_guidance_scale_embedding_gets_the_scale_as_in_diffusers(tiny, tmp_path):
    """As diffusers' own pipeline tells it: get_guidance_scale_embedding(w - 1) through cond_proj."""
    from diffusers import UNet2DConditionModel

    config = {k: v for k, v in build_unet().config.items() if k != "_use_default_values"} | {"time_cond_proj_dim": 32}
    torch.manual_seed(4)
    other = UNet2DConditionModel.from_config(config)
    save_file(other.state_dict(), tmp_path / "unet.safetensors")
    model = load_published(find_checkpoint("lcm-sdxl"), str(tiny), tmp_path / "unet.safetensors")
    assert model.denoiser.accepts == {"guidance_embed"} and model.guidance_scale == 1
    assert model.card.guidance_embed == 8
    x, cond = torch.randn(2, *model.teacher.latent_shape), model.teacher.encode_prompts(["a", "b"])
    with torch.no_grad():
        got = model.denoiser(x, 500, cond, guidance_embed=8.0).output
        told = model.teacher.pipeline.get_guidance_scale_embedding(torch.tensor([7.0, 7.0]), 32)
        wanted = other(x, 500, cond["prompt_embeds"], timestep_cond=told, return_dict=False)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_guidance_zero_is_off_and_an_embedded_scale_is_not_guidance():
    normal = "pcm-sd15-8step-normalcfg"
    for name, wish, both in (
        ("tcd-sd15", 0.0, (1.0, None)), ("tcd-sd15", None, (1.0, None)), (normal, None, (4.5, None)),
        (normal, 3.0, (3.0, None)), ("lcm-sdxl", None, (1.0, 8.0)), ("lcm-sdxl", 5.0, (1.0, 5.0)),
    ):  # fmt: skip
        entry = find_checkpoint(name)
        card = Card("", "", 4, "full", "", guidance_embed=8.0 if entry.guidance == "embedded" else None)
        model = Model(None, None, card, 1.0 if entry.guidance == "embedded" else entry.guidance_scale, entry)
        assert model.guidance(wish) == both


def test_it_samples_with_its_own_settings(tiny, file):
    model = load_published(HYPER, str(tiny), file)
    sampler = model.sampler(None, {"num_inference_steps": None})
    assert isinstance(sampler, TCDSampler) and sampler.eta == 1 and sampler.num_inference_steps == 4
    noise, cond = torch.randn(1, *model.teacher.latent_shape), model.teacher.encode_prompts([""])
    run = sample(model.denoiser, sampler, noise, cond)
    assert run.timesteps.tolist() == [999, 759, 499, 259]


@pytest.mark.parametrize("weights, rank, match", [("lora", 4, None), ("full", 32, None), ("lora", 8, "has rank 4")])
def test_a_recipe_starts_from_one(weights, rank, match, tiny, teacher, lora, file, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "download", lambda entry: file)
    recipe = parse_recipe({
        "method": "tcd", "teacher": str(tiny), "init": "tcd-sd15", "student": {"weights": weights, "rank": rank},
        "training": {"steps": 2, "batch_size": 2},
    })  # fmt: skip
    if match:
        with pytest.raises(ValueError, match=match):
            setup(recipe, tmp_path)
        return
    job = setup(recipe, tmp_path)
    x, cond = torch.randn(2, *teacher.latent_shape), teacher.encode_prompts(["a", "b"])
    wanted = load_teacher(str(tiny))
    wanted.pipeline.unet.load_state_dict(added(teacher.pipeline.unet, lora))
    with torch.no_grad():
        got, expected = job.roles.student(x, 500, cond).output, wanted.denoiser(x, 500, cond).output
        assert (got - expected).abs().max() < 1e-4 < (teacher.denoiser(x, 500, cond).output - expected).abs().max()


def test_a_foreign_lora_file_starts_a_student_too(tiny, lora, file, tmp_path):
    recipe = {"method": "tcd", "teacher": str(tiny), "init": str(file), "student": {"rank": 4}}
    job = setup(parse_recipe({**recipe, "training": {"steps": 2, "batch_size": 2}}), tmp_path)
    mine = job.roles.tensors_of("student")
    for name, (a, b) in lora.items():
        torch.testing.assert_close(mine[f"unet.{name}.lora_A.weight"], a)
        torch.testing.assert_close(mine[f"unet.{name}.lora_B.weight"], b)


@pytest.mark.parametrize("name, family, weights", [
    ("tcd-sdxl", "sdxl", "lora"), ("hyper-sd3-4step-cfg", "sd3", "lora"), ("hyper-flux-8step", "flux", "lora"),
    ("flash-pixart", "pixart", "lora"), ("hyper-sd3-4step-cfg", "sd3", "full"), ("dmd2-sdxl-4step", "sdxl", "full"),
    ("sd-turbo", "sd15", "full"),
])  # fmt: skip
def test_any_kind_of_entry_is_the_beginning_of_a_student(name, family, weights, tmp_path, monkeypatch):
    """LoRAs of every family at their scale, peft's own folders, whole networks and pipelines: the student's answer."""
    entry, pipeline = find_checkpoint(name), copy.deepcopy(build(family))
    teacher = as_teacher(pipeline, size=SIZE)
    kind = find_family(pipeline)
    part, network = kind.part, kind.base
    x, cond = torch.randn(1, *teacher.latent_shape), teacher.encode_prompts(["a"])
    time = 0.5 if entry.flow else 500
    if entry.is_lora:
        lora, head = lora_of(network, targets=teacher.denoiser.network.lora_targets), "base_model.model"
        head = part if entry.kind == "lora" else head
        save_file({f"{head}.{n}.lora_{k}.weight": t for n, ab in lora.items() for k, t in zip("AB", ab, strict=True)},
                  tmp_path / "x.safetensors")  # fmt: skip
        (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 4}')
        wanted = added(network, lora, entry.lora_scale)
    else:
        wanted = {k: t + 0.01 * torch.randn_like(t) for k, t in network.state_dict().items()}
        save_file(wanted, tmp_path / "x.safetensors")
        other = copy.deepcopy(pipeline)
        find_family(other).base.load_state_dict(wanted)
        monkeypatch.setattr(load, "load_teacher", lambda *_, **__: as_teacher(
            other if entry.kind == "pipeline" else copy.deepcopy(pipeline), size=SIZE))  # fmt: skip
    begun = start_weights(entry, teacher, weights, 4, None if entry.kind == "pipeline" else tmp_path / "x.safetensors")
    roles = Roles(teacher.denoiser)
    roles.add("student", Weights(weights, rank=4, targets=teacher.denoiser.network.lora_targets))
    roles.start("student", begun)
    with torch.no_grad():
        got, before = (view(x, time, cond).output for view in (roles.student, roles.teacher))
        find_family(pipeline).base.requires_grad_(False)
        expected = as_teacher(with_network(family, wanted), size=SIZE).denoiser(x, time, cond).output
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (before - expected).abs().max() > 1e-3 * expected.abs().max()


def with_network(family, state):
    pipeline = copy.deepcopy(build(family))
    find_family(pipeline).base.load_state_dict(state)
    return pipeline


@pytest.mark.parametrize("change", ["drop", "rename", "shape", "flat"])
def test_peft_layout_is_checked_where_diffusers_has_no_loader(change, tmp_path):
    pipeline = build("pixart")
    lora = lora_of(pipeline.transformer, targets=("to_q",))
    tensors = {f"transformer.{n}.lora_{k}.weight": t for n, ab in lora.items() for k, t in zip("AB", ab, strict=True)}
    first = min(tensors)
    value = tensors.pop(first)
    more = {"rename": {first.replace("to_q", "to_z"): value}, "shape": {first: value[:, 1:]}, "flat": {first: value[0]}}
    save_file({k: t.contiguous() for k, t in {**tensors, **more.get(change, {})}.items()}, tmp_path / "x.safetensors")
    match = {"drop": "lacks its down", "rename": "another model"}.get(change, "does not fit PixArtTransformer2DModel")
    with pytest.raises(ValueError, match=match):
        read_lora(find_family(pipeline).lora_parts, tmp_path / "x.safetensors")


def test_a_network_with_a_guidance_scale_embedding_starts_none_without(tmp_path, monkeypatch):
    teacher = as_teacher(copy.deepcopy(build("sdxl")), size=SIZE)
    told = copy.deepcopy(build("sdxl").unet)
    told.time_embedding.cond_proj = torch.nn.Linear(32, told.time_embedding.linear_1.in_features, bias=False)
    save_file(told.state_dict(), tmp_path / "x.safetensors")
    others = copy.deepcopy(build("sdxl"))
    others.unet.time_embedding.cond_proj = torch.nn.Identity()  # as a role's own w-embedding leaves it
    monkeypatch.setattr(load, "load_teacher", lambda *_, **__: as_teacher(others, size=SIZE))
    with pytest.raises(ValueError, match="init: lcm-sdxl has a guidance-scale embedding"):
        start_weights(find_checkpoint("lcm-sdxl"), teacher, "full", 4, tmp_path / "x.safetensors")


# ---------------------------------------------------------------- hostile files


class Bomb:
    def __reduce__(self):
        return (open, ("/tmp/fewstep-was-here", "w"))


def written(kind, lora, path):
    tensors, said = kohya(lora, alpha=2), None
    if kind == "pickle":
        path = path.with_suffix(".bin")
        path.write_bytes(pickle.dumps(Bomb()))
        return path
    if kind == "pickle in disguise":
        path.write_bytes(pickle.dumps(Bomb()))
        return path
    if kind == "cut":
        save_file(tensors, path)
        path.write_bytes(path.read_bytes()[:-100])
        return path
    if kind == "another model's":
        tensors = {k.replace("down_blocks_0", "down_blocks_7"): t for k, t in tensors.items()}
    elif kind == "other shapes":
        tensors = {k: t if t.ndim == 0 else torch.zeros(5, *[7] * (t.ndim - 1)) for k, t in tensors.items()}
    elif kind == "missing keys":
        tensors = {k: t for k, t in tensors.items() if not ("to_q" in k and "lora_down" in k)}
    elif kind == "absurd rank in the header":
        tensors, said = peft(lora), {"unet.r": 10**12, "unet.lora_alpha": 10**18, "unet.target_modules": ["to_q"]}
    elif kind == "not a number":
        tensors[next(iter(tensors))] = torch.full_like(tensors[next(iter(tensors))], float("nan"))
    elif kind == "mixed layouts":  # as a script of diffusers' own wrote them: its loader goes by the first key
        tensors = {
            k.replace("lora_A", "lora.down").replace("lora_B", "lora.up") if ".to_" in k else k: t
            for k, t in peft(lora).items()
        }
    elif kind == "path in a key":
        tensors = {f"../../{k}": t for k, t in tensors.items()}
    elif kind == "empty":
        tensors = {"nothing": torch.zeros(1)}
    elif kind == "text encoder":
        tensors["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.zeros(1, 1)
    save_file(tensors, path, metadata=said and {"lora_adapter_metadata": json.dumps(said)})
    return path


SAID = {
    "pickle": "convert it first",
    "text encoder": "encoder too",
    "mixed layouts": "convert it to one layout",
    "another model's": "is of another model (a UNet of Stable Diffusion)",
    "missing keys": "lacks its down",
}
KINDS = ["pickle", "pickle in disguise", "cut", "another model's", "other shapes", "missing keys", "mixed layouts",
         "not a number", "absurd rank in the header", "path in a key", "empty", "text encoder"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_file_is_one_sentence_and_loads_nothing(kind, teacher, lora, tmp_path, tmp_path_factory):
    path = written(kind, lora, tmp_path / "x.safetensors")
    before = {k: v.clone() for k, v in teacher.pipeline.unet.state_dict().items()}
    with pytest.raises(ValueError) as error:
        read_lora(teacher.family.lora_parts, path)
    said = str(error.value)
    assert SAID.get(kind, "") in said
    assert str(path) in said and "\n" not in said and len(said) < 600
    weights_are(teacher.pipeline.unet, before, 0)
    assert not (tmp_path_factory.getbasetemp().parent / "fewstep-was-here").exists()


def test_a_network_of_another_model_is_refused(tiny, teacher, tmp_path):
    entry = find_checkpoint("sdxl-lightning-4step-unet")
    state = teacher.pipeline.unet.state_dict()
    for name, tensors in {
        "lacks": {k: t for k, t in state.items() if not k.startswith("conv_in")},
        "another": {**state, "conv_in.weight": torch.zeros(3, 3)},
        "has": {**state, "more.weight": torch.zeros(3)},
    }.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match="of another network"):
            load_checkpoint(entry, str(tiny), tmp_path / f"{name}.safetensors")


def test_the_command_line(tiny, file, tmp_path, monkeypatch, capsys):
    code, out, err = inside(
        monkeypatch, capsys, tmp_path, "sample", "--checkpoint", "hyper-sd15-4step", "--base", tiny, "--file", file,
        "--steps", 5, "--guidance-scale", 7.5,
    )  # fmt: skip
    assert code == 0 and "Wrote sample.png" in out and "guidance 7.5" in out and "ddim" in out
    assert "is bound to 4 steps, not 5" in err and "without guidance" in err and "was made for" in err
    assert "Licence of hyper-sd15-4step" in err
    code, out, err = inside(monkeypatch, capsys, tmp_path, "checkpoints", "sdxl-lightnig-4step-lora")
    assert code == 2 and "did you mean sdxl-lightning-4step-lora" in err
    for name in checkpoints():
        code, out, err = inside(monkeypatch, capsys, tmp_path, "checkpoints", name)
        assert code == 0 and name in out and "licence" in out
    code, out, err = inside(monkeypatch, capsys, tmp_path, "checkpoints")
    assert code == 0 and len(out.splitlines()) == len(checkpoints())


def test_a_pipeline_of_another_family_is_refused(tmp_path):
    build("sd15").save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"^sdxl-turbo is a pipeline of .*XL.*, and .*own is none\.$"):
        load_checkpoint(find_checkpoint("sdxl-turbo"), base=str(tmp_path / "own"))
