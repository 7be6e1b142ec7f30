"""`fewstep.load(...).sample(...)`: every form of a student gives the same images, and options have their effect."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fewstep
from fewstep.checkpoints.registry import find_checkpoint
from fewstep.export import publish
from fewstep.export.publish import export
from fewstep.inference.model import Model
from fewstep.models.families import as_teacher, load_teacher
from fewstep.sampling import DDIMSampler, sample
from fewstep.students.card import Card
from tests.checkpoints.tiny import added, kohya, lora_of, peft
from tests.command_line import inside
from tests.export.test_publish import LCM, finished, gap, pictures
from tests.models.pipelines import PROMPTS, SIZE, build
from tests.models.single_file import save_single_file

WORDS = ["a red star", "two shapes"]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    return finished(tmp_path_factory.mktemp("runs") / "mine", tiny)


@pytest.fixture(scope="module")
def teacher(tiny):
    return fewstep.load(str(tiny))


@pytest.fixture(scope="module")
def exports(run, tmp_path_factory):
    """Every form of the run; that each is right is `test_publish`'s to prove."""
    folder = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "check_round_trip", lambda _, __, layers: publish.RoundTrip(0.0, layers))
        for to in {*publish.LAYOUTS} - {"heads"}:  # for students of other methods
            export(run, to, folder / to)
    return folder


@pytest.fixture(scope="module")
def styles(tiny, tmp_path_factory):
    """Two style LoRAs in two layouts, the second with a part for the text encoder."""
    folder, pipeline = tmp_path_factory.mktemp("styles"), load_teacher(str(tiny)).pipeline
    first = lora_of(pipeline.unet, seed=1, targets=("to_q", "to_v"))
    second = lora_of(pipeline.unet, seed=2, targets=("to_q", "conv1"))
    words = lora_of(pipeline.text_encoder, seed=3, targets=("q_proj", "out_proj", "fc1"))
    save_file(peft(first), folder / "first.safetensors")
    tensors = kohya(second, alpha=2)
    tensors |= {k.replace("lora_unet_", "lora_te_text_model_"): t for k, t in kohya(words, alpha=2).items()}
    save_file(tensors, folder / "second.safetensors")
    return folder, first, second, words


def model_of(name, sampler="ddim", steps=4, scale=1.0):
    teacher = as_teacher(build(name), size=SIZE)
    return Model(teacher, teacher.denoiser, Card("", sampler, steps, "full", ""), scale)


# ---------------------------------------------------------------- what can be loaded


def test_a_run_gives_pil_images(run):
    model = fewstep.load(run)
    drawn = model.sample(WORDS, seed=3)
    assert [type(p) for p in drawn] == [Image.Image] * 2 and drawn[0].size == (64, 64)
    assert gap(model.sample(WORDS, seed=3, output_type="latent"), pictures(run)) == 0
    values = model.sample(WORDS, seed=3, output_type="pt")
    assert drawn[1].getpixel((0, 0)) == tuple((values[1, :, 0, 0] * 255).round().int().tolist())
    assert len(model.sample("a red star", num_inference_steps=1)) == 1


@pytest.mark.parametrize("form", ["diffusers", "lora", "merged", "kohya file", "run's file"])
def test_every_form_gives_the_images_of_the_run(form, run, exports):
    path = {
        "kohya file": exports / "kohya" / "mine_comfy.safetensors",
        "run's file": run / "student" / "pytorch_lora_weights.safetensors",
    }.get(form, exports / form)
    assert gap(fewstep.load(path).sample(WORDS, seed=3, output_type="latent"), pictures(run)) <= 1e-5


def test_a_lora_goes_on_another_base(run, exports, tiny, tmp_path):
    """Both a run's and an exported one; the network is the other base's with the LoRA added by hand."""
    other = load_teacher(str(tiny))
    torch.manual_seed(9)
    with torch.no_grad():
        for p in other.pipeline.unet.parameters():
            p.add_(0.01 * torch.randn_like(p))
    other.pipeline.save_pretrained(tmp_path / "other")
    file = load_file(run / "student" / "pytorch_lora_weights.safetensors")
    layers = {k.removesuffix(".lora_A.weight").removeprefix("unet.") for k in file if ".lora_A" in k}
    lora = {n: (file[f"unet.{n}.lora_A.weight"], file[f"unet.{n}.lora_B.weight"]) for n in layers}
    other.pipeline.unet.load_state_dict(added(other.pipeline.unet, lora))
    expected = Model(other, other.denoiser, LCM, 1.0).sample(WORDS, output_type="latent")
    for path in (run, exports / "kohya"):  # a run's student, and an export
        got = fewstep.load(path, base=str(tmp_path / "other")).sample(WORDS, output_type="latent")
        assert gap(got, expected) <= 1e-5 < gap(fewstep.load(path).sample(WORDS, output_type="latent"), expected)


