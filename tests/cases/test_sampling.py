"""What users of diffusers type into `Model.sample`: accepted with diffusers' meaning, or one sentence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.export.test_publish import gap
from tests.inference.test_from_images import DDIM, SIGMAS, model_of, photo
from tests.models.pipelines import PROMPTS, SIZE, build

LATENT = {"output_type": "latent"}
KINDS = {  # pipeline of diffusers, its scheduler, arguments of its call, our sampler
    "sd15": ("StableDiffusionPipeline", ("DDIMScheduler", DDIM), {}, "ddim"),
    "sd2v": ("StableDiffusionPipeline", ("DDIMScheduler", DDIM), {}, "ddim"),
    "sdxl": ("StableDiffusionXLPipeline", ("DDIMScheduler", DDIM), {}, "ddim"),
    "sd3": ("StableDiffusion3Pipeline", None, {"sigmas": SIGMAS}, "euler"),
    "flux": ("FluxPipeline", None, {"guidance_scale": 3.5}, "euler"),
    "pixart": ("PixArtAlphaPipeline", ("DDIMScheduler", DDIM), {"use_resolution_binning": False}, "ddim"),
}


def seeded(*seeds):
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    return made if len(made) > 1 else made[0]


def theirs(name, scheduler=None, **call):
    """Latents of diffusers' text-to-image pipeline from a tiny pipeline's parts."""
    import diffusers

    kind, own, more, _ = KINDS[name]
    pipeline, parts = build(name), dict(build(name).components)
    cls, settings = scheduler or own or (type(pipeline.scheduler).__name__, {})
    parts["scheduler"] = getattr(diffusers, cls).from_config(pipeline.scheduler.config, **settings)
    pipe = getattr(diffusers, kind)(**parts, **({"requires_safety_checker": False} if "15" in name else {}))
    pipe.set_progress_bar_config(disable=True)
    call = {"guidance_scale": 1.0, "num_inference_steps": 4, **more, **call}
    made = pipe(PROMPTS, output_type="latent", **call).images
    height, width = call.get("height", SIZE), call.get("width", SIZE)
    return pipe._unpack_latents(made, height, width, pipe.vae_scale_factor) if made.ndim == 3 else made


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("height", "width"), [(48, 80), (64, 32)])
def test_sizes_generators_and_several_images_are_those_of_diffusers(name, height, width):
    """Two prompts, two images each, a generator for every image, none of them square."""
    options = {"num_images_per_prompt": 2, "height": height, "width": width}
    guided = {} if name == "flux" else {"guidance_scale": 2.5, "negative_prompt": ["blue", "grass"]}
    expected = theirs(name, generator=seeded(5, 6, 7, 8), **options, **guided)
    mine = model_of(name, KINDS[name][3]).sample(
        PROMPTS, 4, generator=seeded(5, 6, 7, 8), **options, **guided, **LATENT
    )
    assert mine.shape[0] == 4 and gap(mine, expected) <= 1e-4
    assert gap(mine[:1], mine[1:2]) > 1e-2 < gap(mine[:1], mine[2:3])


@pytest.mark.parametrize("sampler", ["lcm", "euler-ancestral"])
def test_an_image_with_its_own_generator_does_not_depend_on_the_batch(sampler):
    """Noise of the start and of every step; one generator for all draws one stream, as diffusers does."""
    model = model_of("sd15", sampler)
    both = model.sample(PROMPTS, 3, generator=seeded(1, 2), **LATENT)
    for i in range(2):
        assert gap(both[i : i + 1], model.sample(PROMPTS[i], 3, generator=seeded(1 + i), **LATENT)) <= 1e-4
    assert gap(both, model.sample(PROMPTS, 3, generator=seeded(1), **LATENT)) > 1e-2
    assert torch.equal(
        model.sample(PROMPTS, 3, generator=seeded(1), **LATENT), model.sample(PROMPTS, 3, seed=1, **LATENT)
    )
    assert torch.equal(
        model.sample(PROMPTS, 3, generator=[seeded(1)], **LATENT), model.sample(PROMPTS, 3, seed=1, **LATENT)
    )


def test_lcms_noise_by_a_list_of_generators_is_that_of_diffusers():
    expected = theirs("sd15", ("LCMScheduler", {}), generator=seeded(3, 4))
    assert gap(model_of("sd15", "lcm").sample(PROMPTS, 4, generator=seeded(3, 4), **LATENT), expected) <= 1e-4


def test_a_generator_goes_on_where_it_stands():
    """Twice the same one: other images; with latents of the user's own it draws for the sampler alone."""
    model, one = model_of("sd15", "lcm"), seeded(9)
    first, second = (model.sample("a", 2, generator=one, **LATENT) for _ in range(2))
    assert gap(first, second) > 1e-2
    latents = torch.randn(1, 4, 16, 16, generator=seeded(9))
    later = seeded(9)
    torch.randn(1, 4, 16, 16, generator=later)
    assert torch.equal(model.sample("a", 2, latents=latents, generator=later, **LATENT), first)
    expected = theirs("sd15", ("LCMScheduler", {}), latents=latents.repeat(2, 1, 1, 1), generator=seeded(4))
    mine = model.sample(PROMPTS, 4, latents=latents.repeat(2, 1, 1, 1), generator=seeded(4), **LATENT)
    assert gap(mine, expected) <= 1e-4


