"""A last layer for each step, in one file with the LoRA: written, read back, and read as others publish such files."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewstep
from fewstep.checkpoints.registry import checkpoints
from fewstep.checkpoints.sampling import sampler_of as published_sampler
from fewstep.export.publish import export
from fewstep.inference.load import load_published
from fewstep.methods.pdd import PDD
from fewstep.models.families import load_teacher
from fewstep.models.lora import lora_layers
from fewstep.models.roles import Roles, Weights
from fewstep.students.card import Card, load_card
from fewstep.students.student import load_student, save_student
from tests.models.pipelines import SIZE, build

LEVELS = (1.0, 0.9169867, 0.7861579, 0.549491)
"""Those of the published Qwen-Image-2.1 file, whose norms are trained too."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a tiny Stable Diffusion 3 with random weights, and its folder."""
    folder = tmp_path_factory.mktemp("heads")
    build("sd3").save_pretrained(folder / "sd3")
    teacher = load_teacher(str(folder / "sd3"), size=SIZE)
    method = PDD(teacher.denoiser.schedule, num_grid_steps=8, num_inference_steps=(4, 2, 1))
    roles = Roles(teacher.denoiser)
    roles.add("student", Weights("lora", 4), bank=method.roles()[0].bank)
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in roles.tensors().values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    card = Card("pdd", "ddim", 4, "lora", str(folder / "sd3"), rank=4, image_size=SIZE, prediction_type="flow",
                bank=method.roles()[0].bank, bank_steps=(4, 2, 1))  # fmt: skip
    save_student(folder / "run" / "student", roles, card)
    return folder / "run"


def by_hand(network, cond, x, times, layers, weight_of):
    """Euler's steps of diffusers' own network, its last layer exchanged before each."""
    last = network.transformer.proj_out
    for i, (t, s) in enumerate(pairwise(times)):
        with torch.no_grad():
            last.weight.copy_(weight_of(layers, i)[0])
            last.bias.copy_(weight_of(layers, i)[1])
            x = x + (s - t) * network(x, torch.full((len(x),), t), cond)
    return x


@pytest.mark.slow
def test_a_file_of_heads_is_the_student(run, tmp_path):
    made = export(run, "heads", tmp_path / "out")
    assert made.round_trip.gap <= 1e-6
    file = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    teacher = load_teacher(str(run.parent / "sd3"), size=SIZE)
    own = teacher.family.base.proj_out
    assert file["proj_out.weight"].shape == (4, *own.weight.shape)
    assert file["proj_out.bias"].shape == (4, *own.bias.shape)
    # sampled by hand: the LoRA by its product, the last layers as they stand in the file
    card = load_card(run / "student")
    x = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(1))
    cond = teacher.encode_prompts(["a red circle", "a blue square on grass"])
    student = load_student(load_teacher(str(run.parent / "sd3"), size=SIZE), run / "student", card)
    wanted = fewstep.sampling.sample(student, fewstep.students.card.sampler_of(card), x, cond).x0
    weights = dict(teacher.family.base.named_parameters())
    with torch.no_grad():
        for name, down in file.items():
            if name.endswith(".lora_down"):
                layer = name.removesuffix(".lora_down")
                weights[f"{layer}.weight"] += file[f"{layer}.lora_up"] @ down
    heads = [file[f"proj_out.{kind}"] for kind in ("weight", "bias")]
    times = [*card.bank[:-1:2], 0.0]
    found = by_hand(teacher.denoiser.network, cond, x, times, heads, lambda layers, i: (layers[0][i], layers[1][i]))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    # and by fewstep, from the folder
    model = fewstep.load(tmp_path / "out")
    assert torch.allclose(model.sample(["a red circle"], latents=x[:1], output_type="latent"), wanted[:1], atol=1e-5)
    with pytest.raises(ValueError, match="has 4 last layers and was trained to take 4 steps, not 2"):
        model.sample(["a red circle"], 2)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Read back by fewstep, from the file alone" in text and "fewstep.load" in text
    assert 'library_name: "fewstep"' in text and "VideoX-Fun" in text and "ComfyUI" not in text
    # and as those of earlier releases were written: PEFT's names, everything with its part in front, no settings beside
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    named = {"lora_down": "lora_A.weight", "lora_up": "lora_B.weight", "weight": "weight", "bias": "bias"}
    names = {name: "transformer.{}.{}".format(*(lambda a, _, b: (a, named[b]))(*name.rpartition("."))) for name in file}
    save_file({names[name]: t for name, t in file.items()}, earlier / "pytorch_lora_weights.safetensors")
    (earlier / "few_step.json").write_text((tmp_path / "out" / "few_step.json").read_text())
    again = fewstep.load(earlier).sample(["a red circle"], latents=x[:1], output_type="latent")
    assert torch.allclose(again, wanted[:1], atol=1e-5)


@pytest.mark.slow
def test_other_numbers_of_steps_are_fused_anew(run, tmp_path):
    card = load_card(run / "student")
    replace(card, num_inference_steps=2).save(run / "student")
    try:
        export(run, "heads", tmp_path / "out", dtype="bf16")
        held = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")["proj_out.weight"]
        own = load_teacher(str(run.parent / "sd3"), size=SIZE).family.base.proj_out.weight.detach()
        each = load_file(run / "student" / "fewstep_student.safetensors")["bank.weight"]
        lengths = torch.tensor(card.bank).diff().reshape(2, 4)
        wanted = own + (lengths[:, :, None, None] * each.unflatten(0, (2, 4))).sum(1) / lengths.sum(1)[:, None, None]
        assert held.dtype == torch.bfloat16 and torch.allclose(held.float(), wanted, rtol=2**-8, atol=0)
    finally:
        card.save(run / "student")


