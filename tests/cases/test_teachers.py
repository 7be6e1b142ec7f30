"""Teachers as people keep them: read as diffusers reads them, or refused in one true sentence."""

from __future__ import annotations

import json
import re
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

import fewstep
from fewstep.checkpoints.copies import copy_of
from fewstep.checkpoints.load import load_checkpoint
from fewstep.checkpoints.registry import find_checkpoint
from fewstep.export.publish import export
from fewstep.models.families import as_teacher, load_teacher
from fewstep.models.meta_pipeline import outline
from fewstep.models.roles import Roles, Weights
from fewstep.recipe.load import parse_recipe
from fewstep.runs.distill import distill
from fewstep.runs.setup import setup
from fewstep.students.lineage import open_teacher
from tests.cases.folders import RED, WEIGHTS, Shelf, edit, lcm, rewritten, without
from tests.checkpoints.tiny import kohya, lora_of
from tests.command_line import inside
from tests.models import pipelines
from tests.models.pipelines import SIZE, build
from tests.models.single_file import save_single_file

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return Shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(scope="module")
def plain(shelf):
    """Latents of the plain folders, which other forms of the same weights must give too."""
    return {name: latents(shelf(name)) for name in ("sd15", "sdxl")}


@pytest.fixture(scope="module")
def file(shelf):
    """SDXL in one file, and the folder of its configs."""
    path = shelf.place / "sdxl.safetensors"
    save_single_file(build("sdxl"), path)
    return path


@pytest.fixture(scope="module")
def lcm_folder(shelf):
    return lcm(shelf.place / "lcm")


def latents(name, **options):
    return fewstep.load(str(name), **options).sample(RED, 2, output_type="latent")


def refused(name, sentence, **options):
    """``name`` is refused in one sentence that holds ``sentence``."""
    with pytest.raises(ValueError, match=sentence) as error:
        fewstep.load(str(name), **options)
    assert "\n" not in str(error.value) and str(error.value).endswith(".") and not str(error.value).endswith("..")
    return str(error.value)


# ------------------------------------------------------------------ float16, and what is not finite


@pytest.fixture(scope="module")
def loud(shelf):
    """SDXL with an autoencoder whose activations pass 65,504, as the published one's do."""
    folder = shelf.copy("sdxl", "loud")

    def amplify(tensors):
        for name in ("decoder.conv_in.weight", "decoder.conv_in.bias", "encoder.conv_in.weight"):
            tensors[name] *= 3e5

    rewritten(folder / "vae" / WEIGHTS, folder / "vae" / WEIGHTS, amplify)
    return folder


def test_an_autoencoder_that_says_force_upcast_runs_in_float32_as_in_diffusers(loud):
    theirs = DiffusionPipeline.from_pretrained(loud, torch_dtype=torch.float16)
    theirs.set_progress_bar_config(disable=True)
    teacher, seen = load_teacher(str(loud), dtype=torch.float16), []
    theirs.vae.register_forward_pre_hook(lambda *_: pytest.fail("never called as a whole"))
    decode = theirs.vae.decode
    theirs.vae.decode = lambda z, **more: seen.append(z) or decode(z, **more)
    images = theirs(RED, num_inference_steps=2, output_type="np", height=SIZE, width=SIZE).images
    mine = teacher.decode(seen[0] * teacher.family.latent_scale[0]).permute(0, 2, 3, 1).numpy()
    assert seen[0].dtype == torch.float32 and np.isfinite(images).all() and images.std() > 0.01
    assert np.abs(mine - images).max() < 2e-3  # they round their images to float16
    picture = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = theirs.vae.float().encode(picture).latent_dist  # as their img2img does
    mean, std = teacher.encode_images(picture)
    torch.testing.assert_close(mean, posterior.mean * 0.5, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(std, posterior.std * 0.5, rtol=1e-4, atol=1e-4)
    assert teacher.pipeline.unet.dtype == torch.float16


@slow
def test_an_autoencoder_without_force_upcast_and_bfloat16_stay_as_they_are(shelf):
    folder = shelf.copy("sdxl", "calm")
    edit(folder / "vae" / "config.json", force_upcast=False)
    assert load_teacher(str(folder), dtype=torch.float16).pipeline.vae.dtype == torch.float16
    assert load_teacher(str(shelf("sdxl")), dtype=torch.bfloat16).pipeline.vae.dtype == torch.bfloat16
    plan = outline(str(shelf("sdxl")), dtype=torch.float16)  # a plan counts the bytes of what will be there
    assert plan.parts["vae"].dtype == torch.float32 and plan.base.dtype == torch.float16


@torch.no_grad()
def test_what_is_not_finite_is_an_error_before_it_is_an_image(loud):
    edit(loud / "vae" / "config.json", force_upcast=False)
    try:
        refused(loud, "The autoencoder's images are not finite", dtype="float16")
    finally:
        edit(loud / "vae" / "config.json", force_upcast=True)
    teacher = as_teacher(pipelines.BUILD["sd15"](), size=SIZE)
    x = torch.zeros(1, *teacher.latent_shape)
    for broken in (x / 0, x + torch.inf):
        with pytest.raises(ValueError, match=r"^The latents are not finite"):
            teacher.decode(broken)
    teacher.pipeline.vae.decoder.conv_out.bias.fill_(torch.inf)  # clamped, it would be a white image
    with pytest.raises(ValueError, match=r"^The autoencoder's images are not finite"):
        teacher.decode(x)
    teacher.pipeline.vae.encoder.conv_in.bias.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"^The autoencoder's latents of these images are not finite"):
        teacher.encode_images(torch.zeros(1, 3, SIZE, SIZE))