def test_several_images_of_each_prompt_from_an_image():
    """Images, masks and negative prompts are one for all or one for each prompt, before prompts are repeated."""
    model, two = model_of("sd15", "lcm"), [photo(), photo().rotate(90)]
    mask = photo().convert("L").point(lambda value: 255 if value > 100 else 0)
    options = {"guidance_scale": 2, "negative_prompt": ["blue", "grass"], **LATENT}
    four = model.inpaint(PROMPTS, two, mask, 0.6, 4, num_images_per_prompt=2, generator=seeded(1, 2, 3, 4), **options)
    for i in range(4):
        alone = model.inpaint(
            PROMPTS[i // 2], two[i // 2], mask, 0.6, 4, generator=seeded(1 + i),
            **{**options, "negative_prompt": options["negative_prompt"][i // 2]},
        )  # fmt: skip
        assert gap(four[i : i + 1], alone) <= 1e-4
    assert len(model.sample("a", 1, num_images_per_prompt=3)) == 3
    assert model.img2img("a", photo(), 0.5, 2, height=32, width=96)[0].size == (96, 32)


@pytest.mark.parametrize("same", [
    {"seed": None}, {"seed": 0.0}, {"seed": np.int64(0)}, {"num_inference_steps": 2.0}, {"guidance_scale": 0},
    {"num_inference_steps": np.int64(2)}, {"timesteps": torch.tensor([999, 499])}, {"negative_prompt": ""},
    {"timesteps": np.array([999, 499])}, {"timesteps": (999, 499), "num_inference_steps": 2}, {"height": SIZE},
    {"negative_prompt": ["", ""]}, {"width": None}, {"num_images_per_prompt": 1}, {"eta": np.float32(0)},
])  # fmt: skip
def test_other_words_for_the_same_are_the_same(same):
    model, given = model_of("sd15", "ddim"), {"num_inference_steps": 2, "guidance_scale": 1.0}
    given = {"guidance_scale": 1.0} if "timesteps" in same else given
    assert torch.equal(model.sample(tuple(PROMPTS), **{**given, **same}, **LATENT), model.sample(PROMPTS, 2, **LATENT))


def test_guidance_off_is_said_by_0_and_by_1():
    model = model_of("sd15", "ddim")
    model.guidance_scale = 3.0
    off = [model.generate(PROMPTS, 2, guidance_scale=scale) for scale in (0, 1)]
    assert torch.equal(off[0].latents, off[1].latents) and "guidance 1;" in off[0].description
    assert gap(off[0].latents, model.generate(PROMPTS, 2).latents) > 1e-3
    assert gap(off[0].latents[:1], off[0].latents[1:]) > 1e-3  # the prompts count


def test_the_largest_seed_is_torchs():
    model = model_of("sd15", "ddim")
    expected = model.sample("a", 1, generator=seeded(2**64 - 1), **LATENT)
    assert torch.equal(model.sample("a", 1, seed=2**64 - 1, **LATENT), expected)


HALF = torch.randn(1, 4, 8, 8)


@pytest.mark.parametrize(("options", "sentence"), [
    ({"seed": -1}, "seed must be a whole number from 0 to 18446744073709551615, not -1."),
    ({"seed": 2**64}, "not 18446744073709551616."), ({"seed": 0.5}, "not 0.5."), ({"seed": "7"}, "not '7'."),
    ({"seed": float("nan")}, "not nan."), ({"seed": True}, "not True."), ({"seed": [1, 2]}, "not list."),
    ({"seed": 1, "generator": seeded(0)}, "Give a seed or a generator, one of the two."),
    ({"generator": 5}, "generator must be a torch.Generator or a list of them, not 5."),
    ({"generator": []}, "not list."), ({"generator": [None]}, "not list."),
    ({"generator": seeded(1, 2, 3)}, "Give one generator, or one for each of 1 images, not 3."),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number from 1 to 1024, not 0."),
    ({"num_images_per_prompt": 10**9}, "not 1000000000."), ({"num_images_per_prompt": None}, "not None."),
    ({"height": 70}, "height and width must be multiples of 4 pixels for this model, not 70 and 64."),
    ({"height": 0}, "height must be a whole number from 1 to 16384, not 0."),
    ({"width": 10**6}, "width must be a whole number from 1 to 16384, not 1000000."),
    ({"width": "64"}, "not '64'."), ({"height": -64}, "not -64."), ({"height": float("inf")}, "not inf."),
    ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1 to 10000, not 0."),
    ({"num_inference_steps": "4"}, "not '4'."), ({"num_inference_steps": 10**9}, "not 1000000000."),
    ({"num_inference_steps": 2.5}, "not 2.5."), ({"num_inference_steps": float("nan")}, "not nan."),
    ({"num_inference_steps": [4]}, "not list."), ({"num_inference_steps": 1001}, "exceeds the 1000 training timesteps"),
    ({"timesteps": 999}, "timesteps must be a list of numbers, not 999."), ({"timesteps": ["999"]}, "not '999'."),
    ({"timesteps": []}, "at least one number"), ({"timesteps": [float("nan")]}, "Time nan is outside"),
    ({"timesteps": [999, 499], "num_inference_steps": 4}, "takes one of num_inference_steps, timesteps"),
    ({"eta": "0.5"}, "eta must be a number, not '0.5'."), ({"eta": 2}, "eta must be between 0 and 1, not 2."),
    ({"eta": float("nan")}, "eta must be between 0 and 1, not nan."),
    ({"eta": None, "sampler": "dpm"}, "Unknown sampler"),
    ({"guidance_scale": "3"}, "guidance_scale must be a number, not '3'."),
    ({"guidance_scale": float("nan")}, "guidance_scale must be at least 0 and finite (1 is off), not nan."),
    ({"guidance_scale": -1}, "not -1."), ({"guidance_scale": 10**400}, "guidance_scale must be a number"),
    ({"guidance_embed": 3.5}, "This model has no guidance-scale embedding"),
    ({"negative_prompt": "b"}, "A negative prompt does something only with guidance"),
    ({"negative_prompt": ["b", "c"], "guidance_scale": 2}, "or one for each of 1 prompts, not 2."),
    ({"negative_prompt": 5, "guidance_scale": 2}, "negative_prompt must be a text or a list of texts, not 5."),
    ({"negative_prompt": "\udcff", "guidance_scale": 2}, "negative_prompt: '\\udcff' at position 1"),
    ({"latents": [1, 2]}, "latents must be a tensor of the shape (1, 4, 16, 16), not list."),
    ({"latents": HALF}, "latents must have the shape (1, 4, 16, 16), not (1, 4, 8, 8)."),
    ({"latents": torch.full((1, 4, 16, 16), float("nan"))}, "latents must be finite"),
    ({"latents": torch.zeros(1, 4, 16, 16, dtype=torch.int64)}, "latents must be finite floating-point numbers."),
    ({"prompts": None}, "prompts must be a text or a list of texts, not None."), ({"prompts": 5}, "not 5."),
    ({"prompts": [1, 2]}, "not 1."), ({"prompts": b"a"}, "not b'a'."), ({"prompts": [None]}, "not None."),
    ({"prompts": []}, "There is nothing to generate: give a prompt."),
    ({"prompts": "a \udcff cat"}, "prompts: '\\udcff' at position 3 is no character by itself"),
    ({"prompts": ["a", "\ud83d"]}, "prompts: '\\ud83d' at position 1"),
    ({"output_type": "np"}, "Unknown output_type 'np'"),
])  # fmt: skip
def test_what_cannot_be_used_is_one_sentence(options, sentence):
    with pytest.raises(ValueError) as error:
        model_of("sd15", "ddim").sample(**{"prompts": "a", **LATENT, **options})
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["cfg", "clip_skip", "scheduler"])
def test_an_argument_that_does_not_exist_is_pythons_own_error(name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        model_of("sd15", "ddim").sample("a", 1, **{name: 1})