def test_a_single_file_is_the_model_that_its_folder_is(tmp_path):
    """Not a LoRA that nothing is known of; `file@folder` says where its configs are."""
    build("sd15").save_pretrained(tmp_path / "folder")
    save_single_file(build("sd15"), tmp_path / "one.safetensors")
    one, other = (
        fewstep.load(name).sample("a", 2, output_type="latent")
        for name in (f"{tmp_path / 'one.safetensors'}@{tmp_path / 'folder'}", tmp_path / "folder")
    )
    assert gap(one, other) <= 1e-5


def test_a_published_file_warns_of_unsuitable_options_and_states_its_licence(tiny, styles):
    entry, file = find_checkpoint("hyper-sd15-4step"), styles[0] / "first.safetensors"
    with pytest.warns(UserWarning, match="Licence of hyper-sd15-4step"):
        model = fewstep.load("hyper-sd15-4step", base=str(tiny), file=file)
    assert model.published == entry
    with pytest.warns(UserWarning, match="is bound to 4 steps, not 5"):
        model.sample("a red star", num_inference_steps=5)
    assert "ddim, timesteps 999, 749, 499, 249; guidance 1" in model.generate("a red star").description
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fewstep.load(str(tiny)).sample("a red star", num_inference_steps=1)
    assert not said


@pytest.mark.parametrize("arguments, match", [
    (dict(name="nothing-such"), "There is no model 'nothing-such'"),
    (dict(name="sdxl-lightnig-4step-lora"), "Did you mean sdxl-lightning-4step-lora"),
    (dict(name="TINY", base="x"), "A base goes with a LoRA"),
    (dict(name="TINY", file="x.safetensors"), "A file goes with the name of a published checkpoint"),
    (dict(name="TINY", dtype="float8"), "Unknown dtype 'float8'"),
    (dict(name="STYLE"), r"few_step\.json is not beside it"),
    (dict(name="TINY", loras=["STYLE", ("STYLE", float("nan"))]), "at the scale nan"),
    (dict(name="TINY", loras=["nowhere.safetensors"]), "There is no file nowhere"),
])  # fmt: skip
def test_what_cannot_be_loaded_is_one_sentence(arguments, match, tiny, styles):
    names = {"TINY": str(tiny), "STYLE": str(styles[0] / "first.safetensors")}

    def named(value):
        if isinstance(value, list | tuple):
            return type(value)(named(v) for v in value)
        return names.get(value, value) if isinstance(value, str) else value

    with pytest.raises(ValueError, match=match) as error:
        fewstep.load(**{key: named(value) for key, value in arguments.items()})
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- options


def test_options_reach_the_sampler(teacher):
    model = teacher
    noise = torch.randn(2, *model.teacher.latent_shape, generator=torch.Generator().manual_seed(7))
    cond = model.teacher.encode_prompts(WORDS)
    expected = sample(model.denoiser, DDIMSampler(timesteps=[999, 500, 100]), noise, cond, 2.5).x0
    options = dict(timesteps=[999, 500, 100], guidance_scale=2.5, output_type="latent")
    assert torch.equal(model.sample(WORDS, latents=noise, **options), expected)
    assert torch.equal(model.sample(WORDS, seed=7, **options), expected)
    words = model.generate(WORDS, 2, sampler="tcd", eta=0.5, seed=11).description
    assert words == "tcd, timesteps 999, 499; guidance 3; seed 11"