def test_a_network_that_overflows_writes_no_file(shelf, tmp_path, monkeypatch, capsys):
    """A guidance scale beyond float32 makes infinite latents; weights of NaN are refused when they are loaded."""
    wild = ("-p", RED, "--steps", "2", "--guidance-scale", "1e39", "--out", "x.png")
    code, _, said = inside(monkeypatch, capsys, tmp_path, "sample", shelf("sd15"), *wild)
    assert code == 2 and "The latents are not finite" in said and not (tmp_path / "x.png").exists()
    folder = shelf.copy("sd15", "nan")
    unet = folder / "unet" / WEIGHTS
    rewritten(unet, unet, lambda tensors: tensors["conv_out.weight"].fill_(torch.nan))
    refused(folder, "NaN or infinity comes out of its unet in float32")


# ------------------------------------------------------------------ single files


def marked(file, called, *markers, header=None, **values):
    """SDXL's file with empty tensors of these names, or values."""
    path = file.with_name(f"{called}.safetensors")
    tensors = {name: torch.zeros(0) for name in markers} | {name: torch.tensor(v) for name, v in values.items()}
    rewritten(file, path, lambda own: own.update(tensors))
    if header:
        save_file(fewstep_tensors(path), path, metadata=header)
    return path


def fewstep_tensors(path):
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize(
    "how", ["v_pred and ztsnr", pytest.param("v_pred", marks=slow), pytest.param("modelspec", marks=slow)]
)
def test_a_file_that_says_v_prediction_is_the_folder_that_says_so(how, shelf, file, monkeypatch):
    markers = () if how == "modelspec" else how.split(" and ")
    header = {"modelspec.prediction_type": "v"} if how == "modelspec" else None
    path = marked(file, how.replace(" ", "_"), *markers, header=header)
    folder = shelf.copy("sdxl", f"says {how}")
    zero = {"rescale_betas_zero_snr": True} if "ztsnr" in how else {}
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction", **zero)
    single, wanted = f"{path}@{shelf('sdxl')}", load_teacher(str(folder))
    teacher = load_teacher(single)
    assert teacher.denoiser.prediction_type == "v_prediction"
    end = teacher.denoiser.schedule.alpha_sigma(999)[0]
    assert (end == 0) == bool(zero) and end == wanted.denoiser.schedule.alpha_sigma(999)[0]
    assert torch.equal(latents(single), latents(folder))
    plan = outline(single)  # and the plan knows it before any weight is read
    assert plan.denoiser().prediction_type == "v_prediction" and plan.scheduler.get(
        "rescale_betas_zero_snr", False
    ) == bool(zero)


@slow
def test_markers_that_cannot_be_followed_are_refused(shelf, file):
    edm = marked(file, "edm", **{"edm_vpred.sigma_max": 80.0, "edm_vpred.sigma_min": 0.002})
    refused(f"{edm}@{shelf('sdxl')}", r"is an EDM network \(edm_vpred\.sigma_max\): these are not supported")
    playground = marked(file, "playground", **{"edm_mean": 0.0, "edm_std": 1.0})
    refused(f"{playground}@{shelf('sdxl')}", r"is an EDM network \(edm_mean\)")
    folder = shelf.copy("sdxl", "says sample")
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")
    refused(f"{marked(file, 'v', 'v_pred')}@{folder}", "says v_pred, and its config predicts 'sample'")
    refused(f"{marked(file, 'z', 'ztsnr')}@{shelf('sdxl')}", "An epsilon network cannot start from pure noise")
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")  # most v files have no marker
    assert load_teacher(f"{file}@{folder}").denoiser.prediction_type == "v_prediction"


