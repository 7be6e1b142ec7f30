"""Teachers of every family against the diffusers pipeline they come from: the same calls, nulls, pictures and LoRAs."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import diffusers
import pytest
import torch

from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import as_teacher
from fewstep.models.families.packed import pack, places, unpack
from fewstep.models.lora import matching
from fewstep.models.roles import Roles, Weights
from fewstep.sampling import DDIMSampler, EulerSampler, sample
from fewstep.students.card import Card
from fewstep.students.student import save_student
from tests.models.pipelines import BUILD, PROMPTS, SIZE, build

FAMILIES, STEPS = tuple(BUILD), 4
SAMPLERS = {
    "sd15": DDIMSampler(num_inference_steps=STEPS, final="end"),
    "sd2v": DDIMSampler(num_inference_steps=STEPS, final="end"),
    "sdxl": EulerSampler(num_inference_steps=STEPS, timestep_spacing="leading", steps_offset=1),
    "sd3": EulerSampler(num_inference_steps=STEPS),
    "flux": EulerSampler(num_inference_steps=STEPS),
    "pixart": DDIMSampler(num_inference_steps=STEPS, final="end"),
}
SIGMAS = [1.0, 0.75, 0.5, 0.25]  # of SD3's pipeline, which would end elsewhere by itself; FLUX's passes just these


def teacher_of(name, **options):
    return as_teacher(build(name), size=SIZE, **options)


def ours(name, cond=None, scale=4.0):
    """(teacher, noise, what our sampler makes of it)."""
    teacher = teacher_of(name)
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(1))
    cond = teacher.encode_prompts(PROMPTS) if cond is None else cond
    return teacher, noise, sample(teacher.denoiser, SAMPLERS[name], noise, cond, scale).x0


def theirs(name, pipeline, noise, output_type="pt", scale=4.0, **more):
    """Pictures of the pipeline itself from the same noise."""
    if name == "flux":
        scale = {"guidance_scale": 3.5, "true_cfg_scale": scale, "negative_prompt": [""] * len(PROMPTS)}
        noise = diffusers.FluxPipeline._pack_latents(noise, *noise.shape)
    else:
        scale = {"guidance_scale": scale}
    if name in ("sd3", "flux"):
        more["sigmas"] = SIGMAS
    if name == "pixart":
        more |= {"use_resolution_binning": False, "clean_caption": False}
    size = {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS}
    return pipeline(PROMPTS, latents=noise, output_type=output_type, **size, **scale, **more).images


def ready(name):
    """The pipeline, with a scheduler that we have too."""
    pipeline = copy.copy(build(name))
    if name == "pixart":
        more = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False}
        pipeline.register_modules(scheduler=diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, **more))
    return pipeline


def recorded(name, pipeline, run):
    """Every call of the pipeline's network in ``run``: (inputs by name, output)."""
    network, calls = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer, []

    def look(module, args, kwargs, output):
        names = ("sample", "timestep") if hasattr(pipeline, "unet") else ("hidden_states",)
        calls.append(({**dict(zip(names, args, strict=False)), **kwargs}, output[0]))

    handle = network.register_forward_hook(look, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return calls


@pytest.mark.parametrize("name", FAMILIES)
def test_the_network_is_called_as_its_pipeline_calls_it(name):
    """What the pipeline fed its network, null and prompt, must give the same from the prompts by our way."""
    teacher, noise, _ = ours(name)
    pipeline = ready(name)
    calls = recorded(name, pipeline, lambda: theirs(name, pipeline, noise, "latent"))
    cond = teacher.encode_prompts(PROMPTS)
    both = [cond, cond.null()] if name == "flux" else [Cond.cat([cond.null(), cond])]  # FLUX's asks one by one
    assert len(calls) == STEPS * len(both)
    for i, (inputs, output) in enumerate(calls):
        x, t = inputs.get("hidden_states", inputs.get("sample")), inputs["timestep"]
        told = both[i % len(both)]
        if name == "flux":
            x, output = (unpack(tokens, 8, 8) for tokens in (x, output))
        if name == "sd3":
            t = t / 1000
        mine = teacher.denoiser.network(x, torch.as_tensor(t).expand(len(x)), told)
        torch.testing.assert_close(mine, output[:, : mine.shape[1]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_is_the_pipelines_own(name):
    teacher, noise, x0 = ours(name)
    pictures = theirs(name, ready(name), noise)
    mine = teacher.decode(x0)
    assert mine.shape == pictures.shape == (2, 3, SIZE, SIZE)
    assert (mine - pictures).abs().max() < 1e-4
    assert mine.std() > 0.02 and (mine[0] - mine[1]).abs().mean() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_and_guidance_change_the_samples(name):
    teacher, _, x0 = ours(name)
    cond = teacher.encode_prompts(PROMPTS)
    for other in (ours(name, cond[[1, 0]])[2], ours(name, scale=1.0)[2]):
        assert (other - x0).abs().mean() > 1e-4


def test_no_prompt_is_zeros_for_sdxl_unless_its_config_says_the_empty_prompt():
    pipeline = copy.copy(build("sdxl"))
    null = as_teacher(pipeline, size=SIZE).encode_prompts(["a"]).null()
    assert not null["prompt_embeds"].any() and not null["pooled_embeds"].any()
    assert null["time_ids"].tolist() == [[SIZE, SIZE, 0, 0, SIZE, SIZE]]
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    try:
        empty = as_teacher(pipeline, size=SIZE).encode_prompts(["a", ""])
    finally:
        pipeline.register_to_config(force_zeros_for_empty_prompt=True)
    for name in ("prompt_embeds", "pooled_embeds"):
        assert empty[name][1].any()
        torch.testing.assert_close(empty.null()[name][1], empty[name][1])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "sdxl"])
def test_no_prompt_is_the_empty_prompt_elsewhere(name):
    cond = teacher_of(name).encode_prompts(["a red circle", ""])
    for tensor in cond:
        torch.testing.assert_close(cond.null()[tensor][1], cond[tensor][1])
    assert not torch.equal(cond["prompt_embeds"][0], cond["prompt_embeds"][1])


def test_conditions_on_the_size_stay_when_the_prompt_is_dropped():
    for name, tensors in (("sdxl", ["time_ids"]), ("pixart", ["resolution", "aspect_ratio"])):
        cond = teacher_of(name).encode_prompts(PROMPTS)
        dropped = cond.drop(torch.tensor([True, False]))
        assert all(torch.equal(dropped[t], cond[t]) for t in tensors)
        assert not torch.equal(dropped["prompt_embeds"][0], cond["prompt_embeds"][0])
    assert teacher_of("pixart").encode_prompts(["a"])["resolution"].tolist() == [[SIZE, SIZE]]


# ------------------------------------------------------------------ FLUX


def test_packing_is_that_of_diffusers():
    x = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    tokens = diffusers.FluxPipeline._pack_latents(x, *x.shape)
    assert torch.equal(pack(x), tokens) and torch.equal(unpack(tokens, 3, 5), x)
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32)
    assert torch.equal(places(3, 5, x), ids)


