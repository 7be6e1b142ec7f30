"""LoRA files that diffusers and peft write themselves, and what they make of them; the original names by diffusers' own
converters of whole checkpoints."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

from fewstep.models.families import find_family
from fewstep.models.lora_files.original import original_names
from tests.cases.lora_inputs import copied, drawn, effect, kohya, peft, weights, worst, write
from tests.models.pipelines import build

TARGETS = ["to_q", "to_k", "to_out.0", "conv1", "proj_mlp"]
CONFIGS = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "biases": {"lora_bias": True, "target_modules": ["to_out.0", "conv1"]},
    "alpha_pattern": {"alpha_pattern": {"to_q": 2, "attn1.to_k": 5}},
    "rank_pattern": {"rank_pattern": {"to_q": 8}},
    "both patterns": {"rank_pattern": {"to_q": 8, "conv1": 2}, "alpha_pattern": {"to_k": 1}},
}


def adapted(network, **config):
    """A peft adapter of random weights on a copy of the network."""
    from peft import LoraConfig

    torch.manual_seed(1)
    targets = [t for t in TARGETS if any(n.endswith(t) for n, _ in network.named_modules())]
    config = LoraConfig(**{
        "r": 4, "lora_alpha": 8, "target_modules": targets, "init_lora_weights": False, **config})  # fmt: skip
    network = copy.deepcopy(network)
    network.add_adapter(config)
    for name, p in network.named_parameters():
        if "magnitude" in name:
            p.data.mul_(1.5)
    return network, config


def fused(name, *files):
    """part.parameter -> its change by diffusers' own loader and fuse_lora."""
    pipeline = copy.deepcopy(build(name))
    for file in files:
        pipeline.load_lora_weights(str(file))
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    found = {}
    for part, module in find_family(pipeline).lora_parts.items():
        for key, p in module.named_parameters() if module is not None else ():
            change = p.detach().double() - weights(name)[f"{part}.{key}"]
            found |= {f"{part}.{key}": change} if change.any() else {}
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file by diffusers' save_lora_weights, with the config in its header."""

    def save(name, **config):
        family, folder = find_family(build(name)), tmp_path_factory.mktemp("saved")
        network, config = adapted(family.base, **config)
        from peft.utils import get_peft_model_state_dict

        build(name).save_lora_weights(folder, **{
            f"{family.part}_lora_layers": get_peft_model_state_dict(network),
            f"{family.part}_lora_adapter_metadata": config.to_dict(),
        })  # fmt: skip
        return folder / "pytorch_lora_weights.safetensors"

    return save


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_what_diffusers_saves_is_what_it_fuses(name, config, saved):
    settings = dict(CONFIGS[config])
    if name == "flux" and config == "biases":
        settings["target_modules"] = ["to_out.0", "proj_mlp"]
    file = saved(name, **settings)
    wanted = fused(name, file)
    assert len(wanted) > 4 and worst(effect(name, file), wanted) <= 1e-6


@pytest.mark.slow
def test_a_folder_of_pefts_is_what_peft_merges(tmp_path):
    """`save_pretrained` of each kind, read as a folder and as the file in it."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model

    common = {"target_modules": ["to_q", "conv1"], "init_weights": False}
    for config in (
        LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "conv1"], init_lora_weights=False, use_rslora=True),
        LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"], init_lora_weights=False, use_dora=True),
        LoHaConfig(r=2, alpha=6, **common), LoHaConfig(r=2, alpha=6, use_effective_conv2d=True, **common),
        LoKrConfig(r=2, alpha=6, **common), LoKrConfig(r=2, alpha=6, decompose_both=True, decompose_factor=4, **common),
        LoKrConfig(r=99, alpha=66, **common), LoKrConfig(r=99, alpha=66, rank_pattern={"to_q": 50}, **common),
        LoKrConfig(r=2, alpha=6, use_effective_conv2d=True, **common),
    ):  # fmt: skip
        torch.manual_seed(1)
        model = get_peft_model(copied("sd15")["unet"], config)
        model.save_pretrained(tmp_path / "x")
        merged = dict(model.merge_and_unload().named_parameters())
        wanted = {f"unet.{k}": p.detach().double() - weights("sd15")[f"unet.{k}"] for k, p in merged.items()}
        wanted = {key: change for key, change in wanted.items() if change.any()}
        assert wanted and worst(effect("sd15", tmp_path / "x"), wanted) <= 2e-6, config
    assert worst(effect("sd15", tmp_path / "x" / "adapter_model.safetensors"), wanted) <= 2e-6


@pytest.mark.slow
def test_the_file_of_a_network_is_what_it_fuses(tmp_path):
    """`save_lora_adapter` writes its settings without the part's name."""
    network, _ = adapted(build("sd15").unet)
    network.save_lora_adapter(tmp_path)
    network.fuse_lora()
    layers = {name: layer for name, layer in network.named_modules() if hasattr(layer, "base_layer")}
    wanted = {
        f"unet.{name}.weight": layer.base_layer.weight.detach().double() - weights("sd15")[f"unet.{name}.weight"]
        for name, layer in layers.items()
    }
    assert len(wanted) > 4 and worst(effect("sd15", tmp_path), wanted) <= 1e-6


@pytest.mark.slow
def test_the_second_dora_stands_on_the_first(saved, tmp_path):
    """diffusers fuses one file after the other; so does this reader."""
    files = [saved("sd15", use_dora=True), saved("sd15", r=2)]
    found, parts = {}, copied("sd15")
    for file in files:
        for key, change in effect("sd15", file, parts=parts).items():
            found[key] = found.get(key, 0) + change
    assert worst(found, fused("sd15", *files)) <= 1e-6