@pytest.mark.parametrize("lacking", ["first_stage_model", pytest.param("conditioner", marks=slow)])
def test_parts_that_a_file_lacks_come_from_the_folder_of_its_configs(lacking, shelf, file, plain):
    path = rewritten(file, file.with_name(f"no {lacking}.safetensors"), without(lacking))
    assert torch.equal(latents(f"{path}@{shelf('sdxl')}"), plain["sdxl"])
    bare = shelf.place / "configs"
    if not bare.exists():
        shelf.copy("sdxl", "configs")
        for weights in bare.rglob("*.safetensors"):
            weights.unlink()
    part = {"first_stage_model": "vae", "conditioner": "text_encoder"}[lacking]
    refused(f"{path}@{bare}", f"cannot be loaded: it holds no {part}; give a folder with one, weights and configs")


@slow
def test_files_in_unusual_shapes_are_read(shelf, file, plain):
    upper = shutil.copy(file, file.with_name("UPPER.SAFETENSORS"))
    assert torch.equal(latents(f"{upper}@{shelf('sdxl')}"), plain["sdxl"])
    more = {"model_ema.decay": torch.zeros(1), "alphas_cumprod": torch.rand(1000), "denoiser.sigmas": torch.rand(1000)}
    path = rewritten(file, file.with_name("more.safetensors"), lambda tensors: tensors.update(more))
    assert torch.equal(latents(f"{path}@{shelf('sdxl')}"), plain["sdxl"])
    link = file.with_name("link.safetensors")
    link.symlink_to(file)
    assert torch.equal(latents(f"{link}@{shelf('sdxl')}/"), plain["sdxl"])
    renamed = shelf.place / "sd15.safetensors"
    save_single_file(build("sd15"), renamed)
    old = {f"cond_stage_model.transformer.{n.removeprefix('cond_stage_model.transformer.text_model.')}": t
           for n, t in fewstep_tensors(renamed).items() if n.startswith("cond_stage_model")}  # fmt: skip
    path = rewritten(renamed, renamed.with_name("old.safetensors"), lambda t: (without("cond_stage")(t), t.update(old)))
    refused(
        f"{path}@{shelf('sd15')}",
        r"diffusers cannot read the text_encoder in .*cond_stage_model\.\S* and others",
    )


@slow
def test_files_that_lack_layers_or_are_for_another_model_are_refused(shelf, file):
    for name in ("middle_block.1.transformer_blocks.0.attn1.to_q", "first_stage_model.decoder.mid.attn_1.q"):
        path = rewritten(file, file.with_name("less.safetensors"), without(name))
        refused(f"{path}@{shelf('sdxl')}", "is not whole: it lacks some weights of its network or autoencoder")
    path = rewritten(file, path, without("conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc1"))
    refused(f"{path}@{shelf('sdxl')}", r"its weights of the text_encoder lack encoder\.layers\.1\.mlp\.fc1")
    refused(f"{file}@{shelf('sd15')}", r"is for SDXL, and the configs in .* are of Stable Diffusion 1\.x or 2\.x")
    nine = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)}
    refused(rewritten(file, path, lambda t: t.update(nine)), "takes 9 channels, SDXL's takes 4: inpainting, editing")
    gguf = file.with_name("x.gguf")
    gguf.write_bytes(b"GGUF")
    refused(gguf, r"is a quantised file \(\.gguf\), which is not read here")


# ------------------------------------------------------------------ folders


def test_a_folder_with_one_variant_alone_is_read(shelf):
    folder = shelf.place / "fp16"
    DiffusionPipeline.from_pretrained(shelf("sdxl"), torch_dtype=torch.float16).save_pretrained(folder, variant="fp16")
    theirs = DiffusionPipeline.from_pretrained(folder, variant="fp16")
    mine = load_teacher(str(folder))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        wanted = getattr(theirs, part).state_dict()
        for name, value in getattr(mine.pipeline, part).state_dict().items():
            assert value.dtype == torch.float32 and torch.equal(value, wanted[name])
    shutil.copy(shelf("sdxl") / "vae" / WEIGHTS, folder / "vae" / WEIGHTS)  # a plain one is taken before a variant
    vae = load_teacher(str(folder)).pipeline.vae
    assert torch.equal(vae.decoder.conv_in.weight, build("sdxl").vae.decoder.conv_in.weight)