def test_flux_gets_a_guidance_scale_even_when_the_caller_gives_none():
    teacher, noise, _ = ours("flux")
    cond, network = teacher.encode_prompts(PROMPTS), teacher.denoiser
    assert network.accepts == {"guidance_embed"} and teacher.guidance_embed == 3.5
    told = network(noise, 0.5, cond).output
    assert torch.equal(told, network(noise, 0.5, cond, guidance_embed=3.5).output)
    assert not torch.allclose(told, network(noise, 0.5, cond, guidance_embed=1.0).output, atol=1e-5)
    other = teacher_of("flux", guidance_embed=1.0)
    assert torch.equal(other.denoiser(noise, 0.5, cond).output, network(noise, 0.5, cond, guidance_embed=1.0).output)
    with pytest.raises(ValueError, match="UNet2DConditionModel has no guidance-scale embedding"):
        teacher_of("sd15", guidance_embed=2.0)


def test_schnell_has_no_guidance_scale_embedding():
    torch.manual_seed(0)
    teacher = as_teacher(BUILD["flux"](guidance_embeds=False), size=SIZE)
    assert teacher.guidance_embed is None and not teacher.denoiser.accepts
    x, cond = torch.randn(1, *teacher.latent_shape), teacher.encode_prompts(["a"])
    assert teacher.denoiser(x, 0.5, cond).output.isfinite().all()


