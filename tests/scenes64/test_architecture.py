"""scenes-64's parts: sizes, words as tokens, and a folder that plain diffusers loads."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fewstep.models.families import load_teacher, shipped
from fewstep.scenes64 import architecture as scenes64
from fewstep.scenes64.scenes import WORDS, Scenes

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pipeline():
    return scenes64.build_pipeline(WORDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "scenes-64"
    scenes64.save_pipeline(scenes64.build_pipeline(WORDS), path)
    return path


def bytes_in(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_sizes(pipeline):
    assert parameters(pipeline.unet) == pytest.approx(2.5e6, rel=0.02)
    assert parameters(pipeline.vae) == pytest.approx(1.35e6, rel=0.02)
    assert parameters(pipeline.text_encoder) == pytest.approx(0.36e6, rel=0.02)


def test_one_call_stays_below_0_15_gflop(pipeline):
    x, embeds = torch.zeros(1, *scenes64.LATENT_SHAPE), torch.zeros(1, scenes64.TOKENS, 96)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pipeline.unet(x, torch.tensor([10]), encoder_hidden_states=embeds)
    assert counter.get_total_flops() <= 0.15e9


def test_every_word_is_one_token_and_captions_fit():
    tokenizer = scenes64.build_tokenizer(WORDS)
    ids = [tokenizer(word).input_ids for word in WORDS]
    assert all(len(i) == 3 for i in ids)
    assert len({i[1] for i in ids}) == len(WORDS)
    captions = [Scenes(0).scene(i).caption for i in range(3000)]
    assert max(len(i) for i in tokenizer(captions).input_ids) <= scenes64.TOKENS


def test_merges_leave_no_word_in_pieces_whatever_their_order():
    for words in (WORDS, WORDS[::-1], ("aab", "ab", "abab", "b", "ba")):
        merges = scenes64.word_merges(words)
        for word in words:
            assert scenes64._apply(merges, scenes64._symbols(word)) == [word + "</w>"]


def test_the_tokenizer_survives_saving(tmp_path):
    from transformers import CLIPTokenizer

    tokenizer = scenes64.build_tokenizer(WORDS)
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    texts = ["a small red striped circle, two stars and more", "Crosses", "", "a dragon"]
    assert loaded(texts).input_ids == tokenizer(texts).input_ids
    assert loaded.model_max_length == scenes64.TOKENS
    assert loaded.decode(loaded("a Red  circle").input_ids, skip_special_tokens=True) == "a red circle"


def test_an_untrained_autoencoder_passes_colours_through():
    """Pictures of one colour: latents follow the colours almost linearly."""
    torch.manual_seed(0)
    vae = scenes64.build_vae().eval()
    colours = torch.rand(32, 3, 1, 1) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(colours.expand(-1, -1, 64, 64)).latent_dist
    centre = latents.mean[:, :, 4, 4]
    design = torch.cat([colours.flatten(1), torch.ones(32, 1)], 1)
    fitted = design @ torch.linalg.lstsq(design, centre).solution
    assert (centre - fitted).var() < 0.5 * centre.var()
    assert latents.std.mean() < 0.1


def test_the_untrained_unet_nearly_returns_its_input(pipeline):
    generator = torch.Generator().manual_seed(0)
    x, embeds = (torch.randn(*s, generator=generator) for s in ((8, *scenes64.LATENT_SHAPE), (8, scenes64.TOKENS, 96)))
    with torch.no_grad():
        output = pipeline.unet(x, torch.tensor([900]), encoder_hidden_states=embeds).sample
    assert (output - x).square().mean() < 0.02


def test_the_same_seed_gives_the_same_weights():
    a, b, c = (scenes64.build_pipeline(WORDS, seed).unet.time_embedding.linear_1.weight for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_new_unet_sees_the_borders_and_passes_its_input_on(pipeline):
    """Of each four free channels one is high at the left, right, upper and lower border, whatever the input is."""
    noise, embeds = torch.randn(8, *scenes64.LATENT_SHAPE), torch.zeros(8, scenes64.TOKENS, 96)
    seen = []
    block = pipeline.unet.down_blocks[0].resnets[0]
    hook = block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        out = pipeline.unet(noise, torch.tensor([700]), encoder_hidden_states=embeds).sample
    hook.remove()
    assert (out - noise).square().mean().sqrt() < 0.05
    border = torch.tensor([1.0, 0.6, 0, 0, 0, 0, 0, 0])
    across, down = border.expand(8, 8), border[:, None].expand(8, 8)
    for channels in ((6, 7, 14, 15), (54, 55, 62, 63)):
        for channel, shape in zip(channels, (across, across.flip(1), down, down.flip(0)), strict=True):
            assert torch.allclose(seen[0][:, channel] / 4, shape.expand(8, 8, 8), atol=0.25), channel


def test_plain_diffusers_loads_the_folder_and_samples(folder):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    image = pipe("a red circle", num_inference_steps=2, guidance_scale=2.0).images[0]
    assert image.size == (64, 64)


def test_our_loader_takes_the_folder(folder):
    teacher = load_teacher(str(folder))
    assert teacher.latent_shape == scenes64.LATENT_SHAPE
    assert teacher.encode_prompts(["a star", "two shapes"])["prompt_embeds"].shape == (2, scenes64.TOKENS, 96)
    assert teacher.decode(torch.zeros(1, *scenes64.LATENT_SHAPE)).shape == (1, 3, 64, 64)


def test_files_are_half_precision_and_small(folder):
    assert bytes_in(folder) <= 10e6


@pytest.mark.skipif(shipped("scenes-64") is None, reason="the trained weights are not in this checkout")
def test_the_shipped_teacher():
    assert bytes_in(shipped("scenes-64")) <= 10e6
    teacher = load_teacher("scenes-64")
    assert 0.05 < teacher.family.latent_scale[0] < 20
    rendered = Scenes(77).render(range(16))
    images = torch.from_numpy(rendered.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    mean, _ = teacher.encode_images(images)
    assert mean.std() == pytest.approx(1.0, abs=0.15)
    error = (teacher.decode(mean) - (images / 2 + 0.5)).abs().mean()
    assert error < 0.05