@slow
def test_pickles_are_refused_with_the_lines_that_convert_them(shelf, plain):
    folder = shelf.place / "pickles"
    DiffusionPipeline.from_pretrained(shelf("sd15")).save_pretrained(folder, safe_serialization=False)
    said = refused(folder, r"are pickles \(.*\.bin\), which may run any program when they are read")
    line = re.search(r"convert them by (.*)\.$", said)[1].replace("NEW FOLDER", str(shelf.place / "converted"))
    eval(line, {"DiffusionPipeline": DiffusionPipeline})
    assert torch.equal(latents(shelf.place / "converted"), plain["sd15"])


@slow
@pytest.mark.parametrize("how", ["shards", "slash", "link", "safety", "img2img", "home", "non_ema"])
def test_the_same_weights_in_another_folder_are_the_same_model(how, shelf, plain, monkeypatch):
    base = "sdxl" if how == "img2img" else "sd15"
    folder = shelf.copy(base, how)
    name = str(folder)
    if how == "shards":
        shutil.rmtree(folder / "unet")
        build("sd15").unet.save_pretrained(folder / "unet", max_shard_size="100KB")
        assert len(list((folder / "unet").glob("*.safetensors"))) > 3
    elif how == "slash":
        name += "/"
    elif how == "link":
        (shelf.place / "linked").symlink_to(folder)
        name = str(shelf.place / "linked")
    elif how == "safety":
        listed = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
                  "feature_extractor": ["transformers", "CLIPImageProcessor"]}  # fmt: skip
        edit(folder / "model_index.json", **listed, requires_safety_checker=True)
    elif how == "img2img":
        edit(folder / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline")
    elif how == "home":
        monkeypatch.setenv("HOME", str(shelf.place))
        name = "~/home"
    else:
        shutil.copy(folder / "unet" / WEIGHTS, folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    assert torch.equal(latents(name), plain[base])


def test_sd3_without_t5_is_encoded_as_diffusers_encodes_it(shelf):
    folder = shelf.copy("sd3", "no t5")
    theirs = DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    wanted, _, pooled, _ = theirs.encode_prompt(RED, None, None, do_classifier_free_guidance=False)
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / part)
    refused(folder, r"The model is not complete, .*text_encoder_3.config\.json is missing")
    edit(folder / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    for _ in range(2):
        teacher = load_teacher(str(folder))
        cond = teacher.encode_prompts([RED])
        assert torch.equal(cond["prompt_embeds"], wanted) and torch.equal(cond["pooled_embeds"], pooled)
        assert not wanted[:, 77:].any()
        assert {name: tuple(cond[name].shape[1:]) for name in cond} == teacher.family.shapes(77)
        edit(folder / "model_index.json", text_encoder_3=None, tokenizer_3=None)  # as if never listed


@pytest.mark.parametrize("left", ["nothing", "its config", "its words without merges", "special tokens"])
def test_a_tokenizer_without_its_words_is_refused(left, shelf):
    folder = shelf.copy("sdxl", f"tokenizer {left}")
    place = folder / "tokenizer_2"
    tokenizer = json.loads((place / "tokenizer.json").read_text())
    for path in place.iterdir():
        if left == "nothing" or path.name not in ("tokenizer_config.json", "special_tokens_map.json"):
            path.unlink()
    if left == "its words without merges":
        (place / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    elif left == "special tokens":
        kept = {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
        tokenizer["model"] |= {"vocab": kept, "merges": []}
        (place / "tokenizer.json").write_text(json.dumps(tokenizer))
        refused(folder, "The tokenizer_2 of .* knows no words: every prompt would be encoded alike")
        return
    refused(folder, "The tokenizer in .*tokenizer_2 has no vocabulary .* and would encode all prompts alike")


def test_weights_that_a_folder_lacks_are_never_random(shelf):
    lacking = {
        "unet": "mid_block.attentions.0.proj_in.weight", "vae": "decoder.conv_out.bias",
        "text_encoder": "encoder.layers.1.mlp.fc1.weight", "text_encoder_2": "text_projection.weight",
    }  # fmt: skip
    folder = shelf.copy("sdxl", "less")
    for part, name in lacking.items():
        path = next((folder / part).glob("*.safetensors"))
        whole = path.read_bytes()
        rewritten(path, path, without(name))
        refused(folder, rf"The weights in .*{part} lack (text_model\.)?{name}, which would be random")
        path.write_bytes(whole)
    path.write_bytes(whole[:-500])
    refused(folder, "was downloaded in part .*incomplete.*: download it again")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")
    refused(folder, "is a pointer of git-lfs, not weights: run `git lfs pull`")
    path.unlink()
    refused(folder, r"The model is not complete, .*text_encoder_2 holds no weights \(\.safetensors\)")


@slow
def test_parts_of_another_model_are_named(shelf):
    changes = [
        ("unet", "sd15", {"in_channels": 9}), ("text_encoder", "sd15", {"hidden_size": 32}),
        ("vae", "sd15", {"latent_channels": 8}), ("unet", "sdxl", {"cross_attention_dim": 24}),
    ]  # fmt: skip
    for part, name, changed in changes:
        folder = shelf.copy(name, f"{part} of another {name}")
        edit(folder / part / "config.json", **changed)
        refused(folder, rf"The weights in .*{part} have other shapes than its config\.json says")
    folder = shelf.copy("sd15", "encoder of another")
    shutil.copytree(shelf("sdxl") / "text_encoder_2", folder / "text_encoder", dirs_exist_ok=True)
    refused(folder, "is of another model: its prompts have width 24, and the unet takes 16")


@slow
def test_folders_that_are_not_whole_are_refused_in_one_sentence(shelf):
    folder = shelf.copy("sd15", "broken")
    shutil.rmtree(folder / "unet")
    build("sd15").unet.save_pretrained(folder / "unet", max_shard_size="100KB")
    sorted((folder / "unet").glob("*.safetensors"))[2].unlink()
    refused(folder, r"is not complete, .*diffusion_pytorch_model-00003-of-.* is missing: download it again")
    shutil.rmtree(folder / "unet")
    shutil.copytree(shelf("sd15") / "unet", folder / "unet")
    for file in ("scheduler/scheduler_config.json", "vae/config.json"):
        text = (folder / file).read_text()
        (folder / file).unlink()
        refused(folder, f"is not complete, .*{file} is missing")
        (folder / file).write_text(text)
    index = (folder / "model_index.json").read_text()
    for damaged in ("{", "[]"):
        (folder / "model_index.json").write_text(damaged)
        refused(folder, "model_index.json is damaged .*: download it again")
    (folder / "model_index.json").write_text(index)
    edit(folder / "model_index.json", vae=[None, None])
    refused(folder, "has no vae, which Stable Diffusion 1.x or 2.x needs")
    (folder / "model_index.json").unlink()
    refused(folder, r"model_index\.json is missing\): download it again, with that file")
    refused(shelf("sd15") / "unet", rf"it is one part of a model, whose folder is {shelf('sd15')}")
    refused(shelf("sd15").parent, "give a folder in it, .*sd15|give a folder in it")


@slow
@pytest.mark.parametrize("channels, kind", [(9, "Inpaint"), (8, "InstructPix2Pix")])
def test_editing_networks_and_refiners_are_refused(channels, kind, shelf):
    kind = f"StableDiffusion{kind}Pipeline"
    pipeline = pipelines.sd15()
    pipeline.unet = pipelines.unet(16, in_channels=channels)
    folder = shelf.place / kind
    pipeline.save_pretrained(folder)
    for name in ("StableDiffusionPipeline", kind):
        edit(folder / "model_index.json", _class_name=name)
        refused(folder, f"takes {channels} channels, but its autoencoder makes 4: inpainting, editing and control")
    if channels == 8:
        return
    pipeline = pipelines.sdxl()
    pipeline.unet = pipelines.unet(40, addition_embed_type="text_time", addition_time_embed_dim=8,
                                   projection_class_embeddings_input_dim=5 * 8 + 20)  # fmt: skip
    pipeline.save_pretrained(shelf.place / "refiner")
    refused(shelf.place / "refiner", "a refiner has an aesthetic score")


@slow
def test_channels_with_statistics_of_their_own_are_followed_as_in_diffusers(shelf):
    folder = shelf.copy("sdxl", "statistics")
    edit(folder / "vae" / "config.json", latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0])
    theirs, seen = DiffusionPipeline.from_pretrained(folder), []
    theirs.set_progress_bar_config(disable=True)
    step = theirs.scheduler.step
    theirs.scheduler.step = lambda *args, **more: seen.append(step(*args, **more)) or seen[-1]
    images = theirs(RED, num_inference_steps=2, output_type="pt", height=SIZE, width=SIZE).images
    teacher = load_teacher(str(folder))
    torch.testing.assert_close(teacher.decode(seen[-1][0]), images, rtol=1e-4, atol=1e-4)
    x = torch.rand(1, 3, SIZE, SIZE) * 2 - 1
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in ([0.1, -0.2, 0.3, 0.0], [1.5, 0.5, 2.0, 1.0]))
    posterior = theirs.vae.encode(x).latent_dist
    torch.testing.assert_close(teacher.encode_images(x)[0], (posterior.mean - mean) * 0.5 / std)
    torch.testing.assert_close(teacher.encode_images(x)[1], posterior.std * 0.5 / std)


@slow
def test_a_safety_checker_and_an_image_encoder_may_be_there(shelf, plain):
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

    small = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 32,
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=small, projection_dim=8))
    seeing = CLIPVisionModelWithProjection(CLIPVisionConfig(**small, projection_dim=8))
    pipeline = DiffusionPipeline.from_pretrained(
        shelf("sd15"), safety_checker=checker, feature_extractor=CLIPImageProcessorPil(), image_encoder=seeing
    )
    pipeline.save_pretrained(shelf.place / "checked")
    assert torch.equal(latents(shelf.place / "checked", dtype="fp32"), plain["sd15"])