def converted(name):
    """The checkpoint of a tiny network under its original names, and what diffusers' converter makes of it."""
    from diffusers.loaders import single_file_utils as theirs

    network = find_family(build(name)).base
    old = {}
    for first, place in original_names(network):
        for kind in ("weight", "bias"):
            rows = [getattr(network.get_submodule(layer), kind, None) for layer in place.layers]
            if all(row is not None for row in rows):
                whole = torch.cat(rows)
                old[f"{first}.{kind}"] = torch.cat(whole.chunk(2)[::-1]) if place.swapped else whole
    convert = {"sd15": "ldm_unet", "sdxl": "ldm_unet", "sd3": "sd3_transformer", "flux": "flux_transformer"}[name]
    convert = f"convert_{convert}_checkpoint" + ("" if "unet" in convert else "_to_diffusers")
    source = inspect.getsource(getattr(theirs, convert)).replace("inner_dim = 3072", "inner_dim = 16")
    space = dict(vars(theirs))
    exec(source, space)  # FLUX's converter with the width of a tiny one
    if name == "sd3":
        old["pos_embed"] = network.pos_embed.pos_embed
    for i, block in enumerate(getattr(network, "transformer_blocks", ()) if name == "flux" else ()):
        for side, names in (("img", ("norm_q", "norm_k")), ("txt", ("norm_added_q", "norm_added_k"))):
            for what, norm in zip(("query", "key"), names, strict=True):
                old[f"double_blocks.{i}.{side}_attn.norm.{what}_norm.scale"] = getattr(block.attn, norm).weight
    for i, block in enumerate(getattr(network, "single_transformer_blocks", ())):
        for what, norm in (("query", "norm_q"), ("key", "norm_k")):
            old[f"single_blocks.{i}.norm.{what}_norm.scale"] = getattr(block.attn, norm).weight
    head = "model.diffusion_model."
    checkpoint = {f"{head}{key}": t for key, t in old.items()}
    return network, space[convert](checkpoint, config=dict(network.config))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_original_names_are_those_of_diffusers_converters(name):
    """Every layer that has weights is named, and diffusers' converter puts it where this reader does."""
    network, found = converted(name)
    wanted = network.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def in_kohyas_names(name):
    """A LoRA of every layer of a network and its first text encoder, in kohya's names, alpha 2 of rank 4."""
    tensors = {}
    for part, module in find_family(build(name)).lora_parts.items():
        if part == "text_encoder_3" or type(module).__name__.startswith("T5"):
            continue
        names = original_names(module) if name == "sdxl" else ()  # kohya's trainer has diffusers' UNet for SD 1.x
        other = {place.layers[0]: first for first, place in names}
        for layer, child in module.named_modules():
            if isinstance(child, torch.nn.Linear | torch.nn.Conv2d) and "projection" not in layer:
                rows, columns, *kernel = child.weight.shape
                a, b = drawn(4, columns, *kernel), drawn(rows, 4, *[1] * len(kernel), seed=1)
                prefix = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}.get(part, "lora_unet_")
                long = layer if layer.startswith("text_model") or prefix == "lora_unet_" else f"text_model.{layer}"
                tensors |= kohya(other.get(layer, long), a, b, 2, prefix)
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_kohyas_files_of_whole_unets_are_what_diffusers_fuses(name, tmp_path):
    """All layers of a UNet, SDXL's under their original names, and of the text encoders."""
    file = write(tmp_path / "x.safetensors", in_kohyas_names(name))
    wanted = fused(name, file)
    assert len(wanted) > 60 and worst(effect(name, file), wanted) <= 1e-6


def of_flux():
    block, single, h = "double_blocks.0", "single_blocks.1", 16
    qkv, out = (drawn(4, h), drawn(3 * h, 4)), (drawn(4, h), drawn(h, 4))
    tail = (drawn(4, 5 * h), drawn(h, 4))
    yield "kohya", {
        **kohya(f"{block}.img_attn.qkv", *qkv, 2), **kohya(f"{block}.txt_attn.qkv", *qkv, 4),
        **kohya(f"{block}.img_attn.proj", *out, 2), **kohya(f"{single}.linear2", *tail, 2)}  # fmt: skip
    parts = {"qkv_lora1": qkv, "qkv_lora2": qkv, "proj_lora1": out, "proj_lora2": out}
    parts = {f"{block}.processor.{part}": pair for part, pair in parts.items()}
    parts |= {f"{single}.processor.qkv_lora": qkv, f"{single}.processor.proj_lora": tail}
    yield (
        "XLabs",
        {
            name: t
            for part, pair in parts.items()
            for name, t in peft(part, *pair, "", "down.weight", "up.weight").items()
        },
    )
    names = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_out.0")
    yield "OneTrainer", {k: t for name in names for k, t in kohya(name, *out, 2, "lora_transformer_").items()}
    yield "a tensor of alpha", {
        **peft(names[0], *out, "transformer."), f"transformer.{names[0]}.alpha": torch.tensor(2.0)}  # fmt: skip
    yield "kohya's endings", peft(names[0], *out, "transformer.", "lora_down.weight", "lora_up.weight")


FLUX = dict(of_flux())


@pytest.mark.slow
@pytest.mark.parametrize("layout", FLUX)
def test_layouts_of_flux_are_what_diffusers_fuses(layout, tmp_path):
    file = write(tmp_path / "x.safetensors", FLUX[layout])
    wanted = fused("flux", file)
    assert wanted and worst(effect("flux", file), wanted) <= 1e-6
