"""The parts of scenes-64: a latent text-to-image model small enough to ship, in Stable Diffusion's architecture.

Random weights come from here, trained ones from `fewstep.training.teacher`. Saved, the pipeline is an ordinary
StableDiffusionPipeline folder. diffusers and transformers are imported inside functions.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

IMAGE_SIZE = 64
LATENT_SHAPE = (16, 8, 8)
TOKENS = 32
"""Longest prompt, start and end included; the longest caption has 31."""

_TEXT_WIDTH = 96
_START, _END = "<|startoftext|>", "<|endoftext|>"
_LAST = "</w>"  # CLIP's mark on the last symbol of a word


def build_vae(channels: tuple[int, ...] = (16, 32, 64, 80)) -> Any:
    """AutoencoderKL of 1.3 M parameters: 8x down, 16 latent channels; few channels where pixels are many."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_SHAPE[0],
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
    )


def build_unet(channels: tuple[int, int] = (64, 104), text_width: int = _TEXT_WIDTH) -> Any:
    """UNet2DConditionModel of 2.8 M parameters and 0.13 GFLOP: plain at 8x8, transformers at 4x4."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SHAPE[1],
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=text_width,
        attention_head_dim=4,  # diffusers' name for the number of heads
    )


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
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


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
    """Write a diffusers folder in ``dtype``; the pipeline's networks are converted in place. Returns its bytes."""
    pipeline.to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder, safe_serialization=True)
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
    return [letter + mark for letter in "abcdefghijklmnopqrstuvwxyz" for mark in ("", _LAST)]


def _apply(merges: list[tuple[str, str]], parts: list[str]) -> list[str]:
    """Byte-pair encoding: the merge of lowest rank, wherever it fits, until none does."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    while True:
        pairs = [pair for pair in zip(parts, parts[1:], strict=False) if pair in ranks]
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