@slow
def test_an_autoencoder_with_another_scale_is_followed(shelf):
    folder = shelf.copy("sd15", "other scale")
    edit(folder / "vae" / "config.json", scaling_factor=0.25)
    one, other = load_teacher(str(shelf("sd15"))), load_teacher(str(folder))
    images = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(other.encode_images(images)[0], one.encode_images(images)[0] / 2)
    z = torch.randn(1, *one.latent_shape)
    torch.testing.assert_close(other.decode(z / 2), one.decode(z))


# ------------------------------------------------------------------ few-step pipelines


@pytest.mark.parametrize("scale, seed", [(None, 0), pytest.param(3.0, 1, marks=slow)])
def test_an_lcm_pipeline_is_sampled_as_its_own_pipeline_does(scale, seed, lcm_folder):
    theirs = DiffusionPipeline.from_pretrained(lcm_folder)
    theirs.set_progress_bar_config(disable=True)
    told = {} if scale is None else {"guidance_scale": scale}
    wanted = theirs(
        RED, num_inference_steps=4, height=SIZE, width=SIZE, output_type="latent",
        generator=torch.Generator().manual_seed(seed), **told,
    ).images  # fmt: skip
    model = fewstep.load(str(lcm_folder))
    assert type(theirs).__name__ == "LatentConsistencyModelPipeline"
    assert model.sampler(None, {}).name == "lcm" and model.card.num_inference_steps == 4 and model.guidance_scale == 1
    mine = model.sample(RED, seed=seed, guidance_embed=scale, output_type="latent")
    torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    again = model.sample(RED, seed=seed, guidance_scale=scale, output_type="latent")  # as diffusers calls it
    assert torch.equal(again, mine)
    other = model.sample(RED, seed=seed, guidance_embed=(scale or 8.5) + 2, output_type="latent")
    assert (other - mine).abs().max() > 10 * (mine - wanted).abs().max()


