"""The parts of scenes-64: a latent text-to-image model small enough to ship, in Stable Diffusion's architecture.

Random weights come from here, trained ones from `fewstep.scenes64.train_teacher`. Saved, the pipeline is an ordinary
StableDiffusionPipeline folder. diffusers and transformers are imported inside functions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

IMAGE_SIZE = 64
LATENT_SHAPE = (16, 8, 8)
TOKENS = 32
"""Longest prompt, start and end included; the longest caption has 31."""

_TEXT_WIDTH = 96
_VAE_GROUPS = 1  # with 16 channels, a norm over pairs of them would hide an image's overall colour
_START, _END = "<|startoftext|>", "<|endoftext|>"
_LAST = "</w>"  # CLIP's ending of the last symbol of a word


def build_vae(channels: tuple[int, ...] = (16, 32, 64, 80)) -> Any:
    """AutoencoderKL of 1.3 M parameters: 8x down, 16 latent channels; few channels where pixels are many."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_SHAPE[0],
        norm_num_groups=_VAE_GROUPS,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
    )
    start_as_pyramid(vae)
    return vae


@torch.no_grad()
def start_as_pyramid(vae: Any) -> None:
    """Start an AutoencoderKL near a plain image pyramid: colours pass straight down and up, residual branches are off.

    With PyTorch's default weights every layer outside a residual branch shrinks its signal by about 1.7; the colours
    drown, and a small autoencoder spends its first thousand steps on brightness alone.
    """
    straight = ("conv_in", "downsamplers", "upsamplers", "conv_shortcut", "encoder.conv_out", "quant_conv")
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
        elif any(part in name for part in straight):
            module.weight.mul_(0.5).add_(_identity(module.weight, averaging="downsamplers" in name))
    channels = vae.config.latent_channels
    for layer in (vae.encoder.conv_out, vae.quant_conv):
        layer.weight[channels:] *= 0.1
    vae.quant_conv.bias[channels:] = -6.0  # posterior's log variance: begin with little noise


def _identity(weight: Tensor, averaging: bool) -> Tensor:
    """Kernel that copies channel i to channel i, or averages its 2x2 pixels."""
    kernel = torch.zeros_like(weight)
    if not averaging:
        return nn.init.dirac_(kernel)
    same = range(min(weight.shape[:2]))
    kernel[same, same, :2, :2] = 0.25
    return kernel


def build_unet(channels: tuple[int, int] = (64, 88), text_width: int = _TEXT_WIDTH) -> Any:
    """UNet2DConditionModel of 2.5 M parameters and 0.14 GFLOP, with transformers at 8x8 and at 4x4.

    Neighbouring latents hold parts of one edge or pattern; attention at 8x8 makes them agree. At equal time it learns
    more than a wider network with convolutions alone there.

    The first of ``channels`` must be 48 or more: 16 latents pass twice, beside eight pairs of constants.
    """
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=LATENT_SHAPE[1],
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=text_width,
        attention_head_dim=4,  # diffusers' name for the number of heads
    )
    start_as_identity(unet)
    start_with_borders(unet)
    return unet


@torch.no_grad()
def start_as_identity(unet: Any, constant: float = 3.0) -> None:
    """Start a UNet as the identity: eps(x_t) = x_t, which at high noise is nearly true.

    There the text and the whole composition hide in a correction of 1 % of the output, which a network that must
    first learn to copy its input finds late. Residual branches start at zero, as in the original latent diffusion
    code. Every latent enters as x and -x, bypasses the network by the outermost skip connection, and leaves as
    SiLU(x) - SiLU(-x) = x; a constant pair in each group makes the normalisation in between nearly constant too.
    """
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out", "conv_out")):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    latents, width = unet.config.in_channels, unet.config.block_out_channels[0]
    groups = unet.config.norm_num_groups
    size, each = width // groups, -(-latents // groups)
    # Standard deviation of a group's values, for latents of unit variance.
    scale = ((2 * each + 2 * constant**2) / size) ** 0.5
    shortcut = unet.up_blocks[-1].resnets[-1].conv_shortcut
    shortcut.weight[:, :width] *= 0.1
    shortcut.weight[:, width:] = torch.eye(width)[:, :, None, None]
    for latent in range(latents):
        first = latent // each * size + latent % each * 2
        for sign, channel in ((1.0, first), (-1.0, first + 1)):
            unet.conv_in.weight[channel] = 0.0
            unet.conv_in.weight[channel, latent, 1, 1] = sign
            unet.conv_in.bias[channel] = 0.0
            unet.conv_out.weight[latent, channel, 1, 1] = sign * scale
    for group in range(groups):
        for sign, channel in ((1.0, group * size + 2 * each), (-1.0, group * size + 2 * each + 1)):
            unet.conv_in.weight[channel] = 0.0
            unet.conv_in.bias[channel] = sign * constant