@pytest.mark.parametrize("options, match", [
    (dict(guidance_scale=float("inf")), "guidance_scale must be at least 0"),
    (dict(guidance_embed=3.0), "has no guidance-scale embedding"),
    (dict(seed=-1), "seed must be"),
    (dict(latents=torch.zeros(1, 4, 8, 8)), r"latents must have the shape \(2, 16, 8, 8\)"),
    (dict(guidance_scale=1.0, negative_prompt="dull"), "guidance_scale above 1 too"),
    (dict(negative_prompt=["a", "b", "c"]), "one for each of 2 prompts, not 3"),
    (dict(output_type="np"), "Unknown output_type"),
    (dict(eta=2.0), "eta must be between"),
    (dict(sampler="lcn"), "Unknown sampler"),
])  # fmt: skip
def test_invalid_options_are_one_sentence(options, match, teacher):
    with pytest.raises(ValueError, match=match):
        teacher.sample(WORDS, num_inference_steps=1, **options)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_a_negative_prompt_is_diffusers_own(name):
    """The pipeline's picture with guidance and a negative prompt, by its own scheduler on the same grid."""
    model, pipeline = model_of(name), build(name)
    call = dict(negative_prompt=["blue"] * 2, guidance_scale=3.0)
    mine = model.sample(PROMPTS, negative_prompt="blue", guidance_scale=3.0, seed=4, output_type="latent")
    theirs = through_diffusers(pipeline, **call)
    assert gap(mine, theirs) <= 1e-4
    assert gap(model.sample(PROMPTS, guidance_scale=3.0, seed=4, output_type="latent"), theirs) > 1e-3


def through_diffusers(pipeline, seed=4, steps=4, **call):
    """The pipeline's own latents on our grid."""
    from diffusers import DDIMScheduler

    own = pipeline.scheduler
    if hasattr(pipeline, "text_encoder_3"):
        call["sigmas"] = [1.0, 0.75, 0.5, 0.25]
    else:
        jumps = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
        pipeline.scheduler = DDIMScheduler.from_config(own.config, **jumps)
        call["num_inference_steps"] = steps
    try:
        generator = torch.Generator().manual_seed(seed)
        return pipeline(PROMPTS, generator=generator, output_type="latent", height=SIZE, width=SIZE, **call).images
    finally:
        pipeline.scheduler = own


# ---------------------------------------------------------------- style LoRAs


@pytest.mark.parametrize("form", ["run", "full run", "teacher", "published"])
def test_style_loras_are_added_at_their_scales(form, run, exports, tiny, styles, tmp_path):
    """On whatever there is: layer by layer W + speed + 0.5 first + 0.8 second, and the text encoder's share."""
    folder, first, second, words = styles
    loras = [(folder / "first.safetensors", 0.5), (str(folder / "second.safetensors"), 0.8)]
    if form == "full run":
        run = finished(tmp_path / "full", tiny, replace(LCM, weights="full", rank=0), size=0.01)
    name = {"teacher": str(tiny), "published": "tcd-sd15"}.get(form, run)
    more = dict(base=str(tiny), file=folder / "first.safetensors") if form == "published" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, styled = fewstep.load(name, **more), fewstep.load(name, loras=loras, **more)
    mine, pipe = plain.teacher.pipeline, styled.teacher.pipeline
    want = added(mine.text_encoder, words, 0.8)
    for key, value in pipe.text_encoder.state_dict().items():
        torch.testing.assert_close(value, want[key], rtol=0, atol=1e-5)
    by_hand = fewstep.load(exports / "merged") if form == "run" else plain
    network = by_hand.teacher.pipeline.unet if form != "full run" else by_hand.denoiser.network.network.unet
    for lora, scale in ((first, 0.5), (second, 0.8)):
        network.load_state_dict(added(network, lora, scale))
    by_hand.teacher.pipeline.text_encoder.load_state_dict(want)
    got, expected = (m.sample(WORDS, 2, output_type="latent") for m in (styled, by_hand))
    assert gap(got, expected) <= 2e-5