@torch.no_grad()
def test_an_lcm_pipeline_teaches_with_its_guidance_scale(lcm_folder):
    """Every call of the teacher has w, the pipeline's own 8.5 or the recipe's; a student's inputs come beside it."""
    teacher, told = load_teacher(str(lcm_folder)), load_teacher(str(lcm_folder), guidance_embed=3.0)
    unet, cond = teacher.pipeline.unet, teacher.encode_prompts(["a red", "a blue circle"])
    x = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    assert teacher.guidance_embed == 8.5 and told.guidance_embed == 3.0 and teacher.guidance_scale == 1
    for denoiser, w, more in ((teacher, 8.5, {}), (told, 3.0, {}), (teacher, 5.0, {"guidance_embed": 5.0})):
        embedded = teacher.pipeline.get_guidance_scale_embedding(torch.full((2,), w - 1), 8)
        wanted = unet(x, 500, cond["prompt_embeds"], timestep_cond=embedded, return_dict=False)[0]
        torch.testing.assert_close(denoiser.denoiser(x, 500, cond, **more).output, wanted, rtol=1e-4, atol=1e-5)
    network = teacher.denoiser.network
    extra, t = torch.randn(2, network.extra_width), torch.full((2,), 500)
    plain = network(x, t, cond)
    torch.testing.assert_close(network(x, t, cond, extra=0 * extra), plain)
    assert not torch.allclose(network(x, t, cond, extra=extra), plain, atol=1e-4)
    roles = Roles(teacher.denoiser)
    student = roles.add("student", Weights(rank=2), extra_inputs=("end", "guidance_embed"))
    assert student.accepts == {"end", "guidance_embed"} and roles.student.network.extras.names == {"end"}
    torch.testing.assert_close(student(x, 500, cond, end=0).output, plain)