@pytest.mark.slow
def test_one_block_is_an_ordinary_network(run, tmp_path):
    card = load_card(run / "student")
    replace(card, num_inference_steps=1).save(run / "student")
    try:
        with pytest.raises(ValueError, match="last layer is no LoRA: export --to diffusers or merged"):
            export(run, "lora", tmp_path / "lora")
        assert export(run, "merged", tmp_path / "merged").round_trip.gap <= 1e-5
    finally:
        card.save(run / "student")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["diffusers", "lora", "merged"])
def test_several_steps_have_no_other_form(run, tmp_path, to):
    with pytest.raises(ValueError, match="a last layer for every step, which no pipeline of diffusers exchanges"):
        export(run, to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def published(place, layout, base, steps=4, **broken):
    """A file as VideoX-Fun's ("stacked") or ComfyUI's ("set") for a tiny Qwen-Image-2.1, and what it does by hand."""
    endings = (".lora_down", ".lora_up") if layout == "stacked" else (".lora_A.weight", ".lora_B.weight")
    generator = torch.Generator().manual_seed(3)
    prefix = {"stacked": "", "set": "diffusion_model.", "diffusers": "transformer."}[layout]
    tensors, lora, norms = {}, {}, {}
    for name, layer in base.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(("to_q", "to_out.0")):
            down = 0.1 * torch.randn(2, layer.in_features, generator=generator)
            up = 0.1 * torch.randn(layer.out_features, 2, generator=generator)
            lora[f"{name}.weight"] = up @ down
            tensors |= {f"{prefix}{name}{ending}": t for ending, t in zip(endings, (down, up), strict=True)}
    for name, weight in base.named_parameters():
        if "norm_q" in name or "norm_k" in name:
            norms[name] = weight + 0.2 * torch.randn(weight.shape, generator=generator)
            tensors[prefix + name] = norms[name].detach().clone()
    own = base.proj_out.weight
    heads = own + 0.1 * torch.randn(steps, *own.shape, generator=generator)
    if layout == "set":
        tensors["diffusion_model.proj_out.set_weight"] = heads.flatten(0, 1).detach().clone()
    else:
        tensors[f"{prefix}proj_out.weight"] = heads.detach().clone()
    save_file({**tensors, **broken}, place)
    return heads.detach(), lora, norms


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    build("qwen_image21").save_pretrained(folder / "base")
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:qwen-image-2.1-fun-acc")
@pytest.mark.parametrize("layout", ["stacked", "set", "diffusers"])
def test_a_published_file_is_sampled(qwen, tmp_path, layout):
    teacher = load_teacher(str(qwen / "base"), size=SIZE)
    file = tmp_path / "file.safetensors"
    heads, lora, norms = published(file, layout, teacher.family.base)
    model = load_published(checkpoints()["qwen-image-2.1-fun-acc"], str(qwen / "base"), file, size=SIZE)
    x = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(1))
    found = model.sample(["a red circle"], latents=x, output_type="latent")
    weights = dict(teacher.family.base.named_parameters())
    with torch.no_grad():
        for name, change in lora.items():
            weights[name] += change
        for name, norm in norms.items():
            weights[name].copy_(norm)
        cond, state, times = teacher.encode_prompts(["a red circle"]), x, (*LEVELS, 0.0)
        for i in range(4):
            teacher.family.base.proj_out.weight.copy_(heads[i])
            state = state + (times[i + 1] - times[i]) * teacher.denoiser.network(
                x=state, t=torch.tensor([times[i]]), cond=cond
            )
    torch.testing.assert_close(found, state, rtol=1e-4, atol=1e-5)
    assert lora_layers(model.teacher.family.base) == []
    with pytest.raises(ValueError, match="has last layers for 4 steps, and none for 8"):
        model.sample(["a red circle"], 8)
    for name in ("euler", "ddim"):  # named, its own sampler takes the same times
        assert torch.equal(model.sample(["a red circle"], sampler=name, latents=x, output_type="latent"), found)
    with pytest.raises(ValueError, match=r"0\.5 is none of them: .* choose among 1, 0\.9"):
        model.sample(["a red circle"], timesteps=[1.0, 0.5], sampler="euler")
    with pytest.raises(ValueError, match="no slope at the end of a step, which samplers such as heun ask for"):
        model.sample(["a red circle"], sampler="heun")


@pytest.mark.slow
def test_files_that_do_not_fit_are_refused(qwen, tmp_path):
    base = build("qwen_image21").transformer
    entry, file = checkpoints()["qwen-image-2.1-fun-acc"], tmp_path / "file.safetensors"
    wide = torch.zeros(4, *base.proj_out.weight.shape)
    for steps, broken, why in [
        (3, {}, r"does not hold 4 last layers: proj_out.weight has shape \(3, "),
        (4, {"blocks.7.other.weight": torch.zeros(2)}, "has no blocks.7.other.weight"),
        (4, {"proj_out.weight": wide[..., :3].contiguous()}, "does not hold 4 last layers"),
    ]:
        published(file, "stacked", base, steps, **broken)
        with pytest.raises(ValueError, match=why):
            load_published(entry, str(qwen / "base"), file, size=SIZE)
    save_file({"transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 32)}, file)
    with pytest.raises(ValueError, match=r"holds no last layer for each step: proj_out\.weight is not in it"):
        load_published(entry, str(qwen / "base"), file, size=SIZE)


def test_the_registry_says_how_it_is_sampled():
    entry = checkpoints()["qwen-image-2.1-fun-acc"]
    schedule = fewstep.diffusion.schedule.Schedule.flow(3.0, terminal=0.02)
    assert published_sampler(entry, {}).times(schedule).tolist() == [*LEVELS, 0.0]  # no shift bends them