def test_diffusers_stacks_an_exported_lora_with_styles_alike(exports, styles, tiny):
    """set_adapters with its weights, on the exported speed LoRA, is `loras=` here."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(tiny)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(exports / "lora", weight_name="pytorch_lora_weights.safetensors", adapter_name="speed")
    for name in ("first", "second"):
        pipe.load_lora_weights(styles[0], weight_name=f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(["speed", "first", "second"], [1.0, 0.5, 0.8])
    from diffusers import LCMScheduler

    pipe.scheduler = LCMScheduler.from_pretrained(exports / "lora", subfolder="scheduler")
    theirs = pipe(
        WORDS, num_inference_steps=4, guidance_scale=1.0, generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images  # fmt: skip
    loras = [(styles[0] / f"{name}.safetensors", scale) for name, scale in (("first", 0.5), ("second", 0.8))]
    assert gap(fewstep.load(exports / "lora", loras=loras).sample(WORDS, output_type="latent"), theirs) <= 2e-5


# ---------------------------------------------------------------- ControlNet


def test_an_exported_folder_takes_a_controlnet(run, exports, tiny):
    """Silent (as it is born) it changes nothing; awake it does, and guidance stays off whatever the call says."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    control = ControlNetModel.from_unet(UNet2DConditionModel.from_pretrained(tiny / "unet"))
    pipe = StableDiffusionControlNetPipeline.from_pretrained(exports / "diffusers", controlnet=control)
    pipe.set_progress_bar_config(disable=True)
    call = dict(image=Image.effect_noise((64, 64), 60).convert("RGB"), num_inference_steps=4, output_type="latent")

    def drawn(**more):
        return pipe("a red star", generator=torch.Generator().manual_seed(0), **call, **more).images

    plain = fewstep.load(run).sample("a red star", output_type="latent")
    assert gap(drawn(), plain) <= 1e-5
    with torch.no_grad():
        for p in control.parameters():
            p.add_(0.05 * torch.randn_like(p))
    assert gap(drawn(), plain) > 1e-2
    assert torch.equal(drawn(), drawn(guidance_scale=1.0))


# ---------------------------------------------------------------- the command line


def test_the_command_line_hears_all_of_it(run, styles, tmp_path, monkeypatch, capsys):
    Image.effect_noise((80, 80), 60).convert("RGB").save(tmp_path / "in.png")
    Image.new("L", (80, 80), 255).save(tmp_path / "mask.png")
    call = ["sample", run, "-p", "a red star", "--seed", 5]
    code, out, err = inside(
        monkeypatch, capsys, tmp_path, *call, "--lora", f"{styles[0] / 'first.safetensors'}:0.5", "--image", "in.png",
        "--strength", 0.5, "--guidance-scale", 2, "--negative-prompt", "dull", "--out", "a.png",
    )  # fmt: skip
    assert code == 0 and "lcm, timesteps 499, 379, 259, 139; strength 0.5; guidance 2; seed 5" in out, err
    code, out, err = inside(monkeypatch, capsys, tmp_path, *call, "--image", "in.png", "--mask", "mask.png")
    assert code == 0 and "strength 1;" in out, err
    for more, sentence in (
        (["--mask", "mask.png"], "--mask and --strength go with --image"),
        (["--image", "none.png"], "There is no image none.png"),
        (["--negative-prompt", "dull"], "guidance_scale above 1 too"),
        (["--lora", "none.safetensors:2"], "There is no file none.safetensors"),
        (["--checkpoint", "tcd-sd15"], "Give a MODEL or a --checkpoint"),
    ):
        code, out, err = inside(monkeypatch, capsys, tmp_path, *call, *more)
        assert code == 2 and sentence in err and len(err.strip().splitlines()) == 1, err


# ---------------------------------------------------------------- files by strangers


@pytest.mark.parametrize("change, match", [
    ({"base": 5}, "damaged: base"), ({"base": ""}, "damaged: base"), ({"shift": "3"}, "damaged: shift"),
    ({"export": ["lora"], "rank": 0}, "damaged|must be at least 1"),
    ({"base": "../../nowhere"}, "There is no teacher"), ({"rank": "x"}, "damaged"),
    ({"timesteps": [float("nan")]}, "Time nan is outside"), ({"num_inference_steps": 10**12}, "exceeds"),
    ({"sampler": "__import__"}, "Unknown sampler"), ({"image_size": 10**9 + 1}, "multiple"),
])  # fmt: skip
def test_a_hostile_card_is_one_sentence(change, match, exports, tmp_path):
    for name in ("pytorch_lora_weights.safetensors", "few_step.json"):
        (tmp_path / name).write_bytes((exports / "lora" / name).read_bytes())
    card = tmp_path / "few_step.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), **change}))
    with pytest.raises(ValueError, match=match) as error:
        fewstep.load(tmp_path).sample("a")
    assert "\n" not in str(error.value)