@slow
def test_a_folder_with_a_few_step_scheduler_is_sampled_by_it(shelf):
    folder = shelf.copy("sdxl", "fused tcd")
    edit(folder / "model_index.json", scheduler=["diffusers", "TCDScheduler"])
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="TCDScheduler")
    model = fewstep.load(str(folder))
    assert model.sampler(None, {}).name == "tcd" and model.sampler(None, {}).eta == 0.3 and model.guidance_scale == 1
    assert fewstep.load(str(shelf("sdxl"))).card.sampler == "ddim"


PLACES = {  # how a copy is recognised
    "its name": "somewhere/sdxl-turbo",
    "the hub's cache": "models--stabilityai--sdxl-turbo/snapshots/0123",
    "its index": "mine",
    "git": "cloned",
}


@pytest.mark.parametrize("how", [pytest.param(how, marks=slow if how != "its index" else ()) for how in PLACES])
def test_a_copy_of_a_published_pipeline_is_that_checkpoint(how, shelf):
    folder = shelf.copy("sdxl", PLACES[how])
    assert (copy_of(folder) is None) == (how in ("its index", "git"))
    if how == "its index":
        edit(folder / "model_index.json", _name_or_path="stabilityai/sdxl-turbo")
    elif how == "git":
        (folder / ".git").mkdir()
        (folder / ".git" / "config").write_text(
            '[remote "origin"]\n\turl = https://x.test/stabilityai/sdxl-turbo.git\n'
        )
    with pytest.warns(UserWarning, match="Licence of sdxl-turbo"):
        model = fewstep.load(f"{folder}/")
    by_name = fewstep.inference.load.load_published(find_checkpoint("sdxl-turbo"), str(folder))
    assert model.published is by_name.published and model.guidance_scale == 1
    assert model.sampler(None, {}).name == "euler-ancestral" and model.sampler(None, {}).num_inference_steps == 4
    teacher = open_teacher(str(folder))  # taught by its settings, and found again by its place
    assert teacher.name == str(folder) and teacher.denoiser.prediction_type == "epsilon"
    assert copy_of("StabilityAI/sdxl-turbo").id == "sdxl-turbo" and copy_of("stabilityai/stable-diffusion-xl") is None


@slow
def test_a_few_step_teacher_is_taught_and_exported_with_its_guidance_scale(shelf, lcm_folder, tmp_path):
    """A run on an LCM pipeline calls it at the recipe's w; its student is the same in diffusers, at that w."""
    settings = {
        "method": {"name": "lcm", "guidance_scale": 1}, "data": {"source": "scenes", "size": 8},
        "teacher": {"path": str(lcm_folder), "guidance_embed": 4.0, "size": SIZE}, "student": {"rank": 2},
        "training": {"steps": 2, "batch_size": 2, "learning_rate": 0.05}, "sample": {"teacher_steps": 2, "every": 2},
    }  # fmt: skip
    run = setup(parse_recipe(settings), tmp_path / "run")
    assert run.teacher.guidance_embed == 4 and run.card(0).guidance_embed == 4
    distill(parse_recipe(settings), tmp_path / "run")
    for to in ("diffusers", "lora"):
        made = export(tmp_path / "run", to, tmp_path / to)
        assert made.round_trip.gap < 1e-4 and "guidance_scale=4" in made.call
    places = [str(tmp_path / name) for name in ("run", "diffusers")]
    told, other = (fewstep.load(place).sample(RED, output_type="latent") for place in places)
    torch.testing.assert_close(told, other, rtol=1e-3, atol=1e-4)
    settings["method"]["guidance_scale"] = 7.5
    with pytest.warns(UserWarning, match=r"few-step model, made for guidance of 1 .*, and teacher\.guidance_embed"):
        setup(parse_recipe(settings), tmp_path / "other")
    turbo = shelf.copy("sdxl", "taught/sdxl-turbo")
    settings["teacher"] = {"path": str(turbo), "size": SIZE}
    with pytest.warns(UserWarning, match=r"few-step model, made for guidance of 1 at most \(1 is off\): set method"):
        assert setup(parse_recipe(settings), tmp_path / "other").teacher.name == str(turbo)


def test_a_folder_that_only_has_the_name_of_one_is_not_one(shelf):
    folder = shelf.copy("sd15", "other/sdxl-turbo")
    assert copy_of(folder) is None and fewstep.load(str(folder)).published is None


# ------------------------------------------------------------------ other networks