@pytest.mark.parametrize("size", [64, 256])
def test_a_shift_that_depends_on_the_size_is_the_schedulers(size):
    teacher = as_teacher(build("flux"), size=size)
    scheduler, tokens = build("flux").scheduler, (size // 4 // 2) ** 2
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
    grid = teacher.denoiser.schedule.timesteps(4)
    torch.testing.assert_close(grid, scheduler.sigmas[:-1].double(), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------ features of transformers

TRANSFORMERS = ("sd3", "flux", "pixart")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_features_are_the_blocks_tokens_as_maps(name, checkpointing):
    teacher, noise, _ = ours(name)
    roles = Roles(teacher.denoiser, gradient_checkpointing=checkpointing)
    cond, network = teacher.encode_prompts(PROMPTS), teacher.denoiser.network
    blocks, outputs, entered = network._blocks(), {}, []
    handles = [b.register_forward_hook(lambda m, a, o, i=i: outputs.update({i: o})) for i, b in enumerate(blocks)]
    with torch.no_grad():
        roles.teacher(noise, 0.5 if name != "pixart" else 500, cond)
    whole = dict(outputs)
    handles += [b.register_forward_pre_hook(lambda m, a, i=i: entered.append(i)) for i, b in enumerate(blocks)]
    x = noise.clone().requires_grad_()
    taps = tuple(network.tap_channels)
    assert taps == ("block0", "block1")
    features = roles.teacher.features(x, 0.5 if name != "pixart" else 500, cond, taps)
    assert entered == [0, 1] and len(network._blocks()) == 4  # the second half is left out, and put back
    for tap, i in zip(features, (0, 1), strict=True):
        tokens = whole[i][1] if isinstance(whole[i], tuple) else whole[i]
        assert tap.shape == (2, network.tap_channels["block0"], 8, 8)
        torch.testing.assert_close(tap[1, :, 2, 5], tokens[1, 2 * 8 + 5], rtol=1e-4, atol=1e-5)
    (slope,) = torch.autograd.grad(sum(f.square().mean() for f in features), x)
    nudge = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()

    double = copy.deepcopy(network).double()
    if checkpointing:
        double.transformer.disable_gradient_checkpointing()

    def loss(x):
        t = torch.full((2,), 0.5 if name != "pixart" else 500.0, dtype=torch.float64)
        with torch.no_grad():
            return sum(f.square().mean() for f in double.features(x, t, cond, taps)).item()

    for handle in handles:
        handle.remove()
    if checkpointing:
        network.transformer.disable_gradient_checkpointing()
    ends = [loss(noise.double() + sign * 1e-4 * nudge) for sign in (1, -1)]
    assert (slope.double() * nudge).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=2e-2, abs=2e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_extra_inputs_start_at_zero_and_change_the_output(name):
    teacher, noise, _ = ours(name)
    cond, t = teacher.encode_prompts(PROMPTS), torch.full((2,), 0.5 if name in ("sd3", "flux") else 500.0)
    network = teacher.denoiser.network
    bare = network(noise, t, cond)
    extra = torch.zeros(2, network.extra_width)
    torch.testing.assert_close(network(noise, t, cond, extra=extra), bare)
    assert not torch.allclose(network(noise, t, cond, extra=extra + 1), bare, atol=1e-4)
    torch.testing.assert_close(network(noise, t, cond), bare)


# ------------------------------------------------------------------ LoRAs


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "pixart"])  # whose pipeline loads none
def test_an_exported_lora_reloads_in_the_pipeline(name, tmp_path):
    torch.manual_seed(0)
    pipeline = copy.deepcopy(build(name))
    teacher = as_teacher(pipeline, size=SIZE)
    roles = Roles(teacher.denoiser)
    roles.add("student", Weights(rank=4, alpha=2.0))
    with torch.no_grad():
        for p in roles.parameters("student"):
            p.add_(0.05 * torch.randn_like(p))
    noise = torch.randn(2, *teacher.latent_shape)
    cond = teacher.encode_prompts(PROMPTS)
    x0 = sample(roles.student, SAMPLERS[name], noise, cond, 4.0).x0
    layers = len(matching(teacher.denoiser.network, teacher.denoiser.network.lora_targets))
    file = save_student(tmp_path, roles, Card("lcm", "lcm", 4, "lora", name, rank=4))
    fresh = copy.deepcopy(build(name))
    fresh.set_progress_bar_config(disable=True)
    fresh.load_lora_weights(str(file))
    network = fresh.unet if hasattr(fresh, "unet") else fresh.transformer
    assert sum(hasattr(module, "lora_A") for module in network.modules()) == layers
    pictures = theirs(name, fresh, noise)
    bare = theirs(name, build(name), noise)
    assert (teacher.decode(x0) - pictures).abs().max() < 1e-4
    assert (pictures - bare).abs().max() > 1e-2


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("size", [0, 3, 66])
def test_a_size_that_does_not_fit_is_refused(size):
    with pytest.raises(ValueError, match=r"teacher\.size must be a multiple of 8 pixels for this model"):
        as_teacher(build("sd3"), size=size)


def test_foreign_pipelines_are_refused():
    with pytest.raises(ValueError, match="Strange is not supported as a teacher: use Stable Diffusion"):
        as_teacher(SimpleNamespace(name="Strange", transformer=torch.nn.Linear(1, 1)))
    inpainting = copy.copy(build("sd15"))
    inpainting.unet = copy.copy(inpainting.unet)
    inpainting.unet.register_to_config(in_channels=9)
    with pytest.raises(ValueError, match="takes 9 channels, but its autoencoder makes 4"):
        as_teacher(inpainting)
    refiner = copy.copy(build("sdxl"))
    refiner.unet = copy.copy(refiner.unet)
    refiner.unet.register_to_config(projection_class_embeddings_input_dim=5 * 8 + 20)
    with pytest.raises(ValueError, match="a refiner"):
        as_teacher(refiner)
    assert isinstance(teacher_of("sd15").denoiser, Denoiser)