@torch.no_grad()
def start_with_borders(unet: Any, height: float = 3.0) -> None:
    """Let two channels of each group of `start_as_identity` show how near a border is: left, right, upper, lower.

    A convolution meets the border as zeros beside the constant channels, and attention sees no positions but these.
    By default that trace is so faint that the words "left" and "right" stay without meaning. Groups of six channels or
    fewer have none to spare: such a UNet stays as it is.
    """
    block = unet.down_blocks[0].resnets[0]
    groups = unet.config.norm_num_groups
    size = unet.config.block_out_channels[0] // groups
    latents = -(-unet.config.in_channels // groups)
    if size < 2 * latents + 4:
        return
    constants = torch.arange(groups) * size + 2 * latents
    noise = torch.randn(64, *LATENT_SHAPE, generator=torch.Generator().manual_seed(0)).to(unet.device)
    inner = nn.functional.silu(block.norm1(unet.conv_in(noise)))[:, constants, 2:-2, 2:-2]
    level = inner.mean(dim=(0, 2, 3))
    neighbours = ((1, 0), (1, 2), (0, 1), (2, 1))  # (row, column) in the kernel: left, right, above, below
    free = [group * size + size - 2 + i for group in range(groups) for i in (0, 1)]
    for layer in (unet.conv_in, block.conv1, block.conv2, block.time_emb_proj):
        layer.weight[free] = 0
        layer.bias[free] = 0
    for i, channel in enumerate(free):
        row, column = neighbours[i % 4]
        block.conv1.bias[channel] = height  # away from the border the neighbour's constants cancel it
        block.conv1.weight[channel, constants, row, column] = -height * level / level.square().sum()
        block.conv2.weight[channel, channel, 1, 1] = 0.8
        block.conv2.weight[channel, channel, row, column] = 0.5


def build_text_encoder(tokenizer: Any, width: int = _TEXT_WIDTH, layers: int = 3) -> Any:
    """CLIPTextModel of 0.4 M parameters over the tokenizer's vocabulary."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_tokenizer(words: Iterable[str]) -> Any:
    """CLIPTokenizer that makes one token of each of ``words``, and letters of anything else."""
    from transformers import CLIPTokenizer

    words = list(words)
    merges = word_merges(words)
    letters = sorted({symbol for word in words for symbol in _symbols(word)} | set(_alphabet()))
    tokens = dict.fromkeys([_START, _END, *letters, *(a + b for a, b in merges)])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=cast(Any, merges), model_max_length=TOKENS)


def build_scheduler() -> Any:
    """DDIM over Stable Diffusion's noise schedule, starting from pure noise's end of it (trailing spacing)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def build_pipeline(words: Iterable[str], seed: int = 0) -> Any:
    """The whole StableDiffusionPipeline over a vocabulary of ``words``; random weights, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(words)
        return assemble(build_vae(), build_unet(), build_text_encoder(tokenizer), tokenizer)


def assemble(vae: Any, unet: Any, text_encoder: Any, tokenizer: Any) -> Any:
    """A StableDiffusionPipeline of these parts and the scheduler."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(pipeline: Any, folder: Path, dtype: torch.dtype = torch.float16) -> int:
    """Write a diffusers folder with weights in ``dtype``, read as float32 by default; returns its bytes.

    The pipeline's own networks are converted too.
    """
    pipeline.to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder, safe_serialization=True)
    # By default transformers loads a model in its config's dtype, and diffusers in float32: make both float32.
    config = folder / "text_encoder" / "config.json"
    known = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**known, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    for file in folder.rglob("*.safetensors"):
        file.chmod((folder / "model_index.json").stat().st_mode)  # safetensors itself writes 0600
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# ---------------------------------------------------------------- words as byte pairs


def word_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Merges after which every word is one token.

    Word by word: what the merges so far leave of it is joined from the left by new ones. New merges rank behind
    all others, and an earlier word always has an earlier merge to make until it is whole, so none is disturbed.
    """
    merges: list[tuple[str, str]] = []
    for word in words:
        while len(parts := _apply(merges, _symbols(word))) > 1:
            merges.append((parts[0], parts[1]))
    return merges


def _symbols(word: str) -> list[str]:
    return [*word[:-1], word[-1] + _LAST]


def _alphabet() -> list[str]:
    return [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", _LAST)]


def _apply(merges: list[tuple[str, str]], parts: list[str]) -> list[str]:
    """Byte-pair encoding: the merge of lowest rank, wherever it fits, until none does."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    while True:
        pairs = [pair for pair in pairwise(parts) if pair in ranks]
        if not pairs:
            return parts
        best = min(pairs, key=ranks.__getitem__)
        joined: list[str] = []
        i = 0
        while i < len(parts):
            if tuple(parts[i : i + 2]) == best:
                joined.append(parts[i] + parts[i + 1])
                i += 2
            else:
                joined.append(parts[i])
                i += 1
        parts = joined