def test_a_unet_without_a_middle_block_has_features_for_discriminators():
    torch.manual_seed(0)
    pipeline = pipelines.sd15()
    pipeline.unet = pipelines.unet(16, mid_block_type=None)
    teacher = as_teacher(pipeline, size=SIZE)
    network, cond = teacher.denoiser.network, teacher.encode_prompts([RED])
    assert network.tap_channels == {"down0": 16, "down1": 32}
    x, found = torch.randn(1, *teacher.latent_shape), {}
    for i, block in enumerate(network.unet.down_blocks):
        block.register_forward_hook(lambda m, a, output, i=i: found.update({f"down{i}": output[0]}))
    with torch.no_grad():
        teacher.denoiser(x, 500, cond)
        wanted = dict(found)
        features = teacher.denoiser.features(x, 500, cond, ("down0", "down1"))
        network.drop_decoder()
        again = teacher.denoiser.features(x, 500, cond, ("down1",))
    for tap, feature in zip(wanted, features, strict=True):
        assert torch.equal(feature, wanted[tap])
    assert torch.equal(again[0], wanted["down1"])
    with pytest.raises(ValueError, match="no tap 'mid': it has down0, down1"):
        teacher.denoiser.features(x, 500, cond, ("mid",))


@torch.no_grad()
def test_a_tiny_autoencoder_encodes_and_decodes(shelf):
    torch.manual_seed(0)
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1), scaling_factor=0.7,
    ).eval()  # fmt: skip
    pipeline = DiffusionPipeline.from_pretrained(shelf("sd15"), vae=tiny)
    pipeline.save_pretrained(shelf.place / "taesd")
    teacher = load_teacher(str(shelf.place / "taesd"))
    images = torch.rand(3, 3, SIZE, SIZE) * 2 - 1
    mean, std = teacher.encode_images(images)
    torch.testing.assert_close(mean, tiny.encode(images).latents * 0.7)
    assert mean.shape[1:] == teacher.latent_shape and not std.any()
    decoded = tiny.decode(mean / 0.7).sample
    torch.testing.assert_close(teacher.decode(mean), (decoded / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ wrong bases


@pytest.fixture
def unloadable(monkeypatch):
    """From here on no network may be read: what is refused is refused before."""
    monkeypatch.setattr("fewstep.models.families.load.load_folder", lambda *_: pytest.fail("the base was loaded"))


def published(path, entry, base):
    with pytest.raises(ValueError, match=re.escape(str(base))) as error:
        load_checkpoint(find_checkpoint(entry), str(base), path)
    return str(error.value)


def test_a_wrong_base_is_named_before_it_is_loaded(shelf, unloadable, tmp_path):
    width = 40
    lora = tmp_path / "lora.safetensors"
    save_file(kohya(lora_of(build("sdxl").unet), alpha=4), lora)
    said = published(lora, "lcm-lora-sdxl", shelf("sd15"))
    assert f"is for SDXL with prompts of width {width}, and" in said
    assert f"{shelf('sd15')} is Stable Diffusion 1.x or 2.x with prompts of width 16: give" in said
    unet = tmp_path / "unet.safetensors"
    save_file(build("sdxl").unet.state_dict(), unet)
    assert "is for SDXL" in published(unet, "sdxl-lightning-4step-unet", shelf("sd15"))
    assert "is for Stable Diffusion 1.x or 2.x with prompts of width 16, and" in published(
        save(tmp_path / "sd.safetensors", kohya(lora_of(build("sd15").unet), alpha=4)), "lcm-lora-sd15", shelf("sdxl")
    )
    flux = {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 16)}
    assert "is for FLUX.1, and" in published(
        save(tmp_path / "flux.safetensors", flux), "hyper-flux-8step", shelf("sd15")
    )


def save(path, tensors):
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("width, word", [(768, "SD 1.x"), (1024, "SD 2.x"), (2048, "SDXL")])
def test_models_are_called_by_the_width_of_their_prompts(width, word, shelf, tmp_path, unloadable):
    """This file is for SDXL, that model is SD 1.x."""
    down = {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": torch.zeros(4, width),
            "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": torch.zeros(4, 8, 3, 3)}  # fmt: skip
    path = save(tmp_path / "x.safetensors", down)
    base = shelf.copy("sd15", f"of {width}")
    other = {768: 1024, 1024: 768, 2048: 768}[width]
    edit(base / "unet" / "config.json", cross_attention_dim=other)
    said = published(path, "lcm-lora-sd15", base)
    assert f"is for {word}, and {base} is {'SD 1.x' if other == 768 else 'SD 2.x'}: give a model of its kind." in said
